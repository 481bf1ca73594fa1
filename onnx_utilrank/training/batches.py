"""The runs that training sees: shuffled, varied, and with what the original gives for them."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from onnx_utilrank.calibration.augment import Augmentation
from onnx_utilrank.calibration.data import Dataset
from onnx_utilrank.runtime.sessions import Feed
from onnx_utilrank.training.loop import Batch
from onnx_utilrank.training.teacher import Teacher

__all__ = ["VARIATIONS", "ShuffledBatches"]

# How often the samples are varied anew before the variations come again: what the original gives
# for each is kept.
VARIATIONS = 16


class ShuffledBatches:
    """A `loop.Batches` over samples of a data set; the seed decides all of it."""

    def __init__(
        self,
        data: Dataset,
        samples: Sequence[int],
        *,
        batch: int,
        most: int,
        seed: int,
        teacher: Teacher | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        """Prepare.

        Args:
            data: The samples.
            samples: Which of them.
            batch: Samples of a step. Where the model takes fewer at once, a step has several runs.
            most: Samples of a run at most, where the model leaves that open.
            seed: Of the order and the variations.
            teacher: The original; without one only labels count.
            augmentation: How samples are varied; the first time they come as they are, unless
                windows are cut out.
        """
        self._data, self._samples, self._seed = data, list(samples), seed
        self._rows = min(batch, most)
        self._teacher, self._augmentation = teacher, augmentation
        self._variations = VARIATIONS if augmentation else 1
        self._runs = sum(1 for _ in data.shuffled(self._samples, batch=self._rows, seed=seed))
        self._each = max(1, min(batch // (data.run or self._rows), self._runs))
        self._next = 0
        self._order: Iterator[tuple[tuple[int, int], Feed]] = iter(())

    def at(self, step: int) -> list[Batch]:
        """See `loop.Batches`.

        Raises:
            InferenceError: The original fails on a run.
        """
        first = step * self._each
        if first != self._next:  # goes on after a checkpoint, or begins again
            epoch, place = divmod(first, self._runs)
            self._order = itertools.islice(self._epochs(epoch), place, None)
            self._next = first
        elif not first:
            self._order = self._epochs(0)
        self._next += self._each
        return [self._batch_of(*next(self._order)) for _ in range(self._each)]

    def _epochs(self, first: int) -> Iterator[tuple[tuple[int, int], Feed]]:
        for epoch in itertools.count(first):
            variation = epoch % self._variations
            seed = self._seed + variation
            feeds = self._data.shuffled(self._samples, batch=self._rows, seed=seed)
            for k, feed in enumerate(feeds):
                yield (variation, k), feed

    def _batch_of(self, key: tuple[int, int], feed: Feed) -> Batch:
        variation, k = key
        if self._augmentation and (variation or self._augmentation.windows):
            chance = np.random.SeedSequence([self._seed, variation, k])
            feed = self._augmentation(feed, int(chance.generate_state(1)[0]))
        wanted = self._teacher(feed, key) if self._teacher else {}
        return Batch(feed, wanted)
