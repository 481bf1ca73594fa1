"""Turn measurements into a plan: offer moves, let the method allocate, give every reason."""

from collections.abc import Mapping, Sequence

from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import ModelError, TargetMissedError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.ranking.method import Choice, Measured, Method, Move, candidate_ranks
from onnx_utilrank.ranking.methods import find_method
from onnx_utilrank.ranking.plan import PlanEntry, RankPlan, SkippedNode
from onnx_utilrank.ranking.utilized_rank import at_energy
from onnx_utilrank.sites.find import site_matrix
from onnx_utilrank.sites.site import Site, Skip

__all__ = ["check_plan", "decide", "planned_moves", "skipped_nodes"]


def decide(
    index: GraphIndex,
    measured: Sequence[Measured],
    skips: Sequence[Skip],
    method: Method,
    config: CompressConfig,
) -> RankPlan:
    """Choose a move for every site.

    Raises:
        TargetMissedError: No choice is as small as was asked for, or nothing can be factored.
    """
    total = count_parameters(index.store)
    choices = [_choice(m, config) for m in measured]
    # What a site costs is counted on top of the model without its weights.
    rest = total - sum(_dense_parameters(c.measured.site) for c in choices)
    moves: list[Move] | None
    if config.energy is not None:
        moves = at_energy(choices, config.energy)
    else:
        assert config.param_ratio is not None
        # The room is for the binary fraction of a ratio such as 0.7.
        budget = int(total * config.param_ratio + 1e-6)
        moves = method.allocate(choices, budget - rest)
    if moves is None:
        least = rest + sum(min(m.parameters for m in c.moves) for c in choices)
        raise TargetMissedError(
            f"{index.store.label}: a param ratio of {config.param_ratio:g} cannot be reached: "
            f"with every site at its least, {least / max(total, 1):.4f} is kept "
            f"({rest / max(total, 1):.4f} lies outside the {len(choices)} weights that can be "
            "factored)"
        )
    entries = tuple(_entry(index, m, move) for m, move in zip(measured, moves, strict=True))
    return RankPlan(
        model_sha256=index.store.fingerprint(),
        method=method.key,
        target=config.target,
        parameters_before=total,
        parameters_after=rest + sum(m.parameters for m in moves),
        entries=entries,
        skipped=skipped_nodes(skips),
    )


def skipped_nodes(skips: Sequence[Skip]) -> tuple[SkippedNode, ...]:
    """Nodes that are no sites, as plans and reports list them."""
    return tuple(SkippedNode(node=s.node, op_type=s.op_type, reason=s.reason) for s in skips)


def _dense_parameters(site: Site) -> int:
    # A weight that stays whatever happens to this site is none of its cost.
    return site.parameters if site.freed else 0


def _choice(measured: Measured, config: CompressConfig) -> Choice:
    site = measured.site
    ranks = candidate_ranks(site, config.rank_multiple, force=config.force)
    moves = measured.moves(ranks)
    if not config.force or not moves:
        dense = Move(rank=None, bias=False, parameters=_dense_parameters(site), error=0.0)
        moves = [dense, *moves]
    return Choice(measured=measured, moves=tuple(moves))


def _entry(index: GraphIndex, measured: Measured, move: Move) -> PlanEntry:
    site, moment = measured.site, measured.moment
    error = 0.0
    if move.rank is not None:
        error = measured.error(site_matrix(index, site), move)
    return PlanEntry(
        site=site.key,
        nodes=tuple(use.label for use in site.uses),
        op_type=site.op_type,
        m=site.m,
        d=site.d,
        rank=move.rank,
        bias=move.bias,
        subspaces=move.subspaces,
        parameters_before=_dense_parameters(site),
        parameters_after=move.parameters,
        predicted_error=error,
        rows=None if moment is None else moment.rows,
        trusted=moment is None or moment.enough_rows,
        reason=_reason(site, move),
    )


def _reason(site: Site, move: Move) -> str:
    if move.rank is not None:
        return f"rank {move.rank} of {site.full_rank}"
    if not site.freed:
        return "its weight has other readers and would stay: factors would come on top of it"
    if site.break_even_rank < 1:
        return "no rank saves parameters on so narrow a weight"
    return "at this target it is worth more dense than at any rank that saves parameters"


def check_plan(plan: RankPlan, index: GraphIndex, sites: Sequence[Site]) -> None:
    """Check that a plan is for this model.

    Raises:
        ModelError: It is for another model, names a site that the model does not have, or corrects
            a bias that cannot be.
    """
    label = index.store.label
    if plan.model_sha256 != index.store.fingerprint():
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
        blind = find_method(plan.method).side(site) is None  # no data, so no mean
        if entry.bias and (blind or site.bias == "none"):
            raise ModelError(
                f"{label}: the plan corrects the bias of {entry.site!r}, which cannot be"
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
        )
        for entry in plan.factored
    }
