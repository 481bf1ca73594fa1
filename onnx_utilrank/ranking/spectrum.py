"""What each weight loses at each rank, and what of its space it uses, for a reader to see."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.config import DEFAULT_ENERGY
from onnx_utilrank.ranking.method import Measured
from onnx_utilrank.ranking.utilized_rank import UtilizedSite
from onnx_utilrank.statistics.factorize import energy_rank
from onnx_utilrank.statistics.moments import SecondMoment

__all__ = ["Curve", "LayerSpectrum", "layer_spectra", "tail_curve"]

# (rank, value), from rank 0 on.
Curve = tuple[tuple[int, float], ...]

# Points of a curve, which a picture as wide as a thumb shows.
POINTS = 33


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpectrum:
    """One weight as its method sees it.

    Attributes:
        site: Key of the site.
        loss: (rank, loss) for some ranks from 0 to full, without a loss that is not known: what
            the site is expected to lose where it gets this rank, in the unit of the plan's
            `predicted_error` before it is looked at with others.
        width: Features of the rows that the statistics are of; None without data.
        rows: How many there were; None without data.
        trusted: False where those are fewer than four times the width.
        energy: Share of the energy that `used` directions hold.
        used: Directions that hold it, of the rows that the statistics are of: the smaller side of
            the weight (k_T of its outputs, k_S of its inputs), or min(k_S, k_T) for
            `utilized-rank`; None without data.
    """

    site: str
    loss: Curve
    width: int | None
    rows: int | None
    trusted: bool
    energy: float
    used: int | None


def layer_spectra(sites: Sequence[Measured]) -> tuple[LayerSpectrum, ...]:
    """The spectra of all sites, in their order."""
    return tuple(map(_spectrum, sites))


def tail_curve(values: np.ndarray) -> Curve:
    """The share of the sum of descending `values` that lies beyond each of some ranks."""
    tails = np.append(np.cumsum(values[::-1])[::-1], 0.0)
    total = max(float(tails[0]), float(np.finfo(np.float64).tiny))
    return tuple((k, _short(tails[k] / total)) for k in _ranks(len(values)))


def _spectrum(measured: Measured) -> LayerSpectrum:
    site, moment = measured.site, measured.moment
    return LayerSpectrum(
        site=site.key,
        loss=_loss(measured),
        width=None if moment is None else moment.width,
        rows=None if moment is None else moment.rows,
        trusted=moment is None or moment.enough_rows,
        energy=DEFAULT_ENERGY,
        used=None if moment is None else _used(measured, moment),
    )


def _used(measured: Measured, moment: SecondMoment) -> int:
    if isinstance(measured, UtilizedSite):
        return min(measured.found.ranks(DEFAULT_ENERGY))
    values = np.linalg.eigvalsh(moment.uncentred)[::-1]
    return energy_rank(np.maximum(values, 0.0), DEFAULT_ENERGY)


def _loss(measured: Measured) -> Curve:
    if isinstance(measured, UtilizedSite):  # it does not rank by what outputs lose
        return tail_curve(measured.found.output_values)
    ranks = _ranks(measured.site.full_rank)
    least: dict[int, float] = {}
    for move in measured.moves(ranks):
        assert move.rank is not None
        least[move.rank] = min(move.error, least.get(move.rank, np.inf))
    return tuple((rank, _short(least[rank])) for rank in ranks if np.isfinite(least[rank]))


def _ranks(full: int) -> list[int]:
    return sorted({round(r) for r in np.linspace(0, full, POINTS)})


def _short(value: float) -> float:
    """Digits that a picture shows."""
    return float(f"{value:.4g}")
