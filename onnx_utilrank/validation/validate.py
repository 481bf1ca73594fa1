"""Run a candidate beside its reference on every provider, and hold it to tolerances."""

import dataclasses
from collections.abc import Sequence

from onnx_utilrank.calibration.labels import Labels
from onnx_utilrank.errors import ConfigError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.profile import operator_times
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, Session, open_session
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.validation.accuracy import RUNS_LOOKED_AT, compare_accuracy, find_classes
from onnx_utilrank.validation.bench import compare_latency
from onnx_utilrank.validation.compare import (
    OutputComparison,
    compare_outputs,
    find_classifications,
    float_types,
)
from onnx_utilrank.validation.divergence import token_scores
from onnx_utilrank.validation.report import (
    ModelFigures,
    ProviderResult,
    ValidationReport,
    compared_outputs,
)

__all__ = ["tolerance_failures", "validate"]


def tolerance_failures(
    providers: Sequence[ProviderResult],
    max_error: float | None,
    min_agreement: float | None,
    max_drop: float | None = None,
) -> tuple[str, ...]:
    """One line per tolerance that an output misses on a provider.

    A tolerance that nothing was measured for is a failure too: it was asked for and is not shown.

    Args:
        providers: The results.
        max_error: Largest relative error that any output may have; None allows every one.
        min_agreement: Smallest agreement, in [0, 1], that any output with decisions may have; None
            allows every one.
        max_drop: Most points of accuracy that may be lost; None allows any loss.

    Raises:
        ConfigError: `max_error` or `max_drop` is negative or `min_agreement` is not in [0, 1], or
            one is NaN.
    """
    _require_sound(max_error, min_agreement, max_drop)
    outputs = list(compared_outputs(providers))
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
    if max_drop is not None:
        found = [(p.provider, p.accuracy) for p in providers if p.accuracy is not None]
        if not found:
            lines.append(f"a drop of at most {max_drop:g} is asked for, but there are no labels")
        lines += [
            f"{p}: output {a.output!r}: accuracy drop {_beyond(a.drop, max_drop)} on {a.count} "
            f"labels exceeds {max_drop:g}"
            for p, a in found
            if not a.drop <= max_drop
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
    labels: Labels | None = None,
    max_drop: float | None = None,
    where: str = "the data",
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
        labels: The array of the feeds that holds right classes, which both models are held to.
        max_drop: See `tolerance_failures`.
        where: How messages name the data.
        timed: Feeds that latency is measured on; None for `feeds`.
        seconds: Time to measure latency on each provider, see `compare_latency`.

    Raises:
        ConfigError: There is no provider, a tolerance is out of range, or no output holds scores
            for labels.
        DataError: There is no feed, or the labels are no classes of an output.
        ModelError: A model cannot be loaded or run, or they do not match: see `compare_outputs`.
        ProviderUnavailableError: A session does not use the provider that was asked for.
    """
    if not providers:
        raise ConfigError("validation: no provider to run the models on")
    _require_sound(max_error, min_agreement, max_drop)  # before the work rather than after it
    timed = feeds if timed is None else timed
    labelled = None
    if labels is not None:
        labelled = labels, find_classes(reference, providers[0], labels, feeds, where)
    results = tuple(
        _on_provider(reference, candidate, feeds, timed, p, seconds, providers[0], labelled)
        for p in providers
    )
    return ValidationReport(
        reference=figures[0],
        candidate=figures[1],
        samples=samples,
        feeds=len(feeds),
        providers=results,
        failures=tolerance_failures(results, max_error, min_agreement, max_drop),
    )


def _require_sound(
    max_error: float | None, min_agreement: float | None, max_drop: float | None
) -> None:
    # Written so that NaN fails: no value exceeds NaN, and everything would pass.
    if max_error is not None and not max_error >= 0:
        raise ConfigError(f"the largest relative error must not be negative, and is {max_error:g}")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise ConfigError(f"the smallest agreement must lie in [0, 1], and is {min_agreement:g}")
    if max_drop is not None and not max_drop >= 0:
        raise ConfigError(f"the largest drop must not be negative, and is {max_drop:g}")


def _on_provider(
    reference: ModelStore,
    candidate: ModelStore,
    feeds: Sequence[Feed],
    timed: Sequence[Feed],
    provider: Provider,
    seconds: float,
    first: Provider,
    labelled: tuple[Labels, OutputLoss] | None,
) -> ProviderResult:
    """Compare on one provider. A function of its own: leaving it frees all sessions."""
    expected = open_session(reference, provider)
    classifications: frozenset[str] = frozenset()
    tokens: dict[str, OutputLoss] = {}
    if feeds:
        tokens = token_scores(reference, expected, feeds[:RUNS_LOOKED_AT])
        classifications = find_classifications(reference, expected, feeds[0])
    against_first: tuple[OutputComparison, ...] = ()
    if provider is not first:
        against_first = compare_outputs(
            _named(open_session(reference, first)),
            _named(expected),
            feeds,
            classifications,
            tokens,
        )
    actual = open_session(candidate, provider)
    outputs = compare_outputs(expected, actual, feeds, classifications, tokens)
    accuracy = compare_accuracy(expected, actual, *labelled, feeds) if labelled else None
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
        accuracy=accuracy,
    )


def _named(session: Session) -> Session:
    """The session with its provider in its label, where only that tells two of them apart."""
    return dataclasses.replace(session, label=f"{session.label} on {session.provider.key}")


def _beyond(value: float, limit: float) -> str:
    """`value` in as few digits as still show it on its side of `limit`; at least 3."""
    texts = (f"{value:.{digits}g}" for digits in range(3, 17))
    return next(
        (t for t in texts if (float(t) > limit) == (value > limit) and float(t) != limit),
        repr(value),
    )
