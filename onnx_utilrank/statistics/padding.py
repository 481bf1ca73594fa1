"""Which positions of samples are padding, as an input of the model says."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Padding", "find_padding"]

# What exporters of transformers call the input that is 1 at real positions.
_USUAL = "attention_mask"
# What is added to scores to hide a position is no larger than this, in half precision too.
_HIDING = -1e4


@dataclass(frozen=True, slots=True)
class Padding:
    """A graph input of one value a position that tells padding from real ones.

    Attributes:
        input: Its name.
        real: Its value at real positions.
    """

    input: str
    real: int = 1

    def kept(self, feed: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Which positions of a run are real, bool [rows, positions]; None where it says nothing."""
        mask = feed.get(self.input)
        if mask is None:
            return None
        return np.ascontiguousarray((_by_position(mask) != 0) == bool(self.real))


def find_padding(
    feeds: Sequence[Mapping[str, np.ndarray]],
    shape: tuple[int, ...],
    elsewhere: Collection[str] = (),
) -> Padding | None:
    """What says which positions of a value [rows, positions, …] are padding, if anything does.

    An input [rows, positions] or [rows, 1, 1, positions] with "mask" in its name. Where it is added
    to scores, what is real is 0 and the rest far below. Else its values are 0 and 1, of which one
    marks what is real. Samples are padded on one side, so that on the other all of them are real:
    the column there has one value, that of real positions. Where both ends have, and they differ,
    all samples are padded on the same side, and the name tells; where neither end has, it is no
    padding.

    An encoder's mask says nothing of a decoder's positions, though they be as many: where one input
    holds a filler where it is masked, and another one of its kind values that differ, the mask is
    not of all that has positions, and none of them is taken for padding.

    Args:
        feeds: Some runs to look at.
        shape: Of the value on the first of them.
        elsewhere: Inputs that are known to have positions of their own.
    """
    if len(shape) < 3:
        return None
    for name, value in feeds[0].items():
        if name in elsewhere or not isinstance(value, np.ndarray):  # a list, for a sequence
            continue
        if "mask" in name.lower() and _by_position(value).shape == shape[:2]:
            masks = [_by_position(np.asarray(feed[name])) for feed in feeds]
            real = _real(masks, name.lower())
            padding = None if real is None else Padding(name, real)
            if padding and not _of_one_side(feeds, padding):
                return padding
    return None


def _of_one_side(feeds: Sequence[Mapping[str, np.ndarray]], padding: Padding) -> bool:
    """Whether some inputs have fillers where others of as many positions have values."""
    filled: set[tuple[object, ...]] = set()
    valued: set[tuple[object, ...]] = set()
    for name, first in feeds[0].items():
        if "mask" in name.lower() or not isinstance(first, np.ndarray) or not first.size:
            continue
        real: list[np.ndarray] = []
        masked: dict[int, list[np.ndarray]] = {}  # by position
        for feed in feeds:
            kept, values = padding.kept(feed), feed[name]
            if kept is None or values.shape[:2] != kept.shape:
                break
            lines = values.reshape(*kept.shape, -1)
            real.append(lines[kept])
            for at in np.flatnonzero(~kept.all(0)):
                masked.setdefault(int(at), []).append(lines[~kept[:, at], at])
        else:
            hidden = [np.concatenate(found) for found in masked.values()]
            kind = first.dtype.kind, first.shape[2:]
            if hidden and all((lines == hidden[0][0]).all() for lines in hidden):
                if (np.concatenate(real) != hidden[0][0]).any():
                    filled.add(kind)
            elif any((lines != lines[0]).any() for lines in hidden) and not _counting(feeds, name):
                valued.add(kind)
    return not filled.isdisjoint(valued)


def _counting(feeds: Sequence[Mapping[str, np.ndarray]], name: str) -> bool:
    """Whether an input counts positions, or repeats what is known of a sample."""
    steps = [np.diff(feed[name].astype(np.float64), axis=1) for feed in feeds]
    return all((step == step[:, :1]).all() for step in steps)


def _by_position(mask: np.ndarray) -> np.ndarray:
    """A mask of positions alone, [rows, positions]; any other as it is."""
    return mask[:, 0, 0] if mask.ndim == 4 and mask.shape[1:3] == (1, 1) else mask


def _real(masks: Sequence[np.ndarray], name: str) -> int | None:
    """The value of real positions; None where they are no masks of padding."""
    if not all(mask.size for mask in masks):
        return None
    if all(((mask == 0) | (mask <= _HIDING)).all() for mask in masks):
        return 0
    if not all(np.isin(mask, (0, 1)).all() for mask in masks):
        return None
    if name == _USUAL:
        return 1
    ends = [{int(value) for mask in masks for value in mask[:, end]} for end in (0, -1)]
    sure = {value for values in ends if len(values) == 1 for value in values}
    if len(sure) == 2:
        return 0 if "pad" in name else 1
    return sure.pop() if sure else None
