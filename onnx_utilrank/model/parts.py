"""The plain nodes of one node that does several things at once, in the making."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_utilrank.model.graph import GraphIndex, Span, new_name
from onnx_utilrank.model.store import ModelStore

__all__ = ["MICROSOFT", "Parts", "text", "with_parts"]

MICROSOFT = "com.microsoft"
# Where Clip took its limits, and Split its sizes, from attributes to inputs.
CLIP_LIMITS_AS_INPUTS = 11
SPLIT_SIZES_AS_INPUT = 13


@dataclass(slots=True)
class Parts:
    """The plain nodes of one node, in the making."""

    index: GraphIndex
    place: int  # of the node in the graph
    taken: set[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    @property
    def node(self) -> onnx.NodeProto:
        """The node."""
        return self.index.node(self.place)

    def value(self, hint: str) -> str:
        """A new name, after that of the node's first output."""
        return self.unique(f"{next(filter(None, self.node.output))}/{hint}")

    def unique(self, stem: str) -> str:
        """A name that nothing has."""
        return new_name(stem, self.taken)

    def add(
        self,
        op: str,
        inputs: Iterable[str],
        outputs: Sequence[str],
        *,
        domain: str = "",
        named: bool = False,
        **attrs: Any,
    ) -> str:
        """Append a node, by the name of the one it is a part of where `named`; its output."""
        name = self.node.name
        if not named:
            name = self.value(op.lower())
        self.nodes.append(
            helper.make_node(op, list(inputs), list(outputs), name=name, domain=domain, **attrs)
        )
        return outputs[0]

    def constant(self, values: np.ndarray, stem: str | None = None) -> str:
        """Append a Constant; its output."""
        name = self.unique(stem) if stem else self.value("constant")
        return self.add("Constant", [], [name], value=numpy_helper.from_array(values, name))

    def split(self, x: str, sizes: Sequence[int], pieces: Sequence[str], axis: int) -> None:
        """Append a Split."""
        if self.index.store.opset >= SPLIT_SIZES_AS_INPUT:
            self.add("Split", [x, self.constant(np.array(sizes))], pieces, axis=axis)
        else:
            self.add("Split", [x], pieces, axis=axis, split=sizes)

    def turned(self, name: str, rank: int) -> str:
        """Append what transposes the last two axes of a value; its output."""
        perm = [*range(rank - 2), rank - 1, rank - 2]
        return self.add("Transpose", [name], [self.value("turned")], perm=perm)

    def activated(self, x: str, kind: str, options: dict[str, Any]) -> None:
        """Append the activation that makes the node's output; Clip has its limits as constants."""
        inputs = [x]
        if kind == "Clip" and self.index.store.opset >= CLIP_LIMITS_AS_INPUTS:
            dtype = self.dtype
            inputs += [self.constant(np.array(options.pop(k), dtype)) for k in ("min", "max")]
        self.add(kind, inputs, [self.node.output[0]], **options)

    @property
    def dtype(self) -> np.dtype[np.generic] | None:
        """Element type of the node's constant operand; None where both are computed."""
        kinds = (self.index.constant_type(name) for name in self.node.input[:2])
        return next((kind[1] for kind in kinds if kind is not None), None)


def text(given: dict[str, object], name: str) -> str:
    """An attribute that is a text; '' without it."""
    value = given.get(name, b"")
    assert isinstance(value, bytes)
    return value.decode()


def with_parts(
    index: GraphIndex, parts: Mapping[int, Sequence[onnx.NodeProto]], *, dequantize: bool = False
) -> GraphIndex:
    """The index of a model in which some nodes are seen as the nodes they stand for.

    Args:
        index: The model.
        parts: By place of each such node, what it stands for.
        dequantize: See `GraphIndex.build`.
    """
    store = index.store
    proto = onnx.ModelProto()
    proto.CopyFrom(store.proto)
    del proto.graph.node[:]
    spans = []
    for k, node in enumerate(store.proto.graph.node):
        if k in parts:
            start = len(proto.graph.node)
            spans.append(Span(nodes=range(start, start + len(parts[k])), origin=node))
        proto.graph.node.extend(parts.get(k, [node]))
    return GraphIndex.build(
        ModelStore(proto=proto, folder=store.folder, name=store.label),
        source=store,
        spans=tuple(spans),
        dequantize=dequantize,
    )
