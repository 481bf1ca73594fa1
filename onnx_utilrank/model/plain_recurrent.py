"""See the input weight of a recurrent layer as a product before it.

Y = LSTM(X, W, R, B) is Y = LSTM(X Wᵀ + b, S, R, B'), with the input's bias b taken out of B' and S
choosing for each direction its own part of the sum (ONNX operators, LSTM; GRU and RNN alike).
`surgery.recurrent` puts back what the product became.
"""

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_utilrank.model.assembled import assembled
from onnx_utilrank.model.graph import GraphIndex, attributes, qualified
from onnx_utilrank.model.parts import Parts
from onnx_utilrank.model.rotated import rotating

__all__ = ["RECURRENT", "gates_put_together", "is_recurrent", "recurrent"]

RECURRENT = ("GRU", "LSTM", "RNN")
# Since when there is one.
EYE_LIKE = 9
# Elements of S beyond which a layer is left as it is: whoever runs the plain form holds S, and a
# copy that is packed for products. Bidirectional LSTMs reach it at 724 units, plain ones at 1448.
LARGEST = 2**25


def is_recurrent(node: onnx.NodeProto) -> bool:
    """Whether a node is one of ONNX's recurrent layers."""
    return qualified(node) in {("", op) for op in RECURRENT}


def gates_put_together(index: GraphIndex) -> frozenset[int]:
    """The nodes that put weights of recurrent layers together from pieces of others."""
    layers = [node for node in index.store.proto.graph.node if is_recurrent(node)]
    found = (assembled(index, name) for node in layers for name in filter(None, node.input[1:4]))
    return frozenset(k for each in found if each is not None for k in each.nodes)


def recurrent(parts: Parts) -> bool:
    """LSTM, GRU and RNN: MatMul, Add, and the layer that reads the sum."""
    node, index = parts.node, parts.index
    given: list[str] = [*node.input]
    x, w, r, b, *rest = given + [""] * (4 - len(given))
    if index.store.opset < EYE_LIKE:
        return False
    found = assembled(index, w)
    if found is None or found.values.ndim != 3:
        return False
    if given.count(w) > 1 or not found.freed_by(index, parts.place):
        return False  # pieces would come on top of the whole, which is read elsewhere too
    weight = found.values
    directions, width, d = weight.shape
    every = directions * width
    if every * every > LARGEST:
        return False
    if weight.dtype == np.float16 and rotating(index, x) is not None:
        return False  # the layer loads, the product would not
    biases = assembled(index, b) if b else None
    if b and (biases is None or biases.values.shape != (directions, 2 * width)):
        return False
    held = np.zeros((directions, 2 * width), weight.dtype) if biases is None else biases.values
    behind = np.concatenate([np.zeros_like(held[:, :width]), held[:, width:]], axis=1)
    turned = parts.constant(weight.reshape(every, d).T, f"{w}/turned")
    product = parts.add("MatMul", [x, turned], [parts.value("product")])
    bias = parts.constant(held[:, :width].reshape(-1), f"{b or w}/input")
    total = parts.add("Add", [product, bias], [parts.value("sum")])
    operands = [_choice(parts, (directions, width, every), weight.dtype, f"{w}/parts"), r]
    operands.append(parts.constant(behind, f"{b or w}/recurrent"))
    options: dict[str, Any] = attributes(node)
    parts.add(node.op_type, [total, *operands, *rest], node.output, named=True, **options)
    return True


def _choice(
    parts: Parts, shape: tuple[int, int, int], dtype: np.dtype[np.generic], name: str
) -> str:
    """Append what makes S, which would be larger than all weights of the layer; its output."""
    extents = parts.constant(np.array([shape[-1], shape[-1]]))
    zero = numpy_helper.from_array(np.zeros(1, dtype))
    zeros = parts.add("ConstantOfShape", [extents], [parts.value("zeros")], value=zero)
    ones = parts.add("EyeLike", [zeros], [parts.value("ones")])
    target = parts.constant(np.array(shape))
    return parts.add("Reshape", [ones, target], [parts.unique(name)])
