"""Windows of large images: what a model does to a part is learned as well, and far cheaper."""

from collections.abc import Sequence

import numpy as np

from onnx_utilrank.calibration.augment import WINDOW, Augmentation
from onnx_utilrank.model.store import ModelStore, TensorSpec
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, InferenceError, open_session
from onnx_utilrank.statistics.divergence import OutputLoss

__all__ = ["window_axes"]

# Sides from which on a window is cut out, in sides of the window.
LARGE = 1.5


def window_axes(
    store: ModelStore, feed: Feed, losses: Sequence[OutputLoss], provider: Provider
) -> dict[str, tuple[int, int]]:
    """The inputs that a window may be cut out of, with its axes.

    They are large images of any size, and all that counts of the outputs are images too: a class
    is one of the whole image.

    Args:
        store: The original.
        feed: A run.
        losses: What counts.
        provider: Where it is tried.
    """
    axes = {spec.name: found for spec in store.inputs if (found := _image(spec, feed[spec.name]))}
    least = LARGE * WINDOW
    sides = {name: min(feed[name].shape[a] for a in two) for name, two in axes.items()}
    windows = {name: two for name, two in axes.items() if sides[name] >= least}
    if not windows or any(loss.weighting != "values" for loss in losses):
        return {}
    names = [loss.output for loss in losses]
    if not {o.name for o in store.outputs}.issuperset(names):
        return {}  # scores of decisions, which no user sees
    tried = Augmentation.of([feed], windows=windows).cut(feed, np.random.default_rng(0))
    session = open_session(store, provider)
    try:
        made = session.run(tried, names)
    except InferenceError:  # of any size, it says, but not of this one
        return {}
    whole = session.run(feed, names)
    return windows if all(_is_cut(made[name], whole[name]) for name in names) else {}


def _is_cut(made: np.ndarray, whole: np.ndarray) -> bool:
    """Whether an output is an image that is smaller where the input is."""
    return whole.ndim == 4 and sum(m < w for m, w in zip(made.shape, whole.shape, strict=True)) == 2


def _image(spec: TensorSpec, value: np.ndarray) -> tuple[int, int] | None:
    """The axes of height and width, where the model leaves both open."""
    shape = spec.shape or ()
    if len(shape) != 4 or not np.issubdtype(value.dtype, np.floating):
        return None
    free = [a for a in range(1, 4) if not isinstance(shape[a], int)]
    return (free[0], free[1]) if free in ([1, 2], [2, 3]) else None
