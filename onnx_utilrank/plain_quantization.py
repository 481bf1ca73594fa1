"""Quantize a model as it is."""

from dataclasses import dataclass
from typing import ClassVar

from onnx_utilrank.calibration.collect import Progress, silent
from onnx_utilrank.calibration.data import DataSource
from onnx_utilrank.errors import ConfigError
from onnx_utilrank.job import Job
from onnx_utilrank.model.store import ModelSource
from onnx_utilrank.quality import Judge, with_metric
from onnx_utilrank.quantization.config import QuantizeConfig
from onnx_utilrank.quantizing import Quantizing
from onnx_utilrank.results import MadeModel
from onnx_utilrank.stages import QuantizationReport, Stage, measure_stages

__all__ = ["QuantizeResult", "quantize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult(MadeModel):
    """What `quantize` made.

    Attributes:
        store: The model.
        report: How, and how it compares with the original on samples held back.
        samples: Samples that calibrated.
        notes: Sentences that a user has to know.
    """

    verb: ClassVar[str] = "quantize"

    report: QuantizationReport
    samples: int
    notes: tuple[str, ...]

    @property
    def stage(self) -> Stage:
        """The comparison with the original."""
        return self.report.stages[-1]

    @property
    def verdict(self) -> str:
        """`smaller`; or `slower` or `faster`, which is smaller and measured to be that."""
        in_time = self.stage.validation.in_time
        return "smaller" if in_time == "alike" else in_time

    def as_dict(self) -> dict[str, object]:
        """The result as JSON types; the model itself is left out."""
        return {
            "verdict": self.verdict,
            "samples": self.samples,
            "notes": list(self.notes),
            "quantized": self.report.as_dict(),
        }


def quantize(
    model: ModelSource,
    data: DataSource,
    config: QuantizeConfig | None = None,
    *,
    progress: Progress = silent,
) -> QuantizeResult:
    """Store the weights of a model in fewer bits and validate it.

    Args:
        model: Path, proto or store; it is not changed.
        data: Samples; four fifths calibrate, a fifth is held back.
        config: Options.
        progress: Called with the stage, what is done of it and how much there is.

    Raises:
        ConfigError: No scheme is named.
        ProviderUnavailableError: What would be written cannot be run on the provider.
        TargetMissedError: The result would be larger.
        UtilrankError: One of its other children: options, model, data.
    """
    if config is None:
        raise ConfigError("a scheme has to be named")
    options = with_metric(config.as_compression())
    job = Job.open(model, data, options, progress, labels=options.labels)
    calibration, held = job.data.split(samples=options.samples, seed=options.seed)
    quantizing = Quantizing(job, calibration, options)
    made = quantizing(job.source)
    judge = Judge(job, held, options)
    store, report = measure_stages(job, quantizing, job.source, made, held, judge)
    notes = (*made.notes, *report.notes, *judge.notes)
    return QuantizeResult(store=store, report=report, samples=len(calibration), notes=notes)
