"""The whole trade-off between size and quality."""

from collections.abc import Sequence
from dataclasses import replace

from onnx_utilrank.calibration.collect import Progress, silent
from onnx_utilrank.calibration.data import DataSource
from onnx_utilrank.compression import build
from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import ConfigError, ModelError, TargetMissedError
from onnx_utilrank.job import Job
from onnx_utilrank.model.store import ModelSource
from onnx_utilrank.planning import make_offers
from onnx_utilrank.quality import Judge, with_metric
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.ranking.spectrum import layer_spectra
from onnx_utilrank.remarks import fullness
from onnx_utilrank.results import SweepPoint, SweepResult

__all__ = ["SWEEP_RATIOS", "sweep"]

SWEEP_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


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
    points, notes, kept = [], [*found.notes, *judge.notes], None
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
