"""Compare the outputs of a candidate model with those of its reference, feed by feed."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from onnx_utilrank.errors import DataError, ModelError
from onnx_utilrank.model.heads import is_classification
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.sessions import FLOAT_TYPES, Feed, Session
from onnx_utilrank.statistics.divergence import OutputLoss

__all__ = [
    "FloatTypes",
    "OutputComparison",
    "compare_outputs",
    "find_classifications",
    "float_types",
    "require_same_names",
    "snr_db",
]

Kind = Literal["classification", "values", "decisions", "skipped"]

# An exact match has no finite ratio; nothing this package compares resolves finer than this.
SNR_LIMIT_DB = 200.0

_DISCRETE = frozenset(
    {f"tensor({sign}int{bits})" for sign in ("", "u") for bits in (8, 16, 32, 64)}
    | {"tensor(bool)", "tensor(string)"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatTypes:
    """An input or output of which the models have different float types.

    Attributes:
        what: `input`, of which the candidate gets the reference's values cast; or `output`, of
            which both are compared as float64.
        name: Its name.
        reference: Its type in the reference, as numpy names it.
        candidate: Its type in the candidate.
    """

    what: Literal["input", "output"]
    name: str
    reference: str
    candidate: str

    def __str__(self) -> str:
        done = "its values are cast" if self.what == "input" else "compared as float64"
        return (
            f"{self.what.capitalize()} {self.name!r} is {self.reference} in the reference and "
            f"{self.candidate} in the candidate: {done}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputComparison:
    """How well one output of the candidate matches the reference's, over all feeds.

    Attributes:
        name: The output.
        kind: "values" for a float tensor; "classification" for one whose last axis holds scores of
            classes; "decisions" for a tensor of integers, booleans or strings; "skipped" for what
            is not compared.
        relative_error: ||y - y'||_F / ||y||_F, with y the reference's values of all feeds and y'
            the candidate's; 0 where both norms are 0, infinite where only ||y||_F is. None for
            "decisions" and "skipped".
        snr_db: The same as a signal-to-noise ratio in dB, see `snr_db`. None with it.
        max_abs_error: The largest |y - y'| of any element. None with it.
        agreement: In [0, 1]. For "classification" the fraction of score vectors whose largest
            entry is the same class (the first one, where several are equal); for "decisions" the
            fraction of equal elements; else None.
        decisions: How many score vectors or elements `agreement` is a fraction of; 0 without it.
        reason: Why it was skipped; None for every other kind.
    """

    name: str
    kind: Kind
    relative_error: float | None = None
    snr_db: float | None = None
    max_abs_error: float | None = None
    agreement: float | None = None
    decisions: int = 0
    reason: str | None = None


def snr_db(relative_error: float) -> float:
    """Signal-to-noise ratio of a relative error e: -20 log10(e) dB, at most 200 dB.

    Args:
        relative_error: A ratio of Frobenius norms; zero and infinity are allowed.

    Returns:
        dB; 200 for no error at all, minus infinity for an infinite one.
    """
    if relative_error == 0.0:
        return SNR_LIMIT_DB
    return min(-20.0 * math.log10(relative_error), SNR_LIMIT_DB)


def find_classifications(model: ModelStore, session: Session, feed: Feed) -> frozenset[str]:
    """Names of the outputs that are classifications by the rule of `is_classification`.

    Args:
        model: The model.
        session: The same model, loaded.
        feed: Run once if the model leaves the rank of a float output open: that run's shape then
            decides.

    Raises:
        InferenceError: That run fails.
    """
    types = {o.name: o.type for o in session.raw.get_outputs()}
    free = [o.name for o in model.outputs if o.shape is None and types.get(o.name) in FLOAT_TYPES]
    shapes = {name: y.shape for name, y in session.run(feed, free).items()} if free else {}
    return frozenset(
        o.name for o in model.outputs if is_classification(model, o.name, shapes.get(o.name))
    )


def compare_outputs(
    reference: Session,
    candidate: Session,
    feeds: Iterable[Feed],
    classifications: Collection[str],
    tokens: Mapping[str, OutputLoss] | None = None,
) -> tuple[OutputComparison, ...]:
    """Run both models on every feed and compare each output.

    The feeds are taken one at a time; what is kept between them is a few numbers per output. All
    sums are of float64, whatever the outputs are of.

    Args:
        reference: The model that is right by definition.
        candidate: The model under test. Its inputs that a caller has to feed, and its outputs, must
            have the reference's names, in any order.
        feeds: Held-back feeds, each with every input of the models.
        classifications: Float outputs whose arg-max over the last axis is a decision. One whose
            last axis never has two entries is compared as plain values.
        tokens: Outputs that decide at each position which is no padding, by name.

    Returns:
        One comparison per output, in the reference's order.

    Raises:
        DataError: There is no feed.
        ModelError: The models' inputs or outputs do not match; an output has another shape than
            the reference's on a feed; an output of either model holds NaN or infinity.
        InferenceError: ONNX Runtime fails on a feed.
    """
    tallies = _tallies(reference, candidate, classifications, tokens or {})
    count = 0
    for feed in feeds:
        _compare_feed(reference, candidate, feed, count, tallies)
        count += 1
    if not count:
        raise DataError("validation: there is no held-back feed to compare the models on")
    return tuple(tally.result() for tally in tallies)


def float_types(reference: Session, candidate: Session) -> tuple[FloatTypes, ...]:
    """Inputs and outputs of both models that differ in nothing but their float type."""
    found = []
    kinds: tuple[Literal["input", "output"], ...] = ("input", "output")
    for what in kinds:
        ours, theirs = (getattr(s.raw, f"get_{what}s")() for s in (reference, candidate))
        types = {value.name: FLOAT_TYPES.get(value.type) for value in theirs}
        for value in ours:
            one, other = FLOAT_TYPES.get(value.type), types.get(value.name)
            if one and other and one != other:
                found.append(
                    FloatTypes(what=what, name=value.name, reference=one.name, candidate=other.name)
                )
    return tuple(found)


@dataclass(slots=True)
class _Norm:
    """A running Frobenius norm: scale * sqrt(squares).

    The squares are of entries over the largest one so far, as in LAPACK's xLASSQ: entries near the
    ends of float64's range then neither overflow nor vanish, either of which would make a wrong
    candidate look like a perfect one.
    """

    scale: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> float:
        """Add float64 `values` of any shape; give the largest magnitude among them."""
        top = max(float(values.max()), -float(values.min())) if values.size else 0.0
        if top > self.scale:
            self.squares *= (self.scale / top) ** 2
            self.scale = top
        if math.isinf(self.scale):
            self.squares = 1.0
        elif top:
            scaled = values.ravel() / self.scale
            self.squares += float(np.dot(scaled, scaled))
        return top

    def over(self, other: "_Norm") -> float:
        """Ratio of this norm to `other`: 0/0 = 0 and x/0 = infinity."""
        if not self.scale:
            return 0.0
        if not other.scale:
            return math.inf
        return (self.scale / other.scale) * math.sqrt(self.squares / other.squares)


@dataclass(slots=True, kw_only=True)
class _Tally:
    """What is known of one output after the feeds so far."""

    name: str
    kind: Kind
    reason: str | None = None
    tokens: OutputLoss | None = None
    error: _Norm = field(default_factory=_Norm)
    signal: _Norm = field(default_factory=_Norm)
    max_abs_error: float = 0.0
    elements: int = 0
    decisions: int = 0
    agreed: int = 0

    def add(self, feed: Feed, expected: np.ndarray, actual: np.ndarray) -> None:
        """Count one feed's arrays, of one shape and, for "values", without NaN and infinity."""
        self.elements += expected.size
        if self.kind == "decisions":
            self.decisions += expected.size
            self.agreed += int(np.count_nonzero(expected == actual))
            return
        self.signal.add(expected.astype(np.float64, copy=False))
        # The difference of two finite float64 may be infinite; it then counts as just that.
        with np.errstate(over="ignore"):
            difference = np.subtract(actual, expected, dtype=np.float64)
        self.max_abs_error = max(self.max_abs_error, self.error.add(difference))
        if self.kind == "classification" and expected.ndim and expected.shape[-1] > 1:
            same = expected.argmax(axis=-1) == actual.argmax(axis=-1)
            padding = self.tokens.padding if self.tokens else None
            kept = padding.kept(feed) if padding else None
            if kept is not None and self.tokens and self.tokens.positions_first:
                kept = kept.T
            if kept is not None and kept.shape == same.shape:
                same = same[kept]
            self.decisions += same.size
            self.agreed += int(np.count_nonzero(same))

    def result(self) -> OutputComparison:
        if self.reason or not self.elements:
            reason = self.reason or "it holds no element on any feed"
            return OutputComparison(name=self.name, kind="skipped", reason=reason)
        agreement = self.agreed / self.decisions if self.decisions else None
        if self.kind == "decisions":
            return OutputComparison(
                name=self.name, kind="decisions", agreement=agreement, decisions=self.decisions
            )
        relative_error = self.error.over(self.signal)
        return OutputComparison(
            name=self.name,
            kind="classification" if self.decisions else "values",
            relative_error=relative_error,
            snr_db=snr_db(relative_error),
            max_abs_error=self.max_abs_error,
            agreement=agreement,
            decisions=self.decisions,
        )


def _tallies(
    reference: Session,
    candidate: Session,
    classifications: Collection[str],
    tokens: Mapping[str, OutputLoss],
) -> list[_Tally]:
    """One empty tally per output of the reference, after checking that the models match."""
    require_same_names(reference, candidate)
    types: Mapping[str, str] = {o.name: o.type for o in candidate.raw.get_outputs()}
    tallies = []
    # A graph may list a value among its outputs twice.
    for output in {o.name: o for o in reference.raw.get_outputs()}.values():
        kind, other = _kind(output.type), _kind(types[output.name])
        if kind != other:
            raise ModelError(
                f"{candidate.label}: output {output.name!r} is {types[output.name]}, "
                f"in the reference {output.type}"
            )
        reason = None
        if kind == "skipped":
            reason = f"values of type {output.type} are not compared"
        elif kind == "values" and (output.name in classifications or output.name in tokens):
            kind = "classification"
        own = tokens.get(output.name)
        tallies.append(_Tally(name=output.name, kind=kind, reason=reason, tokens=own))
    return tallies


def _kind(ort_type: str) -> Kind:
    # What is in neither set is a sequence, map, optional or sparse tensor, or of an element type
    # that ONNX Runtime cannot hand to numpy as numbers (bfloat16, float8, 4-bit integers).
    return (
        "values" if ort_type in FLOAT_TYPES else "decisions" if ort_type in _DISCRETE else "skipped"
    )


def require_same_names(reference: Session, candidate: Session) -> None:
    """Check that the inputs and outputs of two models have the same names, in any order.

    Raises:
        ModelError: They have not.
    """
    # Only inputs that must be fed: weights that a model also lists as inputs may come and go.
    _same_names(
        "inputs",
        candidate,
        [i.name for i in reference.raw.get_inputs()],
        [i.name for i in candidate.raw.get_inputs()],
    )
    _same_names("outputs", candidate, reference.outputs, candidate.outputs)


def _same_names(
    what: str, candidate: Session, expected: Sequence[str], actual: Sequence[str]
) -> None:
    missing = [repr(n) for n in expected if n not in actual]
    extra = [repr(n) for n in actual if n not in expected]
    parts = [f"lack {', '.join(missing)} of the reference"] if missing else []
    if extra:
        parts.append(f"hold {', '.join(extra)}, which the reference has not")
    if parts:
        raise ModelError(f"{candidate.label}: the candidate's {what} {' and '.join(parts)}")


def _compare_feed(
    reference: Session, candidate: Session, feed: Feed, index: int, tallies: Sequence[_Tally]
) -> None:
    """Run one feed and count it. A function of its own: its arrays go before the next feed's."""
    compared = [t for t in tallies if t.kind != "skipped"]
    if not compared:  # ONNX Runtime reads an empty list of names as all of them
        return
    names = [t.name for t in compared]
    expected = reference.run(feed, names)
    actual = candidate.run(feed, names)
    for tally in compared:
        y, z = expected.pop(tally.name), actual.pop(tally.name)
        if tally.kind != "decisions":
            _require_finite("reference", reference, tally.name, y, index)
            _require_finite("candidate", candidate, tally.name, z, index)
        if y.shape != z.shape:
            raise ModelError(
                f"{candidate.label}: output {tally.name!r} has shape {list(z.shape)} on held-back "
                f"feed {index}, in the reference {list(y.shape)}"
            )
        tally.add(feed, y, z)


def _require_finite(role: str, session: Session, name: str, y: np.ndarray, index: int) -> None:
    # NaN makes every comparison false, so that no tolerance would ever be exceeded.
    if not np.isfinite(y).all():
        raise ModelError(
            f"{role} {session.label}: output {name!r} holds NaN or infinity on held-back "
            f"feed {index}"
        )
