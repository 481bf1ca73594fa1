"""The default method: the data-optimal factors of each weight, one budget over all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.ranking.budget import allocate
from onnx_utilrank.ranking.method import Choice, Move
from onnx_utilrank.sites.site import Side, Site
from onnx_utilrank.statistics.factorize import (
    Decomposition,
    Factors,
    Metric,
    feature_scale,
    optimal,
)
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
        scale: The diagonal of D, which output errors are divided by, [m].
        variance: E‖D^{-1} W (x − μ)‖², which errors are relative to; E‖D^{-1} W x‖² where it
            vanishes or the bias cannot take the mean.
        bias_cost: Elements that correcting the bias adds.
    """

    site: Site
    moment: SecondMoment
    side: Side
    centred: Decomposition | None
    uncentred: Decomposition | None
    scale: np.ndarray
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
            found = _decomposed(weight, self.side, self.moment, self.scale, centred=move.bias)
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
        assert move.rank is not None
        return self.centred.lost(mean, move.rank)


class OneSided:
    """min E‖D^{-1} (W − Ŵ)(x − μ)‖² a site; see `statistics.factorize.optimal`.

    D keeps outputs of huge variance from ruling all others (`feature_scale`).
    """

    key = "one-sided"
    moves: tuple[str, ...] | None = ("low-rank", "pivot")

    def side(self, site: Site) -> Side:
        """See `Site.smaller_side`."""
        return site.smaller_side

    def measure(
        self, site: Site, weight: np.ndarray, moment: SecondMoment | None, bias_cost: int
    ) -> OneSidedSite:
        """See `Method.measure`."""
        assert moment is not None
        side = self.side(site)
        scale = feature_scale(_energies(weight, side, moment.covariance))
        centred = uncentred = None
        if site.bias != "none":
            centred = _decomposed(weight, side, moment, scale, centred=True)
        if centred is None or bias_cost > 0:
            uncentred = _decomposed(weight, side, moment, scale, centred=False)
        chosen = uncentred if centred is None else centred
        assert chosen is not None
        variance = chosen.energy
        energies = _energies(weight, side, moment.uncentred) / scale**2
        energy = max(float(energies.sum()), float(np.finfo(np.float64).tiny))
        if variance <= 1e-12 * energy:  # one row, or a constant output
            variance = energy
        return OneSidedSite(
            site=site,
            moment=moment,
            side=side,
            centred=centred,
            uncentred=uncentred,
            scale=scale,
            variance=variance,
            bias_cost=bias_cost,
        )

    def allocate(self, choices: Sequence[Choice], budget: float) -> list[Move] | None:
        """See `Method.allocate`."""
        return allocate(choices, budget)


def _decomposed(
    weight: np.ndarray, side: Side, moment: SecondMoment, scale: np.ndarray, *, centred: bool
) -> Decomposition:
    inputs, outputs = (moment, None) if side == "inputs" else (None, moment)
    return optimal(weight, Metric.diagonal(scale), inputs=inputs, outputs=outputs, centred=centred)


def _energies(weight: np.ndarray, side: Side, second: np.ndarray) -> np.ndarray:
    """Diagonal of W C W^T [m], from the second moment or covariance of either side."""
    if side == "outputs":
        return np.diag(second).copy()
    return np.asarray(np.einsum("ij,ij->i", weight @ second, weight))


ONE_SIDED = OneSided()
