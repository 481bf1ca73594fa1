"""Bring a model into the form whose weights training changes."""

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.torch_graph.prepare import prepared

__all__ = ["trainable_form"]

# Before it, initializers are inputs of the graph, of which surgery must not make more.
FIRST_IR = 4


def trainable_form(store: ModelStore) -> ModelStore:
    """The model with its weights as initializers that operators read as they are.

    Functions are inlined and nodes sorted. A floating Constant becomes an initializer, and so does
    what a Transpose or its like makes of one that nothing else reads.

    Raises:
        ModelError: Functions cannot be inlined, nodes wait for each other, or a constant cannot be
            read.
    """
    store = prepared(store)
    if store.proto.ir_version < FIRST_IR:
        return store
    index = GraphIndex.build(store)
    nodes = store.proto.graph.node
    given = {value.name for value in (*store.proto.graph.input, *store.proto.graph.output)}
    made: dict[str, np.ndarray] = {}
    gone: set[str] = set()
    for node in reversed(nodes):
        name = node.output[0] if node.output else ""
        if name not in index.constants or name in gone | given:
            continue
        chain = _chain(index, name)
        if chain is None or not given.isdisjoint(chain):
            continue
        values = index.constant(name)
        if values is None or not np.issubdtype(values.dtype, np.floating) or values.size < 2:
            continue
        made[name] = values
        gone.update(chain)
    if not made:
        return store
    proto = onnx.ModelProto()
    proto.CopyFrom(store.proto)
    graph = proto.graph
    kept = [node for node in graph.node if gone.isdisjoint(node.output)]
    held = [tensor for tensor in graph.initializer if tensor.name not in gone]
    held += [numpy_helper.from_array(values, name) for name, values in reversed(made.items())]
    for field, entries in ((graph.node, kept), (graph.initializer, held)):
        copies = [type(entry).FromString(entry.SerializeToString()) for entry in entries]
        del field[:]
        field.extend(copies)
    return ModelStore(proto=proto, folder=store.folder, name=store.label)


def _chain(index: GraphIndex, name: str) -> list[str] | None:
    """A value and those that it is made of, down to an initializer or a Constant.

    None where something else reads one of them too.
    """
    chain = [name]
    while name not in index.initializers:
        node = index.node(index.producers[name])
        if node.op_type == "Constant":
            return chain
        name = node.input[0]
        if len(index.consumers[name]) > 1 or name in index.pinned:
            return None
        chain.append(name)
    return chain
