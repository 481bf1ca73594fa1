"""What the validation of a candidate found: outputs and latency by provider, size, tolerances."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from onnx_utilrank.runtime.placement import Placement
from onnx_utilrank.runtime.profile import OperatorTime
from onnx_utilrank.validation.accuracy import Accuracy
from onnx_utilrank.validation.bench import LatencyComparison, copies_note
from onnx_utilrank.validation.compare import FloatTypes, OutputComparison, snr_db
from onnx_utilrank.validation.depth import LayerError

__all__ = [
    "ModelFigures",
    "ProviderResult",
    "ValidationReport",
    "compared_outputs",
]


NOT_READ = Placement()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """What a model costs, whatever it runs on.

    Attributes:
        parameters: Number of weights.
        file_bytes: Bytes of its file, external data included.
        flops: Floating-point operations per sample; None where they are not known.
    """

    parameters: int
    file_bytes: int
    flops: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderResult:
    """The comparison on one execution provider.

    Attributes:
        provider: ONNX Runtime's name of it.
        outputs: One comparison per output, in the reference's order.
        latency: The comparison of time.
        options: Options that it was given.
        reference_nodes: Where the reference's nodes ran.
        candidate_nodes: Where the candidate's nodes ran.
        against_first: The reference's outputs on this provider against its outputs on the first one
            that was asked for: the provider's own error. Empty for the first.
        float_types: Where the models differ in float types alone.
        reference_operators: Where the reference's time goes, the dearest operator first; empty on
            other providers than the CPU.
        candidate_operators: Where the candidate's goes.
        accuracy: How often both are right; None where the data hold no labels.
    """

    provider: str
    outputs: tuple[OutputComparison, ...]
    latency: LatencyComparison
    options: tuple[tuple[str, str], ...] = ()
    reference_nodes: Placement = NOT_READ
    candidate_nodes: Placement = NOT_READ
    against_first: tuple[OutputComparison, ...] = ()
    float_types: tuple[FloatTypes, ...] = ()
    reference_operators: tuple[OperatorTime, ...] = ()
    candidate_operators: tuple[OperatorTime, ...] = ()
    accuracy: Accuracy | None = None

    @property
    def placements(self) -> tuple[tuple[str, Placement], ...]:
        """Where the nodes of each model ran."""
        return (("reference", self.reference_nodes), ("candidate", self.candidate_nodes))

    def as_dict(self) -> dict[str, object]:
        """The result as strict JSON's types; see `ValidationReport.as_dict`."""
        return {
            "provider": self.provider,
            "options": dict(self.options),
            "outputs": _outputs(self.outputs),
            "against_first": _outputs(self.against_first),
            "float_types": [dataclasses.asdict(t) for t in self.float_types],
            "accuracy": None if self.accuracy is None else dataclasses.asdict(self.accuracy),
            "nodes": {
                role: {
                    "counts": dict(placement.counts),
                    "fallen": [dataclasses.asdict(node) for node in placement.fallen],
                }
                for role, placement in self.placements
            },
            "operators": {
                role: [dataclasses.asdict(each) for each in times]
                for role, times in (
                    ("reference", self.reference_operators),
                    ("candidate", self.candidate_operators),
                )
            },
            "latency": dataclasses.asdict(self.latency)
            | {"slower": self.latency.slower, "faster": self.latency.faster},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """How a candidate compares with its reference on held-back data.

    Attributes:
        reference: Figures of the reference.
        candidate: Figures of the candidate.
        samples: Number of held-back samples.
        feeds: Number of feeds they came in.
        providers: One result per provider, in the order they were asked for.
        failures: One line per tolerance that is not met, see `tolerance_failures`.
        depth: How the error grows from layer to layer, on the first provider.
    """

    verb: ClassVar[str] = "validate"

    reference: ModelFigures
    candidate: ModelFigures
    samples: int
    feeds: int
    providers: tuple[ProviderResult, ...]
    failures: tuple[str, ...]
    depth: tuple[LayerError, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every tolerance is met."""
        return not self.failures

    @property
    def relative_error(self) -> float | None:
        """The worst of all outputs and providers; None where no output has one."""
        errors = (o.relative_error for _, o in compared_outputs(self.providers))
        return max((e for e in errors if e is not None), default=None)

    @property
    def snr_db(self) -> float | None:
        """The signal-to-noise ratio of the worst relative error, in dB; None without one."""
        return None if self.relative_error is None else snr_db(self.relative_error)

    @property
    def agreement(self) -> float | None:
        """The worst of all outputs and providers, in [0, 1]; None where none makes decisions."""
        values = (o.agreement for _, o in compared_outputs(self.providers))
        return min((a for a in values if a is not None), default=None)

    @property
    def in_time(self) -> Literal["slower", "alike", "faster"]:
        """`slower` where the candidate clearly is on any provider, `faster` where on all."""
        times = [result.latency for result in self.providers]
        if any(time.slower for time in times):
            return "slower"
        return "faster" if times and all(time.faster for time in times) else "alike"

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what no tolerance covers and a user must still see."""
        notes = []
        for result in self.providers:
            time = result.latency
            if time.slower:
                notes.append(
                    f"The candidate is slower than the reference on {result.provider}: "
                    f"{time.candidate_ms:.3g} ms against {time.reference_ms:.3g} ms a run "
                    f"({time.ratio:.2f} times)."
                )
            if time.copies:
                notes.append(copies_note(result.provider))
            notes += [
                f"{len(placement.fallen)} of {placement.nodes} nodes of the {role} do not run on "
                f"{result.provider}, though it was asked for."
                for role, placement in result.placements
                if placement.fallen
            ]
        if self.candidate.file_bytes > self.reference.file_bytes:
            notes.append(
                f"The candidate's file is larger than the reference's: "
                f"{self.candidate.file_bytes:,} bytes against {self.reference.file_bytes:,}."
            )
        # The same on every provider, hence once: dict.fromkeys keeps the order.
        skipped = (o for r in self.providers for o in r.outputs if o.kind == "skipped")
        notes += dict.fromkeys(f"Output {o.name!r} was not compared: {o.reason}." for o in skipped)
        notes += dict.fromkeys(str(t) for r in self.providers for t in r.float_types)
        return tuple(notes)

    def as_dict(self) -> dict[str, object]:
        """The report as strict JSON's types, with its derived figures and verdicts.

        JSON has no infinity. Here it is the string "Infinity" or "-Infinity", which Python's
        `float` and JavaScript's `Number` both read, and never null: null is what was not measured.
        """
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "notes": list(self.notes),
            "relative_error": _json(self.relative_error),
            "snr_db": _json(self.snr_db),
            "agreement": self.agreement,
            "samples": self.samples,
            "feeds": self.feeds,
            "reference": dataclasses.asdict(self.reference),
            "candidate": dataclasses.asdict(self.candidate),
            "providers": [r.as_dict() for r in self.providers],
            "depth": [dataclasses.asdict(layer) for layer in self.depth],
        }


def _outputs(outputs: Sequence[OutputComparison]) -> list[dict[str, object]]:
    return [{k: _json(v) for k, v in dataclasses.asdict(o).items()} for o in outputs]


def compared_outputs(
    providers: Sequence[ProviderResult],
) -> Iterator[tuple[str, OutputComparison]]:
    """Every comparison with the provider it was made on."""
    for result in providers:
        for output in result.outputs:
            yield result.provider, output


def _json(value: object) -> object:
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value
