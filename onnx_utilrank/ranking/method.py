"""What a method of ranking offers to the pipeline, and the moves it chooses from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from onnx_utilrank.config import CompressConfig
from onnx_utilrank.moves.low_rank import LOW_RANK
from onnx_utilrank.moves.shrink import FAST_CHANNELS
from onnx_utilrank.sites.site import RowView, Side, Site, Use
from onnx_utilrank.statistics.factorize import Factors
from onnx_utilrank.statistics.moments import SecondMoment

__all__ = [
    "Choice",
    "Measured",
    "Method",
    "MomentMethod",
    "Move",
    "candidate_ranks",
    "fast_multiple",
    "site_moment",
    "use_view",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One thing that can be done to a site.

    Attributes:
        rank: Rank of the factors; None leaves the weight as it is.
        bias: Whether the lost mean goes into the bias.
        parameters: Elements that the site's weight or factors, and what the bias adds, take.
        error: What it loses: the predicted rise of the model's loss (`two-sided`), or the expected
            squared error of the site's output relative to its variance.
        subspaces: k_S and k_T, where the method projects on both (`utilized-rank`).
        kind: Key of the `MoveKind`: how the factors are stored.
        cost: What it takes in the unit of the budget.
    """

    rank: int | None
    bias: bool
    parameters: int
    error: float
    subspaces: tuple[int, int] | None = None
    kind: str = LOW_RANK.key
    cost: float = 0.0


class Measured(Protocol):
    """What a method knows of one site."""

    @property
    def site(self) -> Site:
        """The site."""
        ...

    @property
    def moment(self) -> SecondMoment | None:
        """The moment it rests on; None where no data were used."""
        ...

    def moves(self, ranks: Sequence[int]) -> list[Move]:
        """A low-rank move for each of the ranks (and for each way to treat the bias)."""
        ...

    def factors(self, weight: np.ndarray, move: Move) -> Factors:
        """Factors of the weight W [m, d] for a move that has a rank."""
        ...

    def error(self, weight: np.ndarray, move: Move) -> float:
        """Expected relative squared error of the site's output after a move, as far as known."""
        ...

    def lost_mean(self, weight: np.ndarray, factors: Factors, move: Move) -> np.ndarray:
        """(W − Ŵ) E[x], the part of the output's mean that the factors lose, [m]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One site's possibilities, dense or factored, in an allocation.

    Attributes:
        measured: The site.
        moves: What may be done to it; never empty.
    """

    measured: Measured
    moves: tuple[Move, ...]


class Method(Protocol):
    """A way to rank and factor weights: one file in this folder, and an entry in `METHODS`."""

    key: str
    moves: tuple[str, ...] | None
    """Keys of the moves that belong to it; None for all."""

    def side(self, site: Site) -> Side | None:
        """Which side's moments it needs of a site; None for neither."""
        ...

    def allocate(self, choices: Sequence[Choice], budget: float) -> list[Move] | None:
        """One move a site, of at most `budget` together; None where none are so cheap."""
        ...


@runtime_checkable
class MomentMethod(Method, Protocol):
    """A method that needs no more than moments."""

    def measure(
        self, site: Site, weight: np.ndarray, moment: SecondMoment | None, bias_cost: int
    ) -> Measured:
        """Decompose a site.

        Args:
            site: The site.
            weight: W, float64 [m, d].
            moment: Moment of x, or of W x, as `side` asked.
            bias_cost: Elements that correcting the bias would add to the model.
        """
        ...


def candidate_ranks(
    site: Site, top: int, multiple: int, *, force: bool, fast: int = 1
) -> list[int]:
    """Ranks worth offering: multiples up to `top`, where they still save.

    With `force` every multiple counts and the full rank too. Ranks of `fast` and more are multiples
    of that too; smaller ones are offered though they may be slow, as only they lead to small sizes.
    """
    top = site.full_rank if force else top
    ranks = [r for r in range(multiple, top + 1, multiple) if r < fast or r % fast == 0]
    if force and site.full_rank not in ranks:
        ranks.append(site.full_rank)
    return ranks


def fast_multiple(site: Site, method: Method, config: CompressConfig) -> int:
    """What fast ranks are multiples of: those between two Convs are channels, see `FAST_CHANNELS`.

    Those that are asked for by name may be slower, and baselines stay what they are.
    """
    named = config.moves is not None or config.rank_multiple is not None or config.force
    if named or method.moves is not None or site.op_type != "Conv":
        return config.multiple
    return math.lcm(config.multiple, FAST_CHANNELS)


def use_view(use: Use, side: Side) -> RowView:
    """The rows of one side of a use; where x is one-hot, those of x say all of W x too."""
    if side == "inputs" or use.inputs.one_hot:
        return use.inputs
    assert use.outputs is not None
    return use.outputs


def site_moment(
    site: Site,
    side: Side,
    moments: Mapping[RowView, SecondMoment],
    biases: Mapping[int, np.ndarray],
) -> SecondMoment:
    """The moment of x, or of W x, over all uses of a site.

    Args:
        site: The site.
        side: Which of them.
        moments: Moments of every tapped view.
        biases: What the node of each use adds to W x itself, float64 [m], by node.
    """
    merged = SecondMoment.zero(site.d if side == "inputs" else site.m)
    for use in site.uses:
        moment = moments[use_view(use, side)]
        merged.merge(moment if side == "inputs" else moment.shifted(-biases[use.node]))
    return merged
