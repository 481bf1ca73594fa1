"""Who makes and who reads each value of a model's main graph, and which values are constant."""

import bisect
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.scopes import captured_names, node_label, qualified, subgraphs
from onnx_utilrank.model.store import ModelStore

__all__ = [
    "GraphIndex",
    "Span",
    "all_names",
    "attributes",
    "captured_names",
    "new_name",
    "node_label",
    "qualified",
    "subgraphs",
    "tensor_type",
]

# Operators that only move, cast or reshape data: a weight behind them is still a constant.
LAYOUT_OPS = frozenset(
    {"Identity", "Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten"}
)

# Operators that round data and scale them back. A model in which they count as layout is seen with
# the weights that it really applies.
ROUNDING_OPS = frozenset({"QuantizeLinear", "DequantizeLinear"})

# Layout operators in a row, at most, that a constant is followed through. Exporters write two or
# three; each that is followed may take as much memory as the constant.
DEEPEST = 32

# Elements of a constant that are looked at in one go, about.
PART = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Nodes of a model in plain form that stand for one node.

    Attributes:
        nodes: Their places.
        origin: The node.
    """

    nodes: range
    origin: onnx.NodeProto


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphIndex:
    """Lookup tables of one model's main graph.

    Attributes:
        store: The model, in plain form where that is another (`model.plain`).
        source: The model as it was given.
        spans: What was taken apart, in graph order.
        initializers: Dense initializers by name.
        constants: Names of all constant values, see `constant`.
        producers: Index of the node that makes each value.
        consumers: Indices of the nodes that read each value, once an input slot.
        pinned: Values that are needed whatever reads them: graph outputs, and names captured by
            subgraphs.
    """

    store: ModelStore
    source: ModelStore
    spans: tuple[Span, ...] = ()
    initializers: dict[str, onnx.TensorProto]
    constants: frozenset[str]
    producers: dict[str, int]
    consumers: dict[str, list[int]]
    pinned: frozenset[str]
    _folded: dict[str, np.ndarray] = field(default_factory=dict)
    _finite: dict[str, bool] = field(default_factory=dict)
    _extents: dict[str, tuple[int | None, ...]] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        store: ModelStore,
        *,
        source: ModelStore | None = None,
        spans: tuple[Span, ...] = (),
        dequantize: bool = False,
    ) -> "GraphIndex":
        """Index the main graph of `store`.

        Args:
            store: The model.
            source: What it is the plain form of, if it is.
            spans: What was taken apart for it.
            dequantize: Whether constants that are quantized, or dequantized, are constants still.
        """
        followed = LAYOUT_OPS | ROUNDING_OPS if dequantize else LAYOUT_OPS
        graph = store.proto.graph
        producers: dict[str, int] = {}
        consumers: defaultdict[str, list[int]] = defaultdict(list)
        pinned = {o.name for o in graph.output}
        initializers = {t.name: t for t in graph.initializer}
        depths = dict.fromkeys(initializers, 0)
        for k, node in enumerate(graph.node):
            for name in filter(None, node.output):
                producers[name] = k
            for name in filter(None, node.input):
                consumers[name].append(k)
            pinned |= captured_names(node)
            depth = _constant_depth(node, depths, followed)
            if depth <= DEEPEST:
                depths.update(dict.fromkeys(node.output, depth))
        return cls(
            store=store,
            source=source or store,
            spans=spans,
            initializers=initializers,
            constants=frozenset(depths) - {""},
            producers=producers,
            consumers=dict(consumers),
            pinned=frozenset(pinned),
            _extents={
                value.name: tuple(
                    dim.dim_value if dim.HasField("dim_value") else None
                    for dim in value.type.tensor_type.shape.dim
                )
                for value in (*graph.value_info, *graph.input)
                if value.type.tensor_type.HasField("shape")
            },
        )

    def __reduce__(self) -> tuple[object, ...]:
        # What was folded may be large, and is found again.
        held = (self.spans, self.constants, self.producers, self.consumers, self.pinned)
        return _sent, (self.store, self.source, *held, self._extents)

    def node(self, k: int) -> onnx.NodeProto:
        """The k-th node of the main graph."""
        node: onnx.NodeProto = self.store.proto.graph.node[k]
        return node

    def origin(self, k: int) -> onnx.NodeProto:
        """The node of the given model that the k-th node is, or is a part of."""
        place = bisect.bisect_right(self.spans, k, key=lambda span: span.nodes.start) - 1
        inside = place >= 0 and k in self.spans[place].nodes
        return self.spans[place].origin if inside else self.node(k)

    def extents(self, name: str) -> tuple[int | None, ...] | None:
        """Extents that the model declares of an input or inner value, if it does; None where free.

        A value that is only cast has the same as before.
        """
        while name not in self._extents and name in self.producers:
            node = self.node(self.producers[name])
            if node.op_type not in ("Cast", "Identity") or node.domain not in ("", "ai.onnx"):
                break
            name = node.input[0]
        return self._extents.get(name)

    def rank(self, name: str) -> int | None:
        """Number of dimensions that the model declares of an input or inner value, if it does."""
        extents = self.extents(name)
        return None if extents is None else len(extents)

    def constant(self, name: str) -> np.ndarray | None:
        """Values of a constant: an initializer, a Constant node, or either behind layout operators.

        An initializer that is also a graph input counts as constant: that is how old exporters
        (IR version 3) write every weight.

        Raises:
            ModelError: The data cannot be read or the layout operators cannot be evaluated.
        """
        if name not in self.constants:
            return None
        if name in self.initializers:
            return self.store.array(self.initializers[name])
        if name in self._folded:
            return self._folded[name]
        node = self.node(self.producers[name])
        if node.op_type == "Constant":
            return self.store.array(next(a.t for a in node.attribute if a.name == "value"))
        (self._folded[name],) = self.evaluated(node)
        return self._folded[name]

    def evaluated(
        self, node: onnx.NodeProto, known: Mapping[str, np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """The outputs of a node that reads constants.

        Args:
            node: The node.
            known: What it reads; None looks constants up.

        Raises:
            ModelError: The data cannot be read or the node cannot be evaluated.
        """
        reads = list(filter(None, node.input))
        feed = {given: self.constant(given) if known is None else known[given] for given in reads}
        axes = attributes(node).get("axes")
        try:
            if node.op_type == "Identity":  # the same, where the evaluator copies
                return [np.asarray(feed[node.input[0]])]
            if node.op_type == "Unsqueeze" and isinstance(axes, list):
                # The form of before opset 13, on which the evaluator fails (onnx 1.23).
                return [np.expand_dims(np.asarray(feed[node.input[0]]), tuple(axes))]
            # It takes a node as it is; opset 13 stands for models that import none.
            run = ReferenceEvaluator(node, opsets={"": self.store.opset or 13})
            return [np.asarray(made) for made in run.run(None, feed)]
        except (
            *(RuntimeError, ValueError, TypeError),
            *(LookupError, ArithmeticError, AttributeError),
        ) as e:
            reason = " ".join(str(e).split())
            raise ModelError(f"{self.store.label}: {node_label(node)}: {reason}") from e

    def constant_type(self, name: str) -> tuple[tuple[int, ...], np.dtype[np.generic]] | None:
        """Shape and element type of a constant, without reading an initializer's values."""
        tensor = self.initializers.get(name)
        if tensor is not None:
            return tensor_type(tensor)
        value = self.constant(name)
        return None if value is None else (value.shape, value.dtype)

    def stored_type(self, name: str) -> np.dtype[np.generic]:
        """Element type in which the data behind a constant are held."""
        while name in self.producers and self.node(self.producers[name]).op_type != "Constant":
            name = self.node(self.producers[name]).input[0]
        kind = self.constant_type(name)
        assert kind is not None, name
        return kind[1]

    def is_finite(self, name: str) -> bool:
        """Whether a constant holds neither NaN nor infinity; True for what cannot hold them.

        Raises:
            ModelError: See `constant`.
        """
        if name not in self._finite:
            held = self.constant(name)
            self._finite[name] = (
                held is None
                or not (held.dtype.kind == "f" or held.dtype.name == "bfloat16")
                or all(np.isfinite(part).all() for part in _parts(held))
            )
        return self._finite[name]

    def root(self, name: str) -> str:
        """The value that a value is by other names: what an Identity reads, if one makes it."""
        while name in self.constants and name in self.producers:
            node = self.node(self.producers[name])
            if qualified(node) != ("", "Identity"):
                break
            name = node.input[0]
        return name

    def aliases(self, root: str) -> tuple[frozenset[str], frozenset[int]]:
        """All names of a constant, itself among them, and the Identity nodes that make them."""
        names, nodes, ways = {root}, set(), [root]
        while ways:
            for k in self.consumers.get(ways.pop(), ()):
                node = self.node(k)
                if qualified(node) == ("", "Identity"):
                    nodes.add(k)
                    names.update(node.output)
                    ways += node.output
        return frozenset(names), frozenset(nodes)

    def freed_by(self, name: str, readers: frozenset[int]) -> bool:
        """Whether the data behind constant `name` could go if nodes `readers` stopped reading it.

        The data are the initializer or Constant node itself, or all those behind the layout
        operators that make `name`.
        """
        if name in self.pinned or not set(self.consumers.get(name, ())) <= readers:
            return False
        if name in self.initializers or name not in self.producers:
            return True
        k = self.producers[name]
        return all(
            self.freed_by(given, frozenset({k})) or not self._large(given)
            for given in filter(None, self.node(k).input)
        )

    def family(self, name: str) -> frozenset[str]:
        """All values that hold the data behind constant `name`, in any layout."""
        known = {name}
        ways = [name]
        while ways:
            each = ways.pop()
            made = self.producers.get(each)
            found = set() if made is None else {n for n in self.node(made).input if n}
            for k in self.consumers.get(each, ()):
                found.update(n for n in self.node(k).output if n in self.constants)
            new = {n for n in found if self._large(n)} - known
            known |= new
            ways += new
        return frozenset(known)

    def readers_of(self, family: Collection[str]) -> list[int]:
        """The nodes that read any of some values and make none of them, in order."""
        found = {k for name in family for k in self.consumers.get(name, ())}
        return sorted(k for k in found if not set(self.node(k).output) & set(family))

    def _large(self, name: str) -> bool:
        # The shape input of a Reshape is not the data.
        kind = self.constant_type(name)
        return kind is None or not np.issubdtype(kind[1], np.integer)


def _constant_depth(
    node: onnx.NodeProto, depths: Mapping[str, int], followed: Collection[str]
) -> float:
    """How many operators lie between a node's outputs and data; infinity where they compute."""
    if node.domain not in ("", "ai.onnx"):
        return math.inf
    if node.op_type == "Constant":
        return 0 if any(a.name == "value" and a.HasField("t") for a in node.attribute) else math.inf
    inputs = list(filter(None, node.input))
    if node.op_type not in followed or not inputs:
        return math.inf
    return 1 + max(depths.get(name, math.inf) for name in inputs)


def _parts(array: np.ndarray) -> list[np.ndarray]:
    """An array in parts of its first axis, so that what is told of each takes little memory."""
    count = min(len(array), -(-array.size // PART)) if array.ndim else 0
    return np.array_split(array, count) if count > 1 else [array]


def tensor_type(tensor: onnx.TensorProto) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """Shape and element type of a tensor."""
    return tuple(tensor.dims), np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """Attributes of a node as Python values, by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _sent(
    store: ModelStore,
    source: ModelStore,
    spans: tuple[Span, ...],
    constants: frozenset[str],
    producers: dict[str, int],
    consumers: dict[str, list[int]],
    pinned: frozenset[str],
    extents: dict[str, tuple[int | None, ...]],
) -> GraphIndex:
    return GraphIndex(
        store=store,
        source=source,
        spans=spans,
        initializers={t.name: t for t in store.proto.graph.initializer},
        constants=constants,
        producers=producers,
        consumers=consumers,
        pinned=pinned,
        _extents=extents,
    )


def all_names(model: onnx.ModelProto) -> set[str]:
    """Every name of a value or node in a model, in all its graphs; new names must avoid them."""
    names: set[str] = set()

    def visit(graph: onnx.GraphProto) -> None:
        for values in (graph.input, graph.output, graph.value_info, graph.initializer):
            names.update(v.name for v in values)
        names.update(t.values.name for t in graph.sparse_initializer)
        for node in graph.node:
            names.update((node.name, *node.input, *node.output))
            for inner in subgraphs(node):
                visit(inner)

    visit(model.graph)
    return names


def new_name(hint: str, taken: set[str]) -> str:
    """A name that starts with `hint` and is not taken yet; then it is."""
    name, k = hint, 0
    while name in taken:
        k += 1
        name = f"{hint}_{k}"
    taken.add(name)
    return name
