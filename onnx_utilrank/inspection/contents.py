"""Count what a file holds."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import onnx
from onnx.external_data_helper import uses_external_data

from onnx_utilrank.inspection.report import OperatorCount
from onnx_utilrank.model.check import stored_bytes
from onnx_utilrank.model.graph import LAYOUT_OPS, GraphIndex, qualified, subgraphs
from onnx_utilrank.model.scopes import all_nodes
from onnx_utilrank.model.store import ModelStore, TensorSpec, node_tensors
from onnx_utilrank.sites.left import QUANTIZED, REASONS

__all__ = ["count_operators", "external_data", "fixed_batch", "quantized_nodes"]

NOTHING = "(read by nothing)"

_QUANTIZE = frozenset(
    {("", "DequantizeLinear"), ("", "DynamicQuantizeLinear"), ("", "QuantizeLinear")}
    | {("com.microsoft", "DequantizeLinear"), ("com.microsoft", "QuantizeLinear")}
    | {operator for operator, reason in REASONS.items() if reason == QUANTIZED}
)


def count_operators(index: GraphIndex) -> tuple[OperatorCount, ...]:
    """Nodes, parameters and bytes by operator; every tensor of the model counts once.

    Args:
        index: Of the model as it is, not in plain form.
    """
    model = index.store.proto
    graphs = [model.graph, *model.functions]
    nodes = Counter(_name(node) for graph in graphs for node in all_nodes(graph))
    sizes: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for owner, tensor in _owned(index):
        sizes[owner] += math.prod(tensor.dims)
        taken[owner] += stored_bytes(tensor) or 0
    found = [
        OperatorCount(op_type=name, nodes=nodes[name], parameters=sizes[name], bytes=taken[name])
        for name in {**nodes, **sizes}
    ]
    return tuple(sorted(found, key=lambda o: (-o.parameters, -o.nodes, o.op_type)))


def _owned(index: GraphIndex) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every tensor of the model, with the operator that it counts for."""
    graph = index.store.proto.graph
    held = [(t.name, [t]) for t in graph.initializer]
    held += [(t.values.name, [t.values, t.indices]) for t in graph.sparse_initializer]
    for name, tensors in held:
        owner = _reader(index, name)
        yield from ((owner, tensor) for tensor in tensors)
    for node in graph.node:
        constant = node.op_type == "Constant" and len(node.output) == 1
        owner = _reader(index, node.output[0]) if constant else _name(node)
        owner = f"(in subgraphs of {_name(node)})" if any(subgraphs(node)) else owner
        yield from ((owner, tensor) for tensor in node_tensors(node))
    for function in index.store.proto.functions:
        for node in function.node:
            yield from ((f"(in function {function.name})", t) for t in node_tensors(node))


def _reader(index: GraphIndex, name: str) -> str:
    """The first operator that reads a constant, behind layout operators too."""
    places, values, seen = [], [name], {name}
    while values:
        value = values.pop()
        for k in index.consumers.get(value, ()):
            node = index.node(k)
            through = node.op_type in LAYOUT_OPS and node.output[0] in index.constants
            if not through:
                places.append(k)
            elif node.output[0] not in seen:
                seen.add(node.output[0])
                values.append(node.output[0])
    if places:
        return _name(index.node(min(places)))
    if not seen.isdisjoint(output.name for output in index.store.proto.graph.output):
        return "(an output)"
    return NOTHING if index.pinned.isdisjoint(seen) else "(read in subgraphs)"


def _name(node: onnx.NodeProto) -> str:
    domain, op_type = qualified(node)
    return f"{domain}.{op_type}" if domain else op_type


def external_data(store: ModelStore) -> tuple[int, tuple[str, ...]]:
    """Bytes that lie outside the file, and the files that hold them."""
    outside = [tensor for tensor in store.tensors() if uses_external_data(tensor)]
    files = dict.fromkeys(
        entry.value for t in outside for entry in t.external_data if entry.key == "location"
    )
    return store.file_bytes - int(store.proto.ByteSize()), tuple(files)


def quantized_nodes(store: ModelStore) -> int:
    """Nodes that quantize, or work with quantized weights, in all graphs."""
    graphs = (store.proto.graph, *store.proto.functions)
    return sum(qualified(node) in _QUANTIZE for graph in graphs for node in all_nodes(graph))


def fixed_batch(inputs: Iterable[TensorSpec]) -> int | None:
    """Samples of a run where all inputs with axes state the same number of them, else None."""
    sizes = {spec.shape[0] if spec.shape else None for spec in inputs if spec.shape != ()}
    (size,) = sizes if len(sizes) == 1 else (None,)
    return size if isinstance(size, int) else None
