"""What `repair` returns."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from onnx_utilrank.engine.engine import EngineUse
from onnx_utilrank.quality import Quality, quality_dict, strict
from onnx_utilrank.ranking.plan import SkippedNode
from onnx_utilrank.results import MadeModel
from onnx_utilrank.validation.bench import LatencyComparison
from onnx_utilrank.validation.report import ValidationReport

__all__ = ["RepairResult", "RepairedLayer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairedLayer:
    """One quantized weight and what was done about its error.

    Attributes:
        site: The reference's weight.
        nodes: Nodes of the quantized model that apply it.
        op_type: Their operator.
        m: Output features.
        d: Input features.
        distance: ‖W - Q(W)‖ / ‖W‖, Frobenius norms.
        rank: Of the branch; 0 where the mean alone is added back; None where nothing was done.
        predicted_before: What its error is predicted to cost the model, in nats or half of the
            squared error relative to the outputs' variance; in terms of the layer's own output
            where gradients could not be had.
        predicted_after: What is left of that.
    """

    site: str
    nodes: tuple[str, ...]
    op_type: str
    m: int
    d: int
    distance: float
    rank: int | None
    predicted_before: float
    predicted_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairResult(MadeModel):
    """What `repair` made.

    Attributes:
        store: With branches; the quantized model itself where those do not help.
        kept: Whether it has branches.
        target: What was asked for.
        layers: One entry a quantized weight that belongs to one of the reference.
        skipped: Quantized nodes that were left alone, and why.
        before: The quantized model on samples held back.
        after: And with branches, whether or not they were kept.
        searched: The same on the samples that a quality target was searched on.
        quantized: The reference and the quantized model compared, on samples held back.
        validation: The reference and `store` compared, on the same.
        latency: `store` against the quantized model; None where they are the same.
        samples: Samples that statistics were collected from.
        engine: Who collected them, where it was not this process alone.
        notes: Sentences that a user has to know.
    """

    verb: ClassVar[str] = "repair"

    kept: bool
    target: dict[str, float]
    layers: tuple[RepairedLayer, ...]
    skipped: tuple[SkippedNode, ...]
    before: Quality
    after: Quality
    searched: Quality | None
    quantized: ValidationReport
    validation: ValidationReport
    latency: LatencyComparison | None
    samples: int
    engine: EngineUse | None
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One word for the outcome: a model that got no better is never called repaired.

        `unchanged`, `slower` (repaired, but slower than the reference), `repaired`.
        """
        if not self.kept:
            return "unchanged"
        return "slower" if self.validation.in_time == "slower" else "repaired"

    @property
    def recovered(self) -> float | None:
        """Share of the divergence that quantization brought which is gone; None where unknown."""
        before, after = self.before.divergence, self.after.divergence
        if before is None or after is None or not before.mean > 0 or not self.kept:
            return None
        return 1 - after.mean / before.mean

    @property
    def extra_bytes(self) -> float:
        """What was added to the file, as a share of the quantized model's bytes."""
        before = self.quantized.candidate.file_bytes
        return self.validation.candidate.file_bytes / before - 1

    @property
    def left_alone(self) -> dict[str, int]:
        """Reasons why nodes were left alone, and how many nodes each holds for."""
        reasons = Counter(s.reason for s in self.skipped)
        return dict(reasons.most_common())

    def as_dict(self) -> dict[str, object]:
        """The result as JSON types; the model itself is left out."""
        return strict(
            {
                "verdict": self.verdict,
                "target": self.target,
                "recovered": self.recovered,
                "extra_bytes": self.extra_bytes,
                "samples": self.samples,
                "engine": None if self.engine is None else dataclasses.asdict(self.engine),
                "notes": list(self.notes),
                "left_alone": self.left_alone,
                "layers": [dataclasses.asdict(layer) for layer in self.layers],
                "skipped": [dataclasses.asdict(node) for node in self.skipped],
                "before": quality_dict(self.before),
                "after": quality_dict(self.after),
                "searched": quality_dict(self.searched),
                "quantized": self.quantized.as_dict(),
                "validation": self.validation.as_dict(),
                "latency": None if self.latency is None else dataclasses.asdict(self.latency),
            }
        )
