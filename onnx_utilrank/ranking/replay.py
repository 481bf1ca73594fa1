"""Follow a plan that was made before: check that it is for the model, and read its decisions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.moves.low_rank import LOW_RANK
from onnx_utilrank.moves.moves import find_move
from onnx_utilrank.moves.shrink import SHRINK, can_be_both
from onnx_utilrank.moves.two_convs import TwoConvs
from onnx_utilrank.ranking.cost import bias_cost, shrunk_parameters
from onnx_utilrank.ranking.entries import kept_of, site_entry
from onnx_utilrank.ranking.method import Measured, Move
from onnx_utilrank.ranking.methods import find_method
from onnx_utilrank.ranking.plan import HiddenEntry, PlanEntry, RankPlan
from onnx_utilrank.ranking.two_sided import TWO_SIDED, TwoSidedSite
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site

__all__ = ["as_measured", "check_hidden", "check_plan", "planned_moves"]

# Why a plan leaves what an earlier one changed.
AS_SAID = "the plan says so"


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


def as_measured(
    plan: RankPlan, index: GraphIndex, measured: Sequence[Measured], hidden: Sequence[Hidden]
) -> RankPlan:
    """A plan with what its decisions save and are expected to lose: it may have been edited.

    Args:
        plan: The plan, which fits the model.
        index: The model.
        measured: What is known of the sites that it changes.
        hidden: The features that it shrinks.

    Raises:
        ModelError: Nothing is known of one of them.
    """
    by_key = {each.site.key: each for each in measured}
    sites = {key: each.site for key, each in by_key.items()}
    kept = {h.hidden: h.kept for h in plan.shrunk if h.kept is not None}
    of_site = {key: (each, kept[each.key]) for each in hidden for key in each.sites}
    moves = planned_moves(plan)
    entries = []
    for entry in plan.entries:
        key, known = entry.site, by_key.get(entry.site)
        if not entry.rank and key not in of_site:
            entries.append(_left(entry))
            continue
        if known is None:
            raise ModelError(
                f"{index.store.label}: {entry.nodes[0] if entry.nodes else key}: the plan changes "
                f"{key!r}, but no output depends on it on these data"
            )
        move = moves.get(key) or Move(rank=None, bias=False, parameters=0, error=0.0)
        if entry.rank:
            move = replace(move, error=_loss(known, move))
        if key in of_site:
            parameters = shrunk_parameters(
                index, of_site[key][0], sites, known.site, of_site[key][1], entry.rank
            )
            move = replace(move, kind=SHRINK, parameters=parameters)
        else:
            move = replace(move, parameters=_parameters(index, known.site, move))
        made = site_entry(index, known, move)
        unknown = made.predicted_error is not None and math.isnan(made.predicted_error)
        entries.append(replace(made, predicted_error=None) if unknown else made)
    known_features = {each.key: each for each in hidden}
    features = tuple(_features(h, known_features.get(h.hidden), by_key) for h in plan.hidden)
    saved = sum(e.parameters_before - e.parameters_after for e in entries)
    errors = [e.predicted_error for e in entries] + [h.predicted_error for h in features]
    known_errors = [error for error in errors if error is not None]
    told = plan.predicted_divergence is not None and len(known_errors) == len(errors)
    return replace(
        plan,
        parameters_after=plan.parameters_before - saved,
        predicted_divergence=sum(known_errors) if told else None,
        entries=tuple(entries),
        hidden=features,
    )


def _left(entry: PlanEntry) -> PlanEntry:
    """A site that a plan leaves, though it may have been edited to."""
    if entry.parameters_after == entry.parameters_before and not entry.predicted_error:
        return entry
    return replace(
        entry,
        bias=False,
        subspaces=None,
        move=None,
        parameters_after=entry.parameters_before,
        predicted_error=0.0,
        reason=AS_SAID,
    )


def _features(
    entry: HiddenEntry, hidden: Hidden | None, measured: Mapping[str, Measured]
) -> HiddenEntry:
    """What becomes of hidden features, by the sites of which they are."""
    if entry.kept is None or hidden is None:
        return (
            replace(entry, predicted_error=0.0, reason=AS_SAID) if entry.predicted_error else entry
        )
    sites = [measured[key] for key in hidden.sites]
    lost = sum(s.shrunk_error(hidden, entry.kept) for s in sites if isinstance(s, TwoSidedSite))
    return replace(entry, predicted_error=lost, reason=kept_of(hidden, entry.kept))


def _loss(measured: Measured, move: Move) -> float:
    """What a move loses; NaN where it was not measured, as for a bias that was left alone."""
    assert move.rank is not None
    if isinstance(measured, TwoSidedSite) and isinstance(find_move(move.kind), TwoConvs):
        offered = measured.inner_moves(move.kind, [move.rank])
    else:
        offered = measured.moves([move.rank])
    return next((one.error for one in offered if one.bias == move.bias), math.nan)


def _parameters(index: GraphIndex, site: Site, move: Move) -> int:
    assert move.rank is not None
    total = find_move(move.kind).parameters(site, move.rank)
    if site.tied is not None and not site.freed:  # its factors are those of the other
        total -= LOW_RANK.parameters(site, move.rank)
    return total + (bias_cost(index, site) if move.bias else 0)
