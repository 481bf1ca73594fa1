"""The seam to onnx-graphsurgeon: edit the topology there, keep everything else to the byte.

graphsurgeon loses what it does not model (metadata, doc strings, quantization annotations, function
overloads, some attribute types). So it never sees the user's model: it gets a skeleton with the
nodes' operators, names and edges, and no attributes or weights. After the surgery, every node
that is still one of the skeleton's is copied from the source as it stands there, but for inputs
and attributes that were said to change; only nodes made during the surgery are exported by
graphsurgeon.
"""

from collections import Counter
from collections.abc import Container, Iterable, MutableSequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper
from onnx.external_data_helper import uses_external_data
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnx_utilrank.model.external import SMALLEST_OUTSIDE, Scratch
from onnx_utilrank.model.graph import GraphIndex, Span, all_names, new_name
from onnx_utilrank.model.store import ModelStore

__all__ = ["Surgeon"]

# Up to IR version 3 every initializer had to be a graph input as well (onnx.proto, Version 4).
FIRST_IR_WITH_FREE_INITIALIZERS = 4


class Surgeon:
    """One operation on a model's main graph.

    Attributes:
        index: The source; it is only read.
    """

    def __init__(self, index: GraphIndex) -> None:
        self.index = index
        source = index.store.proto.graph
        self._taken = all_names(index.store.proto)
        self._tensors: dict[str, gs.Variable] = {}
        self._nodes = [
            gs.Node(
                op=node.op_type,
                name=node.name,
                inputs=[self.tensor(name) for name in node.input],
                outputs=[self.tensor(name) for name in node.output],
                domain=node.domain or None,
            )
            for node in source.node
        ]
        self._chains: dict[int, list[gs.Node]] = {}
        self._forgotten: set[str] = set()
        self._restated: dict[int, dict[str, int | float]] = {}
        self._before: dict[int, list[gs.Node]] = {}
        self._after: dict[int, list[gs.Node]] = {}
        self._new: dict[str, onnx.TensorProto] = {}
        # A model with weights outside may be too large for memory: new ones go outside at once.
        self._scratch = Scratch() if index.store.has_external_data else None

    def tensor(self, name: str) -> gs.Variable:
        """The value of that name in the skeleton; '' is the absent optional input or output."""
        if not name:
            return gs.Variable.empty()
        if name not in self._tensors:
            self._tensors[name] = gs.Variable(name)
        return self._tensors[name]

    def unique(self, hint: str) -> str:
        """A name that no value or node of the model has, starting with `hint`."""
        return new_name(hint, self._taken)

    def value(self, hint: str) -> gs.Variable:
        """A new value of the graph."""
        return self.tensor(self.unique(hint))

    def constant(self, hint: str, values: np.ndarray) -> str:
        """Add an initializer; the name it got."""
        name = self.unique(hint)
        values = np.ascontiguousarray(values)
        if self._scratch is None or values.nbytes < SMALLEST_OUTSIDE:
            self._new[name] = numpy_helper.from_array(values, name)
            return name
        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        self._new[name] = onnx.TensorProto(name=name, data_type=kind, dims=values.shape)
        with self._scratch.writer() as writer:
            writer.put(self._new[name], values.view(np.uint8).data)
        return name

    def replace(self, k: int, chain: list[gs.Node]) -> None:
        """Put `chain` in the place of node `k` of the source; the last one makes its outputs."""
        old = self._nodes[k]
        old.inputs.clear()
        old.outputs.clear()
        self._chains[k] = chain

    def insert(self, k: int, node: gs.Node) -> None:
        """Put a node before node `k` of the source."""
        self._before.setdefault(k, []).append(node)

    def append(self, k: int, old: str, new: str, nodes: list[gs.Node]) -> None:
        """Put nodes behind node `k` of the source, which make `old` of its output, now `new`.

        Args:
            k: The node.
            old: One of its outputs; the last of `nodes` makes it from now on.
            new: What the node's own output is called now, for `nodes` to read.
            nodes: In order.
        """
        node = self._nodes[k]
        slot = next(i for i, tensor in enumerate(node.outputs) if tensor.name == old)
        node.outputs[slot] = self.tensor(new)
        self._after.setdefault(k, []).extend(nodes)

    def forget(self, names: Iterable[str]) -> None:
        """Drop what the model declares of inner values: their shapes change."""
        self._forgotten.update(names)

    def rewire(self, k: int, old: str, new: str, place: int | None = None) -> None:
        """Let node `k` read `new` where it reads `old`, or at one of those places alone."""
        node = self._nodes[k]
        for slot, tensor in enumerate(node.inputs):
            if tensor.name == old and place in (None, slot):
                node.inputs[slot] = self.tensor(new)

    def restate(self, k: int, attribute: str, value: int | float) -> None:
        """Let node `k` have another value of an attribute."""
        self._restated.setdefault(k, {})[attribute] = value

    def finish(self) -> ModelStore:
        """The model after the surgery, with the source's own protos wherever nothing was changed.

        Initializers and layout nodes that nothing reads any more because of the surgery are gone;
        what was unused before stays. Nodes that were one and are untouched become it again.
        """
        whole = self._whole()
        begins = {span.nodes.start: span.origin for span in whole}
        parts = {k for span in whole for k in span.nodes}
        dead = self._dead(parts, list(begins.values()))
        source = self.index.source.proto
        nodes: list[onnx.NodeProto] = []
        for k, node in enumerate(self._nodes):
            if k in begins:
                nodes.append(begins[k])
            if k in parts:
                continue
            nodes.extend(OnnxExporter.export_node(new) for new in self._before.get(k, ()))
            if k in self._chains:
                nodes.extend(OnnxExporter.export_node(new) for new in self._chains[k])
            elif any(t.name in dead for t in node.outputs):
                continue
            else:
                nodes.append(self._kept(k, node))
            nodes.extend(OnnxExporter.export_node(new) for new in self._after.get(k, ()))
        result = onnx.ModelProto()
        result.CopyFrom(source)  # keeps even fields that this version of onnx does not know
        graph = result.graph
        del graph.node[:]
        graph.node.extend(nodes)
        for entries in (graph.initializer, graph.value_info, graph.input):
            _drop(entries, [entry.name in dead for entry in entries])
        _drop(graph.value_info, [entry.name in self._forgotten for entry in graph.value_info])
        annotations = graph.quantization_annotation
        _drop(annotations, [entry.tensor_name in dead for entry in annotations])
        graph.initializer.extend(self._new.values())
        if 0 < source.ir_version < FIRST_IR_WITH_FREE_INITIALIZERS:
            graph.input.extend(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
                for t in self._new.values()
            )
        return self._stored(result)

    def _stored(self, proto: onnx.ModelProto) -> ModelStore:
        """The model with what lies outside in one folder: what is new and what is the source's."""
        source = self.index.store
        if self._scratch is None:
            return ModelStore(proto=proto, folder=source.folder)
        with self._scratch.writer() as writer:
            for tensor in ModelStore(proto=proto).tensors():
                if uses_external_data(tensor) and tensor.name not in self._new:
                    writer.put(tensor, source.outside_bytes(tensor))
        return ModelStore(proto=proto, folder=self._scratch.path, scratch=self._scratch)

    def _whole(self) -> list[Span]:
        """What was taken apart and can be one node again: nothing of it was changed or has gone."""
        spans = self.index.spans
        if not spans:
            return []
        gone = self._dead((), ())
        return [
            span
            for span in spans
            if not any(
                self._touched(k) or not gone.isdisjoint(self.index.node(k).output)
                for k in span.nodes
            )
        ]

    def _touched(self, k: int) -> bool:
        """Whether anything of node `k` was changed."""
        changed = (self._chains, self._before, self._after, self._restated)
        if any(k in of for of in changed):
            return True
        return [t.name for t in self._nodes[k].inputs] != list(self.index.node(k).input)

    def _kept(self, k: int, node: gs.Node) -> onnx.NodeProto:
        proto = self.index.node(k)
        names = [t.name for t in node.inputs]
        made = [t.name for t in node.outputs]
        restated = self._restated.get(k, {})
        if names == list(proto.input) and made == list(proto.output) and not restated:
            return proto
        rewired = onnx.NodeProto()
        rewired.CopyFrom(proto)
        rewired.input[:] = names
        rewired.output[:] = made
        for name, value in restated.items():
            held = next((a for a in rewired.attribute if a.name == name), None)
            stated = rewired.attribute.add() if held is None else held
            stated.CopyFrom(helper.make_attribute(name, value))
        return rewired

    def _dead(self, parts: Container[int], origins: Iterable[onnx.NodeProto]) -> set[str]:
        """Values that lost their last reader, and what was only there to make those.

        Args:
            parts: Nodes that are not written, but the nodes that they are parts of.
            origins: Those.
        """
        before = set(self.index.consumers)
        before.update(name for span in self.index.spans for name in span.origin.input if name)
        now: Counter[str] = Counter()
        for origin in origins:
            now.update(name for name in origin.input if name)
        for k, node in enumerate(self._nodes):
            if k in parts:
                continue
            added = (*self._before.get(k, ()), *self._after.get(k, ()))
            for each in (*added, *self._chains.get(k, [node])):
                now.update(t.name for t in each.inputs if t.name)
        dead: set[str] = set()
        suspects = [name for name in before if not now[name]]
        while suspects:
            name = suspects.pop()
            if now[name] or name in self.index.pinned or name in dead:
                continue
            maker = self.index.producers.get(name)
            if maker is None:
                if name in self.index.initializers:
                    dead.add(name)
                continue
            made = [t.name for t in self._nodes[maker].outputs if t.name]
            if (
                maker in self._chains
                or maker in parts
                or any(now[n] or n in self.index.pinned for n in made)
            ):
                continue
            dead.update(made)
            for tensor in self._nodes[maker].inputs:
                now[tensor.name] -= 1
                suspects.append(tensor.name)
        return dead


def _drop(entries: MutableSequence[Any], doomed: list[bool]) -> None:
    """Remove the marked entries of a repeated field."""
    for k in reversed(range(len(doomed))):
        if doomed[k]:
            del entries[k]
