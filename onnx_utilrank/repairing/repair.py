"""Bring back what quantization lost, and prove it on samples that were held back."""

import math
from collections.abc import Sequence
from dataclasses import replace

from onnx_utilrank.calibration.collect import Progress, silent
from onnx_utilrank.calibration.data import DataSource
from onnx_utilrank.calibration.own_code import import_function
from onnx_utilrank.calibration.split import SEARCHED, parted
from onnx_utilrank.comparison import check_alike
from onnx_utilrank.config import QualityTarget
from onnx_utilrank.errors import ModelError, TargetMissedError
from onnx_utilrank.job import Job
from onnx_utilrank.model.store import ModelSource, ModelStore
from onnx_utilrank.quality import Judge, Quality, most_judged
from onnx_utilrank.ranking.skipped import skipped_nodes
from onnx_utilrank.repairing.config import RepairConfig
from onnx_utilrank.repairing.repairs import Choice, Repairs
from onnx_utilrank.repairing.result import RepairedLayer, RepairResult
from onnx_utilrank.repairing.search import smallest
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.validation.bench import LatencyComparison, compare_latency

__all__ = ["repair"]

# Share of the divergence that the errors of weights have to explain, or the rest is named.
EXPLAINED = 0.5


def repair(
    reference: ModelSource,
    quantized: ModelSource,
    data: DataSource,
    config: RepairConfig,
    *,
    progress: Progress = silent,
) -> RepairResult:
    """Put low-rank branches beside quantized layers, where that brings the outputs back.

    A layer's output Q(W) x becomes Q(W) x + B (A x), with the best B A for the data; see
    `repairing.measure`. Samples that are held back decide: where the outputs diverge no less with
    branches, what comes out is the quantized model as it was.

    Args:
        reference: The model before it was quantized: path, proto or store.
        quantized: The same with quantized weights; it is not changed.
        data: Samples; four fifths calibrate, a fifth is held back (`hold_back`).
        config: Options.
        progress: Called with the stage, what is done of it and how much there is.

    Raises:
        TargetMissedError: The quality that was asked for cannot be reached, or does not hold on
            samples held back.
        UtilrankError: One of its other children: options, models, data, provider.
    """
    if isinstance(config.evaluate, str):
        config = replace(config, evaluate=import_function(config.evaluate))
    options = config.measuring()
    job = Job.open(reference, data, options, progress, labels=config.labels)
    small = ModelStore.load(quantized)
    check_alike(job.source, small)
    open_session(small, job.provider)  # what ONNX Runtime refuses ends here
    most = most_judged(job, config.quality, config.memory_budget)
    calibration, held = job.data.split(samples=config.samples, seed=config.seed, most=most)
    searched: Sequence[int] = ()
    if config.quality is not None:
        calibration, searched = parted(job.data, calibration, config.seed, SEARCHED, most)
    repairs = Repairs.measure(job, small, calibration, options)
    if not repairs.lost.residuals and not repairs.skips:
        raise ModelError(f"{small.label}: no quantized weight was found in it")
    losses = repairs.lost.losses
    found_quality = None
    if config.quality is not None:
        judge = Judge(job, searched, options, losses)
        found = smallest(repairs, judge, config.quality, progress)
        choices, made, found_quality = found.choices, found.store, found.quality
    elif config.extra_bytes is not None:
        choices, made = repairs.fit(int(config.extra_bytes * small.file_bytes))
    else:
        choices = repairs.of_rank(config.rank or 0)
        made = repairs.make(choices)
    judge = Judge(job, held, options, losses)
    before = judge(small)
    after = before if made is small else judge(made)
    kept = made is not small and _helps(before, after)
    store = made if kept else small
    if config.quality is not None:
        _check_held(small.label, config.quality, after if kept else before)
    progress("validating", 0, 0)
    validation = job.validate(small, held)
    notes = _notes(made is not small, kept, before, after, config) + judge.notes
    if not kept or _share_left(before, after) > EXPLAINED:
        notes += _unexplained(repairs, before)
    return RepairResult(
        store=store,
        kept=kept,
        target=config.target,
        layers=tuple(_layer(choice, kept) for choice in choices),
        skipped=skipped_nodes(repairs.skips),
        before=before,
        after=after,
        searched=found_quality,
        quantized=validation,
        validation=job.validate(store, held) if kept else validation,
        latency=_latency(job, small, store, held) if kept else None,
        samples=len(calibration),
        engine=repairs.lost.engine,
        notes=(*repairs.lost.notes, *notes),
    )


def _latency(
    job: Job, quantized: ModelStore, repaired: ModelStore, samples: Sequence[int]
) -> LatencyComparison:
    """Time of the repaired model against the quantized one."""
    sessions = open_session(quantized, job.provider), open_session(repaired, job.provider)
    return compare_latency(*sessions, job.feeds(samples))


def _helps(before: Quality, after: Quality) -> bool:
    """Whether outputs diverge less, and the user's metric is not clearly worse."""
    if before.drop is not None and after.drop is not None:
        error = after.drop_error
        room = 2 * error if error is not None and math.isfinite(error) else 0.0
        if after.drop > before.drop + room:
            return False
        if before.divergence is None:
            return after.drop < before.drop
    if before.divergence is None or after.divergence is None:
        return False
    return after.divergence.mean < before.divergence.mean


def _check_held(label: str, target: QualityTarget, quality: Quality) -> None:
    """The samples that were held back from the search have to agree with it.

    Raises:
        TargetMissedError: They are worse than the target by more than two standard errors.
    """
    if quality.meets(target, errors=2.0):
        return
    value, error = quality.figure(target)
    spread = "" if error is None or not math.isfinite(error) else f" ± {error:.2g}"
    raise TargetMissedError(
        f"{label}: {target.key.replace('_', ' ')} {target.limit:g} is met where it was searched "
        f"but not on samples held back ({value:.4g}{spread}); more samples or a milder target "
        "would help"
    )


def _notes(
    changed: bool, kept: bool, before: Quality, after: Quality, config: RepairConfig
) -> tuple[str, ...]:
    """Why the quantized model stayed as it is, if it did."""
    if kept or config.rank == 0:
        return ()
    if changed:
        figures = ""
        if before.divergence is not None and after.divergence is not None:
            figures = f" ({after.divergence.mean:.3g} with, {before.divergence.mean:.3g} without)"
        return (
            "On the samples held back outputs diverge no less, or the metric is worse, with "
            f"branches{figures}: none is kept.",
        )
    if config.quality is not None:
        return ("The quantized model is as good as was asked for: nothing was added.",)
    return ("No branch is predicted to help: nothing was added.",)


def _share_left(before: Quality, after: Quality) -> float:
    """Of the divergence; 1 where it is not known."""
    if before.divergence is None or after.divergence is None or not before.divergence.mean > 0:
        return 1.0
    return after.divergence.mean / before.divergence.mean


def _unexplained(repairs: Repairs, before: Quality) -> tuple[str, ...]:
    """A sentence where what quantization lost lies elsewhere than in the weights."""
    explained = sum(residual.untouched for residual in repairs.lost.residuals)
    found = before.divergence
    if not repairs.lost.losses or found is None or explained >= EXPLAINED * found.mean:
        return ()
    return (
        f"Of the quantized model's divergence, {found.mean:.2g}, the errors of the weights that "
        f"were measured are predicted to make {explained:.2g}. The rest comes from rounding "
        "activations, or from layers that were left alone: no branch brings it back.",
    )


def _layer(choice: Choice, kept: bool) -> RepairedLayer:
    pair = choice.residual.pair
    before = choice.residual.untouched
    return RepairedLayer(
        site=pair.key,
        nodes=tuple(layer.use.label for layer in pair.layers),
        op_type=pair.layers[0].use.op_type,
        m=pair.site.m,
        d=pair.site.d,
        distance=pair.distance,
        rank=choice.rank if kept else None,
        predicted_before=before,
        predicted_after=choice.error if kept else before,
    )
