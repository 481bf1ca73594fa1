"""Convolutions, and the windows that they share with pooling."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from onnx_utilrank.torch_graph.operator import Context, Operator, Table
from onnx_utilrank.torch_graph.shapes import pad_constant

__all__ = ["CONVOLUTION", "Window", "convolution", "transposed_convolution"]

Tensor = torch.Tensor

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


@dataclass(frozen=True, slots=True)
class Window:
    """A window that slides over the last axes of a tensor.

    Attributes:
        kernel: Its sizes.
        strides: Its steps.
        dilations: Distances between its taps.
        pads: What the axes are padded with, before each and after each, as ONNX orders it.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[int]

    @classmethod
    def of(cls, context: Context, kernel: list[int], sizes: list[int]) -> "Window":
        """The window that a node's attributes describe over axes of `sizes`."""
        rank = len(kernel)
        strides = context.integers("strides") or [1] * rank
        dilations = context.integers("dilations") or [1] * rank
        pads = context.integers("pads") or [0] * (2 * rank)
        mode = context.text("auto_pad", "NOTSET")
        if mode == "VALID":
            pads = [0] * (2 * rank)
        elif mode in ("SAME_UPPER", "SAME_LOWER"):
            spans = (
                (-(-n // s) - 1) * s + (k - 1) * d + 1 - n
                for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
            )
            pads = same_pads([max(n, 0) for n in spans], upper=mode == "SAME_UPPER")
        return cls(kernel, strides, dilations, pads)


def same_pads(totals: list[int], *, upper: bool) -> list[int]:
    """Share padding between both ends; `upper` puts the odd one at the end."""
    less, more = [n // 2 for n in totals], [n - n // 2 for n in totals]
    return less + more if upper else more + less


def convolution(context: Context, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operator Conv."""
    kernel = list(weight.shape[2:])
    rank = len(kernel)
    window = Window.of(context, kernel, list(x.shape[2:]))
    before, after = window.pads[:rank], window.pads[rank:]
    inside = before == after and min(before, default=0) >= 0
    return _CONV[rank](
        x if inside else pad_constant(x, window.pads),
        weight,
        bias,
        stride=window.strides,
        padding=before if inside else 0,
        dilation=window.dilations,
        groups=context.integer("group", 1),
    )


def transposed_convolution(
    context: Context, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The operator ConvTranspose."""
    kernel = list(weight.shape[2:])
    rank, sizes = len(kernel), list(x.shape[2:])
    strides = context.integers("strides") or [1] * rank
    dilations = context.integers("dilations") or [1] * rank
    extra = context.integers("output_padding") or [0] * rank
    pads = context.integers("pads") or [0] * (2 * rank)
    mode = context.text("auto_pad", "NOTSET")
    full = [
        (n - 1) * s + (k - 1) * d + 1 + e
        for n, s, k, d, e in zip(sizes, strides, kernel, dilations, extra, strict=True)
    ]
    wanted = context.integers("output_shape")
    if wanted is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(sizes, strides, strict=True)]
    if wanted is not None:
        totals = [f - w for f, w in zip(full, wanted[-rank:], strict=True)]
        pads = same_pads(totals, upper=mode == "SAME_UPPER")
    elif mode == "VALID":
        pads = [0] * (2 * rank)
    y = _TRANSPOSED[rank](
        x,
        weight,
        None,
        stride=strides,
        groups=context.integer("group", 1),
        dilation=dilations,
    )
    # Torch has no uneven padding, and no output padding of a stride or more: both are cut or
    # added here, before the bias, which applies there too.
    y = pad_constant(
        y, [-n for n in pads[:rank]] + [e - n for e, n in zip(extra, pads[rank:], strict=True)]
    )
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


CONVOLUTION: Table = {
    "Conv": Operator(convolution),
    "ConvTranspose": Operator(transposed_convolution),
}
