"""How far the outputs of a candidate are from the reference's, one number a sample."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnx_utilrank.statistics.padding import Padding

__all__ = [
    "WEIGHTINGS",
    "OutputLoss",
    "Weighting",
    "choose_weighting",
    "divergence",
    "output_sharpness",
    "output_variance",
    "samples_in",
    "unlike",
]

Weighting = Literal["softmax", "logits", "values"]
WEIGHTINGS: tuple[Weighting, ...] = ("softmax", "logits", "values")

# Mean of 1 − Σ p² over the decisions below which a softmax is over-confident: its Fisher
# information, whose trace this is, vanishes where nearly all of p lies on one class.
OVERCONFIDENT = 1e-3
# Share of the largest possible entropy above which scores are no logits of classes: a trained
# classifier is surer than that on its own data, a softmax of an embedding never is.
UNDECIDED = 0.9
# How much of what scores do is in the level that they share, which a softmax does not see, beside
# what is in another direction of theirs: about 1 for targets that have nothing to do with each
# other, near 0 for a trained classifier, as the gradient of its cross-entropy has none of it.
LEVELLED = 0.4
# Values that stand side by side for being few: of so many each may be a target by itself.
FEW = 16
# Rows that deviations are told from: of a few they are chance.
LEAST_ROWS = 16
# Below the smallest normal float32, where a softmax of that type underflows.
_LEAST = 1e-38


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputLoss:
    """What is lost when one output changes: a divergence of the candidate's from the reference's.

    Attributes:
        output: The graph output.
        weighting: `softmax`: Kullback-Leibler divergence KL(p‖p̂), in nats a decision, of the
            softmax over the classes. `logits`: ½‖ẑ − z‖² of the logits less their mean over the
            classes, over their variance. `values`: ½‖ŷ − y‖² over the variance of y, or of y/s for
            `scales` s.
        probabilities: Whether the output is itself a softmax.
        axis: Where its classes or features lie; counted from the end.
        variance: What `logits` and `values` are relative to: summed over the last axis.
        scales: What each of few values is divided by, as targets in units of their own are; None
            where values count as they are.
        faint: Of many values, those that hardly count, for others vary far more.
        sharpness: Mean of 1 − Σ p² (`softmax`): the energy of its Fisher information.
        padding: What says which positions [rows, positions] do not count; None where all do.
        channels: Where the channels of a convolution lie, counted from the end, if it has made
            the output: its classes, if it has any.
        decides: The graph output that is the class of the highest score, where the scores
            themselves are none.
        positions_first: Whether the first axis counts positions and the second one samples.
    """

    output: str
    weighting: Weighting
    probabilities: bool = False
    axis: int = -1
    variance: float = 1.0
    scales: tuple[float, ...] | None = None
    faint: int = 0
    sharpness: float = 1.0
    padding: Padding | None = None
    channels: int | None = None
    decides: str | None = None
    positions_first: bool = False

    def rows(self, values: np.ndarray, samples: int) -> np.ndarray:
        """The output as [samples, positions, features] float64.

        Where the axis that should does not count samples, all is one sample.
        """
        values = np.asarray(values, dtype=np.float64)
        if values.ndim == 0:
            return values.reshape(1, 1, 1)
        values = np.moveaxis(values, self.axis, -1)
        if self.positions_first and values.ndim > 2:
            values = values.swapaxes(0, 1)
        first = samples if values.ndim > 1 and values.shape[0] % samples == 0 else 1
        if values.ndim == 1 and values.shape[0] == samples:
            return values.reshape(samples, 1, 1)
        # Spelled out, for -1 says nothing of an output without elements.
        return values.reshape(first, math.prod(values.shape[:-1]) // first, values.shape[-1])


def samples_in(feed: Mapping[str, np.ndarray]) -> int:
    """Samples that one run takes: the extent of the first axis that all its arrays agree on."""
    arrays = [v for v in feed.values() if isinstance(v, np.ndarray)]  # no lists, for sequences
    extents = {value.shape[0] for value in arrays if value.ndim}
    return max(extents.pop(), 1) if len(extents) == 1 else 1


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)))


def log_probabilities(loss: OutputLoss, y: np.ndarray) -> np.ndarray:
    """log p of an output of either kind, over the last axis."""
    return np.log(np.maximum(y, _LEAST)) if loss.probabilities else _log_softmax(y)


def _centred(z: np.ndarray) -> np.ndarray:
    return np.asarray(z - z.mean(-1, keepdims=True))


def scores(loss: OutputLoss, y: np.ndarray) -> np.ndarray:
    """What `logits` and `values` compare: centred logits, or the values themselves."""
    if loss.weighting == "values":
        return y if loss.scales is None else np.asarray(y / np.array(loss.scales))
    return _centred(log_probabilities(loss, y) if loss.probabilities else y)


def choose_weighting(
    y: np.ndarray, *, classes: bool, probabilities: bool, drifting: bool
) -> Weighting:
    """How an output is to be weighted, from what the reference gives on some samples.

    Args:
        y: The values that the output takes, [rows, features].
        classes: Whether the graph says that its last axis holds scores of classes.
        probabilities: Whether it is a softmax.
        drifting: Whether a level that scores share says nothing, as that of tokens, on which
            language models decide all the same, and that of what an ArgMax decides by.
    """
    if y.shape[-1] < 2 or not (classes or probabilities):
        return "values"
    loss = OutputLoss(output="", weighting="softmax", probabilities=probabilities)
    log_p = log_probabilities(loss, y)
    entropy = -(np.exp(log_p) * log_p).sum(-1).mean() / np.log(y.shape[-1])
    if not probabilities and entropy > UNDECIDED:
        return "values"
    if not (probabilities or drifting) and _shared(y) > LEVELLED:
        return "values"
    return "logits" if output_sharpness(loss, y) < OVERCONFIDENT else "softmax"


def _shared(y: np.ndarray) -> float:
    """Variance of the level that the features share, over the mean one of their directions."""
    variance = y.var(0).sum()
    return float(y.shape[-1] ** 2 * y.mean(-1).var() / variance) if variance else 0.0


def output_variance(loss: OutputLoss, y: np.ndarray) -> float:
    """Variance of what an output's loss compares, summed over the last axis.

    Args:
        loss: The loss, of which `variance` is not read.
        y: The reference's values on some samples, [rows, features].
    """
    compared = scores(loss, y)
    about = compared.mean(0) if loss.weighting == "values" else 0.0
    spread = float(np.square(compared - about).sum(-1).mean())
    # One sample of a regression, or a constant output, has no variance to be relative to.
    energy = float(np.square(compared).sum(-1).mean())
    return spread if spread > 1e-12 * energy else energy or 1.0


def unlike(y: np.ndarray) -> tuple[tuple[float, ...] | None, int]:
    """Whether values are in units of their own, as the columns of a regression.

    Of a few that vary a hundred times more or less than each other (a tenth of the deviation) none
    is to be lost for being small, and each counts relative to its own deviation, or a thousandth of
    the largest. Many are features of one thing, such as an embedding; those of which the variance
    is less than 1e-4 of the largest are counted.

    Args:
        y: The reference's values on some samples, [rows, features].

    Returns:
        The scales of few, or how many of many hardly count.
    """
    if len(y) < LEAST_ROWS:
        return None, 0
    deviations = y.std(0)
    top = float(deviations.max())
    varied = deviations > 1e-6 * top
    if not top > 0 or not np.isfinite(deviations).all():
        return None, 0
    if len(deviations) > FEW:
        return None, int((varied & (deviations < 1e-2 * top)).sum())
    if not (deviations[varied] < 0.1 * top).any():
        return None, 0
    scales = np.where(varied, np.maximum(deviations, 1e-3 * top), top)
    return tuple(map(float, scales)), 0


def output_sharpness(loss: OutputLoss, y: np.ndarray) -> float:
    """Mean of 1 − Σ p², the trace of the softmax's Fisher information, over rows y."""
    p = np.exp(log_probabilities(loss, y))
    return float((1 - (p * p).sum(-1)).mean())


def divergence(
    loss: OutputLoss, expected: np.ndarray, actual: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Mean divergence over the positions of each sample, float64 [samples].

    Args:
        loss: What counts.
        expected: The reference's output, [samples, positions, features].
        actual: The candidate's.
        weights: What each position counts, [samples, positions]; None for ones.
    """
    if loss.weighting == "softmax":
        log_p, log_q = log_probabilities(loss, expected), log_probabilities(loss, actual)
        each = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    else:
        lost = scores(loss, actual) - scores(loss, expected)
        each = np.square(lost).sum(-1) / (2 * loss.variance)
    if weights is None:
        return np.asarray(each.mean(-1))
    return np.asarray((each * weights).sum(-1) / np.maximum(weights.sum(-1), 1))
