"""The models on the way to a quantized one, each beside the original on samples held back."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnx_utilrank.comparison import compare
from onnx_utilrank.config import ValidateConfig
from onnx_utilrank.job import Job
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.quality import Judge, Quality, quality_dict
from onnx_utilrank.quantization.scheme import Quantized
from onnx_utilrank.quantizing import Quantizing
from onnx_utilrank.remarks import FULL
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sites.site import Skip
from onnx_utilrank.validation.bench import LatencyComparison, compare_latency
from onnx_utilrank.validation.divergence import Divergence
from onnx_utilrank.validation.report import ValidationReport

__all__ = ["QuantizationReport", "Stage", "measure_stages"]

LOW_RANK = "low-rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One model beside the original.

    Attributes:
        name: What it is: `low-rank`, `int8`, `low-rank + int8`.
        validation: Size, operations, latency and outputs.
        quality: Divergence, and the user's metric.
    """

    name: str
    validation: ValidationReport
    quality: Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """How a model was quantized, and whether it was worth it.

    Attributes:
        scheme: Key of the scheme.
        weights: Nodes whose weights are in fewer bits.
        left: Nodes that hold weights and stay, and why.
        in_float: Those among them that stay for what they would lose, each by the first value that
            it makes.
        stages: The models, that which was made last; the same scheme on the original is among
            them, where anything else was done.
        beside_plain: Time of the model that was made against that of the original quantized by the
            same scheme; None where they are the same.
        repair_rank: Rank of the branches that the last of the stages has; 0 for none.
    """

    scheme: str
    weights: tuple[str, ...]
    left: tuple[Skip, ...]
    in_float: tuple[str, ...]
    stages: tuple[Stage, ...]
    beside_plain: LatencyComparison | None
    repair_rank: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """How far the outputs are off, and what the factors gain over quantization alone."""
        found = self.stages[-1].quality.divergence
        far: tuple[str, ...] = ()
        if found is not None and found.mean > FULL:
            far = (
                f"THE OUTPUTS ARE FAR FROM THE ORIGINAL'S: a divergence of {found.mean:.3g}, where "
                f"more than {FULL:g} shows; expect its quality to suffer.",
            )
        return (*far, *self._beside_plain())

    def _beside_plain(self) -> tuple[str, ...]:
        if self.beside_plain is None:
            return ()
        plain = next(stage for stage in self.stages if stage.name == self.scheme)
        last = self.stages[-1]
        time = self.beside_plain
        sizes = [stage.validation.candidate.file_bytes for stage in (plain, last)]
        nearer, farther = _closer(plain.quality.divergence, last.quality.divergence)
        gains = [
            word
            for word, holds in (
                ("SMALLER", sizes[1] < sizes[0]),
                ("FASTER", time.faster),
                ("CLOSER to the original", nearer),
            )
            if holds
        ]
        costs = [
            word
            for word, holds in (
                ("LARGER", sizes[1] > sizes[0]),
                ("SLOWER", time.slower),
                ("FARTHER from the original", farther),
            )
            if holds
        ]
        verdict = ", ".join(gains) or "NO BETTER"
        if costs:
            verdict += f", but {', '.join(costs)}"
        return (
            f"Beside plain {self.scheme} it is {verdict}: {sizes[1] / max(sizes[0], 1):.3f} of its "
            f"bytes, {time.ratio:.3f} of its time ({time.ratio_low:.3f} to {time.ratio_high:.3f}).",
        )

    @property
    def left_alone(self) -> dict[str, int]:
        """Reasons why nodes stay, and how many nodes each holds for."""
        counts: dict[str, int] = {}
        for skip in self.left:
            counts[skip.reason] = counts.get(skip.reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, object]:
        """The report as JSON types."""
        return {
            "scheme": self.scheme,
            "weights": list(self.weights),
            "in_float": list(self.in_float),
            "repair_rank": self.repair_rank,
            "left_alone": self.left_alone,
            "left": [dataclasses.asdict(skip) for skip in self.left],
            "stages": [
                {
                    "name": stage.name,
                    "quality": quality_dict(stage.quality),
                    "validation": stage.validation.as_dict(),
                }
                for stage in self.stages
            ],
            "beside_plain": None
            if self.beside_plain is None
            else dataclasses.asdict(self.beside_plain),
        }


def _closer(plain: Divergence | None, last: Divergence | None) -> tuple[bool, bool]:
    """Whether one diverges less than the other, or more, by two standard errors of both."""
    if plain is None or last is None:
        return False, False
    room = 2 * math.hypot(plain.standard_error, last.standard_error)
    return last.mean < plain.mean - room, last.mean > plain.mean + room


def measure_stages(
    job: Job,
    quantizing: Quantizing,
    store: ModelStore,
    made: Quantized,
    held: Sequence[int],
    judge: Judge,
    *,
    branched: tuple[ModelStore, int] | None = None,
    timed: int | None = None,
) -> tuple[ModelStore, QuantizationReport]:
    """Measure the model before quantization, plain quantization, and what came after.

    Args:
        job: The original.
        quantizing: The scheme.
        store: The model before quantization; the original itself where nothing was done to it.
        made: And after.
        held: Samples that took no part in making them.
        judge: Measures on the same samples.
        branched: And with branches beside what is quantized, and their rank.
        timed: Samples of a run that is timed; None for as many as fit.

    Returns:
        The last model, which has branches only where its outputs diverge less for it; the report.

    Raises:
        ModelError: A model does not run.
    """
    config = ValidateConfig(providers=(job.provider.key,))

    def stage(name: str, model: ModelStore, counted: ModelStore) -> Stage:
        job.progress("validating", 0, 0)
        report = compare(
            *(job.source, model, job.data, held, job.batch, [job.provider], config),
            counted=counted,
            timed=timed,
        )
        return Stage(name=name, validation=report, quality=judge(model))

    key, plain, last = quantizing.scheme.key, quantizing.plain.store, made.store
    stages = []
    if store is not job.source:
        stages = [stage(LOW_RANK, store, store), stage(key, plain, job.source)]
    stages.append(stage(f"{LOW_RANK} + {key}" if stages else key, last, store))
    repair_rank = 0
    if branched is not None and branched[0] is not last:
        repaired = stage(f"{stages[-1].name} + repair", branched[0], store)
        if _less(repaired.quality.divergence, stages[-1].quality.divergence):
            stages.append(repaired)
            last, repair_rank = branched
    beside = None
    if last is not plain:
        one, other = (open_session(model, job.provider) for model in (plain, last))
        beside = compare_latency(one, other, list(job.data.feeds(held, batch=timed or job.batch)))
    return last, QuantizationReport(
        scheme=key,
        weights=made.weights,
        left=made.left,
        in_float=made.in_float,
        stages=tuple(stages),
        beside_plain=beside,
        repair_rank=repair_rank,
    )


def _less(one: Divergence | None, other: Divergence | None) -> bool:
    return one is not None and other is not None and one.mean < other.mean
