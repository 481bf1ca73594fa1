"""What a plan says of each site and of features between them, and the reason."""

from onnx_utilrank.model.graph import GraphIndex, node_label
from onnx_utilrank.moves.low_rank import LOW_RANK
from onnx_utilrank.moves.shrink import SHRINK
from onnx_utilrank.ranking.cost import Ledger
from onnx_utilrank.ranking.joint import Bundle, Option
from onnx_utilrank.ranking.method import Measured, Move
from onnx_utilrank.ranking.plan import HiddenEntry, PlanEntry
from onnx_utilrank.sites.find import site_matrix
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site

__all__ = ["dense_parameters", "hidden_entry", "kept_of", "site_entry"]


def dense_parameters(site: Site) -> int:
    """Parameters that go with the weight of a site."""
    # A weight that stays whatever happens to this site is none of its cost.
    return site.parameters if site.freed else 0


def hidden_entry(bundle: Bundle, option: Option | None) -> HiddenEntry:
    """What becomes of the hidden features of a bundle; no option where its weights go apart."""
    hidden = bundle.hidden
    assert hidden is not None
    n, kept = hidden.size, None if option is None else option.kept
    reason = "its weights do as well by themselves at this target"
    if kept is not None:
        reason = kept_of(hidden, kept)
    return HiddenEntry(
        hidden=hidden.key,
        sites=hidden.sites,
        groups=len(hidden.made),
        size=n,
        kept=kept,
        # What its weights lose by their ranks is put down to them.
        predicted_error=0.0
        if option is None
        else option.error - sum(m.error for m in option.moves),
        reason=reason,
    )


def kept_of(hidden: Hidden, kept: int) -> str:
    """What is kept of hidden features, in words."""
    if hidden.units:
        return f"{kept} of {hidden.size} hidden units"
    return f"{kept} of {hidden.size} features in each of {len(hidden.made)} groups"


def site_entry(
    index: GraphIndex, measured: Measured, move: Move, ledger: Ledger | None = None
) -> PlanEntry:
    """What becomes of a site, and why: of one that stays dense the ledger may know."""
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
        move=None if move.rank is None else LOW_RANK.key if move.kind == SHRINK else move.kind,
        parameters_before=dense_parameters(site),
        parameters_after=move.parameters,
        predicted_error=error,
        rows=None if moment is None else moment.rows,
        trusted=moment is None or moment.enough_rows,
        reason=_reason(index, site, move, ledger),
    )


def _reason(index: GraphIndex, site: Site, move: Move, ledger: Ledger | None) -> str:
    if move.kind == SHRINK:
        shrinks = "it shrinks with the features it makes or reads: see hidden"
        return shrinks if move.rank is None else f"{shrinks}; rank {move.rank} of what is left"
    if move.rank is not None:
        return f"rank {move.rank} of {site.full_rank}"
    if site.tied is not None and not site.freed:
        return f"it shares its weight with {site.tied!r}, which says more"
    if not site.freed:
        own = {use.node for use in site.uses}
        others = [k for k in index.readers_of(index.family(site.weight)) if k not in own]
        named = f" ({', '.join(node_label(index.node(k)) for k in others)})" if others else ""
        return (
            f"its weight has other readers and would stay: factors would come on top of it{named}"
        )
    if site.break_even_rank < 1:
        return "no rank saves parameters on so narrow a weight"
    latency = None if ledger is None else ledger.latency
    slower = None if latency is None else latency.refused(site)
    if slower is not None:
        return slower
    return "at this target it is worth more dense than at any rank that saves parameters"
