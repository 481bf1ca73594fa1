"""The default method: factors that change the model's outputs least, by label-free gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_utilrank.ranking.budget import allocate
from onnx_utilrank.ranking.method import Choice, Move, Side
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.factorize import Decomposition, Factors, Metric, optimal
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.sensitivity import Sensitivity

__all__ = ["TWO_SIDED", "TwoSided", "TwoSidedSite", "two_sided_site"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSidedSite:
    """The decomposition of one site in the metric of the model's outputs.

    Attributes:
        site: The site.
        moment: Moment of x or W x.
        side: Which of the two.
        found: The decomposition, centred where the bias can take the lost mean.
        gamma: Γ [m, m], what a change of the site's output counts.
        errors: Predicted loss of the model at each rank, in nats or relative squared error.
        bias_cost: Elements that correcting the bias adds.
    """

    site: Site
    moment: SecondMoment
    side: Side
    found: Decomposition
    gamma: np.ndarray
    errors: np.ndarray
    bias_cost: int

    @property
    def centred(self) -> bool:
        """Whether the bias takes the lost mean."""
        return self.site.bias != "none"

    def mean_output(self, weight: np.ndarray) -> np.ndarray:
        """E[W x], [m]."""
        mean = self.moment.mean
        return np.asarray(mean if self.side == "outputs" else weight @ mean)

    def corrected(self, quadratic: np.ndarray) -> "TwoSidedSite":
        """The same with the larger of two predictions of the loss at each rank.

        The product of Cov(x) and Γ is blind to errors that agree over positions; the sum over
        whole samples sees those, but rests on few of them.
        """
        rising = np.maximum.accumulate(quadratic[::-1])[::-1]  # no rank is worse than a lower one
        return replace(self, errors=np.maximum(self.errors, rising))

    def moves(self, ranks: Sequence[int]) -> list[Move]:
        """See `Measured.moves`."""
        extra = self.bias_cost if self.centred else 0
        return [
            Move(
                rank=rank,
                bias=self.centred,
                parameters=rank * (self.site.m + self.site.d) + extra,
                error=float(self.errors[rank]),
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
        """See `Measured.lost_mean`."""
        del factors
        assert move.rank is not None
        return self.found.lost(self.mean_output(weight), move.rank)


def two_sided_site(
    site: Site, weight: np.ndarray, found: Sensitivity, side: Side, bias_cost: int
) -> TwoSidedSite:
    """Decompose a site: min E[Σ_positions (g^T (W − Ŵ)(x − μ))²].

    With Γ = R R^T that is the optimum of `statistics.factorize.optimal`; the predicted rise of
    the loss is half its error.
    """
    gamma = found.fisher
    decomposition = optimal(
        weight,
        Metric.of(gamma),
        inputs=found.moment if side == "inputs" else None,
        outputs=found.moment if side == "outputs" else None,
        centred=site.bias != "none",
    )
    return TwoSidedSite(
        site=site,
        moment=found.moment,
        side=side,
        found=decomposition,
        gamma=gamma,
        errors=decomposition.errors / 2,
        bias_cost=bias_cost,
    )


class TwoSided:
    """min E[Σ (g^T (W − Ŵ)(x − μ))²] a site; see `two_sided_site`."""

    key = "two-sided"
    moves: tuple[str, ...] | None = None

    def side(self, site: Site) -> Side:
        """See `Site.smaller_side`."""
        return site.smaller_side

    def allocate(self, choices: Sequence[Choice], budget: float) -> list[Move] | None:
        """See `Method.allocate`."""
        return allocate(choices, budget)


TWO_SIDED = TwoSided()
