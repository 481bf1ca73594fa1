"""From a plan and decompositions to a model: refit, rewrite."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import TargetMissedError
from onnx_utilrank.job import Job
from onnx_utilrank.measurement import Measurement
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.moves.shrink import Basis, Shrinking
from onnx_utilrank.moves.two_convs import TWO_CONVS
from onnx_utilrank.ranking.method import Measured, Move
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.ranking.replay import planned_moves
from onnx_utilrank.ranking.skipped import unfactorable
from onnx_utilrank.ranking.stamp import stamped
from onnx_utilrank.ranking.two_sided import TwoSidedSite
from onnx_utilrank.refit.layer import Layer, Refitted, as_measured
from onnx_utilrank.refit.propagate import propagate
from onnx_utilrank.refit.twin import Twin
from onnx_utilrank.runtime.sessions import Feed
from onnx_utilrank.sites.bias import own_biases
from onnx_utilrank.sites.find import site_matrix, site_weight
from onnx_utilrank.sites.hidden import Group, Hidden
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.statistics.spill import spilled
from onnx_utilrank.surgery.rewrite import Replacement, check_contract, rewrite
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.validation.divergence import OutputRecorder

__all__ = ["build", "is_better"]

# Samples, at most, that a refit has to prove itself on, and the parts that it takes at least, or
# variations are left out.
JUDGED = 32
FEWEST_PARTS = 4


def build(
    job: Job,
    plan: RankPlan,
    measurement: Measurement,
    config: CompressConfig,
    *,
    settled: bool = False,
) -> tuple[RankPlan, ModelStore]:
    """The model that a plan makes; the source itself where it factors nothing.

    Args:
        job: The source.
        plan: What is to be done.
        measurement: The decompositions of its sites, and the samples that layers are refitted to.
        config: Options.
        settled: Whether the plan's word on the refit holds, as for one that is replayed. Else the
            refit has to be better on samples it was not made on.

    Returns:
        The plan with its final word on the refit, and the model.

    Raises:
        TargetMissedError: Nothing can be factored, or the result would be larger.
    """
    if not plan.changes:
        return plan, _unchanged(job, plan)
    plan, made = _layers(job, plan, measurement, config, settled)
    moves = planned_moves(plan)
    sites = {m.site.key: m for m in measurement.sites}
    replacements = [
        Replacement(
            site=sites[key].site,
            move=moves[key].kind,
            factors=new.factors,
            lost_mean=new.lost_mean if moves[key].bias else None,
        )
        for key, new in made.items()
        if new.factors is not None and key not in plan.shrinking
    ]
    hidden = {h.key: h for h in measurement.hidden}
    shrinkings = [
        _shrinking(job, hidden[entry.hidden], entry.kept or 0, sites, made) for entry in plan.shrunk
    ]
    job.progress("rewriting", 0, 0)
    store = stamped(rewrite(job.index, replacements, shrinkings), plan)
    check_contract(job.store, store)
    before, after = job.source.file_bytes, store.file_bytes
    if after > before and not config.force:
        raise TargetMissedError(
            f"{job.store.label}: the result would be larger, {after:,} bytes after "
            f"{before:,}; nothing is gained"
        )
    return plan, store


def _layers(
    job: Job,
    plan: RankPlan,
    measurement: Measurement,
    config: CompressConfig,
    settled: bool,
) -> tuple[RankPlan, dict[str, Refitted]]:
    """What becomes of every weight that changes, refitted where that is better."""
    moves = planned_moves(plan)
    gradients = measurement.gradients
    if gradients is None:
        return plan, {
            m.site.key: _factored(job, m, moves[m.site.key])
            for m in measurement.sites
            if m.site.key in moves
        }
    layers = _changed(job, plan, measurement)
    plain = _with_means(
        plan,
        measurement,
        {layer.measured.site.key: spilled(as_measured(layer)) for layer in layers},
    )
    if not plan.refit:
        return plan, plain
    # Both graphs hold the live values of all samples at once.
    data, samples = gradients.data, gradients.samples
    room = min(job.room(config) // (4 * gradients.footprint.live), gradients.effort.refit)
    parts = data.apart(samples)
    if room < FEWEST_PARTS * len(parts[0]):
        parts = data.apart(data.given(samples))
    each = len(parts[0])
    room = min(max(2, room // each), len(parts))
    apart = min(JUDGED // len(data.given(parts[0])), room // 4) or 1
    if apart >= room and not settled:
        return replace(plan, refit=False), plain
    # Factors may have been made of the first of these; what judges them comes last.
    order = np.random.default_rng(config.seed).permutation(len(parts))
    graph, effort = gradients.graph, gradients.effort
    padding = next((loss.padding for loss in gradients.losses if loss.padding), None)

    def of(chosen: np.ndarray) -> list[int]:
        return [s for k in sorted(chosen) for s in parts[k]]

    def feeds(chosen: Sequence[int]) -> list[Feed]:
        return list(data.feeds(chosen, batch=effort.run))

    def refitted(chosen: np.ndarray) -> dict[str, Refitted]:
        return propagate(graph, layers, feeds(of(chosen)), padding, job.progress)

    fitted, judging = order[: max(room - apart, 1)], order[-apart:]
    if not (settled and effort.again):
        made = refitted(fitted)
        held = feeds(data.given(of(judging)))
        if not settled and not is_better(graph, layers, plain, made, gradients.losses, held):
            return replace(plan, refit=False), plain
    return plan, refitted(order[:room]) if effort.again else made


def _changed(job: Job, plan: RankPlan, measurement: Measurement) -> list[Layer]:
    """The weights that change, in graph order."""
    moves = planned_moves(plan)
    hidden = {h.key: h for h in measurement.hidden}
    kept = {key: (hidden[e.hidden], e.kept or 0) for e in plan.shrunk for key in e.sites}
    two_convs = {move.key for move in TWO_CONVS}
    layers = []
    for found in measurement.sites:
        key = found.site.key
        if key not in moves and key not in kept:
            continue
        assert isinstance(found, TwoSidedSite)
        between, features = kept.get(key, (None, 0))
        groups = between.makers(key) if between and not between.units else ()
        layers.append(
            Layer(
                measured=found,
                weight=site_weight(job.index, found.site),
                rank=moves[key].rank if key in moves else None,
                inner=moves[key].kind if key in moves and moves[key].kind in two_convs else None,
                biases=own_biases(job.index, found.site),
                behind=between.added(job.index, key, found.site.m)
                if between
                else np.zeros(found.site.m),
                kept=features * len(groups) if groups else None,
                units=features if between and key in between.readers else None,
            )
        )
    return layers


def is_better(
    graph: TorchGraph,
    layers: Sequence[Layer],
    plain: Mapping[str, Refitted],
    refitted: Mapping[str, Refitted],
    losses: Sequence[OutputLoss],
    feeds: Sequence[Mapping[str, np.ndarray]],
) -> bool:
    """Whether the outputs diverge less with the refitted layers than with the plain ones.

    A regression a layer can look right at every layer and be wrong together: in few samples, or
    where errors that one layer hides are what a later one needs.

    Args:
        graph: The model.
        layers: What changes.
        plain: By key of their sites, what they become without a refit.
        refitted: And with it.
        losses: What counts at the outputs.
        feeds: Samples that the refit has not seen.

    Raises:
        ModelError: A node cannot be computed.
    """
    recorder = OutputRecorder(Twin(graph), losses, feeds)
    lost = [recorder.compare(Twin(graph, layers, made)).mean for made in (plain, refitted)]
    return lost[1] < lost[0]


def _with_means(
    plan: RankPlan, measurement: Measurement, made: Mapping[str, Refitted]
) -> dict[str, Refitted]:
    """Let the biases of weights that read heads take what those lose of their mean.

    A weight that was refitted has it already.
    """
    sites = {m.site.key: m for m in measurement.sites}
    hidden = {h.key: h for h in measurement.hidden}
    found = dict(made)
    for entry in plan.shrunk:
        between = hidden[entry.hidden]
        for group in between.groups if not between.units else ():
            reader = sites[group.met.site]
            if group.met.side == "rows" or reader.site.bias not in ("input", "add"):
                continue
            assert isinstance(reader, TwoSidedSite)
            assert reader.input_mean is not None
            basis = _basis(between, group, entry.kept or 0, made)
            columns = slice(group.met.start, group.met.start + between.size)
            mean = reader.input_mean[columns]
            before = found[group.met.site]
            lost = before.of_columns(columns, mean - basis.expand @ (basis.reduce @ mean))
            if before.lost_mean is not None:
                lost = before.lost_mean + lost
            found[group.met.site] = replace(before, lost_mean=lost)
    return found


def _basis(hidden: Hidden, group: Group, kept: int, made: Mapping[str, Refitted]) -> Basis:
    """L and K of one group."""
    found = made[group.made.site].heads
    assert found is not None
    makers = hidden.makers(group.made.site)
    every, k = len(makers), makers.index(group.made)
    rows = slice(group.made.start, group.made.start + hidden.size)
    return Basis(
        expand=found.expand[rows, k::every][:, :kept],
        reduce=found.reduce[k::every, rows][:kept],
    )


def _factored(job: Job, found: Measured, move: Move) -> Refitted:
    weight = site_matrix(job.index, found.site)
    factors = found.factors(weight, move)
    lost = found.lost_mean(weight, factors, move) if move.bias else None
    return spilled(Refitted(weight=None, lost_mean=lost, factors=factors))


def _shrinking(
    job: Job,
    hidden: Hidden,
    kept: int,
    sites: Mapping[str, Measured],
    made: Mapping[str, Refitted],
) -> Shrinking:
    """How hidden features shrink, with the weights that were fitted for it."""
    lost = {key: made[key].lost_mean for key in hidden.sites}
    if hidden.units:
        bases = _chosen(hidden, kept, sites)
    else:
        bases = [_basis(hidden, group, kept, made) for group in hidden.groups]
    biases = {}
    for key in hidden.sites:
        site = sites[key].site
        shift = lost[key]
        if hidden.rows(key, site.m, kept) < site.m and shift is not None:
            biases[key] = site.uses[0].bias.values(job.index, site.m) + shift
    return Shrinking(
        hidden=hidden,
        sites={key: sites[key].site for key in hidden.sites},
        bases=bases,
        # Products would all wait in memory for each other.
        weights={k: made[k].matrix for k in hidden.sites if made[k].factors is None},
        factors={key: f for key in hidden.sites if (f := made[key].factors) is not None},
        biases=biases,
        lost={key: None if key in biases else lost[key] for key in hidden.sites},
    )


def _chosen(hidden: Hidden, kept: int, sites: Mapping[str, Measured]) -> list[Basis]:
    """L and K of each group of units: all keep the same, and each reader has an L of its own."""
    by_reader = {}
    for key in hidden.readers:
        reader = sites[key]
        assert isinstance(reader, TwoSidedSite)
        assert reader.units is not None
        expand, picks = reader.units.selection.basis(kept)
        by_reader[key] = Basis(expand=expand, reduce=np.eye(hidden.size)[picks])
    first = by_reader[hidden.readers[0]]
    return [by_reader.get(group.met.site, first) for group in hidden.groups]


def _unchanged(job: Job, plan: RankPlan) -> ModelStore:
    of_floats = {"param_ratio", "flop_ratio"} & plan.target.keys()
    if plan.met or (plan.then is not None and not of_floats):
        return job.source  # quantization alone may well do
    if not plan.entries:
        raise TargetMissedError(unfactorable(job.store.label, plan.skipped))
    raise TargetMissedError(
        f"{job.store.label}: no weight can be factored with a saving "
        f"({len(plan.entries)} weights looked at, {len(plan.skipped)} nodes left alone): the "
        "model uses its space"
    )
