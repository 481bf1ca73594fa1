"""Make more of a few samples: moved, mirrored, mixed, cut out, with noise, with other tokens.

What is made needs no labels: the model itself says what it gives for it. It only has to lie where
the model's inputs lie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_utilrank.runtime.sessions import Feed
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.statistics.padding import Padding

__all__ = ["Augmentation"]

# How far along an axis values move at most, as a share of its extent.
SHIFT = 0.1
# Axes shorter than this have no places to move along: they are features, or channels. So are those
# along which neighbours are not alike, by the correlation of their values.
SHORTEST_MOVED = 12
ALIKE = 0.3
# Side of the window that is cut out of large images.
WINDOW = 64
# Standard deviation of noise, at most, as a share of that of the input.
NOISE = 0.1
# Share of tokens that others take the place of, at most.
EXCHANGED = 0.15
# Values of an input from which on it is taken for tokens, if they are integers, or for values that
# may vary: fewer are flags, masks or types.
FEWEST_VALUES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """What may be done to each input of a model.

    Attributes:
        moved: Axes along which a floating input may be moved, by its name.
        scale: Standard deviation of each floating input that gets noise; of features that are not
            moved, [samples, features], of each by itself.
        tokens: Of each integer input whose values may be exchanged, the values that samples hold.
        padding: What says which positions are padding; None where none are.
        free: Whether samples need not keep their labels: images are mirrored, and a sample may be
            mixed with another one of its run in all of its inputs. The model says what it gives.
        windows: Axes of the inputs that a window is cut out of, the same of all of one size.
    """

    moved: Mapping[str, tuple[int, ...]]
    scale: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]
    padding: Padding | None = None
    free: bool = False
    windows: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        feeds: Sequence[Feed],
        padding: Padding | None = None,
        *,
        labelled: bool = False,
        windows: Mapping[str, tuple[int, int]] | None = None,
    ) -> "Augmentation":
        """Tell from some runs what kind each input is of.

        Axes behind the first are moved along where they are long and neighbours are alike: both of
        an image, one of a signal; of a spectrogram, whose axes differ, the longer one alone. What
        another input says something of, place by place, stays where it is. Integers of many values
        are tokens.

        Args:
            feeds: Runs whose first axis counts samples.
            padding: What says which positions are padding, if anything does.
            labelled: Whether what is made has to keep its label.
            windows: Inputs that a window may be cut out of, and the axes of it.
        """
        moved: dict[str, tuple[int, ...]] = {}
        scale, tokens = {}, {}
        others: set[int] = set()  # extents of what is not moved
        for name, first in feeds[0].items():
            if not isinstance(first, np.ndarray) or first.ndim < 2 or not first.size:
                continue
            values = [np.asarray(feed[name]) for feed in feeds]
            flat = np.concatenate([v.reshape(-1) for v in values])
            told = padding is not None and name == padding.input
            varied = not told and len(np.unique(flat)) >= FEWEST_VALUES
            if varied and first.dtype.kind == "f":
                moved[name] = tuple(a for a in _long_axes(first.shape) if _is_smooth(values, a))
                scale[name] = _spread(values, features=first.ndim == 2 and not moved[name])
            elif varied and first.dtype.kind in "iu" and first.ndim == 2:
                tokens[name] = flat
            if not moved.get(name):
                others.update(first.shape[1:])
        for name, axes in moved.items():
            extents = np.shape(feeds[0][name])
            moved[name] = tuple(a for a in axes if extents[a] not in others)
        return cls(
            moved=moved,
            scale=scale,
            tokens=tokens,
            padding=padding,
            free=not labelled,
            windows=windows or {},
        )

    @property
    def changes(self) -> bool:
        """Whether there is anything that may be done."""
        return any(s.any() for s in self.scale.values()) or bool(self.tokens)

    def __call__(self, feed: Feed, seed: int) -> dict[str, np.ndarray]:
        """Another run, of the same shape but for what is cut out; the seed alone decides it.

        Args:
            feed: A run; it is not changed.
            seed: Of all choices.
        """
        chance = np.random.default_rng(seed)
        feed = self.cut(feed, chance)
        made = dict(feed)
        count = samples_in(feed)
        partner, share = chance.permutation(count), chance.random(count)
        moves = _Moves(chance, count)
        mixes = self.free and all(np.ndim(v) < 2 or name in self.scale for name, v in feed.items())
        for name in sorted(feed):
            if name in self.scale:
                values = self._varied(name, feed[name], moves, chance)
                if mixes and len(values) == count:
                    of_own = share.reshape(-1, *[1] * (values.ndim - 1))
                    mixed = of_own * values + (1 - of_own) * values[partner]
                    values = mixed.astype(values.dtype)
                made[name] = values
            elif name in self.tokens:
                made[name] = self._exchanged(name, feed, chance)
        return made

    def cut(self, feed: Feed, chance: np.random.Generator) -> Feed:
        """The run with a window in the place of each large image; the same one of all samples."""
        made = dict(feed)
        starts: dict[tuple[int, int], list[int]] = {}
        for name, axes in self.windows.items():
            value = feed[name]
            extents = value.shape[axes[0]], value.shape[axes[1]]
            if extents not in starts:
                starts[extents] = [int(chance.integers(n - min(n, WINDOW) + 1)) for n in extents]
            for axis, start in zip(axes, starts[extents], strict=True):
                value = value.take(range(start, min(start + WINDOW, value.shape[axis])), axis)
            made[name] = value
        return made

    def _varied(
        self, name: str, values: np.ndarray, moves: "_Moves", chance: np.random.Generator
    ) -> np.ndarray:
        made = np.empty_like(values)
        axes = self.moved[name]
        for k, sample in enumerate(values):
            if self.free and len(axes) == 2 and moves.mirrored[k]:
                sample = np.flip(sample, axes[-1] - 1)
            for place, axis in enumerate(axes):
                sample = _moved(sample, moves.by(k, place, values.shape[axis]), axis - 1)
            noise = chance.standard_normal(sample.shape, dtype=np.float32)
            scale = self.scale[name]
            if scale.shape not in ((), sample.shape):
                scale = scale.mean()  # of another length than those that were looked at
            size = NOISE * chance.random() * scale
            made[k] = (sample + size * noise).astype(values.dtype)
        return made

    def _exchanged(self, name: str, feed: Feed, chance: np.random.Generator) -> np.ndarray:
        """Tokens of other samples in the place of some; the first and last of each text stay."""
        values = np.asarray(feed[name])
        kept = self.padding.kept(feed) if self.padding else None
        live = np.ones(values.shape, bool) if kept is None else kept
        if live.shape != values.shape:
            live = np.ones(values.shape, bool)
        inner = live & np.roll(live, 1, axis=1) & np.roll(live, -1, axis=1)
        inner[:, [0, -1]] = False
        share = EXCHANGED * chance.random((len(values), 1))
        chosen = inner & (chance.random(values.shape) < share)
        others = chance.choice(self.tokens[name], size=values.shape)
        return np.where(chosen, others, values).astype(values.dtype)


class _Moves:
    """How samples are moved: inputs of one size alike, as they may show the same."""

    def __init__(self, chance: np.random.Generator, count: int) -> None:
        """Draw for so many samples."""
        self.mirrored = chance.random(count) < 0.5
        self._chance = chance
        self._shares: dict[tuple[int, int], np.ndarray] = {}

    def by(self, sample: int, place: int, extent: int) -> int:
        """By how many values a sample is moved along an axis, the first or second that it is."""
        key = place, extent
        if key not in self._shares:
            self._shares[key] = self._chance.uniform(-SHIFT, SHIFT, len(self.mirrored))
        return round(float(self._shares[key][sample]) * extent)


def _is_smooth(values: Sequence[np.ndarray], axis: int) -> bool:
    """Whether neighbours along an axis are alike."""
    here, there = (
        np.concatenate(
            [v.take(range(start, v.shape[axis] - 1 + start), axis).ravel() for v in values]
        ).astype(np.float64)
        for start in (0, 1)
    )
    return bool(here.std() and there.std() and np.corrcoef(here, there)[0, 1] > ALIKE)


def _spread(values: Sequence[np.ndarray], *, features: bool) -> np.ndarray:
    """Standard deviation, of all values or over samples of each of their features."""
    if features and len({v.shape[1:] for v in values}) == 1:
        return np.asarray(np.concatenate(values).astype(np.float64).std(0))
    return np.asarray(np.concatenate([v.reshape(-1) for v in values]).astype(np.float64).std())


def _long_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """Axes along which a sample may be moved."""
    long = [axis for axis in range(1, len(shape)) if shape[axis] >= SHORTEST_MOVED]
    if len(shape) == 4 and len(long) == 3:
        # Many channels, first or last: the two axes that are alike are those of the image.
        long = long[1:] if shape[2] == shape[3] else long[:2]
    if len(shape) < 4 and len(long) > 1:
        long = [max(long, key=lambda axis: shape[axis])]
    return tuple(long)


def _moved(sample: np.ndarray, by: int, axis: int) -> np.ndarray:
    """Values moved along an axis; what lies at the edge fills the gap, mirrored."""
    if not by:
        return sample
    pad = [(0, 0)] * sample.ndim
    pad[axis] = (max(by, 0), max(-by, 0))
    padded = np.pad(sample, pad, mode="reflect")
    start = max(-by, 0)
    return np.take(padded, np.arange(start, start + sample.shape[axis]), axis=axis)
