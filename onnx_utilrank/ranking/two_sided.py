"""The default method: factors that change the model's outputs least, by label-free gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_utilrank.ranking.budget import allocate
from onnx_utilrank.ranking.inner import Heads, InnerFeatures, Reading, Units
from onnx_utilrank.ranking.method import Choice, Move
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Side, Site
from onnx_utilrank.statistics.factorize import (
    Decomposition,
    Factors,
    Metric,
    optimal,
)
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.sensitivity import Sensitivity

__all__ = [
    "TRUSTED",
    "TWO_SIDED",
    "TwoSided",
    "TwoSidedSite",
    "reading",
    "two_sided_site",
    "with_heads",
    "with_inner",
]


# A loss of one weight, in nats or half of a relative squared error, that is twice what its second
# order says: gradients tell of small changes, and large ones turn out worse.
TRUSTED = 0.1
# What the product counts where it is not the larger prediction: enough to break ties.
TIE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSidedSite:
    """The decomposition of one site in the metric of the model's outputs.

    Attributes:
        site: The site.
        moment: Moment of its smaller side: of W x where W is wide, else of x.
        found: The decomposition of those rows z, which become L_r K_r z, so that Ŵ is L K W or
            W L K; centred where the bias can take the lost mean.
        gamma: Γ [p, p], what a change of z counts.
        errors: Predicted loss of the model at each rank, in nats or relative squared error.
        seen: The same of rows and gradients as they were seen, however few.
        bias_cost: Elements that correcting the bias adds.
        inner: Of a Conv that looks at its neighbours too: what it reads, for each way to make two
            Convs of it.
        heads: Where the outputs are hidden features that may shrink: the decomposition by groups
            of W x + b, every G columns one direction of each of its G groups. None elsewhere.
        units: Where it reads hidden units that may become fewer.
        input_mean: E[x], [d], where it reads hidden features that may shrink.
    """

    site: Site
    moment: SecondMoment
    found: Decomposition
    gamma: np.ndarray
    errors: np.ndarray
    seen: np.ndarray
    bias_cost: int
    heads: Heads | None = None
    inner: tuple[InnerFeatures, ...] = ()
    units: Units | None = None
    input_mean: np.ndarray | None = None

    @property
    def centred(self) -> bool:
        """Whether the bias takes the lost mean."""
        return self.site.bias != "none"

    def mean_output(self, weight: np.ndarray) -> np.ndarray:
        """E[W x], [m]."""
        mean = self.moment.mean
        return np.asarray(mean if self.site.wide else weight @ mean)

    def factors_of(self, weight: np.ndarray, rank: int) -> Factors:
        """Ŵ of one rank."""
        if self.site.wide:
            return self.found.factors(weight, rank)
        return self.found.input_factors(weight, rank)

    def lost_of(self, weight: np.ndarray, rank: int) -> np.ndarray:
        """(W − Ŵ) E[x], [m]."""
        lost = self.found.lost(self.moment.mean, rank)
        return lost if self.site.wide else np.asarray(weight @ lost)

    def corrected(self, quadratics: Sequence[np.ndarray], *, apart: bool) -> "TwoSidedSite":
        """The same with the larger of two predictions of the loss at each rank.

        The product of Cov(x) and Γ is blind to errors that agree over positions; the sum over
        whole samples sees those, but rests on few of them.

        On samples of its own a decomposition of few rows looks better than it is, and the product
        is that of Cov(x) and Γ as they were shrunk. Other samples tell what it loses, and shrunk
        ones would say several times as much.

        Args:
            quadratics: Of `found`, then of `heads`, all of `inner` and `units` if there are any.
            apart: Whether they are of other samples than the decomposition.
        """

        def larger(each: "TwoSidedSite | Heads | InnerFeatures | Units") -> np.ndarray:
            return _larger(each.seen if apart else each.errors, next(rest))

        rest = iter(quadratics)
        errors = larger(self)
        heads, units = self.heads, self.units
        if heads is not None:
            heads = replace(heads, errors=larger(heads))
        inner = tuple(replace(i, errors=larger(i)) for i in self.inner)
        if units is not None:
            units = replace(units, errors=larger(units))
        return replace(self, errors=errors, heads=heads, inner=inner, units=units)

    def expecting(self, others: Sequence["TwoSidedSite"]) -> "TwoSidedSite":
        """The same with the mean of what others of the same site are predicted to lose."""
        if not others:
            return self
        heads, units = self.heads, self.units
        if heads is not None:
            heads = replace(heads, errors=_mean([o.heads for o in others], heads.errors))
        inner = tuple(
            replace(i, errors=_mean([o.inner_of(i.move) for o in others], i.errors))
            for i in self.inner
        )
        if units is not None:
            units = replace(units, errors=_mean([o.units for o in others], units.errors))
        errors = np.mean([o.errors for o in others], axis=0)
        return replace(self, errors=errors, heads=heads, inner=inner, units=units)

    def shrunk_error(self, hidden: Hidden, kept: int) -> float:
        """What the model is predicted to lose where so many features of each group are kept.

        It is put down to the weight that makes them, or those that read them where they are units.
        """
        key = self.site.key
        if hidden.units:
            if key not in hidden.readers:
                return 0.0
            assert self.units is not None
            return float(self.units.errors[kept])
        groups = len(hidden.makers(key))
        if not groups:
            return 0.0
        assert self.heads is not None
        return float(self.heads.errors[kept * groups])

    def moves(self, ranks: Sequence[int]) -> list[Move]:
        """See `Measured.moves`."""
        return self._moves(ranks, self.errors)

    def inner_of(self, move: str) -> InnerFeatures | None:
        """What the first of two Convs reads, by key of the move; None where it was not measured."""
        return next((i for i in self.inner if i.move == move), None)

    def inner_moves(self, move: str, ranks: Sequence[int]) -> list[Move]:
        """The same for what it reads, in the place of its outputs."""
        inner = self.inner_of(move)
        return [] if inner is None else self._moves(ranks, inner.errors)

    def _moves(self, ranks: Sequence[int], errors: np.ndarray) -> list[Move]:
        extra = self.bias_cost if self.centred else 0
        return [
            Move(
                rank=rank,
                bias=self.centred,
                parameters=rank * (self.site.m + self.site.d) + extra,
                error=float(errors[rank]),
            )
            for rank in ranks
        ]

    def factors(self, weight: np.ndarray, move: Move) -> Factors:
        """See `Measured.factors`."""
        assert move.rank is not None
        return self.factors_of(weight, move.rank)

    def error(self, weight: np.ndarray, move: Move) -> float:
        """See `Measured.error`."""
        del weight
        return move.error

    def lost_mean(self, weight: np.ndarray, factors: Factors, move: Move) -> np.ndarray:
        """See `Measured.lost_mean`."""
        del factors
        assert move.rank is not None
        return self.lost_of(weight, move.rank)


def two_sided_site(
    site: Site,
    weight: np.ndarray,
    found: Sensitivity,
    bias_cost: int,
    input_mean: np.ndarray | None = None,
) -> TwoSidedSite:
    """Decompose a site: min E[Σ_positions (g^T (W − Ŵ)(x − μ))²].

    A change W δ of the outputs is worth δ^T W^T Γ W δ, so the optimum over all Ŵ is had from the
    smaller side z alone, with h = g or h = W^T g the gradient there: that of
    min E[Σ_positions (h^T (I − L K)(z − μ))²] in `statistics.factorize.optimal`. The predicted rise
    of the loss is half its error.

    Args:
        site: The site.
        weight: W [m, d].
        found: Rows of its smaller side and the gradients there.
        bias_cost: Elements that correcting the bias adds.
        input_mean: E[x], [d], where it is needed.
    """
    # Outputs that no gradient told of are alike to each other, not inputs.
    gamma = found.fisher(None if site.wide else weight.T @ weight)
    decomposition = optimal(
        weight if site.wide else np.eye(site.d),
        Metric.of(gamma),
        outputs=found.moment,
        centred=site.bias != "none",
    )
    return TwoSidedSite(
        site=site,
        moment=found.moment,
        found=decomposition,
        gamma=gamma,
        errors=decomposition.errors / 2,
        seen=decomposition.errors_under(
            found.observed, found.moment.second(centred=site.bias != "none")
        )
        / 2,
        bias_cost=bias_cost,
        input_mean=input_mean,
    )


def with_heads(
    site: TwoSidedSite,
    weight: np.ndarray,
    groups: Sequence[tuple[slice, bool]],
    found: Sensitivity,
    own: np.ndarray,
    behind: np.ndarray,
) -> TwoSidedSite:
    """The site with its outputs decomposed by groups too.

    Args:
        site: The site.
        weight: W [m, d].
        groups: Rows of each group, and whether their lost mean is made up for.
        found: The gradients there, of each group.
        own: What the node itself adds to W x, [m].
        behind: What an Add behind it adds, [m].
    """
    covariance = site.moment.covariance
    if not site.site.wide:
        covariance = weight @ covariance @ weight.T
    mean = site.mean_output(weight) + own + behind
    gammas, observed = found.block_fishers(), found.observed_blocks
    return replace(site, heads=Heads.of(groups, gammas, observed, mean, covariance, behind))


def with_inner(site: TwoSidedSite, move: str, found: Sensitivity) -> TwoSidedSite:
    """The site with what the first of two Convs reads decomposed too.

    A change of the input is worth what its gradient there says, as a change of the output is: the
    optimum is that of a weight which is the identity, in the metric of the input's gradients.

    Args:
        site: The site.
        move: Key of the move.
        found: Rows of those features and the gradients there.
    """
    inner = InnerFeatures.of(move, found, centred=site.centred and not _padded(site.site))
    return replace(site, inner=(*site.inner, inner))


def reading(
    site: TwoSidedSite,
    weight: np.ndarray,
    found: Sensitivity,
    moment: SecondMoment,
    of_inputs: Sensitivity | None,
) -> Reading:
    """The hidden units that a site reads, as it does.

    Args:
        site: The site.
        weight: W [m, d].
        found: The gradients of its smaller side.
        moment: Of the units [n].
        of_inputs: The gradients there, of a Conv of several taps; else they follow from those of
            the smaller side.
    """
    # A weight that gets no new bias cannot make up for a mean.
    centred = site.site.bias in ("input", "add") and not _padded(site.site)
    if of_inputs is not None:
        root, observed = Metric.of(of_inputs.fisher()).root_t, of_inputs.observed
    else:
        root, observed = Metric.of(site.gamma).root_t, found.observed
        if site.site.wide:
            root, observed = root @ weight, weight.T @ observed @ weight
    return Reading(root=root, observed=observed, moment=moment, centred=centred)


def _padded(site: Site) -> bool:
    """Whether it sees zeros beyond borders: a bias makes up for the mean of its inputs nowhere."""
    patches = site.uses[0].inputs.patches
    return patches is not None and (any(patches.pads) or patches.auto_pad.startswith("SAME"))


def _mean(
    parts: Sequence[Heads | InnerFeatures | Units | None], otherwise: np.ndarray
) -> np.ndarray:
    """The mean of their errors, as far as there are any."""
    known = [part.errors for part in parts if part is not None]
    return np.asarray(np.mean(known, axis=0)) if known else otherwise


def _larger(errors: np.ndarray, quadratic: np.ndarray) -> np.ndarray:
    rising = np.maximum.accumulate(quadratic[::-1])[::-1]  # no rank is worse than a lower one
    larger = np.maximum(errors, rising)
    # Where a few samples cannot tell ranks apart, the higher one is not worth nothing.
    return np.asarray(larger + larger * larger / TRUSTED + TIE * errors)


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
