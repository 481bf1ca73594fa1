"""Bring a model into the form that the executor takes: no functions, nodes in order."""

import graphlib

import onnx

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.functions import inlined
from onnx_utilrank.model.graph import captured_names, subgraphs
from onnx_utilrank.model.store import ModelStore

__all__ = ["prepared"]


def prepared(store: ModelStore) -> ModelStore:
    """The model itself where it needs no change, or a copy in the form that is needed.

    Raises:
        ModelError: Its functions cannot be inlined, or its nodes wait for each other.
    """
    store = inlined(store)
    if _is_sorted(store.proto.graph):
        return store
    proto = onnx.ModelProto()
    proto.CopyFrom(store.proto)
    try:
        _sort(proto.graph)
    except graphlib.CycleError as e:
        raise ModelError(f"{store.label}: nodes that wait for each other's outputs") from e
    return ModelStore(proto=proto, folder=store.folder, name=store.label)


def _reads(node: onnx.NodeProto) -> set[str]:
    return {*node.input, *captured_names(node)}


def _is_sorted(graph: onnx.GraphProto) -> bool:
    to_come = {name for node in graph.node for name in node.output} - {""}
    for node in graph.node:
        if not to_come.isdisjoint(_reads(node)):
            return False
        if not all(map(_is_sorted, subgraphs(node))):
            return False
        to_come.difference_update(node.output)
    return True


def _sort(graph: onnx.GraphProto) -> None:
    """Put every node behind those that it reads, as ONNX demands and runtimes do for themselves."""
    for node in graph.node:
        for inner in subgraphs(node):
            _sort(inner)
    makers = {name: k for k, node in enumerate(graph.node) for name in node.output if name}
    needs = {
        k: sorted({makers[name] for name in _reads(node) if name in makers})
        for k, node in enumerate(graph.node)
    }
    order = list(graphlib.TopologicalSorter(needs).static_order())
    nodes = [onnx.NodeProto.FromString(graph.node[k].SerializeToString()) for k in order]
    del graph.node[:]
    graph.node.extend(nodes)
