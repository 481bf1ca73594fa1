"""Biases: what a node adds itself, and the vector that is added right after it: found, or made."""

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.sites.site import BiasSlot, Site, SiteKind, Use

__all__ = ["added_bias", "own_biases", "product_and_bias"]

# Operators of com.microsoft that add a vector of their own to an input, and that vector's place
# among their inputs; what they add it to may be any input before.
_ADDERS = {
    "BiasGelu": 1,
    "FastGelu": 1,
    "SkipLayerNormalization": 4,
    "SkipSimplifiedLayerNormalization": 3,
}


def own_biases(index: GraphIndex, site: Site) -> dict[int, np.ndarray]:
    """What the node of each use adds to W x itself, [m]; an Add behind it is not part of it."""
    return {
        use.node: use.bias.values(index, site.m) if use.bias.kind == "input" else np.zeros(site.m)
        for use in site.uses
    }


def added_bias(index: GraphIndex, output: str, width: int, axis: int) -> BiasSlot | None:
    """The node that is the only reader of `output`, if it adds one constant per feature.

    Args:
        index: The graph.
        output: Output of the node whose bias is looked for.
        width: Number of features m.
        axis: Feature axis of `output`, counted from the end (negative).

    Returns:
        A slot of kind `add`, or None. The constant has `width` entries along `axis` and 1 along
        every other, so that replacing its values never changes a shape. It is finite: one that
        masks by -infinity has no mean to correct.
    """
    readers = index.consumers.get(output, [])
    if len(readers) != 1 or output in index.pinned:
        return None
    node = index.node(readers[0])
    if node.domain == "com.microsoft" and node.op_type in _ADDERS:
        place = _ADDERS[node.op_type]
        # The scale and shift of a normalization come after the two values that it adds.
        if len(node.input) <= place or output not in node.input[: min(place, 2)] or axis != -1:
            return None
    elif node.op_type == "Add" and node.domain in ("", "ai.onnx") and len(node.input) == 2:
        if any(a.name in ("broadcast", "axis") for a in node.attribute):
            return None  # Add before opset 7 aligns its operands in another way
        place = 1 if node.input[0] == output else 0
    else:
        return None
    name = node.input[place]
    kind = index.constant_type(name)
    if kind is None or len(kind[0]) < -axis or kind[0][axis] != width:
        return None
    shape = kind[0]
    others = [n for k, n in enumerate(shape) if k != len(shape) + axis]
    if any(n != 1 for n in others) or not index.is_finite(name):
        return None
    return BiasSlot(kind="add", node=readers[0], place=place, name=name, shape=shape)


def product_and_bias(
    kind: SiteKind, surgeon: Surgeon, use: Use, first: str, second: str, bias: str | None
) -> list[gs.Node]:
    """`SiteKind.chain` of an operator without gain or a bias of its own: a new one is an Add."""
    y = surgeon.tensor(use.result.tensor)
    if bias is None or use.bias.kind != "new":
        return kind.product(surgeon, use, first, second, y)
    product = surgeon.value(f"{y.name}/product")
    return [
        *kind.product(surgeon, use, first, second, product),
        gs.Node(
            op="Add",
            name=surgeon.unique(f"{surgeon.index.node(use.node).name or y.name}/bias"),
            inputs=[product, surgeon.tensor(bias)],
            outputs=[y],
        ),
    ]
