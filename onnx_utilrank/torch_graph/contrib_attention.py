"""The attentions of ONNX Runtime's own domain, com.microsoft."""

import math

import torch

from onnx_utilrank.torch_graph.attention import (
    additive,
    attend,
    causal,
    join_heads,
    rotate,
    split_heads,
)
from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table

__all__ = ["CONTRIB_ATTENTION"]

Tensor = torch.Tensor


def _packed(
    context: Context,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    scores_bias: Tensor | None = None,
) -> Result:
    """The operator Attention: one weight makes queries, keys and values."""
    projected = x @ weight
    projected = projected if bias is None else projected + bias
    sizes = context.integers("qkv_hidden_sizes") or [projected.shape[-1] // 3] * 3
    heads = context.integer("num_heads")
    query, key, value = (
        split_heads(t, heads) for t in torch.split_with_sizes(projected, sizes, -1)
    )
    if context.flag("do_rotary"):
        raise ValueError("rotary embedding within Attention is not supported")
    if past is not None:
        key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    made = _masked(context, query, key, value, mask, scores_bias)
    return join_heads(made), torch.stack([key, value])


def _multi_head(
    context: Context,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scores_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
) -> Result:
    """The operator MultiHeadAttention: queries, keys and values are given, or packed."""
    heads = context.integer("num_heads")
    if key is None:  # [batch, length, heads, 3, size]
        query, key, value = (t.flatten(2) for t in query.unbind(3))
    elif key.dim() == 5:  # [batch, length, heads, 2, size]
        key, value = (t.flatten(2) for t in key.unbind(3))
    assert value is not None
    ready = key.dim() == 4  # keys and values of a cross attention, made before
    if bias is not None:
        width = query.shape[-1]
        query = query + bias[:width]
        if not ready:
            key, value = key + bias[width : 2 * width], value + bias[2 * width :]
    q, k, v = (t if t.dim() == 4 else split_heads(t, heads) for t in (query, key, value))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    return join_heads(_masked(context, q, k, v, mask, scores_bias)), k, v


def _masked(
    context: Context,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scores_bias: Tensor | None,
) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    biases = [] if scores_bias is None else [scores_bias]
    if mask is not None:
        # What is masked gets a large negative number, not -inf: a row of padding stays finite.
        below = context.number("mask_filter_value", -10000.0)
        biases.append(additive(_key_mask(mask, len(query), queries, keys), query, below))
    if context.flag("unidirectional"):
        seen = causal(queries, keys, keys - queries, query.device) >= 0
        biases.append(additive(seen, query, torch.finfo(query.dtype).min))
    bias = sum(biases[1:], biases[0]) if biases else None
    scale = context.number("scale", 0.0) or 1 / math.sqrt(query.shape[-1])
    return attend(query, key, value, bias, scale).values


def _key_mask(mask: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """The forms that masks may have, as booleans that broadcast to the scores."""
    places = torch.arange(keys, device=mask.device)
    if mask.dim() == 1:
        ends = mask[:batch].reshape(-1, 1, 1, 1)
        if mask.numel() == 2 * batch:
            return (places < ends) & (places >= mask[batch:].reshape(-1, 1, 1, 1))
        if mask.numel() == batch:
            return places < ends
        raise ValueError("a mask of cumulated lengths is not supported")
    if mask.dim() == 4:  # [batch, 1, longest, longest]
        return mask[:, :, keys - queries : keys, :keys] != 0
    return (mask.unsqueeze(1) if mask.dim() == 3 else mask[:, None, None, :]) != 0


def _grouped(
    context: Context,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    last: Tensor | None = None,
    total: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    scores_bias: Tensor | None = None,
) -> Result:
    """The operator GroupQueryAttention."""
    heads, groups = context.integer("num_heads"), context.integer("kv_num_heads")
    if context.flag("smooth_softmax"):
        raise ValueError("smooth softmax is not supported")
    if key is None or value is None:
        size = query.shape[-1] // (heads + 2 * groups)
        widths = [heads * size, groups * size, groups * size]
        query, key, value = torch.split_with_sizes(query, widths, -1)
    q, k, v = split_heads(query, heads), split_heads(key, groups), split_heads(value, groups)
    assert last is not None
    assert total is not None
    batch, queries = len(q), q.shape[2]
    # Keys of each sample before its first query; a prompt may be padded at its end.
    before = (last.reshape(-1).to(torch.int64) + 1 - queries).clamp(min=0)
    steps = before.reshape(-1, 1) + torch.arange(queries, device=q.device)
    if context.flag("do_rotary") and cos is not None and sin is not None:
        at = steps if positions is None else positions
        turns = cos[at].unsqueeze(1), sin[at].unsqueeze(1)
        interleaved = context.flag("rotary_interleaved")
        q, k = (rotate(t, *turns, interleaved=interleaved) for t in (q, k))
    room = max(int(total), 0 if past_key is None else past_key.shape[2])
    place = steps.reshape(batch, 1, queries, 1)
    k, v = _appended(past_key, k, place, room), _appended(past_value, v, place, room)
    behind = causal(queries, room, before, q.device)
    seen = behind >= 0
    window = context.integer("local_window_size", -1)
    seen = seen & (behind < window) if window > 0 else seen
    bias = additive(seen, q)
    bias = bias if scores_bias is None else bias + scores_bias
    scale = context.number("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    made = attend(q, k, v, bias, scale, context.number("softcap", 0.0)).values
    return join_heads(made), k, v


def _appended(past: Tensor | None, new: Tensor, place: Tensor, room: int) -> Tensor:
    """A cache of `room` steps that holds new steps behind those of each sample's past."""
    shape = (*new.shape[:2], room, new.shape[3])
    held = new.new_zeros(shape)
    if past is not None:
        held = torch.cat([past, held[:, :, past.shape[2] :]], 2)
    return held.scatter(2, place.expand(new.shape), new)


def _rotary(context: Context, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Result:
    """The operator RotaryEmbedding, whose positions come before its tables."""
    size = 2 * cos.shape[-1]
    heads = context.integer("num_heads") or x.shape[-1] // size
    parts = split_heads(x, heads) if x.dim() == 3 else x
    if positions.numel() == 1:
        positions = positions.reshape(1, 1) + torch.arange(parts.shape[2], device=x.device)
    cos, sin = (context.number("scale", 1.0) * t[positions].unsqueeze(1) for t in (cos, sin))
    made = rotate(parts, cos, sin, interleaved=context.flag("interleaved"))
    return join_heads(made) if x.dim() == 3 else made


CONTRIB_ATTENTION: Table = {
    "Attention": Operator(_packed),
    "GroupQueryAttention": Operator(_grouped, frozenset({6})),
    "MultiHeadAttention": Operator(_multi_head),
    "RotaryEmbedding": Operator(_rotary),
}
