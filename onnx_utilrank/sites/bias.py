"""The constant vector that is added right after a node: found, or made."""

import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.sites.site import BiasSlot, SiteKind, Use

__all__ = ["added_bias", "product_and_bias"]


def added_bias(index: GraphIndex, output: str, width: int, axis: int) -> BiasSlot | None:
    """The Add that is the only reader of `output`, if it adds one constant per feature.

    Args:
        index: The graph.
        output: Output of the node whose bias is looked for.
        width: Number of features m.
        axis: Feature axis of `output`, counted from the end (negative).

    Returns:
        A slot of kind `add`, or None. The constant has `width` entries along `axis` and 1 along
        every other, so that replacing its values never changes a shape.
    """
    readers = index.consumers.get(output, [])
    if len(readers) != 1 or output in index.pinned:
        return None
    node = index.node(readers[0])
    if node.op_type != "Add" or node.domain not in ("", "ai.onnx") or len(node.input) != 2:
        return None
    if any(a.name in ("broadcast", "axis") for a in node.attribute):
        return None  # Add before opset 7 aligns its operands in another way
    name = node.input[1] if node.input[0] == output else node.input[0]
    kind = index.constant_type(name)
    if kind is None or len(kind[0]) < -axis or kind[0][axis] != width:
        return None
    shape = kind[0]
    others = [n for k, n in enumerate(shape) if k != len(shape) + axis]
    if any(n != 1 for n in others):
        return None
    return BiasSlot(kind="add", node=readers[0], name=name, shape=shape)


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
