"""What things cost: the one meaning of each "ratio" in this tool."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from onnx_utilrank.latency.costs import LatencyCosts
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.moves.move import MoveKind
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site

__all__ = [
    "Ledger",
    "Storage",
    "Unit",
    "bias_cost",
    "count_parameters",
    "hidden_cost",
    "shrunk_parameters",
]

Unit = Literal["parameters", "bytes", "operations", "latency"]

# Bytes that a node with its names takes in a file, about: the plan is made with it and corrected
# by what the file then has.
NODE_BYTES = 160


class Storage(Protocol):
    """How the file holds weights."""

    def matrix_bytes(
        self, op_type: str, outputs: int, inputs: int, dtype: np.dtype[np.generic]
    ) -> float:
        """Bytes of a weight of an operator that has an element type in the model."""
        ...


class _AsTheyAre:
    """Weights in their own element type."""

    def matrix_bytes(
        self, op_type: str, outputs: int, inputs: int, dtype: np.dtype[np.generic]
    ) -> float:
        """See `Storage.matrix_bytes`."""
        del op_type
        return float(outputs * inputs * dtype.itemsize)


_AS_THEY_ARE = _AsTheyAre()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What a whole model and each of its sites cost in one unit.

    Attributes:
        unit: `parameters`: elements of all initializers and constants. `bytes`: of the file,
            external data included. `operations`: multiply-accumulates of MatMul, Gemm, Conv
            and ConvTranspose on one sample. `latency`: nanoseconds of a run.
        total: Of the model as it is.
        rows: Rows of output that one sample has at each site, by key.
        latency: What was timed, where moves have to be faster.
        storage: How the final file holds weights, where the model is quantized afterwards.
        dense_total: What the model costs with every site as it is, where that is another figure:
            of the file that quantization alone makes.
    """

    unit: Unit
    total: float
    rows: Mapping[str, float]
    latency: LatencyCosts | None = None
    storage: Storage = _AS_THEY_ARE
    dense_total: float | None = None

    def dense(self, site: Site) -> float:
        """What the site costs as it is: what goes when it is factored."""
        if self.unit == "latency":
            return self._timed.dense(site)
        if self.unit == "operations":
            return self.rows[site.key] * site.multiplications
        # A weight that stays whatever happens to this site is none of its cost.
        if not site.freed:
            return 0.0
        if self.unit == "bytes":
            return self.storage.matrix_bytes(site.op_type, site.m, site.d, site.stored)
        return float(site.parameters)

    def shrunk(
        self, site: Site, rows: int, columns: int, extra: int, rank: int | None = None
    ) -> float:
        """What it costs with fewer rows and columns, of some rank, and so many elements elsewhere.

        Operations of depthwise Convs on the way, which become fewer too, are not told; nor is what
        a rank takes, where time is counted.
        """
        if self.unit == "latency":
            return self._timed.shrunk(site, rows, columns)
        parts = [(rows, columns)] if rank is None else [(rank, columns), (rows, rank)]
        if self.unit == "operations":
            first, *rest = (outputs * inputs for outputs, inputs in parts)
            return self.rows[site.key] * (first * site.density + sum(rest))
        if self.unit == "bytes":
            held = sum(self.storage.matrix_bytes(site.op_type, *part, site.dtype) for part in parts)
            return held + extra * site.dtype.itemsize + NODE_BYTES * (2 * len(parts) - 1)
        return float(sum(outputs * inputs for outputs, inputs in parts) + extra)

    def factored(self, site: Site, kind: MoveKind, rank: int, parameters: int) -> float:
        """What it costs after a move that stores so many parameters."""
        if self.unit == "latency":
            return self._timed.factored(site, kind, rank)
        if self.unit == "operations":
            return self.rows[site.key] * kind.multiplications(site, rank)
        if self.unit == "bytes":
            return self._held(site, kind, rank, parameters) + 2 * NODE_BYTES * len(site.uses)
        return float(parameters)

    def _held(self, site: Site, kind: MoveKind, rank: int, parameters: int) -> float:
        parts = kind.matrices(site, rank)
        rest = parameters - sum(outputs * inputs for _, outputs, inputs in parts)
        if rest < 0:  # its factors are those of the weight that it is tied to
            parts, rest = (), parameters
        held = sum(self.storage.matrix_bytes(*part, site.dtype) for part in parts)
        return held + rest * site.dtype.itemsize

    def shrinks(self, site: Site, kind: MoveKind, rank: int, parameters: int) -> bool:
        """Whether a move takes fewer bytes than the dense weight, as the final file holds both.

        A scheme of quantization may have no form for a factor: a table of an odd rank stays in
        floats, which takes more than the whole table in 4 bits.
        """
        dense = self.storage.matrix_bytes(site.op_type, site.m, site.d, site.stored)
        return not site.freed or self._held(site, kind, rank, parameters) < dense

    def shrinks_further(self, site: Site, rows: int, columns: int, rank: int) -> bool:
        """The same of factors beside a weight that has shrunk to so many rows and columns."""
        pair, whole = [(rank, columns), (rows, rank)], [(rows, columns)]
        held, dense = (
            sum(self.storage.matrix_bytes(site.op_type, *part, site.dtype) for part in parts)
            for parts in (pair, whole)
        )
        return held < dense

    def pays(self, site: Site, kind: MoveKind, rank: int) -> bool:
        """Whether a move is faster than the dense weight: as measured, or else as it should be."""
        if self.latency is not None:
            return self.latency.pays(site, kind, rank)
        return kind.pays(site, rank, self.rows[site.key])

    @property
    def _timed(self) -> LatencyCosts:
        assert self.latency is not None
        return self.latency


def count_parameters(store: ModelStore) -> int:
    """Elements of every initializer and every constant tensor of the model, in all its graphs."""
    return sum(math.prod(tensor.dims) for tensor in store.tensors())


def shrunk_parameters(
    index: GraphIndex,
    hidden: Hidden,
    sites: Mapping[str, Site],
    site: Site,
    kept: int,
    rank: int | None,
) -> int:
    """Elements of a weight whose hidden features shrink, and of what is left some rank.

    What comes with the features is put down to the first of their weights.
    """
    rows, columns = hidden.rows(site.key, site.m, kept), hidden.columns(site.key, site.d, kept)
    extra = hidden_cost(index, hidden, sites, kept) if site.key == hidden.sites[0] else 0
    if rank is None:
        return rows * columns + extra
    return rank * (rows + columns) + extra + (rows if site.bias == "new" else 0)


def hidden_cost(index: GraphIndex, hidden: Hidden, sites: Mapping[str, Site], kept: int) -> int:
    """Elements that shrinking hidden features adds to the model beside its weights, at most.

    Biases and other constants shrink with the features, which may well make it negative; shapes
    are stated anew. A constant that other nodes read too is taken to stay.
    """
    total = 0
    for vector in hidden.vectors:
        kind = index.constant_type(vector.name)
        assert kind is not None
        held = math.prod(kind[0])
        total += held * kept // hidden.size
        total -= held if index.freed_by(vector.name, frozenset({vector.node})) else 0
    for repair in (*hidden.reshapes, *hidden.shapes):
        total += repair.length
    for node in hidden.splits:
        total += len(index.node(node).output)
    for repair in hidden.slices:  # a bound that is computed is divided and multiplied
        bounds = index.node(repair.node).input[1:3]
        total += sum(1 if name in index.constants else 2 for name in bounds)
    for name, nodes in _targets(index, hidden).items():
        kind = index.constant_type(name)
        if kind is not None and index.freed_by(name, frozenset(nodes)):
            total -= math.prod(kind[0])
    for key in hidden.sites:
        site = sites[key]
        (use,) = site.uses
        rows = hidden.rows(key, site.m, kept)
        if rows == site.m and use.bias.kind != "new":
            total += bias_cost(index, site)
        elif use.bias.kind == "input":
            total += rows
            total -= site.m if index.freed_by(use.bias.name, frozenset({use.node})) else 0
    return total


def _targets(index: GraphIndex, hidden: Hidden) -> dict[str, set[int]]:
    """The shapes that are read, the sizes of Splits and the bounds of Slices, with the nodes."""
    found: dict[str, set[int]] = {}
    for node in (*(repair.node for repair in hidden.reshapes), *hidden.splits):
        found.setdefault(index.node(node).input[1], set()).add(node)
    for repair in hidden.slices:
        names = index.node(repair.node).input
        for name in set(names[1:3]) - set(names[3:]):
            found.setdefault(name, set()).add(repair.node)
    return found


def bias_cost(index: GraphIndex, site: Site) -> int:
    """Elements that a corrected bias adds to the model, over all uses of a site."""
    total = 0
    for use in site.uses:
        slot = use.bias
        if slot.kind in ("input", "add"):
            kind = index.constant_type(slot.name)
            assert kind is not None
            reader = use.node if slot.kind == "input" else slot.node
            replaced = math.prod(kind[0]) if index.freed_by(slot.name, frozenset({reader})) else 0
            total += math.prod(slot.shape) - replaced
        elif slot.kind == "new":
            total += site.m
    return total
