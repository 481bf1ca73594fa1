"""Time a candidate model against its reference, in pairs of runs that share the machine's mood."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.errors import DataError
from onnx_utilrank.runtime.sessions import Feed, Session

__all__ = ["LatencyComparison", "compare_latency"]

# A difference that two sessions of one model can show for good, by where their memory lies.
MARGIN = 1.02

# Standard errors of the median that a clear difference has to be away from the margin.
Z = 3.0

# Runs of each model before the first timed one of a shape: the first run of a shape plans its
# memory (and picks kernels, or builds an engine, on a GPU), the second is the first to use that.
WARM_UPS = 2

# What settles for less than the pairs asked for: this many, after this many times the time.
FEWEST_PAIRS = 3
OVERTIME = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyComparison:
    """Time of one run of the candidate against one of the reference.

    Attributes:
        reference_ms: Median over the reference's runs, in milliseconds.
        candidate_ms: Median over the candidate's runs, in milliseconds.
        ratio: Median of candidate / reference over the pairs; below 1 the candidate is faster.
        ratio_low: Their lower quartile (25 %).
        ratio_high: Their upper quartile (75 %).
        pairs: Number of pairs.
    """

    reference_ms: float
    candidate_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int

    @property
    def slower(self) -> bool:
        """Whether the candidate is clearly slower.

        It is where (a) three pairs in four show it more than 2 % slower (`ratio_low` > 1.02) and
        (b) the median ratio is above 1.02 by more than 3 of its standard errors. Without (b), few
        pairs on a busy machine meet (a) by chance.

        Standard error of a median from quartiles: 1.25 IQR / (1.35 sqrt(n)), from R. McGill,
        J. W. Tukey, W. A. Larsen, "Variations of Box Plots", The American Statistician 32 (1978).
        Here it is of log(ratio), so that exchanging the models exchanges `slower` and `faster`,
        and n is `pairs` - 2, because the quartiles of very few pairs lie too close together. Two
        models of equal, independent noise (Student t with 3 degrees of freedom and scale 5 %, on
        log time) are called different, in simulation, in 2 to 4 of 100 comparisons of 3 to 5 pairs,
        1 of 200 of 10 pairs and 1 of 2000 of 20 pairs. Fewer than 3 pairs show nothing.
        """
        return self.exceeds(MARGIN)

    def exceeds(self, limit: float) -> bool:
        """Whether the ratio is clearly above a limit, as `slower` tells it of 1.02."""
        return self.ratio_low > limit and math.log(self.ratio / limit) > self._uncertainty

    @property
    def faster(self) -> bool:
        """Whether the candidate is clearly faster: `slower` with the models exchanged."""
        return self.ratio_high < 1 / MARGIN and -math.log(self.ratio * MARGIN) > self._uncertainty

    @property
    def _uncertainty(self) -> float:
        """`Z` standard errors of the median of log(ratio)."""
        if self.pairs < FEWEST_PAIRS:
            return math.inf
        spread = math.log(self.ratio_high / self.ratio_low)
        return Z * 1.25 * spread / (1.35 * math.sqrt(self.pairs - 2))


def compare_latency(
    reference: Session,
    candidate: Session,
    feeds: Sequence[Feed],
    *,
    outputs: Sequence[str] | None = None,
    seconds: float = 5.0,
    min_pairs: int = 10,
    max_pairs: int = 200,
) -> LatencyComparison:
    """Time both models in interleaved pairs: one run of each on the same feed.

    Two successive pairs share a feed, and the second of them runs the models in the other order;
    then comes the next feed, round and round. Before the first timed run on feeds of a new shape,
    each model runs on it twice untimed. A run is timed from numpy arrays to numpy arrays, so on a
    GPU it includes the copies there and back, and on any provider a few microseconds of Python.

    Args:
        reference: The model to compare with.
        candidate: The model under test.
        feeds: Feeds with every input of both models.
        outputs: The outputs that are asked for; default: all.
        seconds: Stop after this time if there are `min_pairs` by then. After four times this time,
            3 pairs are enough. Warming up on further shapes counts, on the first does not.
        min_pairs: See `seconds`.
        max_pairs: Stop after so many pairs, however early. One pair is always run.

    Raises:
        DataError: There is no feed.
        InferenceError: ONNX Runtime fails on a feed.
    """
    if not feeds:
        raise DataError("validation: there is no held-back feed to time the models on")
    times: list[tuple[float, float]] = []
    warm: set[object] = set()
    start = math.nan
    while True:
        pairs = len(times)
        feed = feeds[pairs // 2 % len(feeds)]
        if _shapes(feed) not in warm:
            warm.add(_shapes(feed))
            for _ in range(WARM_UPS):
                reference.run(feed, outputs)
                candidate.run(feed, outputs)
        if not pairs:
            start = time.perf_counter()
        if pairs % 2:
            late = _timed(candidate, feed, outputs)
            times.append((_timed(reference, feed, outputs), late))
        else:
            times.append((_timed(reference, feed, outputs), _timed(candidate, feed, outputs)))
        pairs, elapsed = len(times), time.perf_counter() - start
        if (
            pairs >= max_pairs
            or (elapsed >= seconds and pairs >= min_pairs)
            or (elapsed >= OVERTIME * seconds and pairs >= FEWEST_PAIRS)
        ):
            return _summary(np.asarray(times))


def _timed(session: Session, feed: Feed, outputs: Sequence[str] | None) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    session.run(feed, outputs)
    # Never zero, whatever the clock's step: it is divided by.
    return max(time.perf_counter() - start, 1e-9)


def _shapes(feed: Feed) -> object:
    """A key that is equal for feeds of the same shapes; a list (for a sequence) has its length."""
    return tuple(
        sorted((k, v.shape if isinstance(v, np.ndarray) else (len(v),)) for k, v in feed.items())
    )


def _summary(times: np.ndarray) -> LatencyComparison:
    """Medians and quartiles of `times`: float64 [pairs, 2], seconds, reference first."""
    medians = np.median(times, axis=0) * 1e3
    low, middle, high = np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75])
    return LatencyComparison(
        reference_ms=float(medians[0]),
        candidate_ms=float(medians[1]),
        ratio=float(middle),
        ratio_low=float(low),
        ratio_high=float(high),
        pairs=len(times),
    )
