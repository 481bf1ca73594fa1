"""Run one sample with values exposed, to learn shapes and means that the file does not tell."""

import math
from collections.abc import Collection, Mapping

import numpy as np
import onnx

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import GraphIndex, attributes, node_label
from onnx_utilrank.model.plain import index_model
from onnx_utilrank.model.plain_recurrent import is_recurrent
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, InferenceError, open_session

__all__ = ["LINEAR_OPS", "check_finite", "expose", "inputs_of", "linear_flops", "survey"]

LINEAR_OPS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})


def expose(store: ModelStore, names: Collection[str]) -> ModelStore:
    """A copy of the model in which the named values are outputs too."""
    proto = onnx.ModelProto()
    proto.CopyFrom(store.proto)
    known = {o.name for o in proto.graph.output}
    # Without a type: ONNX Runtime infers it, also for operators that onnx does not know.
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return ModelStore(proto=proto, folder=store.folder, name=store.label)


def inputs_of(store: ModelStore, feed: Feed) -> Feed:
    """A feed without what is no input: labels may have the name of another value, or of a mask."""
    names = {i.name for i in store.proto.graph.input}
    return {name: value for name, value in feed.items() if name in names}


def survey(
    store: ModelStore, names: Collection[str], feed: Feed, provider: Provider
) -> dict[str, np.ndarray]:
    """The values that `names` take on one feed.

    Graph inputs may be named too. All values are held at once, so the feed should be one sample.

    Raises:
        ModelError: The model does not load or run.
    """
    given = inputs_of(store, feed)
    inner = [name for name in names if name not in given]
    values = {name: np.asarray(given[name]) for name in names if name in given}
    if not inner:  # no names would be all outputs to ONNX Runtime
        return values
    session = open_session(expose(store, inner), provider)
    return values | session.run(feed, inner)


def check_finite(
    index: GraphIndex, outputs: Mapping[str, np.ndarray], feed: Feed, provider: Provider
) -> None:
    """Look for NaN and infinity in outputs; where there is any, find the node that began it.

    Raises:
        ModelError: An output is not finite; the message names the first node that is not.
    """
    broken = [name for name, value in outputs.items() if not _finite(value)]
    if not broken:
        return
    suspects = [name for node in index.store.proto.graph.node for name in filter(None, node.output)]
    try:
        values = survey(index.store, suspects, feed, provider)
    except InferenceError:
        values = {}
    # Infinities are at home in attention masks; a NaN is not, so the first NaN is the culprit.
    for is_bad in (_has_nan, lambda value: not _finite(value)):
        for name in suspects:
            if name in values and is_bad(values[name]):
                culprit = node_label(index.node(index.producers[name]))
                raise ModelError(
                    f"{index.store.label}: output {broken[0]!r} holds NaN or infinity on the "
                    f"calibration data; it begins at {culprit}, value {name!r}"
                )
    raise ModelError(f"{index.store.label}: output {broken[0]!r} holds NaN or infinity")


def _finite(value: np.ndarray) -> bool:
    return not _is_float(value) or bool(np.isfinite(value).all())


def _has_nan(value: np.ndarray) -> bool:
    return _is_float(value) and bool(np.isnan(value).any())


def _is_float(value: object) -> bool:
    # Sequences and maps come out as lists and dictionaries; bfloat16 has a kind of its own.
    return isinstance(value, np.ndarray) and value.dtype.kind in "fV"


def linear_flops(store: ModelStore, feed: Feed, provider: Provider) -> int:
    """Floating-point operations of MatMul, Gemm, Conv and ConvTranspose on one feed.

    Nodes that fuse such a product with others count as the product, and recurrent layers as their
    two products.

    Two a multiply-accumulate; counted from the shapes that really occur. Subgraphs, and what other
    operators do, are not counted.

    Raises:
        ModelError: The model does not load or run.
    """
    index = index_model(store)
    store = index.store
    nodes = [
        node
        for node in store.proto.graph.node
        if node.op_type in LINEAR_OPS and node.domain in ("", "ai.onnx")
    ]
    steps = [(k, node) for k, node in enumerate(store.proto.graph.node) if is_recurrent(node)]
    made = {name for node in store.proto.graph.node for name in node.output}
    graph = store.proto.graph
    constants = {t.name: tuple(t.dims) for t in graph.initializer}
    constants |= {t.values.name: tuple(t.dims) for t in graph.sparse_initializer}
    names = {name for node in nodes for name in (*node.input[:2], node.output[0])}
    names |= {name for _, node in steps for name in node.input[:3]}
    values = survey(store, [n for n in names if n in made or n in feed], feed, provider)
    shapes = constants | {name: value.shape for name, value in values.items()}
    found = sum(_flops(node, shapes) for node in nodes)
    for k, node in steps:
        x, w, r = (shapes[name] for name in node.input[:3])
        # The product with the input is seen by itself where the layer was taken apart.
        own = math.prod(w) if index.origin(k) == node else 0
        found += 2 * math.prod(x[:2]) * (own + math.prod(r))
    return found


def _flops(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    first, second, out = (shapes[name] for name in (*node.input[:2], node.output[0]))
    size = int(np.prod(out, dtype=np.int64))
    if node.op_type == "ConvTranspose":
        size, depth = math.prod(first), math.prod(second[1:])
    elif node.op_type == "Conv":
        depth = int(np.prod(second[1:], dtype=np.int64))
    elif node.op_type == "Gemm" and attributes(node).get("transA", 0):
        depth = first[0]
    else:
        depth = first[-1]
    return 2 * size * depth
