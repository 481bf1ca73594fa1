"""Who makes and who reads each value of a model's main graph, and which values are constant."""

from collections import defaultdict
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.store import ModelStore

__all__ = ["GraphIndex", "all_names", "attributes", "captured_names", "node_label"]

# Operators that only move, cast or reshape data: a weight behind them is still a constant.
LAYOUT_OPS = frozenset(
    {"Identity", "Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphIndex:
    """Lookup tables of one model's main graph.

    Attributes:
        store: The model.
        initializers: Dense initializers by name.
        constants: Names of all constant values, see `constant`.
        producers: Index of the node that makes each value.
        consumers: Indices of the nodes that read each value, once an input slot.
        pinned: Values that are needed whatever reads them: graph outputs, and names captured by
            subgraphs.
    """

    store: ModelStore
    initializers: dict[str, onnx.TensorProto]
    constants: frozenset[str]
    producers: dict[str, int]
    consumers: dict[str, list[int]]
    pinned: frozenset[str]
    _folded: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def build(cls, store: ModelStore) -> "GraphIndex":
        """Index the main graph of `store`.

        Raises:
            ModelError: Two nodes make the same value.
        """
        graph = store.proto.graph
        producers: dict[str, int] = {}
        consumers: defaultdict[str, list[int]] = defaultdict(list)
        pinned = {o.name for o in graph.output}
        initializers = {t.name: t for t in graph.initializer}
        constants = set(initializers)
        for k, node in enumerate(graph.node):
            for name in filter(None, node.output):
                if name in producers:
                    raise ModelError(
                        f"{store.label}: value {name!r} is made twice, by "
                        f"{node_label(graph.node[producers[name]])} and {node_label(node)}"
                    )
                producers[name] = k
            for name in filter(None, node.input):
                consumers[name].append(k)
            pinned |= captured_names(node)
            if _keeps_constant(node, constants):
                constants.update(node.output)
        return cls(
            store=store,
            initializers=initializers,
            constants=frozenset(constants - {""}),
            producers=producers,
            consumers=dict(consumers),
            pinned=frozenset(pinned),
        )

    def node(self, k: int) -> onnx.NodeProto:
        """The k-th node of the main graph."""
        node: onnx.NodeProto = self.store.proto.graph.node[k]
        return node

    def rank(self, name: str) -> int | None:
        """Number of dimensions that the model declares of an input or inner value, if it does."""
        graph = self.store.proto.graph
        for value in (*graph.input, *graph.value_info):
            if value.name == name and value.type.tensor_type.HasField("shape"):
                return len(value.type.tensor_type.shape.dim)
        return None

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
        feed = {given: self.constant(given) for given in filter(None, node.input)}
        axes = attributes(node).get("axes")
        try:
            if node.op_type == "Unsqueeze" and isinstance(axes, list):
                # The form of before opset 13, on which the evaluator fails (onnx 1.23).
                folded: object = np.expand_dims(np.asarray(feed[node.input[0]]), tuple(axes))
            else:
                # It takes a node as it is; opset 13 stands for models that import none.
                run = ReferenceEvaluator(node, opsets={"": self.store.opset or 13})
                (folded,) = run.run(None, feed)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as e:
            reason = " ".join(str(e).split())
            raise ModelError(f"{self.store.label}: {node_label(node)}: {reason}") from e
        self._folded[name] = np.asarray(folded)
        return self._folded[name]

    def constant_type(self, name: str) -> tuple[tuple[int, ...], np.dtype[np.generic]] | None:
        """Shape and element type of a constant, without reading an initializer's values."""
        tensor = self.initializers.get(name)
        if tensor is not None:
            return tuple(tensor.dims), np.dtype(
                onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            )
        value = self.constant(name)
        return None if value is None else (value.shape, value.dtype)

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


def _keeps_constant(node: onnx.NodeProto, constants: Container[str]) -> bool:
    """Whether a node's outputs are constant where those of `constants` are."""
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Constant":
        return any(a.name == "value" and a.HasField("t") for a in node.attribute)
    inputs = list(filter(None, node.input))
    return node.op_type in LAYOUT_OPS and bool(inputs) and all(n in constants for n in inputs)


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """Attributes of a node as Python values, by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def node_label(node: onnx.NodeProto) -> str:
    """How messages name a node: operator and name, or its first output where it has no name."""
    return f"{node.op_type} {node.name or (node.output[0] if node.output else '?')!r}"


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Graphs held by the attributes of a node (not the graphs inside those)."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def captured_names(node: onnx.NodeProto) -> set[str]:
    """Values of the outer scope that the subgraphs of a node read."""
    captured: set[str] = set()
    for graph in subgraphs(node):
        own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        own |= {t.values.name for t in graph.sparse_initializer}
        read = {o.name for o in graph.output}
        for inner in graph.node:
            own.update(inner.output)
            read.update(inner.input)
            read |= captured_names(inner)
        captured |= read - own
    return captured - {""}


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
