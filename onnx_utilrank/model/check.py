"""What is looked at before anything of a model is believed: its names, tensors and order.

Runtimes refuse most of this too, some with messages that name neither node nor tensor, and some
only after they have taken the memory. Each check is linear in the size of the model, and none
reads a weight.
"""

import graphlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from onnx_utilrank.model.scopes import all_nodes, captured_names, node_label, subgraphs

__all__ = ["model_fault", "outside_fault", "stored_bytes"]

# Bits of the types that share bytes. How six bits lie in a file is left to the runtime.
_PACKED = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}
_UNKNOWN = frozenset({"float6_e2m3fn", "float6_e3m2fn"})

# Elements and bytes are counted in 64 bits everywhere.
_MOST = 2**63 - 1

# Runtimes make sparse tensors dense, up to protobuf's limit.
_DENSE_MOST = 2**31


def model_fault(
    model: onnx.ModelProto, tensors: Iterable[onnx.TensorProto], folder: Path | None
) -> str | None:
    """What no model may be, whatever runs it.

    Args:
        model: The model.
        tensors: All its tensors.
        folder: Where external data have to lie; None where that is not known.

    Returns:
        The first fault that is found, in words; None for a sound model.
    """
    fault = _name_fault(model)
    if fault:
        return fault
    for tensor in tensors:
        fault = _tensor_fault(tensor, folder)
        if fault:
            return f"tensor {tensor.name!r}: {fault}"
    for sparse in model.graph.sparse_initializer:
        fault = _sparse_fault(sparse)
        if fault:
            return f"sparse tensor {sparse.values.name!r}: {fault}"
    for value in (*model.graph.input, *model.graph.output):
        code = value.type.tensor_type.elem_type
        if code and _element_type(code) is None:
            return f"value {value.name!r}: element type {code} is not known"
    for node in all_nodes(model.graph):
        for attribute in node.attribute:
            if attribute.ref_attr_name:  # which only a function has any to refer to
                return f"{node_label(node)}: attribute {attribute.name!r} refers to another one"
    return _order_fault(model.graph)


def _element_type(code: int) -> np.dtype[np.generic] | None:
    """The numpy type of an ONNX element type; None where it is none."""
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(code))
    except KeyError:
        return None


def stored_bytes(tensor: onnx.TensorProto) -> int | None:
    """Bytes that raw or external data of a tensor's type and shape take; None where not known."""
    kind = _element_type(tensor.data_type)
    if kind is None or kind.kind == "O" or kind.name in _UNKNOWN:
        return None
    bits = _PACKED.get(kind.name, 8 * kind.itemsize)
    return int(-(-math.prod(tensor.dims) * bits // 8))


def _tensor_fault(tensor: onnx.TensorProto, folder: Path | None) -> str | None:
    """What is wrong with a tensor's type, shape or data, if anything."""
    kind = _element_type(tensor.data_type)
    if kind is None:
        return f"element type {tensor.data_type} is not known"
    if any(n < 0 for n in tensor.dims):
        return f"shape {list(tensor.dims)} has a negative dimension"
    if math.prod(tensor.dims) * kind.itemsize > _MOST:
        return f"shape {list(tensor.dims)} overflows 64 bits"
    if tensor.HasField("segment"):
        return "its data come in segments, which no runtime reads"
    if tensor.data_location == TensorProto.EXTERNAL:
        return outside_fault(tensor, folder)
    wanted = stored_bytes(tensor)
    if tensor.HasField("raw_data"):
        if wanted is not None and len(tensor.raw_data) != wanted:
            return _disagreement(tensor, len(tensor.raw_data), wanted, "bytes")
        return None
    found = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
    count = math.prod(tensor.dims)
    if kind.name in _PACKED:
        count = -(-count * _PACKED[kind.name] // 8)
    elif kind.kind == "c":
        count *= 2
    if found != count and kind.name not in _UNKNOWN:
        return _disagreement(tensor, found, count, "values")
    return None


def _sparse_fault(tensor: onnx.SparseTensorProto) -> str | None:
    """What is wrong with the shape of a sparse tensor, if anything."""
    if any(n < 0 for n in tensor.dims):
        return f"shape {list(tensor.dims)} has a negative dimension"
    kind = _element_type(tensor.values.data_type)
    size = math.prod(tensor.dims) * (kind.itemsize if kind else 1)
    return (
        f"shape {list(tensor.dims)} is too large to be made dense" if size > _DENSE_MOST else None
    )


def _disagreement(tensor: onnx.TensorProto, found: int, wanted: int, unit: str) -> str:
    return f"shape {list(tensor.dims)} takes {wanted} {unit}, its data have {found}"


def outside_fault(tensor: onnx.TensorProto, folder: Path | None) -> str | None:
    """What is wrong with where the data of an external tensor lie, if anything."""
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    numbers = {key: entries[key] for key in ("offset", "length") if key in entries}
    for key, value in numbers.items():
        if not (value.isascii() and value.isdigit()) or len(value) > 19:
            return f"{key} {value!r} of its data is not a number of bytes"
    wanted = stored_bytes(tensor)
    if wanted is None and "length" not in numbers:
        return "data of this type cannot lie outside the model without a stated length"
    length = int(numbers.get("length", wanted or 0))
    if wanted is not None and length != wanted:
        return _disagreement(tensor, length, wanted, "bytes")
    path = Path(location)
    if not location or "\0" in location or path.is_absolute() or ".." in path.parts:
        return f"its data lie at {location!r}, which is not inside the model's folder"
    if folder is None:
        return None
    whole = folder / path
    try:
        if os.path.realpath(whole) != str(Path(os.path.realpath(folder), path)):
            return f"its data file {location!r} is behind a symbolic link"
        if not whole.is_file():
            return f"its data file {location!r} does not exist"
        size = whole.stat().st_size
    except OSError as e:
        return f"its data file {location!r} cannot be read ({e.strerror or e})"
    offset = int(numbers.get("offset", 0))
    if offset + length > size:
        return f"its data end at byte {offset + length} of {location!r}, which has {size}"
    return None


def _name_fault(model: onnx.ModelProto) -> str | None:
    """Whether a name is not text: protobuf then gives it as bytes, which nothing here expects."""
    for what, text in _names(model):
        if not isinstance(text, str):
            return f"a name of {what} is not UTF-8: {text!r}"
    return None


def _names(model: onnx.ModelProto) -> Iterator[tuple[str, object]]:
    for entry in model.opset_import:
        yield "an operator set", entry.domain
    for prop in model.metadata_props:
        yield from (("the metadata", text) for text in (prop.key, prop.value))
    for function in model.functions:
        mine = (function.name, function.domain, *function.input, *function.output)
        yield from (("a function", text) for text in mine)
        yield from _node_names(function.node)
    yield from _graph_names(model.graph)


def _graph_names(graph: onnx.GraphProto) -> Iterator[tuple[str, object]]:
    yield "the graph", graph.name
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield "a value", value.name
        for dim in value.type.tensor_type.shape.dim:
            yield "a dimension", dim.dim_param
    for tensor in graph.initializer:
        yield from _tensor_names(tensor)
    for sparse in graph.sparse_initializer:
        yield from _tensor_names(sparse.values)
    yield from _node_names(graph.node)


def _tensor_names(tensor: onnx.TensorProto) -> Iterator[tuple[str, object]]:
    yield "a tensor", tensor.name
    for entry in tensor.external_data:
        yield from (("external data", text) for text in (entry.key, entry.value))


def _node_names(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, object]]:
    for node in nodes:
        for text in (node.name, node.op_type, node.domain, *node.input, *node.output):
            yield "a node", text
        for attribute in node.attribute:
            yield "an attribute", attribute.name
            if attribute.HasField("t"):
                yield from _tensor_names(attribute.t)
        for inner in subgraphs(node):
            yield from _graph_names(inner)


def _order_fault(graph: onnx.GraphProto) -> str | None:
    """Whether a value is made twice or never, or nodes wait for each other's outputs.

    Nodes may stand before what they read: runtimes sort them.
    """
    made: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in filter(None, node.output):
            if name in made:
                makers = f"{node_label(made[name])} and {node_label(node)}"
                return f"value {name!r} is made twice, by {makers}"
            made[name] = node
    given = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    given |= {t.values.name for t in graph.sparse_initializer}
    known = given | {""}
    sorted_so_far = True
    for node in graph.node:
        for name in (*node.input, *captured_names(node)):
            if name in known:
                continue
            if name not in made:
                return f"{node_label(node)} reads {name!r}, which nothing makes"
            sorted_so_far = False
        known.update(node.output)
    for output in graph.output:
        if output.name not in known:
            return f"nothing makes the output {output.name!r}"
    return None if sorted_so_far else _cycle(graph)


def _cycle(graph: onnx.GraphProto) -> str | None:
    makers = {name: k for k, node in enumerate(graph.node) for name in node.output if name}
    needs = {
        k: {makers[n] for n in (*node.input, *captured_names(node)) if n in makers}
        for k, node in enumerate(graph.node)
    }
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as e:
        return f"{node_label(graph.node[e.args[1][0]])} waits for its own output"
    return None
