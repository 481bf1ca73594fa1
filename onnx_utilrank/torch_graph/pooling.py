"""Pooling: windows that give their largest or mean element."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from onnx_utilrank.torch_graph.convolution import Window
from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table, ints, plain
from onnx_utilrank.torch_graph.shapes import pad_constant

__all__ = ["POOLING"]

Tensor = torch.Tensor

_MAX: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {
    1: F.max_pool1d_with_indices,
    2: F.max_pool2d_with_indices,
    3: F.max_pool3d_with_indices,
}
_AVERAGE: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _window(context: Context, x: Tensor) -> tuple[Window, list[int]]:
    """The window of a pooling node, and padding that makes it fit without rest.

    The padding goes beyond the window's own where the output size is rounded up.
    """
    sizes = list(x.shape[2:])
    kernel = context.integers("kernel_shape") or []
    rank = len(kernel)
    window = Window.of(context, kernel, sizes)
    pads = list(window.pads)
    for k, n in enumerate(sizes):
        stride, span = window.strides[k], (kernel[k] - 1) * window.dilations[k] + 1
        room = n + pads[k] + pads[rank + k] - span
        steps = room // stride
        if context.flag("ceil_mode") and room % stride:
            # A last window that would start in the padding at the end is left out.
            steps += (steps + 1) * stride < n + pads[k]
        pads[rank + k] += steps * stride - room
    return window, pads


def _max_pool(context: Context, x: Tensor) -> Result:
    window, pads = _window(context, x)
    rank, sizes = len(window.kernel), list(x.shape[2:])
    data = x if x.is_floating_point() else x.to(torch.float64)
    padded = pad_constant(data, pads, -math.inf)
    pooled, places = _MAX[rank](
        padded, window.kernel, window.strides, 0, window.dilations, ceil_mode=False
    )
    pooled = pooled.to(x.dtype)
    if not context.wants(1):
        return pooled
    # From places in a padded plane to places in the whole tensor.
    at = torch.unravel_index(places, tuple(padded.shape[2:]))
    axes = list(range(rank))
    plane = torch.zeros_like(places)
    for k in reversed(axes) if context.flag("storage_order") else axes:
        plane = plane * sizes[k] + (at[k] - pads[k])
    planes = torch.arange(math.prod(x.shape[:2]), device=x.device)
    return pooled, plane + planes.reshape(*x.shape[:2], *[1] * rank) * math.prod(sizes)


def _sums(x: Tensor, window: Window) -> Tensor:
    """Sums over the windows of a padded tensor [N, C, ...]."""
    rank = len(window.kernel)
    if window.dilations == [1] * rank:
        return _AVERAGE[rank](x, window.kernel, window.strides) * math.prod(window.kernel)
    ones = x.new_ones(1, 1, *window.kernel)
    planes = x.reshape(-1, 1, *x.shape[2:])
    y = _CONV[rank](planes, ones, None, window.strides, 0, window.dilations)
    return y.reshape(*x.shape[:2], *y.shape[2:])


def _average_pool(context: Context, x: Tensor) -> Result:
    window, pads = _window(context, x)
    rank = len(window.kernel)
    if not any(pads):
        return _sums(x, window) / math.prod(window.kernel)
    counted = x.new_ones(1, 1, *x.shape[2:])
    own = [0] * (2 * rank)
    if context.flag("count_include_pad"):
        # Padding that was asked for counts; what rounding up adds never does.
        own = [min(a, b) for a, b in zip(window.pads, pads, strict=True)]
        counted = pad_constant(counted, own, 1.0)
    rest = [a - b for a, b in zip(pads, own, strict=True)]
    return _sums(pad_constant(x, pads), window) / _sums(pad_constant(counted, rest), window)


def _lp_pool(context: Context, x: Tensor) -> Result:
    window, pads = _window(context, x)
    p = context.integer("p", 2)
    return _sums(pad_constant(x.abs() ** p, pads), window) ** (1 / p)


def _whole_plane(reduce: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Operator:
    def function(x: Tensor) -> Tensor:
        return reduce(x, tuple(range(2, x.dim())))

    return plain(function)


def _global_lp_pool(context: Context, x: Tensor) -> Result:
    over = tuple(range(2, x.dim()))
    made: Tensor = torch.linalg.vector_norm(x, context.integer("p", 2), over, keepdim=True)
    return made


def _max_unpool(context: Context, x: Tensor, places: Tensor, shape: Tensor | None = None) -> Result:
    kernel = context.integers("kernel_shape") or []
    sizes = list(x.shape[2:])
    window = Window.of(context, kernel, sizes)
    rank = len(kernel)
    plain = [
        (n - 1) * s + k - before - after
        for n, s, k, before, after in zip(
            sizes, window.strides, kernel, window.pads[:rank], window.pads[rank:], strict=True
        )
    ]
    made = [*x.shape[:2], *plain]
    out = x.new_zeros(math.prod(made)).scatter(0, places.reshape(-1), x.reshape(-1)).reshape(made)
    if shape is None:
        return out
    # Places count in the plain size; a larger output is padded at the end.
    wanted = ints(shape)
    return pad_constant(out, [0] * len(made) + [w - n for w, n in zip(wanted, made, strict=True)])


POOLING: Table = {
    "AveragePool": Operator(_average_pool),
    "GlobalAveragePool": _whole_plane(lambda x, over: x.mean(over, keepdim=True)),
    "GlobalLpPool": Operator(_global_lp_pool),
    "GlobalMaxPool": _whole_plane(lambda x, over: x.amax(over, keepdim=True)),
    "LpPool": Operator(_lp_pool),
    "MaxPool": Operator(_max_pool),
    "MaxUnpool": Operator(_max_unpool, frozenset({2})),
}
