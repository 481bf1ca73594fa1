"""The default method: the data-optimal factors of each weight, one budget over all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.ranking.budget import allocate
from onnx_utilrank.ranking.method import Choice, Move, Side
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.factorize import Decomposition, Factors, one_sided
from onnx_utilrank.statistics.moments import SecondMoment

__all__ = ["ONE_SIDED", "OneSided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OneSidedSite:
    """Decompositions of one site.

    Attributes:
        site: The site.
        moment: Moment of x or W x.
        side: Which of the two.
        centred: The decomposition for a corrected bias; None where the bias cannot take the mean.
        uncentred: The one without; None where correcting the bias is free, and so always better.
        variance: E‖W (x − μ)‖², which errors are relative to.
        bias_cost: Elements that correcting the bias adds.
    """

    site: Site
    moment: SecondMoment
    side: Side
    centred: Decomposition | None
    uncentred: Decomposition | None
    variance: float
    bias_cost: int

    def moves(self, ranks: Sequence[int]) -> list[Move]:
        """See `Measured.moves`."""
        kinds = ((self.centred, True, self.bias_cost), (self.uncentred, False, 0))
        return [
            Move(
                rank=rank,
                bias=bias,
                parameters=rank * (self.site.m + self.site.d) + extra,
                error=float(found.errors[rank]) / self.variance,
            )
            for found, bias, extra in kinds
            if found is not None
            for rank in ranks
        ]

    def factors(self, weight: np.ndarray, move: Move) -> Factors:
        """See `Measured.factors`."""
        assert move.rank is not None
        found = self.centred if move.bias else self.uncentred
        assert found is not None
        return found.factors(weight, move.rank)

    def error(self, weight: np.ndarray, move: Move) -> float:
        """See `Measured.error`."""
        del weight
        return move.error

    def lost_mean(self, weight: np.ndarray, factors: Factors, move: Move) -> np.ndarray:
        """See `Measured.lost_mean`."""
        mean = self.moment.mean
        if self.side == "inputs":
            return np.asarray((weight - factors.product) @ mean)
        assert self.centred is not None
        kept = self.centred.basis[:, : move.rank]
        return np.asarray(mean - kept @ (kept.T @ mean))


class OneSided:
    """min E‖(W − Ŵ)(x − μ)‖² a site; see `statistics.factorize.one_sided`."""

    key = "one-sided"

    def side(self, site: Site) -> Side:
        """The smaller side; the inputs where both are equal, as siblings share those."""
        if site.m < site.d and all(use.outputs is not None for use in site.uses):
            return "outputs"
        return "inputs"

    def measure(
        self, site: Site, weight: np.ndarray, moment: SecondMoment | None, bias_cost: int
    ) -> OneSidedSite:
        """See `Method.measure`."""
        assert moment is not None
        side = self.side(site)
        given = {side: moment}
        centred = uncentred = None
        if site.bias != "none":
            centred = one_sided(weight, **given, centred=True)
        if centred is None or bias_cost > 0:
            uncentred = one_sided(weight, **given, centred=False)
        energies = [found.energy for found in (centred, uncentred) if found is not None]
        variance = energies[0]
        if variance <= 1e-12 * max(energies) or variance == 0:  # one row, or a constant output
            variance = max(*energies, float(np.finfo(np.float64).tiny))
        return OneSidedSite(
            site=site,
            moment=moment,
            side=side,
            centred=centred,
            uncentred=uncentred,
            variance=variance,
            bias_cost=bias_cost,
        )

    def allocate(self, choices: Sequence[Choice], budget: int) -> list[Move] | None:
        """See `Method.allocate`."""
        return allocate(choices, budget)


ONE_SIDED = OneSided()
