"""Time candidate models against their reference, in rounds that share the machine's mood."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.errors import DataError
from onnx_utilrank.runtime.sessions import Feed, Session

__all__ = ["LatencyComparison", "Spread", "compare_latencies", "compare_latency", "copies_note"]

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
class Spread:
    """The quartiles (25 % and 75 %) of one model's times, in milliseconds."""

    low_ms: float
    high_ms: float


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
        copies: Whether a run includes copies of inputs and outputs, to and from a device or numpy
            arrays, in any of the models.
        reference_spread: How the reference's times scatter.
        candidate_spread: How the candidate's do.
    """

    reference_ms: float
    candidate_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int
    copies: bool = False
    reference_spread: Spread | None = None
    candidate_spread: Spread | None = None

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
    """Time one candidate: see `compare_latencies`."""
    (comparison,) = compare_latencies(
        reference,
        [candidate],
        feeds,
        outputs=outputs,
        seconds=seconds,
        min_pairs=min_pairs,
        max_pairs=max_pairs,
    )
    return comparison


def compare_latencies(
    reference: Session,
    candidates: Sequence[Session],
    feeds: Sequence[Feed],
    *,
    outputs: Sequence[str] | None = None,
    seconds: float = 5.0,
    min_pairs: int = 10,
    max_pairs: int = 200,
) -> tuple[LatencyComparison, ...]:
    """Time models in interleaved rounds: one run of each on the same feed.

    A round pairs each candidate with the reference. Two successive rounds share a feed, and the
    second of them runs the models in the other order; then comes the next feed, round and round.
    Before the first timed run on feeds of a new shape, each model runs on it twice untimed. Inputs
    are put where the provider wants them and outputs stay where they come to be, untimed, unless
    `LatencyComparison.copies` says otherwise; a few microseconds of Python are in every run.

    Args:
        reference: The model to compare with.
        candidates: The models under test.
        feeds: Feeds with every input of all models.
        outputs: The outputs that are asked for; default: all.
        seconds: Stop after this time if there are `min_pairs` by then. After four times this time,
            3 rounds are enough. Warming up on further shapes counts, on the first does not.
        min_pairs: Rounds; see `seconds`.
        max_pairs: Stop after so many rounds, however early. One round is always run.

    Returns:
        One comparison a candidate, in their order.

    Raises:
        DataError: There is no feed.
        InferenceError: ONNX Runtime fails on a feed.
    """
    if not feeds:
        raise DataError("validation: there is no held-back feed to time the models on")
    models = (reference, *candidates)
    warm: set[object] = set()
    times: list[list[float]] = []
    copies = False
    start = 0.0
    while True:
        rounds = len(times)
        feed = feeds[rounds // 2 % len(feeds)]
        if not rounds or (rounds % 2 == 0 and len(feeds) > 1):
            bound = [model.bind(feed, outputs) for model in models]
            copies = copies or any(each.copies for each in bound)
        if _shapes(feed) not in warm:
            warm.add(_shapes(feed))
            for _ in range(WARM_UPS):
                for each in bound:
                    each.run()
        if not rounds:
            start = time.perf_counter()
        order = range(len(models)) if rounds % 2 == 0 else reversed(range(len(models)))
        # Never zero, whatever the clock's step: it is divided by.
        found = {k: max(bound[k].run(), 1e-9) for k in order}
        times.append([found[k] for k in range(len(models))])
        rounds, elapsed = len(times), time.perf_counter() - start
        if (
            rounds >= max_pairs
            or (elapsed >= seconds and rounds >= min_pairs)
            or (elapsed >= OVERTIME * seconds and rounds >= FEWEST_PAIRS)
        ):
            table = np.asarray(times)
            return tuple(_summary(table[:, [0, k]], copies) for k in range(1, len(models)))


def copies_note(provider: str) -> str:
    """The sentence for times that are not of the models alone."""
    return f"Times on {provider} include copies of inputs and outputs, which cannot be bound there."


def _shapes(feed: Feed) -> object:
    """A key that is equal for feeds of the same shapes; a list (for a sequence) has its length."""
    return tuple(
        sorted((k, v.shape if isinstance(v, np.ndarray) else (len(v),)) for k, v in feed.items())
    )


def _summary(times: np.ndarray, copies: bool) -> LatencyComparison:
    """Medians and quartiles of `times`: float64 [pairs, 2], seconds, reference first."""
    (lows, medians, highs) = np.quantile(times, [0.25, 0.5, 0.75], axis=0) * 1e3
    low, middle, high = np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75])
    spreads = [Spread(low_ms=float(a), high_ms=float(b)) for a, b in zip(lows, highs, strict=True)]
    return LatencyComparison(
        reference_ms=float(medians[0]),
        candidate_ms=float(medians[1]),
        ratio=float(middle),
        ratio_low=float(low),
        ratio_high=float(high),
        pairs=len(times),
        copies=copies,
        reference_spread=spreads[0],
        candidate_spread=spreads[1],
    )
