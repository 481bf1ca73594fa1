"""Operators that look up, write to or sort by index."""

import torch

from onnx_utilrank.torch_graph.operator import (
    Context,
    Operator,
    Result,
    Table,
    ints,
    plain,
    same_device,
)

__all__ = ["INDEXING"]

Tensor = torch.Tensor

_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Indices counted from the end, made to count from the start."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def _gather(context: Context, data: Tensor, indices: Tensor) -> Result:
    axis = context.integer("axis") % max(data.dim(), 1)
    if indices.dim() == 0 and indices.device.type == "cpu":
        return data.select(axis, int(indices))
    data, indices = (t for t in same_device(data, indices) if t is not None)
    flat = _wrapped(indices, data.shape[axis]).reshape(-1)
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    return data.index_select(axis, flat).reshape(shape)


def _gather_elements(context: Context, data: Tensor, indices: Tensor) -> Result:
    axis = context.integer("axis")
    return data.gather(axis, _wrapped(indices, data.shape[axis]))


def _last_axis(data: Tensor, indices: Tensor, first: int) -> tuple[Tensor, ...]:
    """Index tuples [..., r] as r tensors, for the axes of `data` from `first` on."""
    return tuple(_wrapped(part, data.shape[first + k]) for k, part in enumerate(indices.unbind(-1)))


def _gather_nd(context: Context, data: Tensor, indices: Tensor) -> Result:
    batch = context.integer("batch_dims")
    index = _last_axis(data, indices, batch)
    grid = tuple(
        torch.arange(n, device=data.device).reshape(
            [n if a == k else 1 for a in range(indices.dim() - 1)]
        )
        for k, n in enumerate(indices.shape[:batch])
    )
    return data[(*grid, *index)]


def _scatter_elements(context: Context, data: Tensor, indices: Tensor, updates: Tensor) -> Result:
    axis = context.integer("axis")
    at = _wrapped(indices, data.shape[axis])
    reduction = context.text("reduction", "none")
    if reduction == "none":
        return data.scatter(axis, at, updates)
    return data.scatter_reduce(axis, at, updates, _REDUCE[reduction])


def _scatter_nd(context: Context, data: Tensor, indices: Tensor, updates: Tensor) -> Result:
    index = _last_axis(data, indices, 0)
    reduction = context.text("reduction", "none")
    if reduction == "none":
        return data.index_put(index, updates)
    if reduction == "add":
        return data.index_put(index, updates, accumulate=True)
    # By way of flat positions: torch reduces otherwise along one axis only.
    depth = len(index)
    rows = data.new_zeros(data.shape[:depth], dtype=torch.int64).flatten()
    rows = torch.arange(rows.numel(), device=data.device).reshape(data.shape[:depth])[index]
    inner = data.shape[depth:].numel()
    flat = data.reshape(-1, inner)
    at = rows.reshape(-1, 1).expand(-1, inner)
    made = flat.scatter_reduce(0, at, updates.reshape(-1, inner), _REDUCE[reduction])
    return made.reshape(data.shape)


def _tensor_scatter(
    context: Context, past: Tensor, update: Tensor, starts: Tensor | None = None
) -> Result:
    axis = context.integer("axis", -2) % past.dim()
    size, length, batch = past.shape[axis], update.shape[axis], past.shape[0]
    first = update.new_zeros(batch, dtype=torch.int64) if starts is None else starts
    at = first.reshape(-1, 1) + torch.arange(length, device=past.device)
    if context.text("mode", "linear") == "circular":
        at = at % size
    shape = [1] * past.dim()
    shape[0], shape[axis] = batch, length
    return past.scatter(axis, at.reshape(shape).expand(update.shape), update)


def _one_hot(context: Context, indices: Tensor, depth: Tensor, values: Tensor) -> Result:
    (size,) = ints(depth)
    axis = context.integer("axis", -1)
    at = indices.to(torch.int64)
    at = torch.where(at < 0, at + size, at).unsqueeze(-1)
    hot = (at == torch.arange(size, device=at.device)).movedim(-1, axis)
    off, on = values.unbind(0)
    return torch.where(hot, on, off)


def _top_k(context: Context, x: Tensor, k: Tensor | None = None) -> Result:
    (count,) = [context.integer("k")] if k is None else ints(k)
    axis, largest = context.integer("axis", -1), context.flag("largest", True)
    # A stable sort, because of equal elements the ones with lower indices come first.
    values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def _non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x.reshape(1) if x.dim() == 0 else x).T


def _compress(context: Context, x: Tensor, condition: Tensor) -> Result:
    if not context.has("axis"):
        x = x.reshape(-1)
    axis = context.integer("axis")
    kept = torch.nonzero(condition).reshape(-1)
    return x.index_select(axis, kept)


def _reverse_sequence(context: Context, x: Tensor, lengths: Tensor) -> Result:
    time, batch = context.integer("time_axis"), context.integer("batch_axis", 1)
    x = x.movedim((batch, time), (0, 1))
    steps = torch.arange(x.shape[1], device=x.device)
    ends = lengths.reshape(-1, 1)
    at = torch.where(steps < ends, ends - 1 - steps, steps)
    rows = torch.arange(x.shape[0], device=x.device).reshape(-1, 1)
    return x[rows, at].movedim((0, 1), (batch, time))


def _unique(context: Context, x: Tensor) -> Result:
    axis = context.integer("axis") if context.has("axis") else None
    values = x.reshape(-1) if axis is None else x.movedim(axis, 0)
    unique, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True, dim=0)
    places = torch.arange(len(values), device=x.device)
    first = torch.full_like(counts, len(values)).scatter_reduce(0, inverse, places, "amin")
    if not context.flag("sorted", True):
        order = torch.argsort(first)
        unique, first, counts = unique[order], first[order], counts[order]
        inverse = torch.argsort(order)[inverse]
    return unique if axis is None else unique.movedim(0, axis), first, inverse, counts


INDEXING: Table = {
    "Compress": Operator(_compress),
    "Gather": Operator(_gather, frozenset({1})),
    "GatherElements": Operator(_gather_elements),
    "GatherND": Operator(_gather_nd),
    "NonZero": plain(_non_zero),
    "OneHot": Operator(_one_hot, frozenset({1})),
    "ReverseSequence": Operator(_reverse_sequence),
    "Scatter": Operator(_scatter_elements),
    "ScatterElements": Operator(_scatter_elements),
    "ScatterND": Operator(_scatter_nd),
    "TensorScatter": Operator(_tensor_scatter),
    "TopK": Operator(_top_k, frozenset({1})),
    "Unique": Operator(_unique),
}
