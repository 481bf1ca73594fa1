"""A working copy of a model as onnxruntime.quantization needs it, and the way back.

It knows nodes by name, weights as initializers and values by their declared types, and it writes
beside the model; models in the wild have nameless nodes, weights in Constant nodes or behind a
Transpose, and operators whose types onnx cannot infer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_utilrank.calibration.survey import expose
from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.external import Scratch
from onnx_utilrank.model.graph import GraphIndex, all_names, new_name
from onnx_utilrank.model.store import INLINE_LIMIT, ModelStore
from onnx_utilrank.model.surgeon import FIRST_IR_WITH_FREE_INITIALIZERS
from onnx_utilrank.quantization.nodes import Weighted, gemm_factors
from onnx_utilrank.quantization.ort import calling, tools
from onnx_utilrank.quantization.scheme import Calibration
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import open_session

__all__ = ["FLOAT", "Prepared", "at_opset", "prepare", "settled", "value_types"]

FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A working copy in a folder of its own.

    Attributes:
        source: The model it is of.
        names: Of every node of the main graph, in order.
        scratch: The folder; it goes with this object.
        path: The model in it.
    """

    source: ModelStore
    names: tuple[str, ...]
    scratch: Scratch
    path: Path

    def inferred(self, scheme: str) -> onnx.ModelProto:
        """The copy with all of its weights in it and the types of its values declared."""
        with calling(self.source.label, scheme):
            proto: onnx.ModelProto = tools().quant_utils.load_model_with_shape_infer(self.path)
        return proto

    def finished(self, made: onnx.ModelProto) -> ModelStore:
        """What was made of the copy, with what the source says of itself."""
        source = self.source.proto
        given = {
            name for name, node in zip(self.names, source.graph.node, strict=True) if node.name
        }
        for node in made.graph.node:
            if node.name in self.names and node.name not in given:
                node.name = ""
        kept = {name for node in made.graph.node for name in node.output}
        values = [value for value in source.graph.value_info if value.name in kept]
        del made.graph.value_info[:]
        made.graph.value_info.extend(values)
        del made.metadata_props[:]
        made.metadata_props.extend(source.metadata_props)
        for field in ("producer_name", "producer_version", "doc_string"):
            setattr(made, field, getattr(source, field))
        return settled(made, self.source)


def settled(proto: onnx.ModelProto, source: ModelStore) -> ModelStore:
    """A model made of another one, with its weights outside where those of the other are.

    Args:
        proto: The model; tensors that lie outside are in the folder of the source.
        source: What it was made of.
    """
    store = ModelStore(proto=proto, folder=source.folder, name=source.label)
    if not source.has_external_data and proto.ByteSize() <= INLINE_LIMIT:
        return store
    scratch = Scratch()
    path = scratch.path / "model.onnx"
    store.save(path, save_as_external_data=True)
    held = ModelStore.load(path).proto
    return ModelStore(proto=held, folder=scratch.path, name=source.label, scratch=scratch)


def prepare(
    index: GraphIndex, weights: Sequence[Weighted], provider: Provider, *, gemms: bool = True
) -> Prepared:
    """Make the working copy.

    Args:
        index: The model; it is not changed.
        weights: Nodes whose weights have to be initializers.
        provider: Where it runs.
        gemms: Whether Gemm nodes may stay; else they become MatMul and Add.

    Raises:
        ModelError: It does not load, or a weight cannot be read.
        UtilrankError: There is no room for it.
    """
    store = index.store
    proto = onnx.ModelProto()
    proto.CopyFrom(store.proto)
    graph = proto.graph
    taken = all_names(proto)
    often = Counter(node.name for node in graph.node)
    names = []
    for node in graph.node:
        if not node.name or often[node.name] > 1:
            node.name = new_name(f"{node.op_type}_{node.output[0] if node.output else ''}", taken)
        names.append(node.name)
    folded: dict[tuple[str, float, bool], str] = {}

    def fold(name: str, gain: float = 1.0, *, turned: bool = False) -> str:
        """An initializer that holds a constant of the model, perhaps scaled or transposed."""
        if name in index.initializers and gain == 1.0 and not turned:
            return name
        key = name, gain, turned
        if key not in folded:
            values = index.constant(name)
            assert values is not None
            scaled = (values.T if turned else values) * np.asarray(gain, values.dtype)
            folded[key] = new_name(f"{name}/folded", taken)
            tensor = numpy_helper.from_array(np.ascontiguousarray(scaled), folded[key])
            graph.initializer.append(tensor)
        return folded[key]

    places = {each.place: each for each in weights}
    nodes = []
    for k, node in enumerate(graph.node):
        nodes.append(node)
        if k not in places:
            continue
        each = places[k]
        slot = list(node.input).index(each.weight)
        if each.op_type != "Gemm":
            node.input[slot] = fold(each.weight)
            continue
        # What is written for a Gemm forgets beta and has no form for alpha, or none for a Gemm.
        alpha, beta = gemm_factors(node)
        split = not gemms
        turned = split and any(a.name == "transB" and a.i for a in node.attribute)
        node.input[slot] = fold(each.weight, alpha, turned=turned)
        if beta != 1.0 and len(node.input) > 2 and node.input[2]:
            node.input[2] = fold(node.input[2], beta)
        gone = {"alpha", "beta"} | ({"transA", "transB"} if split else set())
        kept = [a for a in node.attribute if a.name not in gone]
        del node.attribute[:]
        node.attribute.extend(kept)
        if split:
            node.op_type = "MatMul"
            added = [name for name in node.input[2:] if name]
            del node.input[2:]
            if added:
                y = node.output[0]
                node.output[0] = new_name(f"{y}/product", taken)
                label = new_name(f"{node.name}/bias", taken)
                nodes.append(helper.make_node("Add", [node.output[0], *added], [y], name=label))
    held = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(held)
    _drop_unread(proto, {name for name, *_ in folded})
    stays = [value for value in graph.input if value.name not in index.initializers]
    if len(stays) < len(graph.input):
        del graph.input[:]
        graph.input.extend(stays)
        proto.ir_version = max(proto.ir_version, FIRST_IR_WITH_FREE_INITIALIZERS)
    _declare(proto, store, provider)
    scratch = Scratch()
    path = scratch.path / "model.onnx"
    ModelStore(proto=proto, folder=store.folder).save(path)
    return Prepared(source=store, names=tuple(names), scratch=scratch, path=path)


def _drop_unread(proto: onnx.ModelProto, before: set[str]) -> None:
    """Remove what only made constants that are read no more."""
    graph = proto.graph
    doomed = set(before)
    while doomed:
        read = {name for node in graph.node for name in node.input}
        read |= {value.name for value in graph.output}
        gone = [n for n in graph.node if set(n.output) & doomed and not set(n.output) & read]
        unread = [t for t in graph.initializer if t.name in doomed and t.name not in read]
        if not gone and not unread:
            return
        doomed |= {name for node in gone for name in node.input}
        for node in gone:
            graph.node.remove(node)
        for tensor in unread:
            graph.initializer.remove(tensor)


def value_types(store: ModelStore, provider: Provider) -> dict[str, int]:
    """Element types of the values of the main graph that are known: of those made, float32 alone.

    ONNX Runtime tells them, also behind operators that onnx does not know.

    Raises:
        ModelError: It does not load.
    """
    graph = store.proto.graph
    types = {t.name: t.data_type for t in graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in graph.input}
    made = [name for node in graph.node for name in node.output if name]
    session = open_session(expose(store, made), provider, optimize=False)
    types |= {v.name: FLOAT for v in session.raw.get_outputs() if v.type == "tensor(float)"}
    return types


def _declare(proto: onnx.ModelProto, store: ModelStore, provider: Provider) -> None:
    """Declare the types of values as ONNX Runtime sees them, where the model does not."""
    graph = proto.graph
    known = {value.name for value in (*graph.value_info, *graph.input, *graph.output)}
    working = ModelStore(proto=proto, folder=store.folder, name=store.label)
    for name, kind in value_types(working, provider).items():
        if name not in known and kind == FLOAT:
            graph.value_info.append(helper.make_tensor_value_info(name, kind, None))


def at_opset(store: ModelStore, opset: int, calibration: Calibration) -> ModelStore:
    """The model in an opset, converted by onnx's own converter where it is older.

    The converter knows most operators but is not exact in all, so the outputs have to be the same.

    Args:
        store: The model.
        opset: The opset.
        calibration: Samples to compare on.

    Raises:
        ModelError: It cannot be converted without changing what it computes.
    """
    if store.opset >= opset:
        return store
    refusal = f"{store.label}: quantization needs opset {opset}; the model has {store.opset}"
    try:
        proto = onnx.version_converter.convert_version(store.whole(), opset)
    except (onnx.version_converter.ConvertError, RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise ModelError(f"{refusal} and cannot be converted ({reason})") from e
    # The converter drops these two.
    proto.metadata_props.extend(p for p in store.proto.metadata_props)
    converted = ModelStore(proto=proto, name=store.label)
    feed, provider = calibration.judging()[0], calibration.provider
    before = open_session(store, provider, optimize=False).run(feed)
    after = open_session(converted, provider, optimize=False).run(feed)
    for name, expected in before.items():
        if not np.allclose(expected, after[name], rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ModelError(
                f"{refusal}, and onnx's version converter changes what it computes (output "
                f"{name!r})"
            )
    return converted
