"""A baseline that never looks at data: the singular value decomposition of each weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.ranking.budget import allocate
from onnx_utilrank.ranking.method import Choice, Move
from onnx_utilrank.sites.site import Side, Site
from onnx_utilrank.statistics.factorize import Decomposition, Factors, plain_svd
from onnx_utilrank.statistics.moments import SecondMoment

__all__ = ["PLAIN_SVD", "PlainSvd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainSvdSite:
    """The decomposition of one weight.

    Attributes:
        site: The site.
        moment: Always None: no data.
        found: The decomposition.
    """

    site: Site
    found: Decomposition
    moment: SecondMoment | None = None

    def moves(self, ranks: Sequence[int]) -> list[Move]:
        """See `Measured.moves`; the error is that of the weight, in the Frobenius norm."""
        scale = max(self.found.energy, float(np.finfo(np.float64).tiny))
        return [
            Move(
                rank=rank,
                bias=False,
                parameters=rank * (self.site.m + self.site.d),
                error=float(self.found.errors[rank]) / scale,
            )
            for rank in ranks
        ]

    def factors(self, weight: np.ndarray, move: Move) -> Factors:
        """See `Measured.factors`."""
        assert move.rank is not None
        return self.found.factors(weight, move.rank)

    def error(self, weight: np.ndarray, move: Move) -> float:
        """See `Measured.error`."""
        del weight
        return move.error

    def lost_mean(self, weight: np.ndarray, factors: Factors, move: Move) -> np.ndarray:
        """Not known without data; never asked for, as no move corrects a bias."""
        raise NotImplementedError


class PlainSvd:
    """min ‖W − Ŵ‖ a site, with the same allocation as the default."""

    key = "svd"
    moves: tuple[str, ...] | None = ("low-rank",)

    def side(self, site: Site) -> Side | None:
        """No data."""
        del site
        return None

    def measure(
        self, site: Site, weight: np.ndarray, moment: SecondMoment | None, bias_cost: int
    ) -> PlainSvdSite:
        """See `Method.measure`."""
        del moment, bias_cost
        return PlainSvdSite(site=site, found=plain_svd(weight))

    def allocate(self, choices: Sequence[Choice], budget: float) -> list[Move] | None:
        """See `Method.allocate`."""
        return allocate(choices, budget)


PLAIN_SVD = PlainSvd()
