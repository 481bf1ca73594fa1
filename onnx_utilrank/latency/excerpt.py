"""One node of a model by itself, with its bias: small enough to be timed in every form."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.sessions import Feed
from onnx_utilrank.sites.find import find_sites, site_kind
from onnx_utilrank.sites.site import Site, Use

__all__ = ["Excerpt", "excerpt", "values_read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """A model of one node with a weight, and of the Add that holds its bias, if one does.

    Attributes:
        index: The model. Its weight is random: time does not depend on it.
        site: The weight.
        feed: What the node reads in the model it comes from.
        key: A digest that is equal for nodes that differ in names and values alone.
    """

    index: GraphIndex
    site: Site
    feed: Feed
    key: str


def values_read(index: GraphIndex, site: Site) -> set[str]:
    """The values that are not constant and that the nodes of a site read."""
    return {
        name
        for use in site.uses
        for node in _nodes(index, use)[:1]
        for name in node.input
        if name and name not in index.constants
    }


def excerpt(
    index: GraphIndex,
    use: Use,
    values: Mapping[str, np.ndarray],
    *,
    rows: int | None = None,
    columns: int | None = None,
) -> Excerpt | None:
    """Take a node out of its model.

    Args:
        index: The model.
        use: The node.
        values: What it reads, by name: all of `values_read`.
        rows: Outputs that the weight is left with, the first of them; None for all.
        columns: Inputs that it is left with; None for all.

    Returns:
        The excerpt; None where the node means something else without its model.
    """
    m, d = rows or use.m, columns or use.d
    proto = onnx.ModelProto(ir_version=index.store.proto.ir_version)
    proto.opset_import.extend(index.store.proto.opset_import)
    proto.graph.name = "excerpt"
    feed: dict[str, np.ndarray] = {}
    names: dict[str, str] = {"": ""}
    for node in _nodes(index, use):
        for name in node.input:
            if name in names:
                continue
            new = names.setdefault(name, f"v{len(names)}")
            held = _weight(index, use, m, d) if name == use.weight else index.constant(name)
            if held is not None:
                if name != use.weight and m != use.m:
                    held = _fewer(held, use.m, m)
                proto.graph.initializer.append(numpy_helper.from_array(np.asarray(held), new))
                continue
            value = values[name]
            if name == use.inputs.tensor and d != use.d:
                value = _first(value, use, d)
            feed[new] = value
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            proto.graph.input.append(onnx.helper.make_tensor_value_info(new, kind, value.shape))
        copy = proto.graph.node.add()
        copy.CopyFrom(node)
        copy.name = ""
        copy.doc_string = ""
        for name in filter(None, node.output):
            names.setdefault(name, f"v{len(names)}")
        copy.input[:] = [names[name] for name in node.input]
        copy.output[:] = [names[name] for name in node.output]
    # Without a type: ONNX Runtime infers it.
    proto.graph.output.append(onnx.ValueInfoProto(name=copy.output[0]))
    alone = GraphIndex.build(ModelStore(proto=proto, name=use.label))
    sites, _ = find_sites(alone)
    site = next((s for s in sites if s.weight == names[use.weight]), None)
    if site is None or (site.m, site.d) != (m, d):
        return None
    return Excerpt(index=alone, site=site, feed=feed, key=_digest(proto))


def _nodes(index: GraphIndex, use: Use) -> list[onnx.NodeProto]:
    nodes = [index.node(use.node)]
    if use.bias.kind == "add":
        nodes.append(index.node(use.bias.node))
    return nodes


def _weight(index: GraphIndex, use: Use, m: int, d: int) -> np.ndarray:
    kind = index.constant_type(use.weight)
    assert kind is not None
    shape, dtype = kind
    matrix = np.random.default_rng(0).standard_normal((m, d), dtype=np.float32) / np.sqrt(d)
    like = np.broadcast_to(np.zeros((), dtype=dtype), shape)
    return site_kind(use.op_type).stored(use, like, matrix).astype(dtype)


def _fewer(held: np.ndarray, m: int, kept: int) -> np.ndarray:
    """A bias, of fewer features."""
    return held[tuple(slice(kept if n == m else n) for n in held.shape)]


def _first(value: np.ndarray, use: Use, d: int) -> np.ndarray:
    """The first features of an input."""
    patches = use.inputs.patches
    features = d if patches is None else d * patches.channels // use.d
    places: list[slice] = [slice(None)] * value.ndim
    places[use.inputs.axis] = slice(features)
    return np.ascontiguousarray(value[tuple(places)])


def _digest(proto: onnx.ModelProto) -> str:
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    for tensor in bare.graph.initializer:
        tensor.ClearField("raw_data")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()
