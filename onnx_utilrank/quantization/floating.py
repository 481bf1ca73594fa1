"""Sixteen bits: float16 and bfloat16 in the place of float32, inputs and outputs apart.

`onnxruntime.transformers.float16` is not used: it clips weights that pass 65504 in silence, knows
nothing of activations that do, needs shapes that onnx infers, and takes quadratic time.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from onnx_utilrank.errors import ModelError, ProviderUnavailableError
from onnx_utilrank.model.graph import GraphIndex, all_names, new_name, node_label, qualified
from onnx_utilrank.model.rotated import rotating
from onnx_utilrank.model.scopes import captured_names, subgraphs
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.model.surgeon import FIRST_IR_WITH_FREE_INITIALIZERS
from onnx_utilrank.quantization.prepare import FLOAT, settled, value_types
from onnx_utilrank.quantization.ranges import ranges
from onnx_utilrank.quantization.scheme import Calibration, Quantized, require_known
from onnx_utilrank.runtime.providers import CPU, Provider
from onnx_utilrank.sites.site import Skip

__all__ = ["BF16", "FP16", "Floating"]

# Values of unseen samples may be so many times those of the calibration samples.
HEADROOM = 4.0

# Operators whose values are counts, scales of integers, or made anew in a stated type.
_AS_THEY_ARE = frozenset(
    {"Cast", "CastLike", "ConstantOfShape", "Constant", "EyeLike", "RandomNormal", "RandomUniform"}
    | {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Range"}
)

TOO_LARGE = "its values pass the range of {}"
VANISHES = "its constant is too small for {}"
NO_KIND = "its operator has no form for {}"
DIES = "ONNX Runtime would die of the product behind it in {} on the CPU"


class Floating:
    """Weights and activations in a floating type of two bytes."""

    def __init__(self, key: str, kind: int) -> None:
        self.key = key
        self._kind = kind
        self._dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))

    def check(self, provider: Provider) -> None:
        """See `Scheme.check`: the CPU has no bfloat16 kernels, and ONNX Runtime no casts to help.

        Raises:
            ProviderUnavailableError: It is bfloat16 on the CPU.
        """
        if self is BF16 and provider.name == CPU.name:
            raise ProviderUnavailableError(
                f"{self.key}: ONNX Runtime has no bfloat16 kernels on provider {provider.key}, so "
                "that no result could be validated; name one that has them, such as --provider cuda"
            )

    def matrix_bytes(
        self, op_type: str, outputs: int, inputs: int, dtype: np.dtype[np.generic]
    ) -> float:
        """See `Scheme.matrix_bytes`."""
        del op_type
        return float(outputs * inputs * (2 if dtype == np.float32 else dtype.itemsize))

    def quantize(
        self, store: ModelStore, calibration: Calibration, in_float: Sequence[str] | None = None
    ) -> Quantized:
        """See `Scheme.quantize`.

        Nodes stay in float32 where a value that they read or make comes within a quarter of the
        type's range on the samples, where a constant of theirs would become 0, and where their
        operator (of that opset) has no form for it.
        """
        source = _lifted(store)
        index = GraphIndex.build(source)
        nodes = list(source.proto.graph.node)
        types = value_types(source, calibration.provider)
        slots = [_slots(index, node, types, self._kind) for node in nodes]
        name = self._dtype.name
        reasons: dict[int, str] = {}
        for k, node in enumerate(nodes):
            if not slots[k]:
                floats = any(types.get(n) == FLOAT for n in (*node.input, *node.output))
                if floats and node.op_type not in _AS_THEY_ARE:
                    reasons[k] = NO_KIND.format(name)
        for k in _deadly(index, nodes) if calibration.provider.name == CPU.name else ():
            reasons[k] = DIES.format(name)
        if in_float is None:
            for k, why in self._out_of_range(index, nodes, slots, calibration):
                reasons.setdefault(k, why.format(name))
        else:
            require_known(store, index.producers, in_float)
            for each in in_float:
                reasons.setdefault(index.producers[each], TOO_LARGE.format(name))
        chosen = {k for k, found in enumerate(slots) if found and k not in reasons}
        if not chosen:
            raise ModelError(f"{store.label}: {self.key}: no node can be of {name}")
        made = _rewritten(index, self._kind, {k: slots[k] for k in chosen})
        weighty = [k for k in sorted(chosen) if slots[k].intersection(index.initializers)]
        return Quantized(
            store=made,
            weights=tuple(node_label(nodes[k]) for k in weighty),
            left=tuple(
                Skip(node=node_label(nodes[k]), op_type=nodes[k].op_type, reason=why)
                for k, why in sorted(reasons.items())
            ),
            in_float=tuple(
                next(filter(None, nodes[k].output))
                for k, why in sorted(reasons.items())
                if why not in (NO_KIND.format(name), DIES.format(name))
            ),
        )

    def _out_of_range(
        self,
        index: GraphIndex,
        nodes: Sequence[onnx.NodeProto],
        slots: Sequence[frozenset[str]],
        calibration: Calibration,
    ) -> Iterator[tuple[int, str]]:
        """Nodes that have to stay for the values they see."""
        limits = np.finfo(np.float16) if self._dtype == np.float16 else None
        if limits is None:
            return  # bfloat16 has the exponents of float32
        used = {n for found in slots for n in found} - index.constants
        # What is infinite stays in float with all that is too large.
        found = ranges(index.store, sorted(used), calibration, finite=False)
        largest = {name: max(map(abs, edges)) for name, edges in found.items()}
        small: set[str] = set()
        for name in {n for node in nodes for n in node.input if n in index.constants}:
            values = index.constant(name)
            if values is None or values.dtype != np.float32 or not values.size:
                continue
            largest[name] = float(np.abs(values).max()) * HEADROOM  # what it is, exactly
            if values.size == 1 and 0 < abs(float(values.reshape(-1)[0])) < float(limits.tiny):
                small.add(name)
        for k, node in enumerate(nodes):
            seen = [n for n in (*node.input, *node.output) if n in slots[k]]
            if any(largest.get(n, 0.0) > float(limits.max) / HEADROOM for n in seen):
                yield k, TOO_LARGE
            elif small.intersection(seen):
                yield k, VANISHES


def _deadly(index: GraphIndex, nodes: Sequence[onnx.NodeProto]) -> Iterator[int]:
    """Places of Transposes that no product of two bytes may read; see `model.rotated`."""
    for node in nodes:
        if qualified(node) == ("", "MatMul"):
            found = rotating(index, node.input[0])
            if found is not None:
                yield found


def _slots(
    index: GraphIndex, node: onnx.NodeProto, types: Mapping[str, int], kind: int
) -> frozenset[str]:
    """The values of a node that may be of the type, by what its operator's schema allows.

    Empty where none may, or where the node has to stay as it is.
    """
    if node.op_type in _AS_THEY_ARE or any(True for _ in subgraphs(node)):
        return frozenset()
    schema = _schema(index, node)
    if schema is None:
        return frozenset()
    wanted = f"tensor({onnx.helper.tensor_dtype_to_np_dtype(kind).name})"
    allowed: set[str] = set()
    fixed: set[str] = set()
    for names, formals in ((node.input, schema[0]), (node.output, schema[1])):
        for place, name in enumerate(names):
            if types.get(name) != FLOAT or not formals:
                continue
            # The last one may stand for any number of values.
            takes = formals[min(place, len(formals) - 1)]
            (allowed if wanted in takes else fixed).add(name)
    return frozenset(allowed) if allowed and not allowed & fixed else frozenset()


_Formals = tuple[list[frozenset[str]], list[frozenset[str]]]
_KNOWN: dict[tuple[str, str, int], _Formals | None] = {}


def _schema(index: GraphIndex, node: onnx.NodeProto) -> _Formals | None:
    """The types that each input and output of an operator takes; None where it is not known."""
    domain, op_type = qualified(node)
    local = {(f.domain, f.name) for f in index.store.proto.functions}
    if (node.domain, op_type) in local:
        return None
    imported = {o.domain: o.version for o in index.store.proto.opset_import}
    key = domain, op_type, imported.get(domain, 1) if domain else index.store.opset
    if key not in _KNOWN:
        _KNOWN[key] = _looked_up(*key)
    return _KNOWN[key]


def _looked_up(domain: str, op_type: str, version: int) -> _Formals | None:
    if domain == "":
        try:
            schema = onnx.defs.get_schema(op_type, version, domain)
        except onnx.defs.SchemaError:
            return None
        return tuple(  # type: ignore[return-value]
            [frozenset(f.types) for f in formals] for formals in (schema.inputs, schema.outputs)
        )
    schemas = [s for s in get_all_operator_schema() if (s.domain, s.name) == (domain, op_type)]
    if not schemas:
        return None
    newest = max(schemas, key=lambda s: s.since_version)
    classes = {c.type_param_str: frozenset(c.allowed_type_strs) for c in newest.type_constraints}
    return tuple(  # type: ignore[return-value]
        [classes.get(f.typeStr, frozenset({f.typeStr})) for f in formals]
        for formals in (newest.inputs, newest.outputs)
    )


def _lifted(store: ModelStore) -> ModelStore:
    """The model with float32 weights of Constant nodes as initializers; itself without any."""
    nodes = store.proto.graph.node
    held = {
        k: next((a.t for a in node.attribute if a.name == "value" and a.t.data_type == FLOAT), None)
        for k, node in enumerate(nodes)
        if qualified(node) == ("", "Constant")
    }
    lifted = {k: tensor for k, tensor in held.items() if tensor is not None}
    if not lifted:
        return store
    proto = onnx.ModelProto()
    proto.CopyFrom(store.proto)
    del proto.graph.node[:]
    proto.graph.node.extend(node for k, node in enumerate(nodes) if k not in lifted)
    for k, tensor in lifted.items():
        proto.graph.initializer.add().CopyFrom(tensor)
        proto.graph.initializer[-1].name = nodes[k].output[0]
    return ModelStore(proto=proto, folder=store.folder, name=store.label)


def _rewritten(index: GraphIndex, kind: int, chosen: Mapping[int, frozenset[str]]) -> ModelStore:
    """The model with values of some nodes in another floating type.

    A value has two versions at most: of float32 under its own name, and of the type, which has
    the name too where it is the only one.

    Args:
        index: The model.
        kind: The type.
        chosen: By place of each node, those of its values that are to be of the type.
    """
    store = index.store
    proto = onnx.ModelProto()
    proto.CopyFrom(store.proto)
    graph = proto.graph
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    short = frozenset[str]().union(*chosen.values())
    made_short = {n for k, own in chosen.items() for n in index.node(k).output if n in own}
    full = {v.name for v in (*graph.input, *graph.output) if v.name not in index.initializers}
    for k, node in enumerate(graph.node):
        full.update({*node.input, *node.output} - chosen.get(k, frozenset()))
        full |= captured_names(node)
    taken = all_names(proto)
    named = {n: new_name(f"{n}/{dtype.name}", taken) if n in full else n for n in sorted(short)}

    def cast(name: str, to: str, kind: int) -> onnx.NodeProto:
        label = new_name(f"{to}/cast", taken)
        return onnx.helper.make_node("Cast", [name], [to], name=label, to=kind)

    present = {*index.initializers, *made_short}
    nodes: list[onnx.NodeProto] = []
    for k, node in enumerate(store.proto.graph.node):
        own = chosen.get(k, frozenset())
        for name in node.input:
            if name in own and name not in present:
                present.add(name)
                nodes.append(cast(name, named[name], kind))
        new = onnx.NodeProto()
        new.CopyFrom(node)
        new.input[:] = [named[n] if n in own else n for n in node.input]
        new.output[:] = [named[n] if n in own else n for n in node.output]
        nodes.append(new)
        both = [n for n in node.output if n in own and n in full]
        nodes.extend(cast(named[name], name, FLOAT) for name in both)
    del graph.node[:]
    graph.node.extend(nodes)
    for tensor in list(graph.initializer):
        if tensor.name in short:
            values = store.array(index.initializers[tensor.name]).astype(dtype)
            target = graph.initializer.add() if tensor.name in full else tensor
            target.CopyFrom(numpy_helper.from_array(values, named[tensor.name]))
    for value in graph.value_info:
        if value.name in short and value.name not in full:
            value.type.tensor_type.elem_type = kind
    stays = [v for v in graph.input if v.name in full or v.name not in short]
    if len(stays) < len(graph.input):
        del graph.input[:]
        graph.input.extend(stays)
        proto.ir_version = max(proto.ir_version, FIRST_IR_WITH_FREE_INITIALIZERS)
    return settled(proto, store)


FP16 = Floating("fp16", onnx.TensorProto.FLOAT16)
BF16 = Floating("bf16", onnx.TensorProto.BFLOAT16)
