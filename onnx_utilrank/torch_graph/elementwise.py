"""Operators that compute each element from the elements at the same place."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table, plain
from onnx_utilrank.torch_graph.tensors import torch_type

__all__ = ["ELEMENTWISE", "activation"]

Tensor = torch.Tensor


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator of any number of inputs, two at a time."""
    return plain(lambda *tensors: functools.reduce(function, tensors))


def _mean(*tensors: Tensor) -> Tensor:
    return functools.reduce(torch.add, tensors) / len(tensors)


def _div(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(context: Context, a: Tensor, b: Tensor) -> Result:
    return torch.fmod(a, b) if context.flag("fmod") else torch.remainder(a, b)


def _pow(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


def _shift(context: Context, a: Tensor, b: Tensor) -> Result:
    left = context.text("direction", "") == "LEFT"
    return torch.bitwise_left_shift(a, b) if left else torch.bitwise_right_shift(a, b)


def _clip(
    context: Context, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Result:
    if context.opset < 11:
        return x.clamp(
            context.number("min", torch.finfo(x.dtype).min),
            context.number("max", torch.finfo(x.dtype).max),
        )
    # minimum of maximum: where the bounds cross, the upper one wins.
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _cast(context: Context, x: Tensor) -> Result:
    target = context.torch_type(context.integer("to"))
    if not x.is_floating_point() or target.is_floating_point:
        return x.to(target)
    return _float_to_integer(x, target)


def _cast_like(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def _float_to_integer(x: Tensor, target: torch.dtype) -> Tensor:
    # By way of int64, so that values out of range wrap instead of meaning whatever the CPU does.
    return x.to(target) if target == torch.bool else x.to(torch.int64).to(target)


def _is_inf(context: Context, x: Tensor) -> Result:
    below = torch.isneginf(x) & context.flag("detect_negative", True)
    return below | torch.isposinf(x) & context.flag("detect_positive", True)


def _gelu(context: Context, x: Tensor) -> Result:
    return F.gelu(x, approximate=context.text("approximate", "none"))


def _hard_sigmoid(context: Context, x: Tensor) -> Result:
    return (context.number("alpha", 0.2) * x + context.number("beta", 0.5)).clamp(0, 1)


def _hard_swish(x: Tensor) -> Tensor:
    return x * (x / 6 + 0.5).clamp(0, 1)


def _leaky_relu(context: Context, x: Tensor) -> Result:
    return F.leaky_relu(x, context.number("alpha", 0.01))


def _elu(context: Context, x: Tensor) -> Result:
    return F.elu(x, context.number("alpha", 1.0))


def _celu(context: Context, x: Tensor) -> Result:
    return F.celu(x, context.number("alpha", 1.0))


def _selu(context: Context, x: Tensor) -> Result:
    alpha = context.number("alpha", 1.67326319217681884765625)
    return context.number("gamma", 1.05070102214813232421875) * F.elu(x, alpha)


def _thresholded_relu(context: Context, x: Tensor) -> Result:
    return torch.where(x > context.number("alpha", 1.0), x, torch.zeros_like(x))


def _shrink(context: Context, x: Tensor) -> Result:
    bias, limit = context.number("bias", 0.0), context.number("lambd", 0.5)
    inner = torch.where(x > limit, x - bias, torch.zeros_like(x))
    return torch.where(x < -limit, x + bias, inner)


def _swiglu(context: Context, gate: Tensor, x: Tensor) -> Result:
    return gate * torch.sigmoid(context.number("alpha", 1.0) * gate) * x


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _swish(context: Context, x: Tensor) -> Result:
    return x * torch.sigmoid(context.number("alpha", 1.0) * x)


def _dropout(
    context: Context, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> Result:
    if training is not None and bool(training) and (ratio is None or float(ratio) > 0):
        raise ValueError("dropout in training mode is random")
    mask = torch.ones_like(x, dtype=torch.bool) if context.wants(1) else None
    return x, mask if mask is None or context.opset >= 10 else mask.to(x.dtype)


def _relu(x: Tensor) -> Tensor:
    return x.clamp(min=0) if not x.is_floating_point() else torch.relu(x)


def _bit_cast(context: Context, x: Tensor) -> Result:
    return x.view(torch_type(context.integer("to")))


# The functions that recurrent layers may name, of the attributes alpha and beta.
_ACTIVATIONS: dict[str, Callable[[Tensor, float | None, float | None], Tensor]] = {
    "Affine": lambda x, a, b: (1.0 if a is None else a) * x + (b or 0.0),
    "Elu": lambda x, a, _b: F.elu(x, 1.0 if a is None else a),
    "HardSigmoid": lambda x, a, b: (
        (0.2 if a is None else a) * x + (0.5 if b is None else b)
    ).clamp(0, 1),
    "LeakyRelu": lambda x, a, _b: F.leaky_relu(x, 0.01 if a is None else a),
    "Relu": lambda x, _a, _b: torch.relu(x),
    "ScaledTanh": lambda x, a, b: (
        (1.0 if a is None else a) * torch.tanh((1.0 if b is None else b) * x)
    ),
    "Sigmoid": lambda x, _a, _b: torch.sigmoid(x),
    "Softplus": lambda x, _a, _b: torch.logaddexp(x, torch.zeros_like(x)),
    "Softsign": lambda x, _a, _b: F.softsign(x),
    "Tanh": lambda x, _a, _b: torch.tanh(x),
    "ThresholdedRelu": lambda x, a, _b: torch.where(
        x > (1.0 if a is None else a), x, torch.zeros_like(x)
    ),
}


def activation(
    name: str, alpha: float | None = None, beta: float | None = None
) -> Callable[[Tensor], Tensor]:
    """An activation function by the name that ONNX gives it in attributes, in any case.

    Raises:
        ValueError: There is none of that name.
    """
    known = {n.lower(): f for n, f in _ACTIVATIONS.items()}
    if name.lower() not in known:
        raise ValueError(f"unknown activation {name!r}")
    return lambda x: known[name.lower()](x, alpha, beta)


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


ELEMENTWISE: Table = {
    "Abs": plain(torch.abs),
    "Acos": plain(torch.acos),
    "Acosh": plain(torch.acosh),
    "Add": plain(torch.add),
    "And": plain(torch.logical_and),
    "Asin": plain(torch.asin),
    "Asinh": plain(torch.asinh),
    "Atan": plain(torch.atan),
    "Atanh": plain(torch.atanh),
    "BitCast": Operator(_bit_cast),
    "BitShift": Operator(_shift),
    "BitwiseAnd": plain(torch.bitwise_and),
    "BitwiseNot": plain(torch.bitwise_not),
    "BitwiseOr": plain(torch.bitwise_or),
    "BitwiseXor": plain(torch.bitwise_xor),
    "Cast": Operator(_cast),
    "CastLike": plain(_cast_like),
    "Ceil": plain(torch.ceil),
    "Celu": Operator(_celu),
    "Clip": Operator(_clip),
    "Cos": plain(torch.cos),
    "Cosh": plain(torch.cosh),
    "Div": plain(_div),
    "Dropout": Operator(_dropout),
    "Elu": Operator(_elu),
    "Equal": plain(torch.eq),
    "Erf": plain(torch.erf),
    "Exp": plain(torch.exp),
    "Floor": plain(torch.floor),
    "Gelu": Operator(_gelu),
    "Greater": plain(torch.gt),
    "GreaterOrEqual": plain(torch.ge),
    "HardSigmoid": Operator(_hard_sigmoid),
    "HardSwish": plain(_hard_swish),
    "Identity": plain(lambda x: x),
    "IsInf": Operator(_is_inf),
    "IsNaN": plain(torch.isnan),
    "LeakyRelu": Operator(_leaky_relu),
    "Less": plain(torch.lt),
    "LessOrEqual": plain(torch.le),
    "Log": plain(torch.log),
    "Max": _fold(torch.maximum),
    "Mean": plain(_mean),
    "Min": _fold(torch.minimum),
    "Mish": plain(F.mish),
    "Mod": Operator(_mod),
    "Mul": plain(torch.mul),
    "Neg": plain(torch.neg),
    "Not": plain(torch.logical_not),
    "Or": plain(torch.logical_or),
    "PRelu": plain(_prelu),
    "Pow": plain(_pow),
    "Reciprocal": plain(torch.reciprocal),
    "Relu": plain(_relu),
    "Round": plain(torch.round),  # halves go to the even neighbour, as ONNX has it
    "Selu": Operator(_selu),
    "Shrink": Operator(_shrink),
    "Sigmoid": plain(torch.sigmoid),
    "Sign": plain(torch.sign),
    "Sin": plain(torch.sin),
    "Sinh": plain(torch.sinh),
    "Softplus": plain(_softplus),
    "Softsign": plain(F.softsign),
    "Sqrt": plain(torch.sqrt),
    "Sub": plain(torch.sub),
    "Sum": _fold(torch.add),
    "SwiGLU": Operator(_swiglu),
    "Swish": Operator(_swish),
    "Tan": plain(torch.tan),
    "Tanh": plain(torch.tanh),
    "ThresholdedRelu": Operator(_thresholded_relu),
    "Where": plain(torch.where),
    "Xor": plain(torch.logical_xor),
}
