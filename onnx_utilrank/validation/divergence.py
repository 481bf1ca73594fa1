"""Choose what counts as a loss at each output, and measure it between two models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from onnx_utilrank.calibration.survey import expose, inputs_of
from onnx_utilrank.errors import ConfigError, ModelError
from onnx_utilrank.model.heads import (
    channel_axis,
    decided_outputs,
    hidden_scores,
    is_classification,
)
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, Session, open_session
from onnx_utilrank.statistics.divergence import (
    OutputLoss,
    Weighting,
    choose_weighting,
    divergence,
    output_sharpness,
    output_variance,
    samples_in,
    unlike,
)
from onnx_utilrank.statistics.padding import find_padding
from onnx_utilrank.validation.layout import (
    elsewhere,
    positions_first,
    scores_of_classes,
    side_by_side,
    with_last,
)

__all__ = [
    "Divergence",
    "OutputRecorder",
    "find_losses",
    "is_judged",
    "measure_divergence",
    "open_judged",
    "token_scores",
]

# Rows of an output that tell whether they are scores.
ROWS_LOOKED_AT = 512

_REAL = frozenset({"tensor(float)", "tensor(float16)", "tensor(double)"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """How far a candidate's outputs are from the reference's, over all outputs that count.

    Attributes:
        mean: Mean over samples of the sum over outputs: nats for classes, ½ of the relative
            squared error for values.
        standard_error: Of that mean; infinite for one sample.
        agreement: Share of decisions that are the same; None where no output makes any.
        agreement_error: Standard error of that share, over samples.
        snr_db: Signal-to-noise ratio of the outputs that are values, by their variance; None
            where there are none.
        snr_error: Its standard error, in dB.
        samples: Samples it was measured on.
    """

    mean: float
    standard_error: float
    agreement: float | None
    agreement_error: float | None
    snr_db: float | None
    snr_error: float | None
    samples: int


def open_judged(
    store: ModelStore, provider: Provider, losses: Sequence[OutputLoss] = ()
) -> Session:
    """A session that gives what counts, also where the outputs are decisions alone.

    Args:
        store: The model.
        provider: Where to run it.
        losses: What counts; by default the scores that its outputs are decided by.

    Raises:
        ModelError: ONNX Runtime cannot load the model, or it does not make these scores.
        ProviderUnavailableError: The session does not use the provider.
    """
    wanted = {loss.output for loss in losses} if losses else set(hidden_scores(store))
    hidden = sorted(wanted - {o.name for o in store.outputs})
    if not is_judged(store, losses):
        raise ModelError(
            f"{store.label}: makes no value {hidden[0]!r}, the scores that the original decides by"
        )
    return open_session(expose(store, hidden) if hidden else store, provider)


def is_judged(store: ModelStore, losses: Sequence[OutputLoss]) -> bool:
    """Whether a model makes all that counts; others may call scores behind decisions otherwise."""
    made = {name for node in store.proto.graph.node for name in node.output}
    return made.union(o.name for o in store.outputs).issuperset(loss.output for loss in losses)


def find_losses(
    store: ModelStore,
    session: Session,
    feeds: Sequence[Feed],
    weighting: Weighting | None = None,
) -> tuple[OutputLoss, ...]:
    """What counts at each floating output of a model, and at the scores that others are made of.

    Whether an output holds scores of classes is read off the graph and off the values it takes:
    see `choose_weighting`. Which positions of outputs [rows, positions, …] are padding: see
    `find_padding`.

    Args:
        store: The model.
        session: The same, as `open_judged` loads it.
        feeds: Some runs to look at.
        weighting: What the user says instead, for every output.

    Raises:
        ConfigError: The weighting that is asked for does not fit any output.
        InferenceError: A run fails.
    """
    types = {o.name: o.type for o in session.raw.get_outputs()}
    decided, hidden = decided_outputs(store), hidden_scores(store)
    decisive = {scores for scores, _ in decided.values()}
    # A graph may list a value among its outputs twice. The number of a class has neither a gradient
    # nor a size that says how wrong it is.
    own = [o.name for o in store.outputs if o.name not in decided]
    names = [n for n in dict.fromkeys((*own, *hidden)) if types.get(n) in _REAL]
    if not names:
        return ()
    outputs = [session.run(feed, names) for feed in feeds]
    given = [inputs_of(store, feed) for feed in feeds]
    losses = []
    for name in names:
        shape = outputs[0][name].shape
        classes, probabilities, axis = scores_of_classes(store, name, shape)
        if name in hidden:
            place = hidden[name] % max(len(shape), 1)
            if place == 0:
                continue  # over the first axis it compares samples, not classes
            classes, axis = True, place - len(shape)
        lie = None if classes or probabilities else channel_axis(store, name)
        channels = lie - len(shape) if lie and lie < len(shape) > 2 else None
        if channels is not None and weighting in ("softmax", "logits"):
            # Maps of scores look like images; who says that they are none means their channels.
            axis = channels
        shapes = [with_last(y[name].shape, axis) for y in outputs]
        turned = positions_first(shapes, [samples_in(feed) for feed in feeds])
        lined = shapes[0]
        loss = OutputLoss(
            output=name,
            weighting="values",
            probabilities=probabilities,
            axis=axis,
            positions_first=turned,
            padding=find_padding(
                given,
                (lined[1], lined[0], *lined[2:]) if turned else lined,
                elsewhere(store, name),
            ),
            channels=channels,
            decides=next((o for o, (s, _) in decided.items() if s == name in hidden), None),
        )
        rows = []
        for feed, y in zip(feeds, outputs, strict=True):
            values = loss.rows(y[name], samples_in(feed))
            rows.append(values[_weights(loss, feed, values) > 0])
        # Features whose number varies are values, each by itself.
        ragged = len({values.shape[-1] for values in rows}) > 1
        flat = np.concatenate([v.reshape(-1, 1) for v in rows] if ragged else rows)
        width = flat.size / sum(map(len, rows)) if ragged and flat.size else 1.0
        if not flat.size or not np.isfinite(flat).all():
            continue
        chosen = weighting or choose_weighting(
            flat,
            classes=classes,
            probabilities=probabilities,
            drifting=len(shape) > 2 or name in decisive,
        )
        if name in hidden and chosen == "values" and weighting is None:
            chosen = "logits"  # which they are, whatever their size
        loss = replace(loss, weighting="values" if flat.shape[-1] < 2 else chosen)
        if loss.weighting == "values" and weighting is None and side_by_side(store, loss):
            scales, faint = unlike(flat)
            loss = replace(loss, scales=scales, faint=faint)
        losses.append(
            replace(
                loss,
                variance=width * output_variance(loss, flat),
                sharpness=output_sharpness(loss, flat) if loss.weighting == "softmax" else 1.0,
            )
        )
    if weighting and losses and all(loss.weighting != weighting for loss in losses):
        raise ConfigError(
            f"{store.label}: output weighting {weighting!r} needs an output with classes on its "
            "last axis, and there is none"
        )
    return tuple(losses)


def token_scores(
    store: ModelStore, session: Session, feeds: Sequence[Feed]
) -> dict[str, OutputLoss]:
    """Outputs [rows, positions, classes] that decide at each position, by name.

    Args:
        store: The model.
        session: The same, loaded.
        feeds: Some runs to look at: the first one is made, of the others the masks are read.
    """
    types = {o.name: o.type for o in session.raw.get_outputs()}
    names = [
        o.name
        for o in store.outputs
        if types.get(o.name) in _REAL
        and (o.shape is None or len(o.shape) == 3)
        and is_classification(store, o.name, (2, 2))
    ]
    found = {}
    for name, y in (session.run(feeds[0], names) if names else {}).items():
        classes, probabilities, axis = scores_of_classes(store, name, y.shape)
        if y.ndim != 3 or not classes or axis % 3 != 2:
            continue
        rows = y.reshape(-1, y.shape[-1])
        rows = rows[:: max(len(rows) // ROWS_LOOKED_AT, 1)].astype(np.float64)
        if not rows.size or not np.isfinite(rows).all():
            continue
        weighting = choose_weighting(
            rows, classes=classes, probabilities=probabilities, drifting=True
        )
        if weighting != "values":
            turned = positions_first([y.shape], [samples_in(feeds[0])])
            given = [inputs_of(store, feed) for feed in feeds]
            shape = (y.shape[1], y.shape[0], y.shape[2]) if turned else y.shape
            found[name] = OutputLoss(
                output=name,
                weighting=weighting,
                probabilities=probabilities,
                padding=find_padding(given, shape, elsewhere(store, name)),
                positions_first=turned,
            )
    return found


class Model(Protocol):
    """Anything that runs feeds: a `runtime.sessions.Session`, or a graph in torch."""

    def run(self, feed: Feed, outputs: Sequence[str]) -> Mapping[str, np.ndarray]:
        """The named outputs of one feed."""
        ...


class OutputRecorder:
    """The reference's outputs on some runs, kept to compare many candidates with."""

    def __init__(
        self, reference: Model, losses: Sequence[OutputLoss], feeds: Sequence[Feed]
    ) -> None:
        self.losses = tuple(losses)
        self.feeds = tuple(feeds)
        names = [loss.output for loss in losses]
        self._expected = [reference.run(feed, names) for feed in feeds] if names else []

    def compare(self, candidate: Model) -> Divergence:
        """Run a candidate on the same feeds.

        Raises:
            InferenceError: A run fails.
        """
        return measure_divergence(self.losses, self.feeds, self._expected, candidate)


def measure_divergence(
    losses: Sequence[OutputLoss],
    feeds: Sequence[Feed],
    expected: Sequence[Mapping[str, np.ndarray]],
    candidate: Model,
) -> Divergence:
    """Compare a candidate's outputs with those that were recorded."""
    each: list[np.ndarray] = []
    agreed: list[np.ndarray] = []
    noise: list[np.ndarray] = []
    names = [loss.output for loss in losses]
    for feed, reference in zip(feeds, expected, strict=True):
        actual = candidate.run(feed, names) if names else {}
        n = samples_in(feed)
        total: np.ndarray | float = 0.0
        for loss in losses:
            y, z = (loss.rows(v[loss.output], n) for v in (reference, actual))
            if y.shape != z.shape or not np.isfinite(z).all():
                return Divergence(
                    mean=math.inf,
                    standard_error=0.0,
                    agreement=0.0,
                    agreement_error=0.0,
                    snr_db=-math.inf,
                    snr_error=0.0,
                    samples=n,
                )
            weights = _weights(loss, feed, y)
            lost = divergence(loss, y, z, weights)
            total = total + lost
            if loss.weighting == "values":
                noise.append(2 * lost)
            else:
                same = (y.argmax(-1) == z.argmax(-1)) * weights
                agreed.append(same.sum(-1) / np.maximum(weights.sum(-1), 1))
        each.append(np.atleast_1d(np.asarray(total, dtype=np.float64)))
    values = np.concatenate(each) if each else np.zeros(1)
    same = np.concatenate(agreed) if agreed else None
    relative = np.concatenate(noise) if noise else None
    return Divergence(
        mean=float(values.mean()),
        standard_error=_standard_error(values),
        agreement=None if same is None else float(same.mean()),
        agreement_error=None if same is None else _standard_error(same),
        snr_db=None if relative is None else _decibels(float(relative.mean())),
        snr_error=None if relative is None else _decibels_error(relative),
        samples=len(values),
    )


def _weights(loss: OutputLoss, feed: Feed, y: np.ndarray) -> np.ndarray:
    """1 for each position [samples, positions] that counts, 0 for padding."""
    kept = loss.padding.kept(feed) if loss.padding else None
    if kept is None or kept.size != y.shape[0] * y.shape[1]:
        return np.ones(y.shape[:2])
    return kept.astype(np.float64).reshape(y.shape[:2])


def _decibels(noise: float) -> float:
    return 200.0 if noise <= 1e-20 else -10 * math.log10(noise)


def _decibels_error(noise: np.ndarray) -> float:
    """Of the decibels of a mean, by its relative standard error."""
    mean = float(noise.mean())
    return 0.0 if mean <= 1e-20 else 10 / math.log(10) * _standard_error(noise) / mean


def _standard_error(values: np.ndarray) -> float:
    if len(values) < 2:
        return math.inf
    return float(values.std(ddof=1) / math.sqrt(len(values)))
