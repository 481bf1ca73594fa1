"""How often a candidate is right beside its reference, where the data hold the right classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.calibration.labels import Answers, Labels
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, Session
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.validation.divergence import find_losses, open_judged

__all__ = ["Accuracy", "accuracy_drop", "compare_accuracy", "find_classes"]

# Runs that are looked at to tell which outputs hold scores.
RUNS_LOOKED_AT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How often two models are right, on the same labels.

    Attributes:
        labels: The array of the data that holds the right classes.
        output: The output whose scores are held to them.
        count: Labels that count.
        reference: Share of them that the reference gets right, in per cent.
        candidate: Share that the candidate gets right.
        drop: What is lost, in points of per cent; below 0 where the candidate is right more often.
        drop_error: Standard error of that, over samples; None for a single one.
    """

    labels: str
    output: str
    count: int
    reference: float
    candidate: float
    drop: float
    drop_error: float | None


def accuracy_drop(before: Answers, after: Answers) -> tuple[float, float | None]:
    """Points of accuracy that are lost, with their standard error.

    Positions of one sample, such as the pixels of an image, go wrong together: the error is the
    linearised one of a ratio of sums over samples (Cochran, Sampling Techniques, chapter 6), which
    is that of a mean where each has one label.

    Args:
        before: What the reference is right on.
        after: What the candidate is right on, of the same labels.

    Returns:
        The drop, above 0 for worse, and its standard error: of paired differences, over samples
        with labels that count; None for one of them.
    """
    lost = 100 * (before.right.astype(np.float64) - after.right)
    drop = float(lost.mean())
    _, sample = np.unique(before.samples, return_inverse=True)
    off = np.bincount(sample, lost - drop)
    if len(off) < 2:
        return drop, None
    return drop, math.sqrt(len(off) / (len(off) - 1) * float(np.square(off).sum())) / len(lost)


def find_classes(
    reference: ModelStore, provider: Provider, labels: Labels, feeds: Sequence[Feed], where: str
) -> OutputLoss:
    """The output of a model that labels are classes of: see `Labels.find_output`.

    Args:
        reference: The model.
        provider: Where to run it.
        labels: The labels.
        feeds: Runs that hold them.
        where: How messages name the data.

    Raises:
        ConfigError: No output holds scores, or none is of the name that the user gave.
        DataError: The labels are no classes of it.
    """
    session = open_judged(reference, provider)
    losses = find_losses(reference, session, feeds[:RUNS_LOOKED_AT])
    return labels.find_output(session, losses, feeds, where)


def compare_accuracy(
    reference: Session,
    candidate: Session,
    labels: Labels,
    classes: OutputLoss,
    feeds: Sequence[Feed],
) -> Accuracy:
    """Hold both models to the labels.

    Args:
        reference: The model that the candidate is held to.
        candidate: The other.
        labels: The labels.
        classes: The output that they are classes of.
        feeds: Runs that hold them.

    Raises:
        DataError: See `Labels.answers`.
        InferenceError: A run fails.
    """
    before, after = (labels.answers(each, classes, feeds) for each in (reference, candidate))
    drop, error = accuracy_drop(before, after)
    return Accuracy(
        labels=labels.key,
        output=classes.decides or classes.output,
        count=len(before.right),
        reference=before.accuracy,
        candidate=after.accuracy,
        drop=drop,
        drop_error=error,
    )
