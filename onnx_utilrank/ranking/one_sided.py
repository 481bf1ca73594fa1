"""The default method: the data-optimal factors of each weight, one budget over all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.ranking.budget import allocate
from onnx_utilrank.ranking.method import Choice, Move, Side
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.factorize import Decomposition, Factors, one_sided, output_error
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
        variance: E‖W (x − μ)‖², which errors are relative to; E‖W x‖² where it vanishes or the
            bias cannot take the mean.
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
        if found is None:  # an edited plan may leave a bias alone that is free to correct
            found = one_sided(weight, **{self.side: self.moment}, centred=move.bias)
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
        chosen = uncentred if centred is None else centred
        assert chosen is not None
        variance = chosen.energy
        energy = max(_energy(weight, side, moment), float(np.finfo(np.float64).tiny))
        if variance <= 1e-12 * energy:  # one row, or a constant output
            variance = energy
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


def _energy(weight: np.ndarray, side: Side, moment: SecondMoment) -> float:
    """E‖W x‖², the mean included."""
    if side == "outputs":
        return float(np.trace(moment.uncentred))
    return output_error(weight, np.zeros_like(weight), moment.uncentred)


ONE_SIDED = OneSided()
