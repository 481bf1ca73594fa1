"""The whole validation of a candidate: outputs and latency per provider, size, tolerances."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from onnx_utilrank.errors import ConfigError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.placement import Placement
from onnx_utilrank.runtime.profile import OperatorTime, operator_times
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, Session, open_session
from onnx_utilrank.validation.bench import LatencyComparison, compare_latency, copies_note
from onnx_utilrank.validation.compare import (
    FloatTypes,
    OutputComparison,
    compare_outputs,
    find_classifications,
    float_types,
    snr_db,
)
from onnx_utilrank.validation.depth import LayerError

__all__ = [
    "ModelFigures",
    "ProviderResult",
    "ValidationReport",
    "tolerance_failures",
    "validate",
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
        errors = (o.relative_error for _, o in _compared(self.providers))
        return max((e for e in errors if e is not None), default=None)

    @property
    def snr_db(self) -> float | None:
        """The signal-to-noise ratio of the worst relative error, in dB; None without one."""
        return None if self.relative_error is None else snr_db(self.relative_error)

    @property
    def agreement(self) -> float | None:
        """The worst of all outputs and providers, in [0, 1]; None where none makes decisions."""
        values = (o.agreement for _, o in _compared(self.providers))
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


def tolerance_failures(
    providers: Sequence[ProviderResult], max_error: float | None, min_agreement: float | None
) -> tuple[str, ...]:
    """One line per tolerance that an output misses on a provider.

    A tolerance that nothing was measured for is a failure too: it was asked for and is not shown.

    Args:
        providers: The results.
        max_error: Largest relative error that any output may have; None allows every one.
        min_agreement: Smallest agreement, in [0, 1], that any output with decisions may have; None
            allows every one.

    Raises:
        ConfigError: `max_error` is negative or `min_agreement` is not in [0, 1], or one is NaN.
    """
    _require_sound(max_error, min_agreement)
    outputs = list(_compared(providers))
    lines = []
    if max_error is not None:
        measured = [
            (p, o.name, o.relative_error) for p, o in outputs if o.relative_error is not None
        ]
        if not measured:
            lines.append(
                f"a relative error of at most {max_error:g} is asked for, but no output "
                "has float values"
            )
        lines += [
            f"{p}: output {name!r}: relative error {_beyond(error, max_error)} "
            f"exceeds {max_error:g}"
            for p, name, error in measured
            if error > max_error
        ]
    if min_agreement is not None:
        decided = [(p, o, o.agreement) for p, o in outputs if o.agreement is not None]
        if not decided:
            lines.append(
                f"an agreement of at least {min_agreement:g} is asked for, but no output "
                "makes decisions"
            )
        lines += [
            f"{p}: output {o.name!r}: agreement {_beyond(agreement, min_agreement)} on "
            f"{o.decisions} decisions is below {min_agreement:g}"
            for p, o, agreement in decided
            if agreement < min_agreement
        ]
    return tuple(lines)


def validate(
    reference: ModelStore,
    candidate: ModelStore,
    feeds: Sequence[Feed],
    *,
    samples: int,
    providers: Sequence[Provider],
    figures: tuple[ModelFigures, ModelFigures],
    max_error: float | None = None,
    min_agreement: float | None = None,
    timed: Sequence[Feed] | None = None,
    seconds: float = 5.0,
) -> ValidationReport:
    """Compare a candidate with its reference on every provider that is asked for.

    The two models are loaded on one provider at a time; both are gone before the next one. From
    the second on, the reference is also compared with itself on the first.

    Args:
        reference: The model that is right by definition.
        candidate: The model under test, with the reference's inputs and outputs.
        feeds: Feeds held back from calibration.
        samples: How many samples they hold, for the report.
        providers: Where to run; ones that cannot be had are an error, never passed over.
        figures: Of the reference and of the candidate.
        max_error: See `tolerance_failures`.
        min_agreement: See `tolerance_failures`.
        timed: Feeds that latency is measured on; None for `feeds`.
        seconds: Time to measure latency on each provider, see `compare_latency`.

    Raises:
        ConfigError: There is no provider, or a tolerance is out of range.
        DataError: There is no feed.
        ModelError: A model cannot be loaded or run, or they do not match: see `compare_outputs`.
        ProviderUnavailableError: A session does not use the provider that was asked for.
    """
    if not providers:
        raise ConfigError("validation: no provider to run the models on")
    _require_sound(max_error, min_agreement)  # before the work rather than after it
    timed = feeds if timed is None else timed
    results = tuple(
        _on_provider(reference, candidate, feeds, timed, p, seconds, first=providers[0])
        for p in providers
    )
    return ValidationReport(
        reference=figures[0],
        candidate=figures[1],
        samples=samples,
        feeds=len(feeds),
        providers=results,
        failures=tolerance_failures(results, max_error, min_agreement),
    )


def _require_sound(max_error: float | None, min_agreement: float | None) -> None:
    # Written so that NaN fails: no value exceeds NaN, and everything would pass.
    if max_error is not None and not max_error >= 0:
        raise ConfigError(f"the largest relative error must not be negative, and is {max_error:g}")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise ConfigError(f"the smallest agreement must lie in [0, 1], and is {min_agreement:g}")


def _on_provider(
    reference: ModelStore,
    candidate: ModelStore,
    feeds: Sequence[Feed],
    timed: Sequence[Feed],
    provider: Provider,
    seconds: float,
    first: Provider,
) -> ProviderResult:
    """Compare on one provider. A function of its own: leaving it frees all sessions."""
    expected = open_session(reference, provider)
    classifications = find_classifications(reference, expected, feeds[0]) if feeds else ()
    against_first: tuple[OutputComparison, ...] = ()
    if provider is not first:
        against_first = compare_outputs(
            _named(open_session(reference, first)), _named(expected), feeds, classifications
        )
    actual = open_session(candidate, provider)
    outputs = compare_outputs(expected, actual, feeds, classifications)
    # Among the skipped may be outputs that cannot be had as numpy arrays at all.
    wanted = [o.name for o in outputs if o.kind != "skipped"] or None
    latency = compare_latency(expected, actual, timed, outputs=wanted, seconds=seconds)
    return ProviderResult(
        provider=provider.name,
        outputs=outputs,
        latency=latency,
        options=provider.options,
        reference_nodes=expected.placement(),
        candidate_nodes=actual.placement(),
        against_first=against_first,
        float_types=float_types(expected, actual),
        reference_operators=operator_times(reference, provider, timed[0], wanted),
        candidate_operators=operator_times(candidate, provider, timed[0], wanted),
    )


def _named(session: Session) -> Session:
    """The session with its provider in its label, where only that tells two of them apart."""
    return dataclasses.replace(session, label=f"{session.label} on {session.provider.key}")


def _outputs(outputs: Sequence[OutputComparison]) -> list[dict[str, object]]:
    return [{k: _json(v) for k, v in dataclasses.asdict(o).items()} for o in outputs]


def _compared(providers: Sequence[ProviderResult]) -> Iterator[tuple[str, OutputComparison]]:
    for result in providers:
        for output in result.outputs:
            yield result.provider, output


def _beyond(value: float, limit: float) -> str:
    """`value` in as few digits as still show it on its side of `limit`; at least 3."""
    texts = (f"{value:.{digits}g}" for digits in range(3, 17))
    return next(
        (t for t in texts if (float(t) > limit) == (value > limit) and float(t) != limit),
        repr(value),
    )


def _json(value: object) -> object:
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value
