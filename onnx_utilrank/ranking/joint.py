"""Choices that several weights make together, because the features between them may shrink."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from onnx_utilrank.ranking.method import Choice, Move
from onnx_utilrank.ranking.two_sided import TwoSidedSite
from onnx_utilrank.sites.hidden import Hidden

__all__ = ["Bundle", "Option", "bundled"]


# Of how many sizes of hidden features, evenly spread, ranks of what is left are looked at too.
SIZES_FACTORED = 32


class Shrunk(Protocol):
    """What a site can do where hidden features shrink; see `bundled`."""

    def __call__(
        self, hidden: Hidden, choice: Choice, kept: int, /, *, ranks: bool
    ) -> Sequence[Move]:
        """The moves of a site of a hidden of which so many features a group are kept."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One thing that can be done to the weights of a bundle.

    Attributes:
        cost: What they take then, in the unit of the budget.
        error: What they lose, all together.
        moves: One a weight.
        kept: Features that each group of the hidden ones keeps; None leaves those as they are.
    """

    cost: float
    error: float
    moves: tuple[Move, ...]
    kept: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Weights that are decided on together.

    Attributes:
        members: Which of the choices they are.
        hidden: The features between them; None for a weight by itself.
        moves: What can be done.
        tied: Whether all make the same move, because they share a weight.
    """

    members: tuple[int, ...]
    hidden: Hidden | None
    moves: tuple[Option, ...]
    tied: bool = False


def bundled(
    choices: Sequence[Choice],
    hidden: Sequence[Hidden],
    shrunk: Shrunk,
    multiple: int,
    channels: int = 1,
) -> list[Bundle]:
    """The choices, those around hidden features joined.

    Either each of the weights makes a move of its own, or all lose what the hidden features lose;
    and what is left of a weight may be factored then. Losses of both add up, as those of several
    weights do: to first order one is blind to the other.

    Args:
        choices: One a site.
        hidden: Features between sites; those of which a weight was not measured are left out.
        shrunk: What a site of a hidden can do where so many features a group are kept: the first
            is to shrink and no more. Told whether ranks are to be offered too.
        multiple: Features are kept in multiples of this.
        channels: And units that are channels of Convs in multiples of this too.
    """
    place = {c.measured.site.key: k for k, c in enumerate(choices)}
    bundles: list[Bundle] = []
    taken: set[int] = set()
    for each in hidden:
        if not all(key in place for key in each.sites):
            continue
        members = tuple(place[key] for key in each.sites)
        taken.update(members)
        own = [choices[k] for k in members]
        options, both = _separately([c.moves for c in own]), []
        step = multiple
        if each.units and any(c.measured.site.op_type == "Conv" for c in own):
            step = math.lcm(multiple, channels)
        every = max(each.size // step // SIZES_FACTORED, 1)
        for kept in range(step, each.size, step):
            ranks = (kept // step) % every == 0
            offered = [shrunk(each, c, kept, ranks=ranks) for c in own]
            lost = 0.0
            for measured in own:
                site = measured.measured
                assert isinstance(site, TwoSidedSite)
                lost += site.shrunk_error(each, kept)
            alone = _together(offered, [0] * len(own))
            options.append(replace(alone, error=lost, kept=kept))
            if any(len(moves) > 1 for moves in offered):
                found = _separately(offered)
                both += [replace(o, error=o.error + lost, kept=kept) for o in found]
        options += _better(both, options)
        bundles.append(Bundle(members=members, hidden=each, moves=tuple(options)))
    for k, choice in enumerate(choices):
        tied = choice.measured.site.tied
        if tied is not None and choice.measured.site.freed:
            members = (k, place[tied])
            taken.update(members)
            as_one = tuple(_as_one([choices[j] for j in members]))
            bundles.append(Bundle(members=members, hidden=None, moves=as_one, tied=True))
    for k, choice in enumerate(choices):
        if k not in taken:
            single = [Option(cost=m.cost, error=m.error, moves=(m,)) for m in choice.moves]
            bundles.append(Bundle(members=(k,), hidden=None, moves=tuple(single)))
    return bundles


def _better(options: Sequence[Option], than: Sequence[Option]) -> list[Option]:
    """Those that neither another one nor any of others matches at the cost or less."""
    found, least = [], math.inf
    others = [(o.cost, o.error, None) for o in than]
    for _, error, option in sorted(
        [*others, *((o.cost, o.error, o) for o in options)], key=lambda each: each[:2]
    ):
        if error < least:
            least = error
            if option is not None:
                found.append(option)
    return found


def _as_one(choices: Sequence[Choice]) -> list[Option]:
    """Moves that sites make at the same rank."""
    first, *rest = ({m.rank: m for m in c.moves} for c in choices)
    common = [rank for rank in first if all(rank in moves for moves in rest)]
    together = [tuple(moves[rank] for moves in (first, *rest)) for rank in common]
    return [
        Option(cost=sum(m.cost for m in moves), error=sum(m.error for m in moves), moves=moves)
        for moves in together
    ]


def _separately(offered: Sequence[Sequence[Move]]) -> list[Option]:
    """Moves of several sites that a price can bring about: the lower hull of all combinations.

    It is walked from the cheapest combination by the step, of any of the sites, that gains most
    for what it costs.
    """
    hulls = [_hull(moves) for moves in offered]
    steps = sorted(
        (
            ((a.error - b.error) / (b.cost - a.cost), site, k + 1)
            for site, hull in enumerate(hulls)
            for k, (a, b) in enumerate(itertools.pairwise(hull))
        ),
        key=lambda step: (-step[0], step[1], step[2]),
    )
    at = [0] * len(hulls)
    options = [_together(hulls, at)]
    for _, site, k in steps:
        at[site] = k
        options.append(_together(hulls, at))
    return options


def _together(hulls: Sequence[Sequence[Move]], at: Sequence[int]) -> Option:
    moves = tuple(hull[k] for hull, k in zip(hulls, at, strict=True))
    return Option(cost=sum(m.cost for m in moves), error=sum(m.error for m in moves), moves=moves)


def _hull(moves: Sequence[Move]) -> list[Move]:
    """Moves on the lower convex hull of error over cost, by rising cost and falling error."""
    hull: list[Move] = []
    for move in sorted(moves, key=lambda m: (m.cost, m.error)):
        if hull and move.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], move):
            hull.pop()
        if hull and move.cost == hull[-1].cost:
            continue
        hull.append(move)
    return hull


def _above(a: Move, b: Move, c: Move) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b.error - a.error) * (c.cost - a.cost) >= (c.error - a.error) * (b.cost - a.cost)
