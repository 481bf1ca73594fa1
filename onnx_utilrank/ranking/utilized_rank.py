"""The paper's rule (Garg et al., arXiv 2407.04797): one energy threshold for every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_utilrank.ranking.method import Choice, Measured, Move
from onnx_utilrank.sites.site import Side, Site
from onnx_utilrank.statistics.factorize import (
    Factors,
    Utilization,
    output_error,
    utilized,
    utilized_outputs,
)
from onnx_utilrank.statistics.moments import SecondMoment

__all__ = ["UTILIZED_RANK", "UtilizedRank", "UtilizedSite", "at_energy"]

BISECTIONS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class UtilizedSite:
    """The subspaces of one site.

    Attributes:
        site: The site.
        moment: Moment of x; of W x where x is one-hot.
        found: The subspaces.
    """

    site: Site
    moment: SecondMoment
    found: Utilization

    def at(self, energy: float, moves: Mapping[int, Move]) -> Move | None:
        """The move at an energy, of those offered by rank: the least that holds the utilized rank.

        A rank above the utilized one widens both subspaces to it. None where all are below.
        """
        k_s, k_t = self.found.ranks(energy)
        rank = min((r for r in moves if r >= min(k_s, k_t)), default=None)
        if rank is None:
            return None
        return replace(moves[rank], subspaces=(max(k_s, rank), max(k_t, rank)))

    def moves(self, ranks: Sequence[int]) -> list[Move]:
        """See `Measured.moves`; both subspaces of the same dimension."""
        return [
            Move(
                rank=rank,
                bias=False,
                parameters=rank * (self.site.m + self.site.d),
                error=float("nan"),
                subspaces=(rank, rank),
            )
            for rank in ranks
        ]

    def factors(self, weight: np.ndarray, move: Move) -> Factors:
        """See `Measured.factors`."""
        assert move.rank is not None
        # An edited plan may name a rank alone.
        return self.found.factors(weight, *(move.subspaces or (move.rank, move.rank)))

    def error(self, weight: np.ndarray, move: Move) -> float:
        """E‖(W − W') x‖² relative to E‖W x‖²: the paper leaves the bias alone."""
        if move.rank is None:
            return 0.0
        energy = float(self.found.output_values.sum())
        if self.site.one_hot:
            _, k_t = move.subspaces or (move.rank, move.rank)
            lost = float(self.found.output_values[k_t:].sum())
            return lost / max(energy, float(np.finfo(np.float64).tiny))
        product = self.factors(weight, move).product
        lost = output_error(weight, product, self.moment.uncentred)
        return lost / max(energy, float(np.finfo(np.float64).tiny))

    def lost_mean(self, weight: np.ndarray, factors: Factors, move: Move) -> np.ndarray:
        """See `Measured.lost_mean`; not used, as the paper leaves the bias alone."""
        mean = self.moment.mean
        if self.site.one_hot:  # all inputs are kept: W' = P_T W
            _, k_t = move.subspaces or (move.rank, move.rank)
            basis = self.found.output_basis[:, :k_t]
            return np.asarray(mean - basis @ (basis.T @ mean))
        return np.asarray((weight - factors.product) @ mean)


def at_energy(choices: Sequence[Choice], energy: float) -> list[Move]:
    """The paper's transformation: each site at its utilized rank, dense where that is no saving."""
    return [_choose(choice, energy) for choice in choices]


def _choose(choice: Choice, energy: float) -> Move:
    site = choice.measured
    assert isinstance(site, UtilizedSite)
    dense = [m for m in choice.moves if m.rank is None]
    move = site.at(energy, {m.rank: m for m in choice.moves if m.rank is not None})
    if move is None:
        return dense[0] if dense else choice.moves[-1]
    return move if not dense or move.cost < dense[0].cost else dense[0]


class UtilizedRank:
    """W' = P_T W P_S a layer, at its utilized rank."""

    key = "utilized-rank"
    moves: tuple[str, ...] | None = ("low-rank",)

    def side(self, site: Site) -> Side:
        """The inputs: both subspaces follow from their moment; of a table the outputs."""
        return "outputs" if site.one_hot else "inputs"

    def measure(
        self, site: Site, weight: np.ndarray, moment: SecondMoment | None, bias_cost: int
    ) -> UtilizedSite:
        """See `Method.measure`."""
        del bias_cost
        assert moment is not None
        found = utilized_outputs(weight, moment) if site.one_hot else utilized(weight, moment)
        return UtilizedSite(site=site, moment=moment, found=found)

    def ranks(self, measured: Measured, energy: float) -> tuple[int, int]:
        """k_S and k_T of a site that this method measured."""
        assert isinstance(measured, UtilizedSite)
        return measured.found.ranks(energy)

    def allocate(self, choices: Sequence[Choice], budget: float) -> list[Move] | None:
        """The largest energy, the same for every layer, whose ranks fit the budget."""

        def spent(moves: Sequence[Move]) -> float:
            return sum(m.cost for m in moves)

        taken = at_energy(choices, 1.0)
        if spent(taken) <= budget:
            return taken
        # The energy lost is bisected by its order of magnitude.
        low, high = 1e-15, 1.0
        taken = at_energy(choices, 0.0)
        if spent(taken) > budget:
            return None
        for _ in range(BISECTIONS):
            lost = float(np.sqrt(low * high))
            moves = at_energy(choices, 1.0 - lost)
            if spent(moves) <= budget:
                high, taken = lost, moves
            else:
                low = lost
        return taken


UTILIZED_RANK = UtilizedRank()
