"""The smallest branches with which a quantized model is as good as was asked for."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from onnx_utilrank.config import QualityTarget
from onnx_utilrank.errors import TargetMissedError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.quality import Quality
from onnx_utilrank.repairing.repairs import Choice, Repairs

__all__ = ["Found", "smallest"]

# Models that are made and measured between the largest and the smallest, at most, and the ratio of
# bytes that is fine enough.
EVALUATIONS = 8
FINE = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One model on the way.

    Attributes:
        choices: What is done at each layer.
        store: The model.
        quality: How good it is on the samples of the search.
    """

    choices: tuple[Choice, ...]
    store: ModelStore
    quality: Quality


def smallest(
    repairs: Repairs,
    judge: Callable[[ModelStore], Quality],
    target: QualityTarget,
    progress: Callable[[str, int, int], None],
) -> Found:
    """Bisect the bytes, by their order of magnitude, between what fails and what passes.

    Args:
        repairs: What can be done.
        judge: Measures a model, on samples that the branches do not rest on.
        target: What is asked for.
        progress: Called with the stage, what is done of it and how much there is.

    Raises:
        TargetMissedError: Not even branches at all layers are good enough.
        ModelError: A model does not run, or a factor does not fit the type of its layer.
    """

    def tried(choices: tuple[Choice, ...]) -> Found:
        store = repairs.make(choices)
        return Found(choices=choices, store=store, quality=judge(store))

    best = tried(repairs.nothing)
    if best.quality.meets(target):
        return best
    costs = [move.cost for offer in repairs.offers for move in offer.moves if move.cost > 0]
    high = sum(max(move.cost for move in offer.moves) for offer in repairs.offers)
    low = min(costs, default=high)
    if high > 0:
        best = tried(repairs.of_bytes(high))
    if not best.quality.meets(target):
        value, error = best.quality.figure(target)
        spread = "" if error is None or not math.isfinite(error) else f" ± {error:.2g}"
        added = best.store.file_bytes / repairs.quantized.file_bytes - 1
        raise TargetMissedError(
            f"{repairs.quantized.label}: {target.key.replace('_', ' ')} {target.limit:g} cannot "
            f"be reached: with branches that add {100 * added:.0f} % to the file it is "
            f"{value:.4g}{spread}"
        )
    for done in range(EVALUATIONS):
        if high <= low * FINE:
            break
        progress("searching", done, EVALUATIONS)
        middle = math.sqrt(low * high)
        found = tried(repairs.of_bytes(middle))
        if found.quality.meets(target):
            best, high = found, middle
        else:
            low = middle
    return best
