"""See operators on integers as the operators on floats they stand for.

ONNX Runtime's QOperator form has one node for what the QDQ form writes as DequantizeLinear, the
operator on floats, and QuantizeLinear. Seen as those, all that holds for the QDQ form holds for it
too, and W x has a name and a float type. What nothing is done to goes back to the one node it was.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnx_utilrank.model.graph import GraphIndex, all_names, attributes, qualified
from onnx_utilrank.model.parts import MICROSOFT, Parts, with_parts
from onnx_utilrank.model.store import ModelStore

__all__ = ["index_quantized"]

# Since when DequantizeLinear may have a scale for each entry of an axis.
SCALES_OF_AXES = 13


def index_quantized(store: ModelStore) -> GraphIndex:
    """The index of a quantized model, in which weights are constants as they are applied.

    Raises:
        ModelError: A constant cannot be read.
    """
    index = GraphIndex.build(store, dequantize=True)
    taken: set[str] | None = None
    parts = {}
    for k, node in enumerate(store.proto.graph.node):
        take_apart = _ON_INTEGERS.get(qualified(node))
        if take_apart is None or not store.opset:
            continue
        taken = all_names(store.proto) if taken is None else taken
        made = Parts(index, k, taken)
        if take_apart(made):
            parts[k] = made.nodes
    return with_parts(index, parts, dequantize=True) if parts else index


def _dequantized(parts: Parts, inputs: Sequence[str], scales: int, axis: int) -> str | None:
    """Append a DequantizeLinear; its output, or None where this opset has none for the scales.

    Args:
        parts: The nodes in the making.
        inputs: Of the new node: values, scale, and the zero point if there is one.
        scales: How many there are.
        axis: Along which.
    """
    if scales > 1 and parts.index.store.opset < SCALES_OF_AXES:
        return None
    options: dict[str, Any] = {"axis": axis} if scales > 1 else {}
    made = [parts.value("dequantized")]
    return parts.add("DequantizeLinear", list(filter(None, inputs)), made, **options)


def _operands(parts: Parts, axes: tuple[int, int]) -> list[str] | None:
    """Append what makes floats of the two operands; None where the second is no constant."""
    given = [*parts.node.input, *[""] * 9]
    if given[3] not in parts.index.constants:
        return None
    made = []
    for at, axis in zip((0, 3), axes, strict=True):
        kind = parts.index.constant_type(given[at + 1])
        scales = 1 if kind is None else math.prod(kind[0])
        made.append(_dequantized(parts, given[at : at + 3], scales, axis))
    return None if None in made else [name for name in made if name is not None]


def _rounded(parts: Parts, y: str, scale: str, zero: str) -> None:
    """Append the QuantizeLinear that makes the node's output."""
    inputs = [y, scale, zero] if zero else [y, scale]
    parts.add("QuantizeLinear", inputs, [parts.node.output[0]])


def _bias(parts: Parts, name: str, gain: float) -> str | None:
    """Append what makes floats of a bias [m] in int32, in steps of the scale of the product.

    That is what QLinearConv (ONNX operators) and QGemm (ONNX Runtime's contrib operators) say of
    it; None where that scale is computed.
    """
    scales = [parts.index.constant(parts.node.input[at]) for at in (1, 4)]
    if scales[0] is None or scales[1] is None:
        return None
    scale = np.asarray(gain * scales[0] * scales[1], scales[0].dtype)
    held = parts.constant(scale.reshape(-1) if scale.size > 1 else scale.reshape(()))
    return _dequantized(parts, (name, held), scale.size, 0)


def _matmul(parts: Parts) -> bool:
    """QLinearMatMul: a, its scale and zero point, b, its own, and those of the output."""
    node = parts.node
    kind = parts.index.constant_type(node.input[3])
    operands = None if kind is None else _operands(parts, (-1, len(kind[0]) - 1))
    if operands is None:
        return False
    y = parts.add("MatMul", operands, [parts.value("product")], named=True)
    _rounded(parts, y, node.input[6], node.input[7])
    return True


def _conv(parts: Parts) -> bool:
    """QLinearConv: the same, and a bias in int32."""
    node = parts.node
    given: dict[str, Any] = attributes(node)
    if given.pop("channels_last", 0):
        return False
    operands = _operands(parts, (1, 0))
    if operands is None:
        return False
    if len(node.input) > 8 and node.input[8]:
        bias = _bias(parts, node.input[8], 1.0)
        if bias is None:
            return False
        operands.append(bias)
    y = parts.add("Conv", operands, [parts.value("product")], named=True, **given)
    _rounded(parts, y, node.input[6], node.input[7])
    return True


def _gemm(parts: Parts) -> bool:
    """QGemm: the operands, a bias in int32, and the output's scale unless that is in floats."""
    node = parts.node
    given: dict[str, Any] = attributes(node)
    operands = _operands(parts, (-1, 0 if given.get("transB", 0) else 1))
    if operands is None:
        return False
    inputs = [*node.input, *[""] * 9]
    if inputs[6]:
        bias = _bias(parts, inputs[6], given.get("alpha", 1.0))
        if bias is None:
            return False
        operands.append(bias)
    rounds = bool(inputs[7])
    y = parts.value("product") if rounds else node.output[0]
    parts.add("Gemm", operands, [y], named=True, **given)
    if rounds:
        _rounded(parts, y, inputs[7], inputs[8])
    return True


# What takes a node of each domain and operator apart; False where it is of a form it does not know.
_ON_INTEGERS: dict[tuple[str, str], Callable[[Parts], bool]] = {
    ("", "QLinearConv"): _conv,
    ("", "QLinearMatMul"): _matmul,
    (MICROSOFT, "QGemm"): _gemm,
    (MICROSOFT, "QLinearConv"): _conv,
}
