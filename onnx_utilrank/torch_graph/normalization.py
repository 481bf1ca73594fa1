"""Normalizations over channels, groups and trailing axes."""

import torch
import torch.nn.functional as F

from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table

__all__ = ["NORMALIZATION", "layer_norm", "rms_norm"]

Tensor = torch.Tensor


def _per_channel(x: Tensor, values: Tensor) -> Tensor:
    """Values [C] in a shape that broadcasts over x [N, C, ...]."""
    return values.reshape(-1, *[1] * (x.dim() - 2))


def _batch_norm(
    context: Context, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Result:
    epsilon = context.number("epsilon", 1e-5)
    if context.flag("training_mode"):
        return _batch_norm_training(context, x, scale, bias, mean, variance)
    if not context.flag("spatial", True):
        # Before opset 9: statistics of each element of a sample.
        return (x - mean) / torch.sqrt(variance + epsilon) * scale + bias
    # Not torch's own function, which has no gradient for the statistics. These may be of a wider
    # type than the data, since opset 14.
    factor = scale / torch.sqrt(variance + epsilon)
    return (x * _per_channel(x, factor) + _per_channel(x, bias - mean * factor)).to(x.dtype)


def _batch_norm_training(
    context: Context, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Result:
    over = tuple(a for a in range(x.dim()) if a != 1)
    momentum = context.number("momentum", 0.9)
    now, spread = x.mean(over), x.var(over, correction=0)
    factor = scale / torch.sqrt(spread + context.number("epsilon", 1e-5))
    y = x * _per_channel(x, factor) + _per_channel(x, bias - now * factor)
    return (
        y,
        mean * momentum + now * (1 - momentum),
        variance * momentum + spread * (1 - momentum),
    )


def _instance_norm(context: Context, x: Tensor, scale: Tensor, bias: Tensor) -> Result:
    over = tuple(range(2, x.dim()))
    centred = x - x.mean(over, keepdim=True)
    variance = (centred * centred).mean(over, keepdim=True)
    y = centred / torch.sqrt(variance + context.number("epsilon", 1e-5))
    return y * _per_channel(x, scale) + _per_channel(x, bias)


def _group_norm(context: Context, x: Tensor, scale: Tensor, bias: Tensor) -> Result:
    groups, epsilon = context.integer("num_groups"), context.number("epsilon", 1e-5)
    if context.opset < 21:
        # One scale a group, where later versions and torch have one a channel.
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, scale, bias, epsilon)


def layer_norm(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, axis: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize over all axes from `axis` on, in at least float32.

    Returns:
        The result, the mean and the inverse standard deviation.
    """
    over = tuple(range(axis % x.dim(), x.dim()))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(over, keepdim=True)
    centred = wide - mean
    inverse = torch.rsqrt((centred * centred).mean(over, keepdim=True) + epsilon)
    y = (centred * inverse).to(x.dtype)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias, mean, inverse


def _layer_norm(context: Context, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Result:
    axis, epsilon = context.integer("axis", -1), context.number("epsilon", 1e-5)
    return layer_norm(x, scale, bias, axis, epsilon)


def rms_norm(x: Tensor, scale: Tensor, axis: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Divide by the root mean square over all axes from `axis` on, in at least float32.

    Returns:
        The result and the inverse of the root mean square.
    """
    over = tuple(range(axis % x.dim(), x.dim()))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt((wide * wide).mean(over, keepdim=True) + epsilon)
    return (wide * inverse).to(x.dtype) * scale, inverse


def _rms_norm(context: Context, x: Tensor, scale: Tensor) -> Result:
    axis, epsilon = context.integer("axis", -1), context.number("epsilon", 1e-5)
    return rms_norm(x, scale, axis, epsilon)[0]


def _lrn(context: Context, x: Tensor) -> Result:
    size = context.integer("size")
    # Torch pads a window of even size the other way round.
    squares = F.pad((x * x).flatten(2).unsqueeze(1), (0, 0, (size - 1) // 2, size // 2))
    mean = F.avg_pool2d(squares, (size, 1), stride=1).squeeze(1).reshape(x.shape)
    alpha, beta = context.number("alpha", 1e-4), context.number("beta", 0.75)
    return x / (context.number("bias", 1.0) + alpha * mean) ** beta


def _lp_norm(context: Context, x: Tensor) -> Result:
    axis, p = context.integer("axis", -1), context.integer("p", 2)
    length = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(length == 0, torch.zeros_like(x), x / length)


def _mean_variance_norm(context: Context, x: Tensor) -> Result:
    axes = tuple(context.integers("axes") or [0, 2, 3])
    centred = x - x.mean(axes, keepdim=True)
    return centred / (torch.sqrt((centred * centred).mean(axes, keepdim=True)) + 1e-9)


def _softmax_cross_entropy(
    context: Context, scores: Tensor, labels: Tensor, weights: Tensor | None = None
) -> Result:
    logs = torch.log_softmax(scores, 1)
    return _likelihood(context, logs, labels, weights), logs


def _likelihood(
    context: Context, logs: Tensor, labels: Tensor, weights: Tensor | None = None
) -> Tensor:
    ignored = context.integer("ignore_index", -(2**31))
    return F.nll_loss(
        logs,
        labels.to(torch.int64),
        weights,
        ignore_index=ignored,
        reduction=context.text("reduction", "mean"),
    )


NORMALIZATION: Table = {
    "BatchNormalization": Operator(_batch_norm),
    "GroupNormalization": Operator(_group_norm),
    "InstanceNormalization": Operator(_instance_norm),
    "LRN": Operator(_lrn),
    "LayerNormalization": Operator(_layer_norm),
    "LpNormalization": Operator(_lp_norm),
    "MeanVarianceNormalization": Operator(_mean_variance_norm),
    "NegativeLogLikelihoodLoss": Operator(_likelihood),
    "RMSNormalization": Operator(_rms_norm),
    "SoftmaxCrossEntropyLoss": Operator(_softmax_cross_entropy),
}
