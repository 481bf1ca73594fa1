"""Graphs and their nodes, ready to be computed in torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import onnx
import torch

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import captured_names, node_label, subgraphs
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.torch_graph.operator import Body, Context, Operator, Result
from onnx_utilrank.torch_graph.operators import OPERATORS
from onnx_utilrank.torch_graph.tensors import as_tensor, torch_type

__all__ = ["Block", "Node", "Settings", "UnsupportedOperatorError", "Values"]

# What torch and the operators raise where shapes, types or values do not fit.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Values of a graph by name.
Values: TypeAlias = dict[str, torch.Tensor]


class UnsupportedOperatorError(ModelError):
    """A node's operator is not in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all graphs of a model share.

    Attributes:
        store: The model.
        opsets: Version of the operator set of each domain.
        device: Where floating tensors live.
        dtype: The one floating type of everything; None where each tensor keeps its own.
    """

    store: ModelStore
    opsets: Mapping[str, int]
    device: torch.device
    dtype: torch.dtype | None

    def tensor(self, proto: onnx.TensorProto) -> torch.Tensor:
        """An initializer or attribute.

        Raises:
            ModelError: It cannot be read, or torch has no such type.
        """
        try:
            return as_tensor(self.store.array(proto), self.device, self.dtype)
        except (TypeError, ValueError) as e:
            reason = f"tensor {proto.name!r}: {' '.join(str(e).split())}"
            raise ModelError(f"{self.store.label}: {reason}") from e

    def sparse(self, proto: onnx.SparseTensorProto) -> torch.Tensor:
        """A sparse initializer or attribute as a dense tensor."""
        values, places = self.tensor(proto.values), self.tensor(proto.indices)
        if places.dim() == 1:
            places = torch.stack(torch.unravel_index(places, tuple(proto.dims)), 1)
        dense = values.new_zeros(tuple(proto.dims))
        return dense.index_put(tuple(places.to(values.device).unbind(1)), values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node, ready to be computed.

    Attributes:
        label: How messages name it.
        operator: Its entry of the table.
        context: What it knows besides its inputs.
        inputs: Names of its inputs; empty where an optional one is missing.
        outputs: Names of its outputs; empty where one is not wanted.
        captured: What its subgraphs read of the values around it.
        blocks: Its subgraphs by attribute.
    """

    label: str
    operator: Operator
    context: Context
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    captured: frozenset[str]
    blocks: Mapping[str, "Block"]

    @classmethod
    def build(cls, proto: onnx.NodeProto, settings: Settings) -> "Node":
        """Look a node up in the table.

        Raises:
            UnsupportedOperatorError: The table has no such operator.
        """
        label = f"{settings.store.label}: {node_label(proto)}"
        domain, _ = _key(proto)
        operator = OPERATORS.get(_key(proto))
        if operator is None:
            raise UnsupportedOperatorError(
                f"{label}: this operator has no differentiable form here"
            )
        context = Context(
            attributes={
                a.name: _value(a, settings)
                for a in proto.attribute
                if a.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
            },
            opset=settings.opsets.get(domain, 1),
            outputs=tuple(map(bool, proto.output)),
            device=settings.device,
            dtype=settings.dtype,
        )
        return cls(
            label=label,
            operator=operator,
            context=context,
            inputs=tuple(proto.input),
            outputs=tuple(proto.output),
            captured=frozenset(captured_names(proto)),
            blocks={a.name: Block.build(a.g, settings) for a in proto.attribute if a.HasField("g")},
        )

    def run(self, values: Values) -> tuple[str, ...]:
        """Compute the outputs, add them to `values` and give their names."""
        missing = [n for n in (*self.inputs, *self.captured) if n and n not in values]
        if missing:
            raise ModelError(f"{self.label}: nothing gives its input {missing[0]!r} a value")
        context = self.context
        if self.blocks:
            bodies = {
                k: Body(partial(block.call, values), block.empty)
                for k, block in self.blocks.items()
            }
            context = replace(context, bodies=bodies)
        try:
            made = self.operator.function(context, *self._operands(values))
        except _FAILURES as e:
            reason = " ".join(str(e).split()) or type(e).__name__
            raise ModelError(f"{self.label}: {reason}") from e
        return self._store(values, made)

    def _operands(self, values: Values) -> list[torch.Tensor | None]:
        """The inputs; those that are computed with lie on one device."""
        operands = [values[n] if n else None for n in self.inputs]
        host = self.operator.host
        device = next(
            (
                t.device
                for k, t in enumerate(operands)
                if t is not None and k not in host and t.device.type != "cpu"
            ),
            None,
        )
        if device is None:
            return operands
        return [
            t if t is None or k in host else t.to(device, non_blocking=True)
            for k, t in enumerate(operands)
        ]

    def _store(self, values: Values, made: Result) -> tuple[str, ...]:
        several = [made] if isinstance(made, torch.Tensor) else list(made)
        named = []
        for k, name in enumerate(self.outputs):
            value = several[k] if k < len(several) else None
            if not name:
                continue
            if value is None:
                raise ModelError(f"{self.label}: its output {name!r} has no form here")
            values[name] = value
            named.append(name)
        return tuple(named)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One graph, ready to be computed.

    Attributes:
        nodes: In topological order.
        constants: Its initializers.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        captured: What it reads of the graphs around it.
        dead_after: For each node the values that nothing reads after it.
        lists: Names of inputs that are declared to have one axis.
        declared: Type and shape of the outputs; free dimensions count as 0.
    """

    nodes: tuple[Node, ...]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    captured: frozenset[str]
    dead_after: tuple[tuple[str, ...], ...]
    lists: frozenset[str]
    declared: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def build(cls, graph: onnx.GraphProto, settings: Settings) -> "Block":
        """Look all nodes of a graph up in the table.

        Raises:
            UnsupportedOperatorError: The table lacks an operator.
        """
        # Numbers such as the scales of a Resize are read at each run: on an accelerator, every
        # one would have to wait for it.
        host, local = _read_on_host(graph), replace(settings, device=torch.device("cpu"))
        nodes = tuple(
            Node.build(n, local if host.issuperset(n.output) else settings) for n in graph.node
        )
        constants = {
            t.name: (local if t.name in host else settings).tensor(t) for t in graph.initializer
        }
        constants |= {t.values.name: settings.sparse(t) for t in graph.sparse_initializer}
        inputs, outputs = (tuple(v.name for v in vs) for vs in (graph.input, graph.output))
        read = {name for n in nodes for name in (*n.inputs, *n.captured)} | set(outputs)
        own = {name for n in nodes for name in n.outputs} | {*inputs, *constants, ""}
        return cls(
            nodes=nodes,
            constants=constants,
            inputs=inputs,
            outputs=outputs,
            captured=frozenset(read - own),
            dead_after=_dead_after(nodes, {*constants, *outputs, *(read - own)}),
            lists=frozenset(v.name for v in graph.input if len(v.type.tensor_type.shape.dim) == 1),
            declared=tuple(_declared(v, settings.dtype) for v in graph.output),
        )

    def call(self, scope: Values, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute a subgraph among the values of `scope`."""
        values = dict(self.constants)
        values.update((name, scope[name]) for name in self.captured)
        for name, value in zip(self.inputs, inputs, strict=True):
            # Loops may count their rounds in a list of one.
            alone = value.dim() == 0 and name in self.lists
            values[name] = value.reshape(1) if alone else value
        for node, dead in zip(self.nodes, self.dead_after, strict=True):
            node.run(values)
            for name in dead:
                del values[name]
        return [values[name] for name in self.outputs]

    def empty(self, k: int) -> torch.Tensor:
        """What stacking the k-th output of no runs gives."""
        kind, shape = self.declared[k]
        return torch.empty((0, *shape), dtype=kind)


def _declared(
    value: onnx.ValueInfoProto, dtype: torch.dtype | None
) -> tuple[torch.dtype, tuple[int, ...]]:
    kind = value.type.tensor_type
    try:
        given = torch_type(kind.elem_type)
    except TypeError:
        given = torch.float32  # it matters to loops that never run, and to nothing else
    shape = tuple(d.dim_value for d in kind.shape.dim)
    return dtype if dtype and given.is_floating_point else given, shape


def _read_on_host(graph: onnx.GraphProto) -> set[str]:
    """Values that operators of this graph read as Python numbers, and nothing reads otherwise."""
    host: set[str] = set()
    rest = {o.name for o in graph.output}
    for proto in graph.node:
        operator = OPERATORS.get(_key(proto))
        rest |= captured_names(proto)
        for k, name in enumerate(proto.input):
            read = operator and k in operator.host and not any(subgraphs(proto))
            (host if read else rest).add(name)
    return host - rest


def _key(proto: onnx.NodeProto) -> tuple[str, str]:
    return ("" if proto.domain == "ai.onnx" else proto.domain), proto.op_type


def _dead_after(nodes: Sequence[Node], kept: set[str]) -> tuple[tuple[str, ...], ...]:
    last: dict[str, int] = {}
    for k, node in enumerate(nodes):
        last.update(dict.fromkeys((*node.inputs, *node.captured, *node.outputs), k))
    dead: list[list[str]] = [[] for _ in nodes]
    for name, k in last.items():
        if name and name not in kept:
            dead[k].append(name)
    return tuple(map(tuple, dead))


def _value(attribute: onnx.AttributeProto, settings: Settings) -> object:
    """An attribute as Python or torch has it."""
    if attribute.type == onnx.AttributeProto.TENSOR:
        return settings.tensor(attribute.t)
    if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
        return settings.sparse(attribute.sparse_tensor)
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if attribute.type == onnx.AttributeProto.STRINGS:
        return [v.decode() for v in value]
    return value
