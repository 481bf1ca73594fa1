"""Quantization to integers and back; nothing passes a gradient through the rounding."""

import torch

from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table, plain
from onnx_utilrank.torch_graph.tensors import torch_type

__all__ = ["DYNAMIC", "QUANTIZATION"]

Tensor = torch.Tensor


def _fitted(context: Context, values: Tensor, x: Tensor) -> Tensor:
    """A scale or zero point of a tensor, of an axis or of blocks, so that it broadcasts over x."""
    if values.dim() == 0:
        return values
    axis, block = context.integer("axis", 1), context.integer("block_size")
    if block:
        return values.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if values.dim() > 1 or values.numel() == 1:
        return values
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _quantize(context: Context, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Result:
    kind = torch.uint8 if zero is None else zero.dtype
    if context.integer("output_dtype"):
        kind = torch_type(context.integer("output_dtype"))
    if kind.is_floating_point:
        raise TypeError("quantization to floats of 8 bits is not supported")
    steps = torch.round(x / _fitted(context, scale, x))
    if zero is not None:
        steps = steps + _fitted(context, zero.to(steps.dtype), x)
    bounds = torch.iinfo(kind)
    return steps.clamp(bounds.min, bounds.max).to(kind)


def _dequantize(context: Context, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Result:
    steps = x.to(torch.promote_types(scale.dtype, torch.float32))
    if zero is not None:
        steps = steps - _fitted(context, zero.to(steps.dtype), x)
    kind = context.integer("output_dtype")
    made = steps * _fitted(context, scale, x)
    return made.to(context.torch_type(kind) if kind else scale.dtype)


def _dynamic(x: Tensor) -> list[Tensor]:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale).clamp(0, 255)
    steps = torch.round(x / scale) + zero
    return [steps.clamp(0, 255).to(torch.uint8), scale, zero.to(torch.uint8)]


def _matmul_integer(
    a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    a, b = a.to(torch.int32), b.to(torch.int32)
    if a_zero is not None:
        rows = a_zero.to(torch.int32)
        a = a - (rows.unsqueeze(-1) if rows.dim() == 1 and rows.numel() > 1 else rows)
    if b_zero is not None:
        b = b - b_zero.to(torch.int32)
    return a @ b


# The names that the operators have in ONNX's domain and in ONNX Runtime's.
QUANTIZATION: Table = {
    "DequantizeLinear": Operator(_dequantize),
    "QuantizeLinear": Operator(_quantize),
}
DYNAMIC: Table = {
    "DynamicQuantizeLinear": Operator(lambda _context, x: _dynamic(x)),
    "MatMulInteger": plain(_matmul_integer),
}
