"""Whether a model can be run in torch, told without reading its weights."""

import numpy as np
import onnx
import torch

from onnx_utilrank.model.graph import node_label, qualified
from onnx_utilrank.model.scopes import all_nodes
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.torch_graph.graph import OLDEST_OPSET
from onnx_utilrank.torch_graph.operators import OPERATORS
from onnx_utilrank.torch_graph.prepare import prepared
from onnx_utilrank.torch_graph.tensors import as_tensor

__all__ = ["obstacles"]


def obstacles(store: ModelStore) -> tuple[str, ...]:
    """What keeps `TorchGraph.build` from taking a model, each a clause; empty where nothing does.

    Raises:
        ModelError: The model's functions cannot be inlined, or nodes wait for each other.
    """
    store = prepared(store)
    found = []
    if 0 < store.opset < OLDEST_OPSET:
        found.append(f"opset {store.opset} is older than {OLDEST_OPSET}")
    unknown: dict[tuple[str, str], list[onnx.NodeProto]] = {}
    for node in all_nodes(store.proto.graph):
        if qualified(node) not in OPERATORS:
            unknown.setdefault(qualified(node), []).append(node)
    for (domain, op_type), nodes in unknown.items():
        name = f"{domain}.{op_type}" if domain else op_type
        found.append(f"torch does not run {name} ({len(nodes)} x, first {node_label(nodes[0])})")
    # The first tensor of each type says what holds for all of them.
    firsts = {tensor.data_type: tensor for tensor in reversed(list(store.tensors()))}
    for kind, tensor in firsts.items():
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
            as_tensor(np.empty(0, dtype), torch.device("cpu"), None)
        except TypeError as e:
            found.append(f"tensor {tensor.name!r}: {e}")
    return tuple(found)
