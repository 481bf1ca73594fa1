"""Operators that sum up an axis, or run along it: Reduce*, ArgMax, Softmax, CumSum."""

import math
from collections.abc import Callable

import torch

from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table, ints

__all__ = ["REDUCTIONS"]

Tensor = torch.Tensor
Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduce(reduction: Reduction) -> Operator:
    """An operator over the axes of the second input, or of the attribute of older versions."""

    def function(context: Context, x: Tensor, given: Tensor | None = None) -> Result:
        axes = (context.integers("axes") if given is None else ints(given)) or []
        if not axes:
            if context.flag("noop_with_empty_axes"):
                # Nothing is reduced, but what is done to each element is done.
                return reduction(x.unsqueeze(0), (0,), False)
            axes = list(range(x.dim()))
        if x.dim() == 0:
            return reduction(x.unsqueeze(0), (0,), False)
        along = tuple(sorted({a % x.dim() for a in axes}))
        return reduction(x, along, context.flag("keepdims", True))

    return Operator(function, frozenset({1}))


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    count = math.prod(x.shape[a] for a in axes)
    return torch.div(_sum(x, axes, keep), count, rounding_mode="trunc")


def _extreme(reduction: Callable[..., Tensor], lowest: bool) -> Reduction:
    def function(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if x.dtype == torch.bool:
            return function(x.to(torch.uint8), axes, keep).to(torch.bool)
        if any(x.shape[a] == 0 for a in axes):
            return _empty_extreme(x, axes, keep, lowest)
        return reduction(x, axes, keep)

    return function


def _empty_extreme(x: Tensor, axes: tuple[int, ...], keep: bool, lowest: bool) -> Tensor:
    if x.is_floating_point():
        value: float = -math.inf if lowest else math.inf
    else:
        value = torch.iinfo(x.dtype).min if lowest else torch.iinfo(x.dtype).max
    sizes = [1 if a in axes else n for a, n in enumerate(x.shape) if keep or a not in axes]
    return x.new_full(sizes, value)


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in reversed(axes):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _l2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        length: Tensor = torch.linalg.vector_norm(x, 2, axes, keepdim=keep)
        return length
    return _sum(x * x, axes, keep).to(torch.float64).sqrt().to(x.dtype)


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    kind = x.dtype if x.is_floating_point() else torch.float64
    return torch.logsumexp(x.to(kind), axes, keepdim=keep).to(x.dtype)


def _log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x, axes, keep).log().to(x.dtype)


def _arg(pick: Callable[..., Tensor]) -> Operator:
    def function(context: Context, x: Tensor) -> Result:
        axis, keep = context.integer("axis"), context.flag("keepdims", True)
        if not context.flag("select_last_index"):
            return pick(x, axis, keepdim=keep)
        return x.shape[axis] - 1 - pick(x.flip(axis), axis, keepdim=keep)

    return Operator(function)


def _along_axis(compute: Callable[[Tensor, int], Tensor]) -> Operator:
    """Softmax and its kin: before opset 13 over all axes from `axis` on, as if they were one."""

    def function(context: Context, x: Tensor) -> Result:
        if context.opset >= 13:
            return compute(x, context.integer("axis", -1))
        axis = context.integer("axis", 1)
        axis = axis + x.dim() if axis < 0 else axis
        rows = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
        return compute(rows, -1).reshape(x.shape)

    return Operator(function)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    at = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, at, 1.0)


def _cumulative(run: Callable[[Tensor, int], Tensor], first: float) -> Operator:
    def function(context: Context, x: Tensor, axis: Tensor) -> Result:
        (along,) = ints(axis)
        if context.flag("reverse"):
            x = x.flip(along)
        if context.flag("exclusive"):
            start = torch.full_like(x.narrow(along, 0, 1), first)
            x = torch.cat([start, x.narrow(along, 0, x.shape[along] - 1)], along)
        made = run(x, along).to(x.dtype)
        return made.flip(along) if context.flag("reverse") else made

    return Operator(function, frozenset({1}))


REDUCTIONS: Table = {
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "CumProd": _cumulative(torch.cumprod, 1.0),
    "CumSum": _cumulative(torch.cumsum, 0.0),
    "Hardmax": _along_axis(_hardmax),
    "LogSoftmax": _along_axis(torch.log_softmax),
    "ReduceL1": _reduce(lambda x, axes, keep: _sum(x.abs(), axes, keep)),
    "ReduceL2": _reduce(_l2),
    "ReduceLogSum": _reduce(_log_sum),
    "ReduceLogSumExp": _reduce(_log_sum_exp),
    "ReduceMax": _reduce(_extreme(torch.amax, lowest=True)),
    "ReduceMean": _reduce(_mean),
    "ReduceMin": _reduce(_extreme(torch.amin, lowest=False)),
    "ReduceProd": _reduce(_prod),
    "ReduceSum": _reduce(_sum),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: _sum(x * x, axes, keep)),
    "Softmax": _along_axis(torch.softmax),
}
