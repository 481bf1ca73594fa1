"""Seconds of small models, compared by turns so that the machine's mood cancels out."""

import time
from collections.abc import Sequence

import numpy as np
import onnx
import onnx.parser

from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, Session, open_session
from onnx_utilrank.torch_graph.placement import device_beside

__all__ = ["Timed", "relative_time", "run_overhead", "seconds_of"]

# Runs before the first that is timed, pairs at least and at most, and how long they may take.
WARM_UPS = 2
FEWEST, MOST = 7, 200
SECONDS = 0.1


class Timed:
    """A model with its inputs and outputs bound where it runs, so that copies are not timed."""

    def __init__(self, session: Session, feed: Feed) -> None:
        self._raw = session.raw
        self._binding = session.raw.io_binding()
        for name, value in feed.items():
            if name in session.inputs:
                self._binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in session.outputs:
            self._binding.bind_output(name, device_beside(session.provider.key))
        self._binding.synchronize_inputs()
        for _ in range(WARM_UPS):
            self.seconds()

    def seconds(self) -> float:
        """Of one run."""
        start = time.perf_counter()
        self._raw.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        # Never zero, whatever the clock's step: it is divided by.
        return max(time.perf_counter() - start, 1e-9)


def seconds_of(timed: Timed, *, seconds: float = SECONDS) -> float:
    """The median over some runs."""
    return float(np.median(_rounds([timed], seconds)))


def relative_time(model: Timed, other: Timed, *, seconds: float = SECONDS) -> tuple[float, float]:
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
    return seconds_of(Timed(session, {"x": np.ones(1, dtype=np.float32)}))


def _rounds(models: Sequence[Timed], seconds: float) -> np.ndarray:
    """float64 [rounds, models]; every second round goes the other way."""
    times: list[list[float]] = []
    start = time.perf_counter()
    while len(times) < FEWEST or (time.perf_counter() - start < seconds and len(times) < MOST):
        order = range(len(models))
        taken = [0.0] * len(models)
        for k in order if len(times) % 2 else reversed(order):
            taken[k] = models[k].seconds()
        times.append(taken)
    return np.asarray(times)
