"""How an output lies: which axis counts classes, positions and samples, and whose positions."""

from collections.abc import Sequence

from onnx_utilrank.model.heads import channel_axis, is_classification, softmax_head
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.statistics.divergence import OutputLoss

__all__ = ["elsewhere", "positions_first", "scores_of_classes", "side_by_side", "with_last"]


def side_by_side(store: ModelStore, loss: OutputLoss) -> bool:
    """Whether the last axis of an output is a fixed number of values, and no side of an image."""
    shape = next((o.shape for o in store.outputs if o.name == loss.output), None)
    if shape is None or loss.channels is not None:
        return False
    return 2 <= len(shape) <= 3 and isinstance(shape[-1], int)


def positions_first(shapes: Sequence[tuple[int, ...]], samples: Sequence[int]) -> bool:
    """Whether values, features last, count the samples of each run by their second axis."""
    runs = list(zip(shapes, samples, strict=True))
    second = all(len(shape) > 2 and shape[1] == n for shape, n in runs)
    return second and any(shape[0] != n for shape, n in runs)


def elsewhere(store: ModelStore, output: str) -> set[str]:
    """Inputs whose positions are declared to be others than those of an output.

    Only where other inputs have the positions of either: exporters make up symbols of outputs, and
    a mask may count what is in a cache too.
    """
    places = {v.name: v.shape[1] for v in store.inputs if v.shape is not None and len(v.shape) > 1}
    known = {o.name: o.shape[1] for o in store.outputs if o.shape is not None and len(o.shape) > 1}
    own = known.get(output)
    others = {place for name, place in places.items() if "mask" not in name.lower()}
    if not isinstance(own, str) or own not in others:
        return set()
    return {
        name
        for name, place in places.items()
        if isinstance(place, str) and place != own and place in others
    }


def with_last(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """A shape with an axis moved to the end."""
    place = axis % max(len(shape), 1)
    return *shape[:place], *shape[place + 1 :], *shape[place : place + 1]


def scores_of_classes(
    store: ModelStore, name: str, shape: tuple[int, ...]
) -> tuple[bool, bool, int]:
    """Whether an output holds scores of classes, whether those are probabilities, and the axis."""
    # A last linear layer of a sequence may give scores of tokens: the values tell. A Conv makes
    # channels, which are the last axis only behind a Transpose.
    tokens = len(shape) == 3 and is_classification(store, name, (2, shape[-1]))
    tokens = tokens and channel_axis(store, name) in (None, 2)
    classes = is_classification(store, name, shape) or tokens
    head = softmax_head(store, name)
    if head is None or (len(shape) > 1 and head.axis in (0, -len(shape))):
        return classes, False, -1  # over the first axis, it compares samples, not classes
    # Before opset 13 a softmax ran over all axes from its own on.
    exact = store.opset >= 13 or head.axis in (-1, len(shape) - 1)
    if not head.reshaped and shape and exact:
        return True, True, head.axis if head.axis < 0 else head.axis - len(shape)
    return classes, classes, -1
