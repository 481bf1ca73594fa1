"""Strings the stages together: measure utilization, compress, validate."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_utilrank.calibration.collect import Collected, Progress, collect, usable_batch
from onnx_utilrank.calibration.data import Dataset, DataSource, open_data
from onnx_utilrank.calibration.survey import linear_flops
from onnx_utilrank.config import AnalyzeConfig, CompressConfig, SiteFilter, ValidateConfig
from onnx_utilrank.errors import ConfigError, ModelError, TargetMissedError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelSource, ModelStore
from onnx_utilrank.ranking.cost import bias_cost, count_parameters
from onnx_utilrank.ranking.decide import check_plan, decide, planned_moves, skipped_nodes
from onnx_utilrank.ranking.method import Measured, Method, site_moment, use_view
from onnx_utilrank.ranking.methods import find_method
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.ranking.utilized_rank import UTILIZED_RANK
from onnx_utilrank.results import CompressResult, LayerUtilization, UtilizationReport
from onnx_utilrank.runtime.providers import Provider, find_provider
from onnx_utilrank.runtime.sessions import Feed
from onnx_utilrank.sites.find import find_sites, site_matrix
from onnx_utilrank.sites.site import Site, Skip
from onnx_utilrank.statistics.moments import ROWS_PER_FEATURE
from onnx_utilrank.surgery.rewrite import Replacement, check_contract, rewrite
from onnx_utilrank.validation.report import ModelFigures, ValidationReport
from onnx_utilrank.validation.report import validate as compare_models

__all__ = ["analyze", "compress", "validate"]

# Metadata of a rewritten model: the plan it came from, so that no plan is applied twice.
PLAN_KEY = "onnx_utilrank.plan_sha256"


def _silent(stage: str, done: int, total: int) -> None:
    """The progress callback of callers that want none."""


def analyze(
    model: ModelSource,
    data: DataSource,
    config: AnalyzeConfig | None = None,
    *,
    progress: Progress = _silent,
) -> UtilizationReport:
    """Measure which share of its space each weight uses on the data.

    For each weight, k_S eigenvectors of M = E[x x^T] and k_T of W M W^T hold the stated energy;
    r = min(k_S, k_T) is its utilized rank (Garg et al., arXiv 2407.04797).

    Args:
        model: Path, proto or store.
        data: Calibration samples; `open_data` says in which forms.
        config: Options.
        progress: Called with the stage, what is done of it and how much there is.

    Raises:
        UtilrankError: One of its children, by what is wrong: options, model, data, provider.
    """
    config = config or AnalyzeConfig()
    job = _Job.open(model, data, config, config.provider, progress)
    samples = _chosen(job.data, config.samples, config.seed)
    collected = job.collect(UTILIZED_RANK, job.sites, samples)
    layers = []
    for measured in job.measure(UTILIZED_RANK, job.sites, collected):
        site, moment = measured.site, measured.moment
        assert moment is not None
        input_rank, output_rank = UTILIZED_RANK.ranks(measured, config.energy)
        layers.append(
            LayerUtilization(
                site=site.key,
                nodes=tuple(use.label for use in site.uses),
                op_type=site.op_type,
                m=site.m,
                d=site.d,
                input_rank=input_rank,
                output_rank=output_rank,
                rows=moment.rows,
                trusted=moment.enough_rows,
            )
        )
    return UtilizationReport(
        model=job.store.label,
        model_sha256=job.store.fingerprint(),
        energy=config.energy,
        samples=len(samples),
        layers=tuple(layers),
        skipped=skipped_nodes(job.skips),
        notes=_notes(collected, {lay.site: (lay.rows, lay.trusted) for lay in layers}),
    )


def compress(
    model: ModelSource,
    data: DataSource,
    config: CompressConfig | None = None,
    *,
    plan: RankPlan | None = None,
    dry_run: bool = False,
    progress: Progress = _silent,
) -> CompressResult:
    """Make a smaller model and validate it on samples that took no part in making it.

    Args:
        model: Path, proto or store; it is not changed.
        data: Samples; four fifths calibrate, a fifth is held back (`hold_back`).
        config: Options. Without a plan, `param_ratio` or `energy` has to be given.
        plan: Decisions to replay instead; statistics are collected anew for the sites it factors.
        dry_run: Stop at the plan.
        progress: Called with the stage, what is done of it and how much there is.

    Returns:
        The plan, and (unless it was a dry run) the model and its validation. Where nothing was
        factored, the model is the source itself.

    Raises:
        TargetMissedError: What was asked for cannot be reached, or the result would be larger.
        UtilrankError: One of its other children: options, model, data, provider.
    """
    config = config or CompressConfig()
    if plan is None and not config.target:
        raise ConfigError("one of param ratio, energy and plan has to be given")
    if plan is not None and config.target:
        raise ConfigError("a plan states its own target: param ratio and energy exclude it")
    job = _Job.open(model, data, config, config.provider, progress)
    calibration, held = job.data.split(samples=config.samples, seed=config.seed)
    stamp = _stamp(job.store)
    if plan is not None and stamp is not None and stamp.value == plan.fingerprint():
        report = job.validate(job.store, held)
        done = ("The model already is what this plan makes of its source; nothing was changed.",)
        return CompressResult(plan=plan, store=job.store, validation=report, samples=0, notes=done)
    method = find_method(config.method_key if plan is None else plan.method)
    sites = job.sites
    if plan is not None:
        check_plan(plan, job.index, sites)
        sites = tuple(s for s in sites if s.key in planned_moves(plan))
    collected = job.collect(method, sites, calibration)
    measured = job.measure(method, sites, collected)
    if plan is None:
        plan = decide(job.index, measured, job.skips, method, config)
    notes = _notes(
        collected, {e.site: (e.rows, e.trusted) for e in plan.entries if e.rows is not None}
    )
    if dry_run:
        return CompressResult(
            plan=plan, store=None, validation=None, samples=len(calibration), notes=notes
        )
    store = job.rewrite(plan, measured, config)
    plan = replace(plan, parameters_after=count_parameters(store))  # as made, not as foreseen
    report = job.validate(store, held)
    if all(o.kind == "skipped" for p in report.providers for o in p.outputs):
        raise ModelError(
            f"{job.store.label}: none of its outputs can be compared, so that no result could be "
            f"validated ({' '.join(report.notes)})"
        )
    return CompressResult(
        plan=plan,
        store=store,
        validation=report,
        samples=len(calibration),
        notes=notes,
    )


def validate(
    reference: ModelSource,
    candidate: ModelSource,
    data: DataSource,
    config: ValidateConfig | None = None,
    *,
    progress: Progress = _silent,
) -> ValidationReport:
    """Compare a candidate with its reference: outputs, size, FLOPs and latency.

    Args:
        reference: The model that is right by definition.
        candidate: A model of the same inputs and outputs.
        data: Samples, all of them used unless the options say otherwise.
        config: Options.
        progress: Called with the stage, what is done of it and how much there is.

    Raises:
        UtilrankError: One of its children, by what is wrong. A missed tolerance is no error here:
            the report says so.
    """
    config = config or ValidateConfig()
    providers = [find_provider(key) for key in config.providers]
    first = ModelStore.load(reference)
    dataset = open_data(data, first.inputs)
    samples = _chosen(dataset, config.samples, config.seed)
    batch = usable_batch(GraphIndex.build(first), dataset, samples, providers[0])
    progress("validating", 0, 0)
    return _compare(first, ModelStore.load(candidate), dataset, samples, batch, providers, config)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One model with its sites and data, on one provider."""

    index: GraphIndex
    sites: tuple[Site, ...]
    skips: tuple[Skip, ...]
    data: Dataset
    provider: Provider
    progress: Progress

    @classmethod
    def open(
        cls,
        model: ModelSource,
        data: DataSource,
        config: SiteFilter,
        provider: str,
        progress: Progress,
    ) -> "_Job":
        found = find_provider(provider)
        store = ModelStore.load(model)
        index = GraphIndex.build(store)
        sites, skips = find_sites(
            index, op_types=config.op_types, include=config.include, exclude=config.exclude
        )
        return cls(
            index=index,
            sites=sites,
            skips=skips,
            data=open_data(data, store.inputs),
            provider=found,
            progress=progress,
        )

    @property
    def store(self) -> ModelStore:
        return self.index.store

    def collect(self, method: Method, sites: Sequence[Site], samples: Sequence[int]) -> Collected:
        """Moments of every tensor that the method wants to know of."""
        sides = [(site, method.side(site)) for site in sites]
        views = [use_view(use, side) for site, side in sides if side for use in site.uses]
        batch = usable_batch(self.index, self.data, samples, self.provider)
        return collect(
            self.index,
            views,
            self.data,
            samples,
            self.provider,
            batch=batch,
            progress=self.progress,
        )

    def measure(
        self, method: Method, sites: Sequence[Site], collected: Collected
    ) -> list[Measured]:
        """Decompose every site."""
        found = []
        for k, site in enumerate(sites):
            self.progress("decomposing", k, len(sites))
            side = method.side(site)
            moment = None
            if side:
                moment = site_moment(site, side, collected.moments, self._own_biases(site))
            weight = site_matrix(self.index, site)
            found.append(method.measure(site, weight, moment, bias_cost(self.index, site)))
        self.progress("decomposing", len(sites), len(sites))
        return found

    def _own_biases(self, site: Site) -> dict[int, np.ndarray]:
        """What the nodes themselves add to W x; an Add behind a node is not part of it."""
        return {
            use.node: use.bias.values(self.index, site.m)
            if use.bias.kind == "input"
            else np.zeros(site.m)
            for use in site.uses
        }

    def rewrite(
        self, plan: RankPlan, measured: Sequence[Measured], config: CompressConfig
    ) -> ModelStore:
        """The model that a plan makes; the source itself where it factors nothing."""
        if not plan.factored:
            return self._unchanged(plan)
        moves = planned_moves(plan)
        replacements = []
        for found in measured:
            move = moves.get(found.site.key)
            if move is None:
                continue
            weight = site_matrix(self.index, found.site)
            factors = found.factors(weight, move)
            lost = found.lost_mean(weight, factors, move) if move.bias else None
            replacements.append(Replacement(site=found.site, factors=factors, lost_mean=lost))
        self.progress("rewriting", 0, 0)
        store = rewrite(self.index, replacements)
        check_contract(self.store, store)
        stamp = _stamp(store) or store.proto.metadata_props.add(key=PLAN_KEY)
        stamp.value = plan.fingerprint()
        before, after = self.store.file_bytes, store.file_bytes
        if after > before and not config.force:
            raise TargetMissedError(
                f"{self.store.label}: the result would be larger, {after:,} bytes after "
                f"{before:,}; nothing is gained"
            )
        return store

    def _unchanged(self, plan: RankPlan) -> ModelStore:
        wanted = plan.target.get("param_ratio")
        if wanted is not None and plan.param_ratio <= wanted:
            return self.store
        raise TargetMissedError(
            f"{self.store.label}: no weight can be factored with a saving "
            f"({len(plan.entries)} weights looked at, {len(plan.skipped)} nodes left alone): the "
            "model uses its space"
        )

    def validate(self, candidate: ModelStore, samples: Sequence[int]) -> ValidationReport:
        """Compare with the source on the given samples."""
        self.progress("validating", 0, 0)
        batch = usable_batch(self.index, self.data, samples, self.provider)
        config = ValidateConfig(providers=(self.provider.key,))
        return _compare(self.store, candidate, self.data, samples, batch, [self.provider], config)


def _compare(
    reference: ModelStore,
    candidate: ModelStore,
    data: Dataset,
    samples: Sequence[int],
    batch: int,
    providers: Sequence[Provider],
    config: ValidateConfig,
) -> ValidationReport:
    single = next(data.feeds(samples, batch=1))
    feeds = list(data.feeds(samples, batch=batch))
    return compare_models(
        reference,
        candidate,
        feeds,
        samples=len(samples),
        providers=providers,
        figures=(
            _figures(reference, single, providers[0]),
            _figures(candidate, single, providers[0]),
        ),
        max_error=config.max_error,
        min_agreement=config.min_agreement,
    )


def _figures(store: ModelStore, feed: Feed, provider: Provider) -> ModelFigures:
    return ModelFigures(
        parameters=count_parameters(store),
        file_bytes=store.file_bytes,
        flops=linear_flops(store, feed, provider),
    )


def _chosen(data: Dataset, samples: int | None, seed: int) -> list[int]:
    """All samples, or so many of them chosen at random, in order."""
    n = len(data)
    if samples is None or samples >= n:
        return list(range(n))
    return sorted(random.Random(seed).sample(range(n), samples))


def _notes(collected: Collected, sites: dict[str, tuple[int | None, bool]]) -> tuple[str, ...]:
    """What a reader of the figures has to know about the statistics behind them."""
    notes = []
    poor = {key: rows for key, (rows, trusted) in sites.items() if not trusted}
    if poor:
        worst = min(poor, key=lambda key: poor[key] or 0)
        notes.append(
            f"{len(poor)} of {len(sites)} weights saw fewer than {ROWS_PER_FEATURE} rows a "
            f"feature (fewest: {worst!r} with {poor[worst]}), so their spectra look emptier than "
            "they are; more samples would help, and savings there are not safe."
        )
    strided = [s for s in collected.strides.values() if s > 1]
    if strided:
        notes.append(
            f"{len(strided)} of {len(collected.strides)} tensors have more rows than a rank "
            f"estimate needs: of those one row in {min(strided)} to one in {max(strided)} was used."
        )
    return tuple(notes)


def _stamp(store: ModelStore) -> onnx.StringStringEntryProto | None:
    """The metadata entry that says which plan made a model, if one did."""
    return next((e for e in store.proto.metadata_props if e.key == PLAN_KEY), None)
