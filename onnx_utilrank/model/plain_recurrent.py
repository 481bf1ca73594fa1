"""See the input weight of a recurrent layer as a product before it.

Y = LSTM(X, W, R, B) is Y = LSTM(X Wᵀ + b, S, R, B'), with the input's bias b taken out of B' and S
choosing for each direction its own part of the sum (ONNX operators, LSTM; GRU and RNN alike).
`surgery.recurrent` puts back what the product became.
"""

from typing import Any

import numpy as np
import onnx

from onnx_utilrank.model.assembled import assembled
from onnx_utilrank.model.graph import attributes, qualified
from onnx_utilrank.model.parts import Parts

__all__ = ["RECURRENT", "is_recurrent", "recurrent"]

RECURRENT = ("GRU", "LSTM", "RNN")
# Since when constants are broadcast as they are today.
BROADCASTING = 7


def is_recurrent(node: onnx.NodeProto) -> bool:
    """Whether a node is one of ONNX's recurrent layers."""
    return qualified(node) in {("", op) for op in RECURRENT}


def recurrent(parts: Parts) -> bool:
    """LSTM, GRU and RNN: MatMul, Add, and the layer that reads the sum."""
    node, index = parts.node, parts.index
    given: list[str] = [*node.input]
    x, w, r, b, *rest = given + [""] * (4 - len(given))
    found = assembled(index, w)
    if index.store.opset < BROADCASTING or found is None or found.values.ndim != 3:
        return False
    if not found.freed_by(index, parts.place):
        return False  # pieces would come on top of the whole, which is read elsewhere too
    weight = found.values
    directions, width, d = weight.shape
    biases = assembled(index, b) if b else None
    if b and (biases is None or biases.values.shape != (directions, 2 * width)):
        return False
    held = np.zeros((directions, 2 * width), weight.dtype) if biases is None else biases.values
    every = directions * width
    choice = np.eye(every, dtype=weight.dtype).reshape(directions, width, every)
    if np.array_equal(weight, choice):
        return False  # it is plain already
    behind = np.concatenate([np.zeros_like(held[:, :width]), held[:, width:]], axis=1)
    turned = parts.constant(weight.reshape(every, d).T, f"{w}/turned")
    product = parts.add("MatMul", [x, turned], [parts.value("product")])
    bias = parts.constant(held[:, :width].reshape(-1), f"{b or w}/input")
    total = parts.add("Add", [product, bias], [parts.value("sum")])
    operands = [parts.constant(choice, f"{w}/parts"), r]
    operands.append(parts.constant(behind, f"{b or w}/recurrent"))
    options: dict[str, Any] = attributes(node)
    parts.add(node.op_type, [total, *operands, *rest], node.output, named=True, **options)
    return True
