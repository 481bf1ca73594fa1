"""See torch values as rows of features, as `RowView` describes them."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional, grad

from onnx_utilrank.moves.two_convs import Split
from onnx_utilrank.sites.site import Patches, RowView
from onnx_utilrank.torch_graph.convolution import transposed_convolution
from onnx_utilrank.torch_graph.operator import Context

__all__ = ["as_rows", "convolved", "input_gradient", "input_rows", "split_rows"]

CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
INPUT_GRADIENTS = (grad.conv1d_input, grad.conv2d_input, grad.conv3d_input)


def as_rows(value: torch.Tensor, view: RowView, samples: int) -> torch.Tensor:
    """A value as [samples, positions, features].

    Where the axis that should does not count samples, all positions are those of one sample.
    Samples only decide over which positions gradients are summed.

    Args:
        value: The value of `view.tensor`.
        view: Where its features are.
        samples: Samples in the run that it is of.
    """
    if view.patches:
        value = _unfolded(value, view.patches)
    rows = value.movedim(view.axis, -1) if value.ndim > 1 else value
    if view.positions_first:
        rows = rows.transpose(0, 1)
    first = samples if value.ndim > 1 and rows.shape[0] % samples == 0 else 1
    return rows.reshape(first, -1, view.width)


def split_rows(
    x: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    kernel: torch.Tensor,
    split: Split,
    samples: int,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """What the first of two Convs reads, and the gradients there, [samples, positions, features].

    Args:
        x: The input of the Conv that they take the place of, [N, C, …].
        gradients: With respect to its output.
        kernel: Its weight [m, C, …].
        split: What the two see.
        samples: Samples in the run.
    """
    seen = x if math.prod(split.first.kernel) == 1 else _unfolded(x, split.first)
    kernel = kernel.reshape(len(kernel), split.features, *split.second.kernel)
    found = (input_gradient(seen, g, kernel, split.second) for g in gradients)
    return input_rows(seen, samples), tuple(input_rows(g, samples) for g in found)


def input_rows(value: torch.Tensor, samples: int) -> torch.Tensor:
    """A Conv's input [N, C, …] as [samples, positions, C]."""
    rows = value.movedim(1, -1)
    first = samples if value.shape[0] % samples == 0 else 1
    return rows.reshape(first, -1, rows.shape[-1])


def convolved(
    x: torch.Tensor, kernel: torch.Tensor, patches: Patches, groups: int = 1
) -> torch.Tensor:
    """The Conv of a kernel [m, C / groups, …] with the strides, pads and dilations of a node."""
    before, after = _pads(patches, x.shape[2:])
    padded = functional.pad(
        x, [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
    )
    convolve = CONVOLUTIONS[len(patches.kernel) - 1]
    return convolve(
        padded, kernel, stride=patches.strides, dilation=patches.dilations, groups=groups
    )


def input_gradient(
    x: torch.Tensor, gradient: torch.Tensor, kernel: torch.Tensor, patches: Patches
) -> torch.Tensor:
    """The gradient with respect to a Conv's input that its output's gradient stands for."""
    extent = x.shape[2:]
    before, after = _pads(patches, extent)
    padded = [n + a + b for n, a, b in zip(extent, before, after, strict=True)]
    gradient_of = INPUT_GRADIENTS[len(extent) - 1]
    size = (*x.shape[:2], *padded)
    steps = {"stride": patches.strides, "dilation": patches.dilations}
    found: torch.Tensor = gradient_of(size, kernel, gradient, **steps)  # type: ignore[no-untyped-call]
    for axis, (n, skipped) in enumerate(zip(extent, before, strict=True), start=2):
        found = found.narrow(axis, skipped, n)
    return found


def _unfolded(x: torch.Tensor, patches: Patches) -> torch.Tensor:
    """im2col as a depthwise convolution with one-hot kernels, [N, C taps, positions …]."""
    taps = math.prod(patches.kernel)
    if patches.transposed:
        return _spread(x, patches)
    kernel = torch.eye(taps, dtype=x.dtype, device=x.device).repeat(patches.channels, 1)
    return convolved(x, kernel.reshape(-1, 1, *patches.kernel), patches, patches.channels)


def _spread(x: torch.Tensor, patches: Patches) -> torch.Tensor:
    """The same for a ConvTranspose."""
    taps = math.prod(patches.kernel)
    kernel = torch.eye(taps, dtype=x.dtype, device=x.device).repeat(patches.channels, 1, 1)
    attributes = {
        "auto_pad": patches.auto_pad,
        "strides": patches.strides,
        "dilations": patches.dilations,
        "pads": patches.pads,
        "output_padding": patches.output_padding or None,
        "output_shape": patches.output_shape or None,
        "group": patches.channels,
    }
    context = Context(
        attributes={key: value for key, value in attributes.items() if value is not None},
        opset=0,
        outputs=(True,),
        device=x.device,
        dtype=None,
    )
    kernel = kernel.reshape(patches.channels, taps, *patches.kernel)
    return transposed_convolution(context, x, kernel)


def _pads(patches: Patches, extent: Sequence[int]) -> tuple[list[int], list[int]]:
    """Zeros before and after each spatial axis (ONNX operators, Conv, `auto_pad`)."""
    spatial = len(patches.kernel)
    if patches.auto_pad == "NOTSET":
        return list(patches.pads[:spatial]), list(patches.pads[spatial:])
    if patches.auto_pad == "VALID":
        return [0] * spatial, [0] * spatial
    before, after = [], []
    for n, kernel, stride, dilation in zip(
        extent, patches.kernel, patches.strides, patches.dilations, strict=True
    ):
        reach = dilation * (kernel - 1) + 1
        total = max(0, (-(-n // stride) - 1) * stride + reach - n)
        less, more = total // 2, total - total // 2
        upper = patches.auto_pad == "SAME_UPPER"
        before.append(less if upper else more)
        after.append(more if upper else less)
    return before, after
