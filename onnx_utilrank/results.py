"""What the public functions return."""

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx

from onnx_utilrank.engine.engine import EngineUse
from onnx_utilrank.errors import UtilrankError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.quality import Quality, quality_dict, strict
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.ranking.spectrum import LayerSpectrum
from onnx_utilrank.stages import QuantizationReport
from onnx_utilrank.training.history import Look
from onnx_utilrank.validation.divergence import Divergence
from onnx_utilrank.validation.report import ValidationReport

__all__ = [
    "CompressResult",
    "FinetuneResult",
    "MadeModel",
    "SweepPoint",
    "SweepResult",
    "TrainResult",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeModel:
    """A model that was made.

    Attributes:
        store: The model.
    """

    store: ModelStore

    @property
    def model(self) -> onnx.ModelProto:
        """The model, with all of its weights in it.

        Raises:
            ModelError: It is larger than a ModelProto can be (2 GiB); `save` writes it.
        """
        return self.store.whole()

    def save(self, path: str | os.PathLike[str], *, save_as_external_data: bool = False) -> None:
        """Write the model; see `ModelStore.save`.

        Raises:
            ModelError: The file cannot be written.
        """
        self.store.save(path, save_as_external_data=save_as_external_data)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult(MadeModel):
    """What `finetune` made.

    Attributes:
        store: With its new weights; the candidate itself where those are no better.
        kept: Whether it has the new weights.
        method: What was trained.
        before: How far the candidate's outputs are from the original's, on samples held back.
        after: And those of the trained model, whether or not it was kept.
        accuracy_before: Of the candidate, in per cent, on samples held back; None without labels.
        accuracy: And of the trained model, whether or not it was kept.
        history: Loss, divergence and numbers trained, as training went on.
        dropped: Steps that were not taken, as their gradients were not finite.
        seconds: Of training.
        samples: Samples that were trained on.
        validation: The original and `store` compared on the samples held back.
        notes: Sentences that a user has to know.
    """

    verb: ClassVar[str] = "finetune"

    kept: bool
    method: str
    before: Divergence
    after: Divergence
    accuracy_before: float | None
    accuracy: float | None
    history: tuple[Look, ...]
    dropped: int
    seconds: float
    samples: int
    validation: ValidationReport
    notes: tuple[str, ...]

    @property
    def training(self) -> dict[str, object]:
        """How it went, as JSON types."""
        return strict(
            {
                "kept": self.kept,
                "method": self.method,
                "before": dataclasses.asdict(self.before),
                "after": dataclasses.asdict(self.after),
                "accuracy_before": self.accuracy_before,
                "accuracy": self.accuracy,
                "history": [dataclasses.asdict(look) for look in self.history],
                "dropped": self.dropped,
                "seconds": self.seconds,
                "samples": self.samples,
            }
        )

    def as_dict(self) -> dict[str, object]:
        """The result as JSON types; the model itself is left out."""
        return self.training | {
            "notes": list(self.notes),
            "validation": self.validation.as_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult(MadeModel):
    """What `train` made.

    Attributes:
        method: How it was trained.
        accuracy_before: Of the model as it was given, in per cent, on samples held back.
        accuracy: Of the trained model.
        held: How many those are.
        ranks: Of each weight in bases, by name: its rank, and its two extents.
        trained: Numbers that were trained at the end.
        trainable: Numbers that were at the beginning.
        parameters_before: Of the model as it was given.
        parameters: Of the trained model.
        history: Loss, loss on samples kept apart, and numbers trained, as training went on.
        dropped: Steps that were not taken, as their gradients were not finite.
        seconds: Of training.
        samples: Samples that were trained on.
        notes: Sentences that a user has to know.
    """

    verb: ClassVar[str] = "train"

    method: str
    accuracy_before: float
    accuracy: float
    held: int
    ranks: dict[str, tuple[int, int, int]]
    trained: int
    trainable: int
    parameters_before: int
    parameters: int
    history: tuple[Look, ...]
    dropped: int
    seconds: float
    samples: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """The result as JSON types; the model itself is left out."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["store"]
        fields["history"] = [dataclasses.asdict(look) for look in self.history]
        fields["notes"] = list(self.notes)
        fields["ranks"] = {name: list(rank) for name, rank in self.ranks.items()}
        return strict(fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressResult:
    """What `compress` made.

    Attributes:
        plan: What was decided.
        store: The compressed model; None after a dry run.
        validation: The comparison on held-back samples; None after a dry run.
        samples: Samples that statistics were collected from.
        notes: Sentences that a user has to know.
        engine: Who collected statistics and decomposed, where it was not this process alone.
        quality: The candidate on held-back samples: divergence, and the user's metric; None after
            a dry run.
        searched: The same on the samples that a quality target was searched on.
        recovered: How fine-tuning went, where it was asked for.
        quantized: The stages of quantization, where it was asked for; validation and quality are
            those of the quantized model.
        layers: What each weight that was looked at loses at each rank.
    """

    verb: ClassVar[str] = "compress"

    plan: RankPlan
    store: ModelStore | None
    validation: ValidationReport | None
    samples: int
    notes: tuple[str, ...]
    engine: EngineUse | None = None
    quality: Quality | None = None
    searched: Quality | None = None
    recovered: FinetuneResult | None = None
    quantized: QuantizationReport | None = None
    layers: tuple[LayerSpectrum, ...] = ()

    @property
    def model(self) -> onnx.ModelProto:
        """The compressed model, with all of its weights in it.

        Raises:
            UtilrankError: It was a dry run.
            ModelError: It is larger than a ModelProto can be (2 GiB); `save` writes it.
        """
        return self._made().whole()

    def save(self, path: str | os.PathLike[str], *, save_as_external_data: bool = False) -> None:
        """Write the compressed model; see `ModelStore.save`.

        Raises:
            UtilrankError: It was a dry run.
            ModelError: The file cannot be written.
        """
        self._made().save(path, save_as_external_data=save_as_external_data)

    def _made(self) -> ModelStore:
        if self.store is None:
            raise UtilrankError("a dry run makes no model")
        return self.store

    @property
    def verdict(self) -> str:
        """One word for the outcome: a slower or unchanged model is never called smaller only.

        `planned` (dry run), `unchanged`, `larger` (which only force allows), `slower` (smaller,
        but measured to be slower), `faster` (smaller, and measured to be faster), `smaller`.
        """
        if self.validation is None:
            return "planned"
        if self.validation.candidate == self.validation.reference:
            return "unchanged"
        if self.validation.candidate.file_bytes > self.validation.reference.file_bytes:
            return "larger"
        in_time = self.validation.in_time
        return "smaller" if in_time == "alike" else in_time

    @property
    def left_alone(self) -> dict[str, int]:
        """Reasons why nodes were left alone, and how many nodes each holds for."""
        reasons = Counter(s.reason for s in self.plan.skipped)
        for entry in self.plan.entries:
            if entry.rank is None and entry.site not in self.plan.shrinking:
                reasons[entry.reason] += len(entry.nodes)
        return dict(reasons.most_common())

    def as_dict(self) -> dict[str, object]:
        """The result as JSON types; the model itself is left out."""
        return {
            "verdict": self.verdict,
            "samples": self.samples,
            "engine": None if self.engine is None else dataclasses.asdict(self.engine),
            "notes": list(self.notes),
            "left_alone": self.left_alone,
            "plan": dataclasses.asdict(self.plan),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "quality": quality_dict(self.quality),
            "searched": quality_dict(self.searched),
            "recovered": None if self.recovered is None else self.recovered.training,
            "quantized": None if self.quantized is None else self.quantized.as_dict(),
            "validation": None if self.validation is None else self.validation.as_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One size of a sweep.

    Attributes:
        ratio: Parameters to keep, as asked for.
        plan: What was decided.
        validation: Size, FLOPs, latency and outputs on held-back samples.
        quality: Divergence and metric on the same samples.
    """

    ratio: float
    plan: RankPlan
    validation: ValidationReport
    quality: Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """The trade-off between size and quality.

    Attributes:
        model: How messages name the model.
        points: The sizes, largest first.
        engine: Who collected statistics and decomposed, where it was not this process alone.
        notes: Sentences that a user has to know.
        store: The model of the point that was to be kept; None where none was.
        layers: What each weight loses at each rank.
    """

    verb: ClassVar[str] = "sweep"

    model: str
    points: tuple[SweepPoint, ...]
    engine: EngineUse | None
    notes: tuple[str, ...]
    store: ModelStore | None
    layers: tuple[LayerSpectrum, ...]

    def save(self, path: str | os.PathLike[str], *, save_as_external_data: bool = False) -> None:
        """Write the model that was kept; see `ModelStore.save`.

        Raises:
            UtilrankError: None was.
            ModelError: The file cannot be written.
        """
        if self.store is None:
            raise UtilrankError("the sweep kept no model")
        self.store.save(path, save_as_external_data=save_as_external_data)

    def as_dict(self) -> dict[str, object]:
        """The result as JSON types; each point's plan can be replayed by `compress`."""
        return {
            "model": self.model,
            "engine": None if self.engine is None else dataclasses.asdict(self.engine),
            "notes": list(self.notes),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "points": [
                {
                    "ratio": point.ratio,
                    "quality": quality_dict(point.quality),
                    "validation": point.validation.as_dict(),
                    "plan": dataclasses.asdict(point.plan),
                }
                for point in self.points
            ],
        }
