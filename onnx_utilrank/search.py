"""The smallest model that is still as good as was asked for."""

import math
from dataclasses import dataclass, replace

from onnx_utilrank.compression import build
from onnx_utilrank.config import CompressConfig, QualityTarget
from onnx_utilrank.errors import ModelError, TargetMissedError
from onnx_utilrank.job import Job
from onnx_utilrank.measurement import Measurement
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.quality import Judge, Quality
from onnx_utilrank.quantizing import Quantizing
from onnx_utilrank.ranking.decide import Offers
from onnx_utilrank.ranking.plan import RankPlan

__all__ = ["Candidate", "search"]

# Candidates that are made and measured, at most, and the step of the ratio that is fine enough.
EVALUATIONS = 8
FINE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One model on the way.

    Attributes:
        ratio: Share of the parameters that it was planned for.
        plan: Its plan.
        store: The model.
        quality: How good it is on the samples of the search.
        saturated: Whether a smaller one was refused only because the metric is saturated.
    """

    ratio: float
    plan: RankPlan
    store: ModelStore
    quality: Quality
    saturated: bool = False


def search(
    job: Job,
    found: Measurement,
    offers: Offers,
    judge: Judge,
    target: QualityTarget,
    config: CompressConfig,
    quantizing: Quantizing | None = None,
) -> Candidate:
    """Bisect the size between what fails and what passes.

    All candidates come from one set of decompositions. Where the method predicts the loss, the
    next size is the one whose predicted loss lies in the middle (of the logarithms), or, once a
    divergence was measured and is what is asked for, the one where prediction times the ratio of
    measured to predicted meets the limit. What is to be quantized begins with the original,
    quantized alone.

    Args:
        job: The model.
        found: Its decompositions.
        offers: What can be done to its sites, at which cost.
        judge: Measures candidates, on samples that those do not rest on.
        target: What is asked for.
        config: Options.
        quantizing: What is done to each candidate before it is judged.

    Raises:
        TargetMissedError: Not even the largest candidate is good enough; the message says how
            good it is.
    """
    low, high = offers.least, 1.0
    best: Candidate | None = None
    worst: Candidate | None = None
    factor = 1.0
    saturated = False
    refused = ""
    floor = 0.0
    if quantizing is not None:
        # What quantization loses by itself comes on top of what is predicted.
        plan, store = build(job, offers.plan(1.0), found, config)
        quality = judge(quantizing(store).store)
        alone = Candidate(ratio=1.0, plan=plan, store=store, quality=quality)
        best, worst = (alone, None) if quality.meets(target) else (None, alone)
        floor = 0.0 if quality.divergence is None else quality.divergence.mean
    for _ in range(EVALUATIONS):
        if high - low <= FINE and best is not None:
            break
        ratio = _next_ratio(offers, low, high, target, factor, floor)
        plan = offers.plan(ratio)
        if not plan.changes:
            low = ratio
            break
        try:
            plan, store = build(job, plan, found, config)
            quality = judge(store if quantizing is None else quantizing(store).store)
        except (TargetMissedError, ModelError) as e:
            # One that cannot be made, or does not run, is not good enough.
            low, refused = max(low, ratio), f"a candidate was refused ({e})"
            if high - low <= FINE:
                break
            continue
        candidate = Candidate(ratio=ratio, plan=plan, store=store, quality=quality)
        job.progress("searching", 0, 0)
        if quality.meets(target):
            best, high = candidate, min(high, ratio)
        else:
            low = max(low, ratio)
            saturated = saturated or quality.saturated
            worst = candidate if worst is None or ratio > worst.ratio else worst
        predicted = plan.predicted_divergence
        if predicted and quality.divergence is not None and quality.divergence.mean > floor:
            factor = (quality.divergence.mean - floor) / predicted
        if high - low <= FINE:
            break
    if best is not None:
        return replace(best, saturated=saturated)
    reached = refused or "nothing could be factored with a saving"
    if worst is not None:
        value, error = worst.quality.figure(target)
        spread = "" if error is None or not math.isfinite(error) else f" ± {error:.2g}"
        reached = (
            f"the best that was found keeps {100 * worst.plan.param_ratio:.1f} % of the parameters "
            f"with {value:.4g}{spread}"
        )
    raise TargetMissedError(
        f"{job.store.label}: {target.key.replace('_', ' ')} {target.limit:g} cannot be reached: "
        f"{reached}; the model uses its space"
    )


def _next_ratio(
    offers: Offers, low: float, high: float, target: QualityTarget, factor: float, floor: float
) -> float:
    """A ratio between the two, at least a twentieth of the way from either."""
    edge = (high - low) / 20
    wanted: float | None = None
    if target.key == "max_divergence":
        wanted = max(target.limit - floor, 0.0) / factor
    else:
        at_low, at_high = (offers.predicted(r) for r in (low, high - edge))
        if at_low and at_high:
            wanted = math.sqrt(at_low * at_high)
    if wanted is None or offers.predicted(low) is None:
        return (low + high) / 2
    a, b = low, high
    for _ in range(20):
        middle = (a + b) / 2
        predicted = offers.predicted(middle)
        a, b = (middle, b) if predicted is not None and predicted > wanted else (a, middle)
    return min(max(b, low + edge), high - edge)
