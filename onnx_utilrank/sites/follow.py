"""Follow the output features of every weight through the graph.

Each feature gets a number, and the numbers are moved through the graph as the nodes move values:
reshaped, transposed, split. So no exporter's way to write attention has to be known; where heads
lie, and which columns of the next weight read which feature, is read off the numbers that arrive.
A feature that meets a node which would mix it with others goes no further.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from onnx_utilrank.model.graph import GraphIndex, attributes, captured_names
from onnx_utilrank.sites.attention import attention_heads, by_head, is_attention, over_heads
from onnx_utilrank.sites.site import Site

__all__ = ["FOLLOWED", "Meeting", "Trace", "Values", "moves_within", "varies"]

# What moves features about and changes nothing else; what reshapes them too by a shape it is told.
_LAYOUT = frozenset({"Transpose", "Squeeze", "Unsqueeze", "Flatten", "Split", "Gather", "Slice"})
_SAME = frozenset({"Identity", "Dropout", "Concat"})  # a Concat of one value, which exporters write
_REPEATING = frozenset({"Expand", "Tile"})  # heads of keys and values, each for several queries
_SCALING = frozenset({"Mul", "Div"})
_ADDING = frozenset({"Add", "Sub"})
FOLLOWED = _LAYOUT | _SAME | _REPEATING | _SCALING | _ADDING | {"Reshape", "MatMul"}

Values = Mapping[str, np.ndarray]


@dataclass(slots=True)
class Meeting:
    """Features [groups, n] on the one side, and what they meet on the other.

    Those of one group may be read by several columns: the group then stands there once for each.
    """

    made: np.ndarray
    rows: np.ndarray | None = None  # numbers of the features they are multiplied with
    columns: tuple[Site, np.ndarray] | None = None  # starts of the columns that read them, [groups]


@dataclass(slots=True)
class Trace:
    """Numbers on their way: `numbers[value]` has the value's shape, -1 nowhere."""

    index: GraphIndex
    sites: Sequence[Site]
    values: Values
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    heads: dict[str, np.ndarray] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    stuck: set[int] = field(default_factory=set)
    meetings: list[Meeting] = field(default_factory=list)
    seen: list[tuple[str, int, np.ndarray]] = field(default_factory=list)
    vectors: list[tuple[int, str, int, np.ndarray]] = field(default_factory=list)
    scaled: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Follow every feature as far as it goes."""
        made, read = {}, {}
        total = 0
        for site in self.sites:
            self.first[site.key] = total
            total += site.m
            for use in site.uses:
                read[use.node] = site
            if _bare(self.index, site) and site.uses[0].result.tensor in self.values:
                made[site.uses[0].node] = site
        for k, node in enumerate(self.index.store.proto.graph.node):
            caught = captured_names(node)
            for name in caught & self.numbers.keys():
                self._stop(self.numbers[name])
            arriving = [name for name in node.input if name in self.numbers]
            if arriving:
                self._pass(k, node, read.get(k), arriving)
            if k in made:
                self._begin(made[k])
            for name in node.output:
                if name in self.numbers and name in self.index.pinned:
                    self._stop(self.numbers.pop(name))

    def _begin(self, site: Site) -> None:
        use = site.uses[0]
        shape = self.values[use.result.tensor].shape
        behind = -use.result.axis - 1 if use.result.axis < 0 else len(shape) - 1 - use.result.axis
        if not math.prod(shape) or behind >= len(shape):  # a vector has no axis of rows
            return
        line = np.arange(site.m, dtype=np.int32) + self.first[site.key]
        self.numbers[use.result.tensor] = np.broadcast_to(line.reshape(-1, *(1,) * behind), shape)

    def _stop(self, numbers: np.ndarray) -> None:
        """These features stay as they are."""
        self.stuck.update(np.unique(numbers).tolist())

    def _pass(self, k: int, node: onnx.NodeProto, site: Site | None, arriving: list[str]) -> None:
        given = [self.numbers[name] for name in arriving]
        known = node.domain in ("", "ai.onnx") and all(n in self.values for n in node.output if n)
        passed = False
        if any(n in self.values and not self.values[n].size for n in node.output):
            known = False  # nothing can be seen of what is empty in this sample
        elif site is not None and arriving == [site.uses[0].inputs.tensor]:
            passed = self._read(site, given[0])
        elif node.op_type == "Shape" and node.domain in ("", "ai.onnx"):
            self.seen.append(("Shape", k, given[0]))
            passed = True
        elif is_attention(node):
            passed = self._attend(k, node, arriving)
        elif known and node.op_type in FOLLOWED:
            if node.op_type == "MatMul":
                passed = self._multiply(node)
            elif node.op_type in _SCALING | _ADDING:
                passed = self._combine(k, node, arriving)
            elif arriving == [node.input[0]] and (node.op_type != "Concat" or len(node.input) < 2):
                passed = self._move(k, node, given[0])
        if not passed:
            for numbers in given:
                self._stop(numbers)

    def _read(self, site: Site, numbers: np.ndarray) -> bool:
        """A weight reads the features: its columns close the way."""
        view = site.uses[0].inputs
        single = len(site.uses) == 1 and site.freed and site.uses[0].gain == 1.0
        if view.patches or not single:
            return False
        lines = np.moveaxis(numbers, view.axis, -1).reshape(-1, view.width)
        if (lines != lines[0]).any():
            return False
        groups = self.heads.get(site.uses[0].inputs.tensor)
        if groups is None:
            return False
        n = groups.shape[1]
        places = {int(row[0]): k for k, row in enumerate(groups)}
        starts = np.arange(0, len(lines[0]), n)
        met = [places.get(int(lines[0, start])) for start in starts]
        known = [k for k in met if k is not None]
        if len(known) < len(met) or set(known) != set(places.values()):
            return False
        made = groups[known]
        if not np.array_equal(made.reshape(-1), lines[0]):
            return False
        self.meetings.append(Meeting(made=made, columns=(site, starts)))
        return True

    def _multiply(self, node: onnx.NodeProto) -> bool:
        left, right = (self.numbers.get(name) for name in node.input)
        (out,) = node.output
        if any(self._rank(name) < 2 for name in node.input):
            return False  # a vector has no axis of features beside the one that is summed
        if left is not None and right is not None:
            # Queries and keys: each head of the one meets a head of the other, feature by feature.
            if left.ndim < 2 or right.ndim < 2 or varies(left, -2) or varies(right, -1):
                return False
            n = left.shape[-1]
            batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
            rows = np.broadcast_to(left[..., 0, :], (*batch, n)).reshape(-1, n)
            others = np.broadcast_to(right[..., :, 0], (*batch, n)).reshape(-1, n)
            pairs = np.unique(np.concatenate([rows, others], axis=1), axis=0)
            self.meetings.append(Meeting(made=pairs[:, :n], rows=pairs[:, n:]))
            return True
        # Values, weighed by attention on either side: positions are mixed, features are not.
        values, features, positions = (left, -2, -1) if right is None else (right, -1, -2)
        if values is None or values.ndim < 2:
            return False
        if varies(values, positions) or not varies(values, features):
            return False
        one = values.take([0], positions)
        self.numbers[out] = np.broadcast_to(one, self.values[out].shape)
        self.heads[out] = np.unique(one.reshape(-1, values.shape[features]), axis=0)
        return True

    def _attend(self, k: int, node: onnx.NodeProto, arriving: list[str]) -> bool:
        """Queries meet keys, and values are weighed, within one node."""
        heads, out = attention_heads(node), node.output[0]
        if heads is None or out not in self.values or not set(arriving) <= set(node.input[:3]):
            return False
        ranks = {self.values[name].ndim for name in node.input[:3] if name in self.values}
        if node.domain and ranks != {3}:
            return False  # ONNX Runtime wants keys and values of four axes to be of one size
        lines = [
            by_head(self.numbers[name], heads) if name in self.numbers else None
            for name in node.input[:3]
        ]
        query, key, value = lines
        if query is None or key is None or query.shape != key.shape:
            self._stop_all(node.input[:2])
        else:
            self.meetings.append(Meeting(made=query, rows=key))
            self.seen.append(("Attention", k, self.numbers[node.input[0]]))
        made = None if value is None else over_heads(value, self.values[out].shape)
        if made is None or value is None:
            self._stop_all(node.input[2:3])
        else:
            self.numbers[out], self.heads[out] = made, value
        return True

    def _stop_all(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.numbers:
                self._stop(self.numbers[name])

    def _combine(self, k: int, node: onnx.NodeProto, arriving: list[str]) -> bool:
        """A constant vector added, or all scaled by one number afterwards: any basis allows both.

        What is added later, or to rows that are mixed already, is more than a bias of the weight.
        """
        if len(arriving) > 1:
            return False
        (name,), (out,) = arriving, node.output
        numbers = self.numbers[name]
        other = node.input[1 - list(node.input).index(name)]
        operand = self.index.constant(other)
        shape = self.values[other].shape if operand is None and other in self.values else None
        shape = operand.shape if operand is not None else shape
        if shape is None or self.values[out].shape != numbers.shape:
            return False
        if node.op_type in _SCALING:
            if int(np.prod(shape)) != 1 or (node.op_type == "Div" and node.input[0] != name):
                return False
        else:
            axes = [a for a in range(numbers.ndim) if varies(numbers, a)]
            wide = [a - len(shape) + numbers.ndim for a, n in enumerate(shape) if n > 1]
            if operand is None or (node.input[0] != name and node.op_type == "Sub"):
                return False
            if wide != axes or not axes:  # a single feature varies along no axis
                return False
            if name in self.scaled or name in self.heads or not moves_within(numbers, axes[-1]):
                return False
            line = numbers[tuple(slice(None) if a in axes else 0 for a in range(numbers.ndim))]
            self.vectors.append((k, other, axes[-1] - numbers.ndim, line.reshape(-1)))
        self._arrive(out, numbers, name)
        if node.op_type in _SCALING:
            self.scaled.add(out)
        return True

    def _arrive(self, out: str, numbers: np.ndarray, source: str) -> None:
        self.numbers[out] = numbers
        if source in self.heads:
            self.heads[out] = self.heads[source]
        if source in self.scaled:
            self.scaled.add(out)

    def _move(self, k: int, node: onnx.NodeProto, numbers: np.ndarray) -> bool:
        source = node.input[0]
        if node.op_type in _SAME:
            made = [numbers]
        elif node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
            made = [numbers.reshape(self.values[node.output[0]].shape)]
            if node.op_type == "Reshape":
                self.seen.append(("Reshape", k, made[0]))
        elif node.op_type == "Expand":
            made = [np.broadcast_to(numbers, self.values[node.output[0]].shape)]
            self.seen.append(("Expand", k, made[0]))
        elif node.op_type == "Transpose":
            perm = attributes(node).get("perm")
            made = [np.transpose(numbers, perm if isinstance(perm, list) else None)]
        else:
            made = self._evaluated(node, numbers)
            if made and _cuts(node, numbers, made[0]):
                # Along the features only what is stated by inputs can be stated anew.
                if not self._is_stated(node):
                    return False
                if len(node.input) > 1 and node.input[1]:
                    self.seen.append((node.op_type, k, numbers))
        for name, moved in zip(node.output, made, strict=False):
            self._arrive(name, moved, source)
        return len(made) == len(node.output)

    def _is_stated(self, node: onnx.NodeProto) -> bool:
        """Whether inputs say where a Split or Slice cuts, the latter along one axis."""
        if node.op_type == "Slice":
            told = [self.told(name) for name in node.input[1:]]
            known = [v for v in told if v is not None and v.size == 1]
            # What is computed is computed with, in the type that shapes have.
            inner = (v for v in map(self.values.get, node.input[1:3]) if v is not None)
            whole = len(known) == len(told) > 1 and all(v.dtype == np.int64 for v in inner)
            return whole and all(int(v.flat[0]) == 1 for v in known[3:])
        return node.op_type == "Split" and all(a.name != "split" for a in node.attribute)

    def _rank(self, name: str) -> int:
        kind = self.index.constant_type(name)
        return np.ndim(self.values.get(name, 0)) if kind is None else len(kind[0])

    def told(self, name: str) -> np.ndarray | None:
        """What a constant holds, or a value that is computed held on the sample."""
        held = self.index.constant(name)
        return self.values.get(name) if held is None else held

    def _evaluated(self, node: onnx.NodeProto, numbers: np.ndarray) -> list[np.ndarray]:
        feed = {node.input[0]: numbers.astype(np.int64)}
        for name in filter(None, node.input[1:]):
            held = self.index.constant(name)
            feed[name] = self.values[name] if held is None else held
        try:
            run = ReferenceEvaluator(node, opsets={"": self.index.store.opset or 13})
            return [np.asarray(v, dtype=np.int32) for v in run.run(None, feed)]
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            return []  # a form of the node that the evaluator does not know: nothing is followed


def _cuts(node: onnx.NodeProto, before: np.ndarray, after: np.ndarray) -> bool:
    """Whether a Split, Gather or Slice takes features of a group apart, or a Tile repeats them."""
    if node.op_type in ("Slice", "Tile"):
        axes = [a for a in range(before.ndim) if before.shape[a] != after.shape[a]]
    else:
        axes = [next((a.i for a in node.attribute if a.name == "axis"), 0)]
    return any(moves_within(before, axis) for axis in axes)


def _bare(index: GraphIndex, site: Site) -> bool:
    """Whether a site is one node that makes W x, with no more than a constant bias of its own."""
    use = site.uses[0]
    if len(site.uses) > 1 or not site.freed or use.gain != 1.0:
        return False
    third = index.node(use.node).input[2:3]
    return use.bias.kind == "input" or not any(third)


def varies(numbers: np.ndarray, axis: int) -> bool:
    """Whether other features lie along the axis."""
    return bool((numbers != numbers.take([0], axis)).any())


def moves_within(numbers: np.ndarray, axis: int) -> bool:
    """Whether neighbours along the axis are neighbours in the weight too."""
    if numbers.shape[axis] < 2:
        return False
    pair = numbers.take([0, 1], axis)
    return bool((np.diff(pair, axis=axis) == 1).all())
