"""Follow hidden units through the functions that are applied to each by itself.

Where `follow` keeps to what treats features alike in any basis, units pass through activations,
gates, constants of their own and pooling too. In exchange they cannot be mixed: some are kept as
they are, and the weight that reads them makes up for the others.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.sites.attention import is_attention
from onnx_utilrank.sites.follow import FOLLOWED, Meeting, Trace, moves_within, varies
from onnx_utilrank.sites.site import Site

__all__ = ["UnitTrace", "values_followed"]

# fmt: off
# Each output is a function of the input at the same place.
_UNARY = frozenset({
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil",
    "Celu", "Clip", "Cos", "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not",
    "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus",
    "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
})
# And of several inputs, which are broadcast.
_NARY = frozenset({
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max",
    "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
})
# fmt: on
# Of these the ones that make sums.
_ADDING = frozenset({"Add", "Mean", "Sub", "Sum"})
# Of a channel, axis 1, and of constants [C].
_PER_CHANNEL = frozenset({"BatchNormalization", "InstanceNormalization"})
_CONTRIB = frozenset({"BiasGelu", "FastGelu", "Gelu", "QuickGelu"})
# Pooling within each channel, axis 1.
_POOLING = frozenset(
    ["AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"]
)
# The same over axes that are named.
_REDUCING = frozenset(
    f"Reduce{how}"
    for how in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
)


def _units_pass(node: onnx.NodeProto) -> bool:
    """Whether units pass a node that features in general do not."""
    if node.domain == "com.microsoft":
        return node.op_type in _CONTRIB
    known = _UNARY | _NARY | _PER_CHANNEL | _POOLING | _REDUCING | {"Conv"}
    return node.domain in ("", "ai.onnx") and node.op_type in known


def values_followed(index: GraphIndex) -> set[str]:
    """Values whose extents (and for shapes, whose numbers) `find_hidden` wants of one sample."""
    names: set[str] = set()
    for node in index.store.proto.graph.node:
        layout = node.domain in ("", "ai.onnx") and node.op_type in FOLLOWED | {"Gemm", "Conv"}
        if layout or _units_pass(node) or is_attention(node):
            names.update(name for name in (*node.input, *node.output) if name)
    return {name for name in names if name not in index.constants}


@dataclass(slots=True)
class UnitTrace(Trace):
    """The same walk for units.

    Attributes:
        pairs: Units that make up one where they meet, [2, n] each: a gate and what it gates.
        added: Those of them that are added up, as a block's are to the stream it reads.
    """

    pairs: list[np.ndarray] = field(default_factory=list)
    added: list[np.ndarray] = field(default_factory=list)

    def _pass(self, k: int, node: onnx.NodeProto, site: Site | None, arriving: list[str]) -> None:
        if (
            _units_pass(node)
            and site is None
            and all(n in self.values and self.values[n].size for n in node.output if n)
            and self._through(k, node, arriving)
        ):
            return
        # `Trace` is asked for what it knows of layouts, weights and shapes; the rest ends there.
        Trace._pass(self, k, node, site, arriving)

    def _multiply(self, node: onnx.NodeProto) -> bool:
        del node  # a product of matrices mixes units
        return False

    def _attend(self, k: int, node: onnx.NodeProto, arriving: list[str]) -> bool:
        del k, node, arriving  # so does attention
        return False

    def _combine(self, k: int, node: onnx.NodeProto, arriving: list[str]) -> bool:
        del k, node, arriving  # `_through` has seen it
        return False

    def _read(self, site: Site, numbers: np.ndarray) -> bool:
        view = site.uses[0].inputs
        if view.patches and view.patches.transposed:
            return False
        if len(site.uses) > 1 or not site.freed or site.uses[0].gain != 1.0:
            return False
        axis = 1 if view.patches else view.axis
        width = view.patches.channels if view.patches else view.width
        if not -numbers.ndim <= axis < numbers.ndim:
            return False
        lines = np.moveaxis(numbers, axis, -1).reshape(-1, numbers.shape[axis])
        if lines.shape[1] != width or (lines != lines[0]).any():
            return False
        self.meetings.append(Meeting(made=lines[:1].copy(), columns=(site, np.zeros(1, dtype=int))))
        return True

    def _through(self, k: int, node: onnx.NodeProto, arriving: list[str]) -> bool:
        """Pass a function of each unit; False where it is something else."""
        (out, *others) = node.output
        if any(others):
            return False
        numbers, shape = self.numbers[arriving[0]], self.values[out].shape
        if node.op_type in _POOLING:
            if numbers.ndim < 3 or any(varies(numbers, a) for a in range(2, numbers.ndim)):
                return False
            self.numbers[out] = np.broadcast_to(
                numbers[(slice(None), slice(None), *(slice(0, 1),) * (numbers.ndim - 2))], shape
            )
            return True
        if node.op_type in _REDUCING:
            return arriving == [node.input[0]] and self._reduced(node)
        if node.op_type == "Conv":
            return arriving == [node.input[0]] and self._convolved(k, node)
        spread = _spread(numbers, shape)
        if spread is None:
            return False
        numbers = spread
        axes = [a for a in range(numbers.ndim) if varies(numbers, a)]
        if node.op_type in _PER_CHANNEL:
            return arriving == [node.input[0]] and self._normalized(k, node, axes)
        found, met = [], []
        for name in dict.fromkeys(filter(None, node.input)):
            if name in self.numbers:
                other = _spread(self.numbers[name], shape)
                if other is None:
                    return False
                if not np.array_equal(other, numbers):
                    met.append(_pairs(numbers, other))
                continue
            held = self.index.constant(name)
            known = held if held is not None else self.values.get(name)
            if known is None:
                return False
            wide = [a - known.ndim + numbers.ndim for a, n in enumerate(known.shape) if n > 1]
            if not set(wide) & set(axes):  # the same for all units
                continue
            if held is None or wide != axes or len(axes) != 1:
                return False
            (axis,) = axes
            if not moves_within(numbers, axis) or known.shape[axis - numbers.ndim] != shape[axis]:
                return False
            line = numbers[tuple(slice(None) if a == axis else 0 for a in range(numbers.ndim))]
            found.append((k, name, axis - numbers.ndim, line.reshape(-1)))
        self.vectors.extend(found)
        self.pairs.extend(met)
        self.added.extend(met if node.op_type in _ADDING else ())
        self.numbers[out] = numbers
        return True

    def _reduced(self, node: onnx.NodeProto) -> bool:
        """Pass a sum, mean or the like over positions of each unit."""
        numbers, shape = self.numbers[node.input[0]], self.values[node.output[0]].shape
        given = {a.name: a for a in node.attribute}
        told = self.told(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        axes = list(given["axes"].ints) if "axes" in given else () if told is None else told.ravel()
        over = {int(a) % numbers.ndim for a in axes}
        if not over or any(varies(numbers, a) for a in over):
            return False
        kept = "keepdims" not in given or given["keepdims"].i
        first = slice(0, 1) if kept else 0
        reduced = numbers[tuple(first if a in over else slice(None) for a in range(numbers.ndim))]
        if reduced.shape != shape:
            return False
        self.numbers[node.output[0]] = reduced
        return True

    def _normalized(self, k: int, node: onnx.NodeProto, axes: list[int]) -> bool:
        """Pass a normalization of each channel by itself."""
        numbers = self.numbers[node.input[0]]
        constants = [self.index.constant(name) for name in node.input[1:]]
        if axes != [1] or any(c is None or c.shape != numbers.shape[1:2] for c in constants):
            return False
        line = numbers.take(0, 0).reshape(numbers.shape[1], -1)[:, 0]
        self.vectors.extend((k, name, -1, line) for name in dict.fromkeys(node.input[1:]))
        self.numbers[node.output[0]] = numbers
        return True

    def _convolved(self, k: int, node: onnx.NodeProto) -> bool:
        """Pass a Conv of each channel by itself."""
        numbers, (out,) = self.numbers[node.input[0]], node.output
        constants = [self.index.constant(name) for name in node.input[1:]]
        axes = [a for a in range(numbers.ndim) if varies(numbers, a)]
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        if axes != [1] or not moves_within(numbers, 1):
            return False
        if any(c is None or len(c) != groups or groups != numbers.shape[1] for c in constants):
            return False
        line = numbers.take(0, 0).reshape(groups, -1)
        for name, held in zip(node.input[1:], constants, strict=True):
            assert held is not None
            self.vectors.append((k, name, -held.ndim, line[:, 0]))
        self.seen.append(("Conv", k, numbers))
        one = line[:, 0].reshape(1, groups, *(1,) * (numbers.ndim - 2))
        self.numbers[out] = np.broadcast_to(one, self.values[out].shape)
        return True


def _spread(numbers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Numbers broadcast to a shape; None where they are not (ONNX, Broadcasting in ONNX)."""
    try:
        return np.broadcast_to(numbers, shape)
    except ValueError:
        return None


def _pairs(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The units of two arrays that meet, [2, n]; along most axes nothing differs."""
    same = [not (varies(one, a) or varies(other, a)) for a in range(one.ndim)]
    cut = tuple(slice(0, 1) if s else slice(None) for s in same)
    return np.unique(np.stack([one[cut].ravel(), other[cut].ravel()]), axis=1)
