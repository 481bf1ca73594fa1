"""Nodes that hold graphs: what is inside them, and what those read from outside."""

from collections.abc import Iterator

import onnx

__all__ = ["all_nodes", "captured_names", "node_label", "qualified", "subgraphs"]


def node_label(node: onnx.NodeProto) -> str:
    """How messages name a node: operator and name, or its first output where it has no name."""
    return f"{node.op_type} {node.name or (node.output[0] if node.output else '?')!r}"


def qualified(node: onnx.NodeProto) -> tuple[str, str]:
    """Domain and operator of a node; the domain of ONNX's own operators is ''."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Graphs held by the attributes of a node (not the graphs inside those)."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph or function, each with those of the graphs inside it."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def captured_names(node: onnx.NodeProto) -> set[str]:
    """Values of the outer scope that the subgraphs of a node read."""
    captured: set[str] = set()
    for graph in subgraphs(node):
        own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        own |= {t.values.name for t in graph.sparse_initializer}
        read = {o.name for o in graph.output}
        for inner in graph.node:
            own.update(inner.output)
            read.update(inner.input)
            read |= captured_names(inner)
        captured |= read - own
    return captured - {""}
