"""See the attention of ONNX Runtime as the nodes that it stands for."""

from typing import Any

import numpy as np
from onnx import helper

from onnx_utilrank.model.graph import GraphIndex, attributes, qualified
from onnx_utilrank.model.parts import MICROSOFT, Parts

__all__ = ["attention", "multi_head"]

# The first three inputs of Attention are in the product; MultiHeadAttention takes two of the rest.
MASK, PAST, SCORES_BIAS = 3, 4, 5
KEPT_BY_ATTENTION = ("num_heads", "scale", "mask_filter_value", "unidirectional")


def attention(parts: Parts) -> bool:
    """Attention of packed weights: MatMul, Add, Split and MultiHeadAttention."""
    node, given = parts.node, attributes(parts.node)
    inputs = [*node.input, *[""] * (7 - len(node.input))]
    weight = parts.index.constant_type(inputs[1])
    mask, scores_bias = inputs[MASK], inputs[SCORES_BIAS]
    rest = {k for k in given if k not in KEPT_BY_ATTENTION and k != "qkv_hidden_sizes" and given[k]}
    simple = not rest and not inputs[PAST] and not inputs[6] and not any(node.output[1:])
    if not simple or weight is None or len(weight[0]) != 2:
        return False
    if mask and parts.index.rank(mask) != 2:
        return False
    sizes = given.get("qkv_hidden_sizes") or [weight[0][1] // 3] * 3
    assert isinstance(sizes, list)
    y = parts.add("MatMul", inputs[:2], [parts.value("product")], named=True)
    if inputs[2]:
        y = parts.add("Add", [y, inputs[2]], [parts.value("projected")])
    pieces = [parts.value(piece) for piece in ("query", "key", "value")]
    parts.split(y, sizes, pieces, axis=-1)
    kept: dict[str, Any] = {k: given[k] for k in KEPT_BY_ATTENTION if k in given}
    # Its bias, third, was added above.
    parts.add(
        "MultiHeadAttention",
        trimmed([*pieces, "", mask, scores_bias]),
        [node.output[0]],
        domain=MICROSOFT,
        **kept,
    )
    return True


def _width(index: GraphIndex, name: str) -> int:
    """Features of a value that a product with a constant makes; 0 of any other."""
    node = index.node(index.producers[name]) if name in index.producers else None
    if node is None or qualified(node) != ("", "MatMul"):
        return 0
    weight = index.constant_type(node.input[1])
    return weight[0][1] if weight is not None and len(weight[0]) == 2 else 0


def multi_head(parts: Parts) -> bool:
    """MultiHeadAttention with a bias for all of its inputs: Add to each of them, and without."""
    node = parts.node
    inputs = [*node.input, *[""] * (4 - len(node.input))]
    kind = parts.index.constant_type(inputs[3])
    if kind is None or len(kind[0]) != 1 or not all(inputs[:3]):
        return False
    widths = [_width(parts.index, name) for name in inputs[:3]]
    if not all(widths) or sum(widths) != kind[0][0]:
        return False  # not told, or keys and values in a form of their own
    values = parts.index.constant(inputs[3])
    assert values is not None
    pieces = np.split(values, np.cumsum(widths)[:-1])
    for k, (piece, what) in enumerate(zip(pieces, ("query", "key", "value"), strict=True)):
        own = parts.constant(piece, f"{inputs[3]}/{what}")
        inputs[k] = parts.add("Add", [inputs[k], own], [parts.value(what)])
    inputs[3] = ""
    kept: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    parts.add(
        "MultiHeadAttention",
        trimmed(inputs),
        node.output,
        domain=MICROSOFT,
        named=True,
        **kept,
    )
    return True


def trimmed(inputs: list[str]) -> list[str]:
    while inputs and not inputs[-1]:
        inputs.pop()
    return inputs
