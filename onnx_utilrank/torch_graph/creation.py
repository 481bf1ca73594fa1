"""Operators that make tensors out of attributes and sizes."""

import torch

from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table, ints

__all__ = ["CREATION"]

Tensor = torch.Tensor


def _constant(context: Context) -> Result:
    value = context.tensor("value")
    if value is None:
        value = context.tensor("sparse_value")
    if value is not None:
        return value
    numbers = context.attributes.get("value_floats", context.attributes.get("value_float"))
    if numbers is not None:
        kind = context.dtype or torch.float32
        return torch.tensor(numbers, dtype=kind, device=context.device)
    integers = context.attributes.get("value_ints", context.attributes.get("value_int"))
    if integers is None:
        raise TypeError("a constant that is no tensor of numbers")
    return torch.tensor(integers, dtype=torch.int64)


def _constant_of_shape(context: Context, shape: Tensor) -> Result:
    value = context.tensor("value")
    if value is None:
        value = torch.zeros(1, dtype=context.dtype or torch.float32, device=context.device)
    return value.reshape(()).expand(ints(shape)).clone()


def _eye_like(context: Context, x: Tensor) -> Result:
    kind = context.torch_type(context.integer("dtype")) if context.has("dtype") else x.dtype
    ones = torch.ones(x.shape, dtype=kind, device=x.device)
    k = context.integer("k")
    return ones.triu(k).tril(k)


def _range(context: Context, start: Tensor, limit: Tensor, delta: Tensor) -> Result:
    device = context.device if start.is_floating_point() else torch.device("cpu")
    first, last, step = start.item(), limit.item(), delta.item()
    if (last - first) * step <= 0:
        return torch.empty(0, dtype=start.dtype, device=device)
    return torch.arange(first, last, step, dtype=start.dtype, device=device)


def _trilu(context: Context, x: Tensor, k: Tensor | None = None) -> Result:
    (diagonal,) = [0] if k is None else ints(k)
    return x.triu(diagonal) if context.flag("upper", True) else x.tril(diagonal)


def _window(first: float) -> Operator:
    """A raised cosine, first - (1 - first) cos."""

    def function(context: Context, size: Tensor) -> Result:
        return _cosines(context, size, (first, first - 1.0))

    return Operator(function, frozenset({0}))


def _blackman(context: Context, size: Tensor) -> Result:
    return _cosines(context, size, (0.42, -0.5, 0.08))


def _cosines(context: Context, size: Tensor, terms: tuple[float, ...]) -> Tensor:
    (n,) = ints(size)
    period = n if context.flag("periodic", True) else n - 1
    angle = torch.arange(n, dtype=torch.float64) * (2 * torch.pi / period)
    made = torch.stack([w * torch.cos(k * angle) for k, w in enumerate(terms)]).sum(0)
    return made.to(context.device, context.torch_type(context.integer("output_datatype", 1)))


CREATION: Table = {
    "BlackmanWindow": Operator(_blackman, frozenset({0})),
    "Constant": Operator(_constant),
    "ConstantOfShape": Operator(_constant_of_shape, frozenset({0})),
    "EyeLike": Operator(_eye_like),
    "HammingWindow": _window(25 / 46),
    "HannWindow": _window(0.5),
    "Range": Operator(_range, frozenset({0, 1, 2})),
    "Trilu": Operator(_trilu, frozenset({1})),
}
