"""Operators that rearrange, cut, join and pad; they compute nothing."""

import math

import torch
import torch.nn.functional as F

from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table, ints, plain

__all__ = ["SHAPES", "pad_constant"]

Tensor = torch.Tensor


def _axes(context: Context, given: Tensor | None) -> list[int] | None:
    """Axes of an input where the node has one, of the attribute of older versions otherwise."""
    return context.integers("axes") if given is None else ints(given)


def _shape(context: Context, x: Tensor) -> Result:
    rank = x.dim()
    start, end = context.integer("start"), context.integer("end", rank)
    start, end = (min(max(k + rank if k < 0 else k, 0), rank) for k in (start, end))
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def _size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


def _reshape(context: Context, x: Tensor, shape: Tensor) -> Result:
    sizes = ints(shape)
    if not context.flag("allowzero"):
        sizes = [x.shape[k] if n == 0 else n for k, n in enumerate(sizes)]
    elif -1 in sizes and x.numel() == 0 and 0 in sizes:
        raise ValueError(f"the target shape {sizes} holds both 0 and -1")
    return x.reshape(sizes)


def _flatten(context: Context, x: Tensor) -> Result:
    axis = context.integer("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(context: Context, x: Tensor) -> Result:
    return x.permute(context.integers("perm") or list(reversed(range(x.dim()))))


def _squeeze(context: Context, x: Tensor, given: Tensor | None = None) -> Result:
    axes = _axes(context, given)
    if axes is None:
        return x.squeeze()
    for axis in axes:
        if x.shape[axis] != 1:
            raise ValueError(f"axis {axis} of {list(x.shape)} is not 1")
    return x.squeeze(tuple(axes))


def _unsqueeze(context: Context, x: Tensor, given: Tensor | None = None) -> Result:
    axes = _axes(context, given) or []
    rank = x.dim() + len(axes)
    for axis in sorted(a + rank if a < 0 else a for a in axes):
        x = x.unsqueeze(axis)
    return x


def _broadcast(a: list[int], b: list[int]) -> list[int]:
    """The shape that both shapes broadcast to."""
    rank = max(len(a), len(b))
    pairs = zip([1] * (rank - len(a)) + a, [1] * (rank - len(b)) + b, strict=True)
    return [n if m == 1 else m for n, m in pairs]


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(_broadcast(list(x.shape), ints(shape)))


def _tile(x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(ints(repeats))


def _concat(context: Context, *tensors: Tensor) -> Result:
    return torch.cat(tensors, context.integer("axis", 1))


def _split(context: Context, x: Tensor, given: Tensor | None = None) -> Result:
    axis = context.integer("axis")
    sizes = context.integers("split") if given is None else ints(given)
    if sizes is None:
        parts = context.integer("num_outputs", len(context.outputs))
        # Equal parts; since opset 18 the last one may be smaller.
        size = -(-x.shape[axis] // parts)
        sizes = [size] * (parts - 1) + [x.shape[axis] - size * (parts - 1)]
    return torch.split_with_sizes(x, sizes, axis)


def _slice(
    context: Context,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Result:
    first = context.integers("starts") or [] if starts is None else ints(starts)
    last = context.integers("ends") or [] if ends is None else ints(ends)
    along = _axes(context, axes) or list(range(len(first)))
    by = [1] * len(first) if steps is None else ints(steps)
    for axis, start, end, step in zip(along, first, last, by, strict=True):
        # Python's own slices clamp as ONNX does, but for an end that says "before the first".
        if step < 0 and end < -x.shape[axis]:
            taken = range(x.shape[axis])[slice(start, None, step)]
        else:
            taken = range(x.shape[axis])[slice(start, end, step)]
        if step < 0:
            x = x.index_select(axis, torch.tensor(list(taken), dtype=torch.int64, device=x.device))
        else:
            index: list[slice] = [slice(None)] * x.dim()
            index[axis] = slice(taken.start, taken.stop, step)
            x = x[tuple(index)]
    return x


def pad_constant(x: Tensor, pads: list[int], value: float = 0.0) -> Tensor:
    """Pad (or, where negative, cut) the last axes.

    Args:
        x: The tensor.
        pads: As ONNX orders them: before each axis, then after each, of the last axes.
        value: What is put there.
    """
    if not any(pads):
        return x
    half = len(pads) // 2
    # Torch lists pairs from the last axis on.
    pairs = [n for k in reversed(range(half)) for n in (pads[k], pads[half + k])]
    return F.pad(x, pairs, value=value)


def _pad(
    context: Context,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Result:
    stated = (context.integers("pads") or []) if pads is None else ints(pads)
    filler = context.number("value", 0.0) if value is None else value.item()
    along = list(range(x.dim())) if axes is None else ints(axes)
    half = len(along)
    all_pads = [0] * (2 * x.dim())
    for k, axis in enumerate(along):
        all_pads[axis % x.dim()] = stated[k]
        all_pads[x.dim() + axis % x.dim()] = stated[half + k]
    mode = context.text("mode", "constant")
    if mode == "constant":
        if x.dtype == torch.bool:
            return pad_constant(x.to(torch.uint8), all_pads, filler).to(torch.bool)
        return pad_constant(x, all_pads, filler)
    # A negative pad cuts first; the rest is taken from inside by index.
    x = pad_constant(x, [min(n, 0) for n in all_pads])
    for axis in range(x.dim()):
        before, after = max(all_pads[axis], 0), max(all_pads[x.dim() + axis], 0)
        if before or after:
            index = _padded_index(x.shape[axis], before, after, mode)
            x = x.index_select(axis, index.to(x.device))
    return x


def _padded_index(size: int, before: int, after: int, mode: str) -> Tensor:
    """Where each element of a padded axis comes from."""
    index = torch.arange(-before, size + after)
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        return index % size
    if mode != "reflect":
        raise ValueError(f"unknown padding mode {mode!r}")
    period = max(2 * (size - 1), 1)
    index = index % period
    return torch.where(index < size, index, period - index)


def _depth_to_space(context: Context, x: Tensor) -> Result:
    block = context.integer("blocksize")
    n, c, h, w = x.shape
    if context.text("mode", "DCR") == "DCR":
        x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // block**2, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(context: Context, x: Tensor) -> Result:
    block = context.integer("blocksize")
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // block, block, w // block, block)
    x = (
        x.permute(0, 3, 5, 1, 2, 4)
        if context.text("mode", "DCR") == "DCR"
        else x.permute(0, 1, 3, 5, 2, 4)
    )
    return x.reshape(n, c * block**2, h // block, w // block)


def _center_crop_pad(context: Context, x: Tensor, shape: Tensor) -> Result:
    axes = context.integers("axes") or list(range(x.dim()))
    pads = [0] * (2 * x.dim())
    for axis, size in zip(axes, ints(shape), strict=True):
        missing = size - x.shape[axis]
        # The odd element is cut from the end, or padded there.
        before = missing // 2 if missing >= 0 else -(-missing // 2)
        pads[axis % x.dim()], pads[x.dim() + axis % x.dim()] = before, missing - before
    return pad_constant(x, pads)


def _col_to_im(context: Context, x: Tensor, image: Tensor, block: Tensor) -> Result:
    sizes, kernel = ints(image), ints(block)
    rank = len(sizes)
    dilations = context.integers("dilations") or [1] * rank
    pads = context.integers("pads") or [0] * (2 * rank)
    strides = context.integers("strides") or [1] * rank
    padded = [n + pads[k] + pads[k + rank] for k, n in enumerate(sizes)]
    # One cell of the padded image for each tap and position; `index_add` sums what overlaps.
    cells = torch.zeros(1, 1, dtype=torch.int64)
    for n, k, step, stride in zip(padded, kernel, dilations, strides, strict=True):
        first = torch.arange(0, n - step * (k - 1), stride)
        along = torch.arange(k)[:, None] * step + first
        cells = cells[:, None, :, None] * n + along[None, :, None, :]
        cells = cells.reshape(cells.shape[0] * k, -1)
    batch = x.shape[0]
    channels = x.shape[1] // math.prod(kernel)
    flat = x.reshape(batch, channels, -1)
    out = flat.new_zeros(batch, channels, math.prod(padded))
    out = out.index_add(2, cells.reshape(-1).to(x.device), flat).reshape(batch, channels, *padded)
    return pad_constant(out, [-n for n in pads])


SHAPES: Table = {
    "CenterCropPad": Operator(_center_crop_pad, frozenset({1})),
    "Col2Im": Operator(_col_to_im, frozenset({1, 2})),
    "Concat": Operator(_concat),
    "DepthToSpace": Operator(_depth_to_space),
    "Expand": plain(_expand, 1),
    "Flatten": Operator(_flatten),
    "Pad": Operator(_pad, frozenset({1, 2, 3})),
    "Reshape": Operator(_reshape, frozenset({1})),
    "Shape": Operator(_shape),
    "Size": plain(_size),
    "Slice": Operator(_slice, frozenset({1, 2, 3, 4})),
    "SpaceToDepth": Operator(_space_to_depth),
    "Split": Operator(_split, frozenset({1})),
    "Squeeze": Operator(_squeeze, frozenset({1})),
    "Tile": plain(_tile, 1),
    "Transpose": Operator(_transpose),
    "Unsqueeze": Operator(_unsqueeze, frozenset({1})),
}
