"""From decompositions to a model: plan, refit, rewrite."""

import math
from collections.abc import Sequence

import numpy as np
import onnx

from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import TargetMissedError
from onnx_utilrank.job import Gradients, Job, Measurement
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.cost import NODE_BYTES, Unit
from onnx_utilrank.ranking.decide import Offers, planned_moves
from onnx_utilrank.ranking.method import Measured, Move
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.ranking.two_sided import TwoSidedSite
from onnx_utilrank.refit.propagate import Layer, propagate
from onnx_utilrank.sites.find import site_matrix
from onnx_utilrank.surgery.rewrite import Replacement, check_contract, rewrite

__all__ = ["build", "fit", "make_offers", "stamp"]

# Metadata of a rewritten model: the plan it came from, so that no plan is applied twice.
PLAN_KEY = "onnx_utilrank.plan_sha256"

# Plans that are made, at most, for a file to have the bytes that were asked for.
FITS = 8


def make_offers(
    job: Job, found: Measurement, samples: Sequence[int], config: CompressConfig
) -> Offers:
    """What can be done to the sites of a model, in the unit of the ratio that was asked for."""
    unit: Unit = "parameters"
    if config.size_ratio:
        unit = "bytes"
    elif config.flop_ratio:
        unit = "operations"
    ledger = job.ledger(unit, [m.site for m in found.sites], samples)
    skips = (*job.skips, *found.skips)
    return Offers.of(job.index, found.sites, skips, found.method, config, ledger)


def fit(
    job: Job, found: Measurement, offers: Offers, samples: Sequence[int], config: CompressConfig
) -> tuple[RankPlan, ModelStore]:
    """Plan for the ratio or the energy that was asked for, and make the model.

    The bytes of a file are known when it is made: where the first plan misses them, the next ones
    aim lower by what was too much.

    Raises:
        TargetMissedError: It cannot be reached.
    """
    ratio = config.ratio
    for _ in range(FITS):
        plan = offers.plan(ratio)
        store = build(job, plan, found, samples, config)
        if config.size_ratio is None or ratio is None:
            return plan, store
        excess = store.file_bytes - math.floor(config.size_ratio * job.store.file_bytes)
        if excess <= 0:
            return plan, store
        ratio -= (excess + NODE_BYTES) / job.store.file_bytes
        if ratio <= 0:
            break
    raise TargetMissedError(
        f"{job.store.label}: a file of {config.size_ratio:g} of its bytes cannot be reached"
    )


def build(
    job: Job,
    plan: RankPlan,
    measurement: Measurement,
    samples: Sequence[int],
    config: CompressConfig,
) -> ModelStore:
    """The model that a plan makes; the source itself where it factors nothing.

    Raises:
        TargetMissedError: Nothing can be factored, or the result would be larger.
    """
    if not plan.factored:
        return _unchanged(job, plan)
    moves = planned_moves(plan)
    planned = [m for m in measurement.sites if m.site.key in moves]
    replacements = (
        _refitted(job, plan, planned, measurement.gradients, samples, config)
        if plan.refit and measurement.gradients is not None
        else [_factored(job, found, moves[found.site.key]) for found in planned]
    )
    job.progress("rewriting", 0, 0)
    store = rewrite(job.index, replacements)
    check_contract(job.store, store)
    entry = stamp(store) or store.proto.metadata_props.add(key=PLAN_KEY)
    entry.value = plan.fingerprint()
    before, after = job.store.file_bytes, store.file_bytes
    if after > before and not config.force:
        raise TargetMissedError(
            f"{job.store.label}: the result would be larger, {after:,} bytes after "
            f"{before:,}; nothing is gained"
        )
    return store


def _factored(job: Job, found: Measured, move: Move) -> Replacement:
    weight = site_matrix(job.index, found.site)
    factors = found.factors(weight, move)
    lost = found.lost_mean(weight, factors, move) if move.bias else None
    return Replacement(site=found.site, move=move.kind, factors=factors, lost_mean=lost)


def _refitted(
    job: Job,
    plan: RankPlan,
    planned: Sequence[Measured],
    gradients: Gradients,
    samples: Sequence[int],
    config: CompressConfig,
) -> list[Replacement]:
    moves = planned_moves(plan)
    layers = []
    for found in planned:
        assert isinstance(found, TwoSidedSite)
        rank = moves[found.site.key].rank
        assert rank is not None
        layers.append(
            Layer(
                measured=found,
                weight=site_matrix(job.index, found.site),
                rank=rank,
                biases=job.own_biases(found.site),
            )
        )
    # Both graphs hold the live values of all samples at once.
    room = max(2, config.memory_budget // (4 * gradients.footprint.live))
    picked = np.random.default_rng(config.seed).permutation(len(samples))[:room]
    feeds = list(job.data.feeds([samples[k] for k in sorted(picked)], batch=gradients.effort.batch))
    mask = next((loss.mask for loss in gradients.losses if loss.mask), None)
    made = propagate(
        gradients.graph,
        layers,
        feeds,
        mask,
        lambda done, total: job.progress("refitting", done, total),
    )
    return [
        Replacement(
            site=found.site,
            move=moves[found.site.key].kind,
            factors=made[found.site.key].factors,
            lost_mean=made[found.site.key].lost_mean,
        )
        for found in planned
    ]


def _unchanged(job: Job, plan: RankPlan) -> ModelStore:
    if plan.met:
        return job.store
    raise TargetMissedError(
        f"{job.store.label}: no weight can be factored with a saving "
        f"({len(plan.entries)} weights looked at, {len(plan.skipped)} nodes left alone): the "
        "model uses its space"
    )


def stamp(store: ModelStore) -> onnx.StringStringEntryProto | None:
    """The metadata entry that says which plan made a model, if one did."""
    return next((e for e in store.proto.metadata_props if e.key == PLAN_KEY), None)
