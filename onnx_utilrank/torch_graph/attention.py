"""Attention and rotary embeddings as ONNX has them since opset 23."""

import math
from dataclasses import dataclass

import torch

from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table

__all__ = [
    "ATTENTION",
    "Attended",
    "additive",
    "attend",
    "causal",
    "join_heads",
    "rotate",
    "split_heads",
]

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Attended:
    """An attention and its steps, all but the first [batch, heads, queries, keys].

    Attributes:
        values: The weighted values [batch, heads, queries, head size].
        scores: Scaled products of queries and keys.
        capped: After the soft cap.
        biased: After the bias.
        weights: After softmax.
    """

    values: Tensor
    scores: Tensor
    capped: Tensor
    biased: Tensor
    weights: Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads x size] to [batch, heads, length, size]."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[batch, heads, length, size] to [batch, length, heads x size]."""
    return x.transpose(1, 2).flatten(2)


def additive(mask: Tensor, like: Tensor, below: float = -math.inf) -> Tensor:
    """A mask (true: attend) as a bias of the type of `like`."""
    zero = torch.zeros((), dtype=like.dtype, device=mask.device)
    return torch.where(mask, zero, torch.full_like(zero, below))


def causal(queries: int, keys: int, offset: int | Tensor, device: torch.device) -> Tensor:
    """Distance of each query behind each key, [..., queries, keys]: where it is >= 0 it sees it.

    Args:
        queries: How many queries.
        keys: How many keys.
        offset: Keys before the first query; a tensor [batch] gives [batch, 1, queries, keys].
        device: Where the result is wanted.
    """
    rows = torch.arange(queries, device=device).reshape(-1, 1)
    if isinstance(offset, Tensor):
        rows = rows + offset.to(device).reshape(-1, 1, 1, 1)
    else:
        rows = rows + offset
    return rows - torch.arange(keys, device=device)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    cap: float = 0.0,
    precision: torch.dtype | None = None,
) -> Attended:
    """softmax(scale Q Kᵀ + bias) V with [batch, heads, length, size] each.

    Keys and values may have fewer heads, each of which serves as many queries' heads in a row. A
    query that may attend to nothing (bias -inf throughout) gives zeros.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    # Half of the scale each, so that products of 16-bit floats stay in range.
    half = math.sqrt(scale) if scale > 0 else 1.0
    scores = (query * half) @ (key * half).mT
    scores = scores if scale > 0 else scores * scale
    capped = cap * torch.tanh(scores / cap) if cap > 0 else scores
    biased = capped if bias is None else capped + bias
    logits = biased if precision is None else biased.to(precision)
    blind = None if bias is None else torch.isneginf(bias).all(-1, keepdim=True)
    if blind is not None:
        # Before softmax, as a NaN would come back in the gradient.
        logits = torch.where(blind, torch.zeros_like(logits), logits)
    weights = torch.softmax(logits, -1)
    if blind is not None:
        weights = torch.where(blind, torch.zeros_like(weights), weights)
    weights = weights.to(query.dtype)
    return Attended(weights @ value, scores, capped, biased, weights)


def _attention(
    context: Context,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Result:
    flat = query.dim() == 3
    if flat:
        query = split_heads(query, context.integer("q_num_heads"))
        key, value = (split_heads(t, context.integer("kv_num_heads")) for t in (key, value))
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    scale = context.number("scale", 0.0) or 1 / math.sqrt(query.shape[-1])
    made = attend(
        query,
        key,
        value,
        _bias(context, query, key.shape[2], mask, past, lengths),
        scale,
        context.number("softcap", 0.0),
        context.torch_type(context.integer("softmax_precision"))
        if context.integer("softmax_precision")
        else None,
    )
    steps = (made.scores, made.capped, made.biased, made.weights)
    seen = steps[context.integer("qk_matmul_output_mode")]
    return join_heads(made.values) if flat else made.values, key, value, seen


def _bias(
    context: Context,
    query: Tensor,
    keys: int,
    mask: Tensor | None,
    past: int,
    lengths: Tensor | None,
) -> Tensor | None:
    """All masks of the operator as one bias that broadcasts to the scores; None without any."""
    device, parts = query.device, []
    if mask is not None:
        short = keys - mask.shape[-1]
        if short > 0:
            # What the mask does not reach is not attended to.
            rest = (*mask.shape[:-1], short)
            blank = mask.new_full(rest, 0 if mask.dtype == torch.bool else -math.inf)
            mask = torch.cat([mask, blank], -1)
        parts.append(additive(mask, query) if mask.dtype == torch.bool else mask)
    queries = query.shape[2]
    # Without a cache of its own, the valid keys end where the last query stands.
    offset = past if lengths is None or past else lengths.reshape(-1) - queries
    behind = causal(queries, keys, offset, device)
    if context.flag("is_causal"):
        parts.append(additive(behind >= 0, query))
    left, right = context.integer("left_window_size", -1), context.integer("right_window_size", -1)
    if left >= 0:
        parts.append(additive(behind <= left, query))
    if right >= 0:
        parts.append(additive(-behind <= right, query))
    if lengths is not None:
        valid = torch.arange(keys, device=device) < lengths.reshape(-1, 1, 1, 1)
        parts.append(additive(valid, query))
    if not parts:
        return None
    bias = parts[0]
    for part in parts[1:]:
        bias = bias + part
    return bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate pairs of features by angles.

    Args:
        x: [..., length, size]; features beyond twice the number of angles stay as they are.
        cos: Cosines [..., length, angles].
        sin: Sines of the same shape.
        interleaved: Whether pairs are neighbours, not halves.
    """
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        made = torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        made = torch.cat([cos * a - sin * b, sin * a + cos * b], -1)
    return torch.cat([made, rest], -1)


def _rotary(
    context: Context, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> Result:
    heads = split_heads(x, context.integer("num_heads")) if x.dim() == 3 else x
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    interleaved = context.flag("interleaved")
    made = rotate(heads, cos.unsqueeze(1), sin.unsqueeze(1), interleaved=interleaved)
    return join_heads(made) if x.dim() == 3 else made


ATTENTION: Table = {
    "Attention": Operator(_attention),
    "RotaryEmbedding": Operator(_rotary),
}
