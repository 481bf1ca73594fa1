"""Operators of ONNX Runtime's own domain, com.microsoft, that are not attention."""

import torch
import torch.nn.functional as F

from onnx_utilrank.torch_graph.convolution import convolution
from onnx_utilrank.torch_graph.elementwise import activation
from onnx_utilrank.torch_graph.linear import gemm
from onnx_utilrank.torch_graph.normalization import layer_norm, rms_norm
from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table, plain

__all__ = ["CONTRIB", "SIMPLIFIED"]

Tensor = torch.Tensor


def _fused_matmul(context: Context, a: Tensor, b: Tensor) -> Result:
    # The rows come before the batch axes.
    a = a.movedim(0, -2) if context.flag("transBatchA") else a
    b = b.movedim(0, -2) if context.flag("transBatchB") else b
    # A vector has no axes to turn.
    a = a.mT if context.flag("transA") and a.dim() > 1 else a
    b = b.mT if context.flag("transB") and b.dim() > 1 else b
    y = a @ b
    alpha = context.number("alpha", 1.0)
    return y if alpha == 1.0 else y * alpha


def _fused_gemm(context: Context, a: Tensor, b: Tensor, c: Tensor | None = None) -> Result:
    name = context.text("activation", "")
    y = gemm(context, a, b, c)
    if not name:
        return y
    scales = (_optional(context, "activation_alpha"), _optional(context, "activation_beta"))
    return activation(name, *scales)(y)


def _optional(context: Context, name: str) -> float | None:
    return context.number(name, 0.0) if context.has(name) else None


def _fused_conv(
    context: Context, x: Tensor, weight: Tensor, bias: Tensor | None = None, z: Tensor | None = None
) -> Result:
    y = convolution(context, x, weight, bias)
    y = y if z is None else y + z
    name, scales = context.text("activation", ""), context.numbers("activation_params") or []
    if name == "Clip":
        return y.clamp(*scales)
    return activation(name, *scales)(y) if name else y


def _fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _quick_gelu(context: Context, x: Tensor) -> Result:
    return x * torch.sigmoid(context.number("alpha", 1.702) * x)


def _simplified_layer_norm(context: Context, x: Tensor, scale: Tensor) -> Result:
    axis, epsilon = context.integer("axis", -1), context.number("epsilon", 1e-5)
    return rms_norm(x, scale, axis, epsilon)


def _skip_layer_norm(
    context: Context,
    x: Tensor,
    skip: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> Result:
    total = x + skip if bias is None else x + skip + bias
    epsilon = context.number("epsilon", 1e-12)
    return (*layer_norm(total, scale, shift, -1, epsilon), total)


def _skip_rms_norm(
    context: Context, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Result:
    total = x + skip if bias is None else x + skip + bias
    y, inverse = rms_norm(total, scale, -1, context.number("epsilon", 1e-12))
    return y, None, inverse, total


def _embed_layer_norm(
    context: Context,
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    places: Tensor,
    kinds: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Result:
    total = F.embedding(ids, words)
    if positions is None:
        total = total + places[: ids.shape[1]]
    else:
        total = total + F.embedding(positions, places)
    if segments is not None and kinds is not None:
        total = total + F.embedding(segments, kinds)
    y, _, _ = layer_norm(total, scale, shift, -1, context.number("epsilon", 1e-12))
    valid = ids.new_zeros(len(ids)) if mask is None else mask.sum(1)
    return y, valid.to(torch.int32), total


CONTRIB: Table = {
    "BiasGelu": plain(lambda x, bias: F.gelu(x + bias)),
    "EmbedLayerNormalization": Operator(_embed_layer_norm),
    "FastGelu": plain(_fast_gelu),
    "FusedConv": Operator(_fused_conv),
    "FusedGemm": Operator(_fused_gemm),
    "FusedMatMul": Operator(_fused_matmul),
    "Gelu": plain(F.gelu),
    "Inverse": plain(torch.linalg.inv),
    "QuickGelu": Operator(_quick_gelu),
    "SkipLayerNormalization": Operator(_skip_layer_norm),
    "SkipSimplifiedLayerNormalization": Operator(_skip_rms_norm),
}

# ONNX Runtime files this one under ONNX's own domain.
SIMPLIFIED: Table = {"SimplifiedLayerNormalization": Operator(_simplified_layer_norm)}
