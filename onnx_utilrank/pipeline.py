"""Strings the stages together: measure utilization, compress, validate."""

import math
from collections.abc import Sequence
from dataclasses import replace

from onnx_utilrank.calibration.collect import Progress, silent, usable_batch
from onnx_utilrank.calibration.data import DataSource, chosen_samples, open_data, parted
from onnx_utilrank.comparison import compare
from onnx_utilrank.compression import build
from onnx_utilrank.config import AnalyzeConfig, CompressConfig, QualityTarget, ValidateConfig
from onnx_utilrank.errors import ConfigError, ModelError, TargetMissedError
from onnx_utilrank.finetuning import finetuned
from onnx_utilrank.job import Job
from onnx_utilrank.model.store import ModelSource, ModelStore
from onnx_utilrank.planning import check_latency, fit, make_offers
from onnx_utilrank.quality import Judge, Quality, with_metric
from onnx_utilrank.quantizing import Quantizing
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.ranking.replay import check_hidden, check_plan, planned_moves
from onnx_utilrank.ranking.skipped import skipped_nodes
from onnx_utilrank.ranking.spectrum import layer_spectra
from onnx_utilrank.ranking.stamp import stamp, stamped
from onnx_utilrank.ranking.utilization import LayerUtilization, UtilizationReport
from onnx_utilrank.ranking.utilized_rank import UTILIZED_RANK
from onnx_utilrank.remarks import fullness, refit_note
from onnx_utilrank.repairing.repairs import repaired
from onnx_utilrank.results import (
    CompressResult,
    FinetuneResult,
    SweepPoint,
    SweepResult,
)
from onnx_utilrank.runtime.providers import find_providers
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.search import Candidate, search
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.stages import measure_stages
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.training.setting import Setting
from onnx_utilrank.validation.report import ValidationReport

__all__ = ["analyze", "compress", "sweep", "validate"]

SWEEP_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def analyze(
    model: ModelSource,
    data: DataSource,
    config: AnalyzeConfig | None = None,
    *,
    progress: Progress = silent,
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
    job = Job.open(model, data, config, progress)
    samples = chosen_samples(job.data, config.samples, config.seed)
    options = CompressConfig(memory_budget=config.memory_budget, cache=config.cache)
    found = job.measure(UTILIZED_RANK.key, job.sites, samples, options)
    return UtilizationReport(
        model=job.store.label,
        model_sha256=job.store.fingerprint(),
        energy=config.energy,
        samples=len(samples),
        engine=found.engine,
        layers=tuple(LayerUtilization.of(site, config.energy) for site in found.sites),
        skipped=skipped_nodes((*job.skips, *found.skips)),
        notes=found.notes,
    )


def compress(
    model: ModelSource,
    data: DataSource,
    config: CompressConfig | None = None,
    *,
    plan: RankPlan | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> CompressResult:
    """Make a smaller model and validate it on samples that took no part in making it.

    Args:
        model: Path, proto or store; it is not changed.
        data: Samples; four fifths calibrate, a fifth is held back (`hold_back`).
        config: Options. Without a plan, one of the targets has to be given.
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
        raise ConfigError("a target has to be given: a ratio, energy, a quality target or a plan")
    if plan is not None and config.target:
        raise ConfigError("a plan states its own target: ratios, energy and quality exclude it")
    if plan is not None and config.then is not None:
        raise ConfigError("a plan states its own quantization: then excludes it")
    config = with_metric(config)
    job = Job.open(model, data, config, progress, labels=config.labels)
    if config.finetune is not None:
        TorchGraph.build(job.source)  # what cannot be trained is told before the work
    calibration, held = job.data.split(samples=config.samples, seed=config.seed)
    made_by = stamp(job.source)
    if plan is not None and made_by is not None and made_by.value == plan.fingerprint():
        report = job.validate(job.source, held)
        done = ("The model already is what this plan makes of its source; nothing was changed.",)
        return CompressResult(plan=plan, store=job.source, validation=report, samples=0, notes=done)
    sites = job.sites
    hidden: tuple[Hidden, ...] | None = None
    if plan is not None:
        check_plan(plan, job.index, sites)
        if plan.shrunk:
            # Of all sites: which weights share features depends on the others.
            hidden = check_hidden(plan, job.index, job.hidden(sites, calibration))
        changed = planned_moves(plan).keys() | plan.shrinking
        sites = tuple(s for s in sites if s.key in changed)
        config = replace(
            config,
            method=plan.method,
            weighting=plan.weighting,
            augment=plan.augment,
            moves=None,
            then=None if plan.then is None else plan.then.scheme,
        )
    searched: Sequence[int] = ()
    if config.quality is not None:
        calibration, searched = parted(job.data, calibration, config.seed)
    quantizing = None if config.then is None else Quantizing(job, calibration, config)
    found = job.measure(config.method_key, sites, calibration, config, hidden)
    best: Candidate | None = None
    store: ModelStore | None = None
    notes = found.notes
    if plan is not None:
        if not dry_run:
            plan, store = build(job, plan, found, config, settled=True)
    else:
        offers = make_offers(job, found, calibration, config, quantizing)
        if config.quality is not None:
            judge = Judge(job, searched, config, found.losses)
            best = search(job, found, offers, judge, config.quality, config, quantizing)
            plan, store = best.plan, None if dry_run else best.store
        elif dry_run:
            plan = offers.plan(config.ratio)
        else:
            plan, store = fit(job, found, offers, calibration, config, quantizing)
        notes = (*notes, *fullness(offers, plan), *refit_note(plan, config, found))
    if store is None:
        return CompressResult(
            plan=plan,
            store=None,
            validation=None,
            samples=len(calibration),
            notes=notes,
            engine=found.engine,
            layers=layer_spectra(found.sites),
        )
    recovered = None
    if config.finetune is not None and plan.changes:
        recovered = _recovered(job, store, (*calibration, *searched), held, config)
        store, notes = recovered.store, (*notes, *recovered.notes)
    plan = replace(plan, parameters_after=count_parameters(store))  # as made, not as foreseen
    judge = Judge(job, held, config, found.losses)
    quantized = None
    if quantizing is not None:
        assert plan.then is not None
        made = quantizing(store, plan.then.in_float)
        branched, rank = None, plan.then.repair_rank
        if rank:
            branched = repaired(job, store, made.store, calibration, config, rank), rank
        last, quantized = measure_stages(
            *(job, quantizing, store, made, held, judge),
            branched=branched,
            timed=config.latency_batch,
        )
        kept = quantized.repair_rank
        then = replace(plan.then, in_float=made.in_float, repair_rank=kept)
        plan = replace(plan, then=then)
        store = stamped(last, plan) if plan.changes else last
        notes = (*notes, *made.notes, *quantized.notes)
        if rank and not kept:
            notes += (f"Branches of rank {rank} help no output held back: there are none.",)
        report, quality = quantized.stages[-1].validation, quantized.stages[-1].quality
    else:
        report, quality = job.validate(store, held, timed=config.latency_batch), judge(store)
    check_latency(job, config, report)
    compared = [o for p in report.providers for o in p.outputs]
    if all(o.kind == "skipped" for o in compared):
        why = dict.fromkeys(f"output {o.name!r}: {o.reason}" for o in compared)
        raise ModelError(
            f"{job.store.label}: none of its outputs can be compared, so that no result could be "
            f"validated ({'; '.join(why)})"
        )
    if config.quality is not None and best is not None:
        _check_held(job, config.quality, best, quality)
    return CompressResult(
        plan=plan,
        store=store,
        validation=report,
        samples=len(calibration),
        notes=(*notes, *_saturation(config.quality, best, quality)),
        engine=found.engine,
        quality=quality,
        searched=None if best is None else best.quality,
        recovered=recovered,
        quantized=quantized,
        layers=layer_spectra(found.sites),
    )


def sweep(
    model: ModelSource,
    data: DataSource,
    config: CompressConfig | None = None,
    *,
    ratios: Sequence[float] = SWEEP_RATIOS,
    keep: float | None = None,
    progress: Progress = silent,
) -> SweepResult:
    """Measure the whole trade-off between size and quality, from one calibration.

    Args:
        model: Path, proto or store; it is not changed.
        data: Samples; a fifth is held back, and every point is measured on those.
        config: Options, without a target.
        ratios: Parameters to keep, each a point of the curve. Those that cannot be reached are
            left out and named in the notes.
        keep: The ratio of the point whose model is kept in the result.
        progress: Called with the stage, what is done of it and how much there is.

    Raises:
        ConfigError: There is a target, no ratio, or `keep` is none of the ratios.
        TargetMissedError: No point can be reached.
        UtilrankError: One of its other children: options, model, data, provider.
    """
    config = config or CompressConfig()
    if config.target:
        raise ConfigError("a sweep goes over all sizes: it takes no target")
    if config.then is not None:
        raise ConfigError("a sweep is of low-rank models: it quantizes none")
    if not ratios or not all(0 < r <= 1 for r in ratios):
        raise ConfigError("a sweep needs ratios, each in (0, 1]")
    if keep is not None and keep not in ratios:
        raise ConfigError(f"ratio {keep:g} is no point of the sweep")
    config = with_metric(config)
    job = Job.open(model, data, config, progress, labels=config.labels)
    calibration, held = job.data.split(samples=config.samples, seed=config.seed)
    found = job.measure(config.method_key, job.sites, calibration, config)
    offers = make_offers(job, found, calibration, config)
    judge = Judge(job, held, config, found.losses)
    points, notes, kept = [], list(found.notes), None
    full: tuple[str, ...] = ()
    for ratio in sorted(set(ratios), reverse=True):
        try:
            plan = replace(offers.plan(ratio), target={"param_ratio": ratio})
            plan, store = build(job, plan, found, config)
            report = job.validate(store, held, timed=config.latency_batch)
            quality = judge(store)
        except (TargetMissedError, ModelError) as e:
            notes.append(f"{ratio:g}: {e}.")
            continue
        full = full or fullness(offers, plan)
        plan = replace(plan, parameters_after=count_parameters(store))
        points.append(SweepPoint(ratio=ratio, plan=plan, validation=report, quality=quality))
        kept = store if ratio == keep else kept
    if not points or (keep is not None and kept is None):
        raise TargetMissedError(" ".join(notes) or f"{job.store.label}: no point can be reached")
    return SweepResult(
        model=job.store.label,
        points=tuple(points),
        engine=found.engine,
        notes=(*notes, *full),
        store=kept,
        layers=layer_spectra(found.sites),
    )


def _recovered(
    job: Job, store: ModelStore, rest: Sequence[int], held: Sequence[int], config: CompressConfig
) -> FinetuneResult:
    """A compressed model after its fine-tuning, on all samples that are not held back."""
    assert config.finetune is not None
    options = replace(
        config.finetune,
        seed=config.seed,
        provider=config.provider,
        provider_options=config.provider_options,
        memory_budget=config.memory_budget,
        cache=config.cache,
        weighting=config.finetune.weighting or config.weighting,
        custom_op_libraries=config.custom_op_libraries,
    )
    setting = Setting.parted(
        job.data, sorted(rest), held, job.provider, job.batch, seed=config.seed
    )
    return finetuned(job.source, store, setting, options, job.progress)


def _check_held(job: Job, target: QualityTarget, best: Candidate, quality: Quality) -> None:
    """The samples that were held back from the search have to agree with it.

    Raises:
        TargetMissedError: They are worse than the target by more than two standard errors.
    """
    if quality.meets(target, errors=2.0):
        return
    value, error = quality.figure(target)
    spread = "" if error is None or not math.isfinite(error) else f" ± {error:.2g}"
    searched, _ = best.quality.figure(target)
    raise TargetMissedError(
        f"{job.store.label}: {target.key.replace('_', ' ')} {target.limit:g} is met where it was "
        f"searched ({searched:.4g}) but not on samples held back ({value:.4g}{spread}); the best "
        f"that was found keeps {100 * best.plan.param_ratio:.1f} % of the parameters; more samples "
        "or a milder target would help"
    )


def _saturation(
    target: QualityTarget | None, best: Candidate | None, quality: Quality
) -> tuple[str, ...]:
    if target is None or target.key != "max_drop" or best is None:
        return ()
    if not (best.saturated or quality.saturated):
        return ()
    return (
        "The metric shows no loss where the outputs clearly differ: it is saturated, and the size "
        "was limited by the divergence of the outputs instead.",
    )


def validate(
    reference: ModelSource,
    candidate: ModelSource,
    data: DataSource,
    config: ValidateConfig | None = None,
    *,
    progress: Progress = silent,
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
    providers = find_providers(
        config.providers, config.custom_op_libraries, config.provider_options
    )
    first = ModelStore.load(reference)
    dataset = open_data(data, first.inputs)
    samples = chosen_samples(dataset, config.samples, config.seed)
    batch = usable_batch(open_session(first, providers[0]), dataset)
    progress("validating", 0, 0)
    return compare(first, ModelStore.load(candidate), dataset, samples, batch, providers, config)
