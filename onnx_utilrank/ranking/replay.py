"""Follow a plan that was made before: check that it is for the model, and read its decisions."""

from collections.abc import Mapping, Sequence

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.moves.low_rank import LOW_RANK
from onnx_utilrank.moves.moves import find_move
from onnx_utilrank.moves.shrink import can_be_both
from onnx_utilrank.moves.two_convs import TwoConvs
from onnx_utilrank.ranking.method import Move
from onnx_utilrank.ranking.methods import find_method
from onnx_utilrank.ranking.plan import PlanEntry, RankPlan
from onnx_utilrank.ranking.two_sided import TWO_SIDED
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site

__all__ = ["check_hidden", "check_plan", "planned_moves"]


def check_plan(plan: RankPlan, index: GraphIndex, sites: Sequence[Site]) -> None:
    """Check that a plan is for this model.

    Raises:
        ModelError: It is for another model, names a site that the model does not have, or corrects
            a bias that cannot be.
    """
    label = index.store.label
    if plan.model_sha256 != index.source.fingerprint():
        raise ModelError(f"{label}: the plan is for another model (its SHA-256 differs)")
    known = {site.key: site for site in sites}
    for entry in plan.factored:
        site = known.get(entry.site)
        if site is None:
            raise ModelError(f"{label}: the plan factors {entry.site!r}, which is no site")
        if (site.m, site.d) != (entry.m, entry.d):
            raise ModelError(
                f"{label}: the plan has {entry.site!r} as {entry.m} x {entry.d}, "
                f"it is {site.m} x {site.d}"
            )
        kind = find_move(entry.move or LOW_RANK.key)
        own = find_method(plan.method).moves
        fits = own is None or kind.key in own
        if isinstance(kind, TwoConvs) and kind.applies(index, site):
            fits = fits and (entry.rank or 0) <= kind.top_rank(site)
        if not fits or not kind.applies(index, site):
            raise ModelError(
                f"{label}: the plan makes move {entry.move!r} at {entry.site!r}, which cannot be"
            )
        blind = find_method(plan.method).side(site) is None  # no data, so no mean
        if entry.bias and (blind or site.bias == "none"):
            raise ModelError(
                f"{label}: the plan corrects the bias of {entry.site!r}, which cannot be"
            )


def check_hidden(
    plan: RankPlan, index: GraphIndex, hidden: Sequence[Hidden], sites: Sequence[Site]
) -> tuple[Hidden, ...]:
    """Check that the features which a plan shrinks are those of this model, and give them.

    Raises:
        ModelError: They are not.
    """
    if plan.method != TWO_SIDED.key:
        raise ModelError(
            f"{index.store.label}: the plan shrinks features, which method {plan.method} cannot"
        )
    known, by_key = {each.key: each for each in hidden}, {site.key: site for site in sites}
    factored, shrunk = {e.site: e for e in plan.factored}, set[str]()
    for entry in plan.shrunk:
        found = known.get(entry.hidden)
        stated = (entry.sites, entry.size, entry.groups)
        if found is None or (found.sites, found.size, len(found.made)) != stated:
            raise ModelError(
                f"{index.store.label}: the plan shrinks the features of {entry.hidden!r}, which "
                "the model does not have that way"
            )
        for key in entry.sites:
            if key in shrunk or not (
                key not in factored or _fit(found, entry.kept or 0, by_key[key], factored[key])
            ):
                raise ModelError(
                    f"{index.store.label}: the plan shrinks {key!r} and changes it otherwise too, "
                    "in a way that cannot be"
                )
        shrunk.update(entry.sites)
    return tuple(known[entry.hidden] for entry in plan.shrunk)


def _fit(hidden: Hidden, kept: int, site: Site, entry: PlanEntry) -> bool:
    """Whether what is left of a weight that shrinks can be factored as a plan says."""
    left = hidden.rows(site.key, site.m, kept), hidden.columns(site.key, site.d, kept)
    return (
        entry.move == LOW_RANK.key
        and can_be_both(hidden, site)
        and (entry.rank or 0) <= min(left)
        and entry.bias == (site.bias != "none")
    )


def planned_moves(plan: RankPlan) -> Mapping[str, Move]:
    """The moves of a plan by site key, for the sites it factors."""
    return {
        entry.site: Move(
            rank=entry.rank,
            bias=entry.bias,
            parameters=entry.parameters_after,
            error=float("nan") if entry.predicted_error is None else entry.predicted_error,
            subspaces=entry.subspaces,
            kind=entry.move or LOW_RANK.key,
        )
        for entry in plan.factored
    }
