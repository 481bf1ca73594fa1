"""Features that lie between weights: heads of attention, or the hidden units of an MLP.

The features of a *hidden* are made by the rows of some weights and read by the columns of others,
or met by the rows of others in a product (queries and keys). What lies between treats the n
features of a group alike, so that any basis of them will do: y ≈ L K y, with K [k, n] applied to
the weights that make them and L [n, k] to those that read them. No node is added, every matrix
shrinks in its place, and there is no rank at which that does not yet pay.

Units go through functions of their own on the way. Of these k are chosen, so that K is a choice of
rows, and each weight that reads them makes up for the others by an L of its own.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnx_utilrank.model.graph import GraphIndex

__all__ = ["Group", "Hidden", "Part", "Repair", "Vector"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows or columns of one weight that belong to a group.

    Attributes:
        site: Key of the site.
        side: `rows` are outputs of the weight, `columns` inputs.
        start: The first of them; the others follow.
        taps: Columns that each feature has: more than one in a Conv.
    """

    site: str
    side: Literal["rows", "columns"]
    start: int
    taps: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """n features that may be mixed with each other and with no others.

    Attributes:
        made: The rows that make them: they get K.
        met: What reads them or meets them: columns get L, rows L^T.
    """

    made: Part
    met: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """A node that states the extent of an axis along which the features lie.

    Attributes:
        node: Its index.
        place: Where the extent stands in the vector that a Reshape reads or a Shape makes.
        length: Of that vector.
        extent: The extent as it was.
    """

    node: int
    place: int
    length: int
    extent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    """A constant that is added to the features on their way, or holds something of each unit.

    Attributes:
        node: The node that reads it.
        name: The constant.
        axis: Its axis that the features of a group lie along; negative.
        parts: Which rows made the features it is added to, one part for every n of them.
    """

    node: int
    name: str
    axis: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """Features between weights that can shrink together.

    Attributes:
        key: What plans and reports call it: the key of the first weight that makes them.
        sites: Keys of all its weights, in graph order.
        size: Features n in a group.
        groups: The groups; one that several columns or weights read stands there once for each.
        reshapes: Reshape and Expand nodes whose targets name the features.
        splits: Split nodes that name how many features go where.
        slices: Slice nodes that cut features of other groups off, at constant or computed bounds.
        shapes: Shape nodes that read them; whoever reads those is shown the extents as they were.
        vectors: Constants that are added to them, or hold something of each unit.
        values: Every value that holds them: what a model declares of their shapes no longer holds.
        depthwise: Convs of each unit by itself, whose number of groups is the extent.
        attentions: Attention nodes whose queries and keys they are: unless told, those scale their
            scores by the number of features.
        units: Whether functions are applied to each of them by itself, so that they cannot be
            mixed: some are kept as they are, the same of every group.
    """

    key: str
    sites: tuple[str, ...]
    size: int
    groups: tuple[Group, ...]
    reshapes: tuple[Repair, ...]
    splits: tuple[int, ...]
    shapes: tuple[Repair, ...]
    vectors: tuple[Vector, ...]
    values: tuple[str, ...]
    depthwise: tuple[Repair, ...] = ()
    attentions: tuple[Repair, ...] = ()
    slices: tuple[Repair, ...] = ()
    units: bool = False

    @property
    def made(self) -> tuple[Part, ...]:
        """The rows that make features: a group of one basis each, however often it is read."""
        return tuple(dict.fromkeys(g.made for g in self.groups))

    @property
    def readers(self) -> tuple[str, ...]:
        """The weights that read units; none of features that are no units."""
        if not self.units:
            return ()
        return tuple(g.met.site for g in self.groups if g.met.side == "columns")

    def makers(self, site: str) -> tuple[Part, ...]:
        """Those of a site."""
        return tuple(part for part in self.made if part.site == site)

    def added(self, index: GraphIndex, site: str, m: int) -> np.ndarray:
        """What is added to the features that a site of m rows makes, on their way, [m].

        Of units nothing: a function lies between.
        """
        total = np.zeros(m)
        if self.units:
            return total
        for vector in self.vectors:
            held = index.constant(vector.name)
            assert held is not None
            sign = -1.0 if index.node(vector.node).op_type == "Sub" else 1.0
            pieces = sign * held.astype(np.float64).reshape(-1, self.size)
            for part, piece in zip(vector.parts, pieces, strict=True):
                if part.site == site:
                    total[part.start : part.start + self.size] += piece
        return total

    def rows(self, site: str, m: int, kept: int) -> int:
        """Rows of a site of m once every group keeps so many features."""
        parts = {p for g in self.groups for p in (g.made, g.met)}
        count = sum(p.site == site and p.side == "rows" for p in parts)
        return m - count * (self.size - kept)

    def columns(self, site: str, d: int, kept: int) -> int:
        """Columns of a site of d once every group keeps so many features."""
        met = (g.met for g in self.groups if g.met.side == "columns" and g.met.site == site)
        return d - sum(part.taps for part in met) * (self.size - kept)
