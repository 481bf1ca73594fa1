"""Nodes without weights that may work in int8 because they lie between Convs that do."""

from collections.abc import Sequence

from onnx_utilrank.model.graph import GraphIndex, qualified
from onnx_utilrank.quantization.nodes import Weighted

__all__ = ["between"]

# Operators with int8 kernels, or that only move values, for which a range is all they need.
# An activation goes into the scale of the Conv before it.
_OPERATORS = frozenset(
    {"Relu", "Clip", "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Resize"}
    | {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Split", "Pad"}
)


def between(index: GraphIndex, weights: Sequence[Weighted]) -> dict[int, str]:
    """Places of such nodes, with their operators.

    A node is one where all that it reads of computed values comes from a Conv or another such node,
    and all that reads it is a weight's node, or another such one. In a residual stream of a
    transformer none is: additions there feed norms, and are worth their precision.

    Args:
        index: The model.
        weights: The nodes that are quantized.
    """
    convs = {w.place for w in weights if w.op_type in ("Conv", "ConvTranspose")}
    readers = {w.place for w in weights if w.op_type != "Gather"}
    graph = index.store.proto.graph
    chosen: set[int] = set()
    for k, node in enumerate(graph.node):
        domain, op_type = qualified(node)
        if domain or op_type not in _OPERATORS or index.pinned.intersection(node.output):
            continue
        given = [n for n in node.input if n and n not in index.constants]
        makers = {index.producers.get(name, -1) for name in given}
        if given and makers <= convs | chosen:
            chosen.add(k)
    while True:
        kept = {
            k
            for k in chosen
            if all(
                set(index.consumers.get(name, ())) <= readers | chosen
                for name in index.node(k).output
            )
            and all(
                index.producers.get(name, -1) in convs | chosen
                for name in index.node(k).input
                if name and name not in index.constants
            )
        }
        if kept == chosen:
            return {k: index.node(k).op_type for k in sorted(chosen)}
        chosen = kept
