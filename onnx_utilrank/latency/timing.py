"""Seconds of small models, compared by turns so that the machine's mood cancels out."""

import time
from collections.abc import Sequence

import numpy as np
import onnx
import onnx.parser

from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.binding import Binding
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, Session, open_session

__all__ = ["relative_time", "run_overhead", "seconds_of", "warm"]

# Runs before the first that is timed, pairs at least and at most, and how long they may take.
WARM_UPS = 2
FEWEST, MOST = 7, 200
SECONDS = 0.1


def warm(session: Session, feed: Feed) -> Binding:
    """A model with a feed bound where it runs, so that copies are not timed, and run before."""
    binding = session.bind(feed)
    for _ in range(WARM_UPS):
        binding.run()
    return binding


def seconds_of(timed: Binding, *, seconds: float = SECONDS) -> float:
    """The median over some runs."""
    return float(np.median(_rounds([timed], seconds)))


def relative_time(
    model: Binding, other: Binding, *, seconds: float = SECONDS
) -> tuple[float, float]:
    """Time two models by turns.

    Args:
        model: One model.
        other: The other.
        seconds: How long both may take together, where a few runs take less.

    Returns:
        The median seconds of `model`, and the median of other / model over the pairs.
    """
    times = _rounds([model, other], seconds)
    return float(np.median(times[:, 0])), float(np.median(times[:, 1] / times[:, 0]))


def run_overhead(provider: Provider) -> float:
    """Seconds that a run takes beside its nodes: those of a model that does next to nothing."""
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) { y = Abs(x) }'
    )
    session = open_session(ModelStore.load(proto), provider)
    return seconds_of(warm(session, {"x": np.ones(1, dtype=np.float32)}))


def _rounds(models: Sequence[Binding], seconds: float) -> np.ndarray:
    """float64 [rounds, models]; every second round goes the other way."""
    times: list[list[float]] = []
    start = time.perf_counter()
    while len(times) < FEWEST or (time.perf_counter() - start < seconds and len(times) < MOST):
        order = range(len(models))
        taken = [0.0] * len(models)
        for k in order if len(times) % 2 else reversed(order):
            taken[k] = max(models[k].run(), 1e-9)  # it is divided by
        times.append(taken)
    return np.asarray(times)
