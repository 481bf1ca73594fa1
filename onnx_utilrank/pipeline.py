"""Strings the stages together: measure utilization, compress, validate."""

import math
from collections.abc import Sequence
from dataclasses import replace

from onnx_utilrank.calibration.collect import Progress, silent, usable_batch
from onnx_utilrank.calibration.data import DataSource, open_data
from onnx_utilrank.calibration.labels import Labels
from onnx_utilrank.calibration.split import SEARCHED, chosen_samples, parted
from onnx_utilrank.comparison import compare
from onnx_utilrank.compression import build
from onnx_utilrank.config import AnalyzeConfig, CompressConfig, QualityTarget, ValidateConfig
from onnx_utilrank.errors import ConfigError, ModelError, TargetMissedError
from onnx_utilrank.finetuning import finetuned
from onnx_utilrank.job import Job
from onnx_utilrank.model.store import ModelSource, ModelStore
from onnx_utilrank.planning import check_latency, fit, make_offers
from onnx_utilrank.quality import Judge, Quality, most_judged, with_metric
from onnx_utilrank.quantizing import Quantizing
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.ranking.replay import as_measured, check_hidden, check_plan, planned_moves
from onnx_utilrank.ranking.skipped import skipped_nodes
from onnx_utilrank.ranking.spectrum import layer_spectra
from onnx_utilrank.ranking.stamp import stamp, stamped
from onnx_utilrank.ranking.utilization import LayerUtilization, UtilizationReport
from onnx_utilrank.ranking.utilized_rank import UTILIZED_RANK
from onnx_utilrank.remarks import fullness, refit_note
from onnx_utilrank.repairing.repairs import repaired
from onnx_utilrank.results import CompressResult, FinetuneResult
from onnx_utilrank.runtime.providers import find_providers
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.search import Candidate, search
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site
from onnx_utilrank.stages import QuantizationReport, measure_stages
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.training.setting import Setting
from onnx_utilrank.validation.report import ValidationReport

__all__ = ["analyze", "compress", "validate"]


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
    _check_asked(config, plan)
    config = with_metric(config)
    own = None if config.finetune is None else config.finetune.labels
    job = Job.open(model, data, config, progress, labels=config.labels or own)
    if config.finetune is not None:
        TorchGraph.build(job.source)  # what cannot be trained is told before the work
    most = most_judged(job, config.quality, config.memory_budget)
    calibration, held = job.data.split(samples=config.samples, seed=config.seed, most=most)
    sites: Sequence[Site] = job.sites
    hidden: tuple[Hidden, ...] | None = None
    if plan is not None:
        made_by = stamp(job.source)
        if made_by is not None and made_by.value == plan.fingerprint():
            return _as_it_is(job, plan, held)
        config, sites, hidden = _replayed(job, plan, calibration, config)
    searched: Sequence[int] = ()
    if config.quality is not None:
        calibration, searched = parted(job.data, calibration, config.seed, SEARCHED, most)
    quantizing = None if config.then is None else Quantizing(job, calibration, config)
    found = job.measure(config.method_key, sites, calibration, config, hidden)
    best, store, notes = None, None, found.notes
    if plan is None:
        offers = make_offers(job, found, calibration, config, quantizing)
        if config.quality is not None:
            judge = Judge(job, searched, config, found.losses)
            best = search(job, found, offers, judge, config.quality, config, quantizing)
            plan, store = best.plan, best.store
        elif dry_run:
            plan = offers.plan(config.ratio)
        else:
            plan, store = fit(job, found, offers, calibration, config, quantizing)
        notes = (*notes, *fullness(offers, plan), *refit_note(plan, config, found))
    else:
        plan = as_measured(plan, job.index, found.sites, hidden or ())
        if not dry_run:
            plan, store = build(job, plan, found, config, settled=True)
    result = CompressResult(
        plan=plan,
        store=None,
        validation=None,
        samples=len(calibration),
        notes=notes,
        engine=found.engine,
        layers=layer_spectra(found.sites),
    )
    if dry_run or store is None:
        return result
    if config.finetune is not None and plan.changes:
        recovered = _recovered(job, store, (*calibration, *searched), held, config, found.losses)
        store, notes = recovered.store, (*notes, *recovered.notes)
        result = replace(result, recovered=recovered)
    plan = replace(plan, parameters_after=count_parameters(store))  # as made, not as foreseen
    judge = Judge(job, held, config, found.losses)
    notes = (*notes, *judge.notes)
    if quantizing is None:
        report, quality = job.validate(store, held, timed=config.latency_batch), judge(store)
    else:
        plan, store, quantized, told = _quantized(
            job, quantizing, plan, store, calibration, held, judge, config
        )
        report, quality = quantized.stages[-1].validation, quantized.stages[-1].quality
        notes = (*notes, *told)
        result = replace(result, quantized=quantized)
    check_latency(job, config, report)
    _check_compared(job, report)
    if config.quality is not None and best is not None:
        missed = _held_against(job, config.quality, best, quality)
        notes = (*notes, *missed, *_saturation(config.quality, best, quality))
        result = replace(result, searched=best.quality)
    return replace(result, plan=plan, store=store, validation=report, quality=quality, notes=notes)


def _check_asked(config: CompressConfig, plan: RankPlan | None) -> None:
    """A target has to be given, by options or by a plan.

    Raises:
        ConfigError: There is none, or more than one.
    """
    if plan is None and not config.target:
        raise ConfigError("a target has to be given: a ratio, energy, a quality target or a plan")
    if plan is not None and config.target:
        raise ConfigError("a plan states its own target: ratios, energy and quality exclude it")
    if plan is not None and config.then is not None:
        raise ConfigError("a plan states its own quantization: then excludes it")


def _as_it_is(job: Job, plan: RankPlan, held: Sequence[int]) -> CompressResult:
    """The source, which a plan has made already."""
    return CompressResult(
        plan=plan,
        store=job.source,
        validation=job.validate(job.source, held),
        samples=0,
        notes=("The model already is what this plan makes of its source; nothing was changed.",),
    )


def _replayed(
    job: Job, plan: RankPlan, calibration: Sequence[int], config: CompressConfig
) -> tuple[CompressConfig, tuple[Site, ...], tuple[Hidden, ...] | None]:
    """What a plan says in the place of options, and what it changes.

    Raises:
        ModelError: It is a plan for another model.
    """
    check_plan(plan, job.index, job.sites)
    hidden = None
    if plan.shrunk:
        # Of all sites: which weights share features depends on the others.
        found = job.hidden(job.sites, calibration)
        hidden = check_hidden(plan, job.index, found, job.sites)
    changed = planned_moves(plan).keys() | plan.shrinking
    config = replace(
        config,
        method=plan.method,
        weighting=plan.weighting,
        augment=plan.augment,
        moves=None,
        then=None if plan.then is None else plan.then.scheme,
    )
    return config, tuple(s for s in job.sites if s.key in changed), hidden


def _quantized(
    job: Job,
    quantizing: Quantizing,
    plan: RankPlan,
    store: ModelStore,
    calibration: Sequence[int],
    held: Sequence[int],
    judge: Judge,
    config: CompressConfig,
) -> tuple[RankPlan, ModelStore, QuantizationReport, tuple[str, ...]]:
    """A compressed model in fewer bits, with branches that repair it where the plan has a rank.

    Returns:
        The plan with what became of that, the model, its stages, and sentences to tell.
    """
    assert plan.then is not None
    made = quantizing(store, plan.then.in_float)
    branched, rank = None, plan.then.repair_rank
    if rank:
        branched = repaired(job, store, made.store, calibration, config, rank), rank
    last, found = measure_stages(
        *(job, quantizing, store, made, held, judge),
        branched=branched,
        timed=config.latency_batch,
    )
    then = replace(plan.then, in_float=made.in_float, repair_rank=found.repair_rank)
    plan = replace(plan, then=then)
    notes = (*made.notes, *found.notes)
    if rank and not found.repair_rank:
        notes += (f"Branches of rank {rank} help no output held back: there are none.",)
    return plan, stamped(last, plan) if plan.changes else last, found, notes


def _check_compared(job: Job, report: ValidationReport) -> None:
    """Something has to be compared, or nothing is validated.

    Raises:
        ModelError: No output can be.
    """
    compared = [o for p in report.providers for o in p.outputs]
    if not all(o.kind == "skipped" for o in compared):
        return
    why = dict.fromkeys(f"output {o.name!r}: {o.reason}" for o in compared)
    raise ModelError(
        f"{job.store.label}: none of its outputs can be compared, so that no result could be "
        f"validated ({'; '.join(why)})"
    )


def _recovered(
    job: Job,
    store: ModelStore,
    rest: Sequence[int],
    held: Sequence[int],
    config: CompressConfig,
    losses: tuple[OutputLoss, ...],
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
    known = losses if options.weighting == config.weighting else ()
    return finetuned(job.source, store, setting, options, job.progress, known)


def _held_against(
    job: Job, target: QualityTarget, best: Candidate, quality: Quality
) -> tuple[str, ...]:
    """What a report says where the samples that were held back from the search do not confirm it.

    Raises:
        TargetMissedError: They are worse than the target by more than two standard errors.
    """
    value, error = quality.figure(target)
    spread = "" if error is None or not math.isfinite(error) else f" ± {error:.2g}"
    if quality.meets(target, errors=2.0):
        if quality.confirms(target):
            return ()
        return (
            f"On samples held back, {target.key.replace('_', ' ')} is {value:.4g}{spread}, where "
            f"{target.limit:g} was asked: within two standard errors; more samples would tell.",
        )
    searched, _ = best.quality.figure(target)
    raise TargetMissedError(
        f"{job.store.label}: {target.key.replace('_', ' ')} {target.limit:g} is met where it was "
        f"searched ({searched:.4g}) but not on samples held back ({value:.4g}{spread}); the best "
        f"that was found keeps {100 * best.plan.param_ratio:.1f} % of the parameters; more samples "
        "or a milder target would help"
    )


def _saturation(target: QualityTarget, best: Candidate, quality: Quality) -> tuple[str, ...]:
    if target.key != "max_drop" or not (best.saturated or quality.saturated):
        return ()
    where = "that were searched on" if best.saturated else "held back"
    return (
        f"On samples {where} the metric shows no loss where the outputs clearly differ: it is "
        "saturated, and the size was limited by the divergence of the outputs instead.",
    )


def validate(
    reference: ModelSource,
    candidate: ModelSource,
    data: DataSource,
    config: ValidateConfig | None = None,
    *,
    progress: Progress = silent,
) -> ValidationReport:
    """Compare a candidate with its reference: outputs, size, FLOPs, latency, and accuracy.

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
    wanted = [] if config.labels is None else [Labels.parse(config.labels).spec]
    dataset = open_data(data, [*first.inputs, *wanted])
    samples = chosen_samples(dataset, config.samples, config.seed)
    batch = usable_batch(open_session(first, providers[0]), dataset)
    progress("validating", 0, 0)
    return compare(first, ModelStore.load(candidate), dataset, samples, batch, providers, config)
