"""The right classes of samples, and the output that they are classes of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_utilrank.errors import ConfigError, DataError
from onnx_utilrank.model.store import TensorSpec
from onnx_utilrank.runtime.sessions import Feed, Session
from onnx_utilrank.statistics.divergence import OutputLoss, samples_in

__all__ = ["IGNORED", "Answers", "Labels"]

# Positions with this label have no class: the convention of torch's cross entropy, which data of
# tokens follow.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Answers:
    """Which labels a model is right on.

    Attributes:
        right: Whether it is, bool [labels that count].
        samples: The sample that each of them is of, int64 [labels that count], rising.
    """

    right: np.ndarray
    samples: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of the labels that it is right on, in per cent."""
        return 100 * float(self.right.mean())


@dataclass(frozen=True, slots=True)
class Labels:
    """An array of the data, int64 [samples] or [samples, positions, …], with right classes.

    Attributes:
        key: Its name.
        output: The output that they are classes of, where the user says it.
    """

    key: str
    output: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Labels":
        """Read KEY, or KEY=OUTPUT.

        Raises:
            ConfigError: There is no key.
        """
        key, _, output = text.partition("=")
        if not key:
            raise ConfigError(f"labels {text!r} do not name an array of the data")
        return cls(key, output or None)

    @property
    def spec(self) -> TensorSpec:
        """What the data have to hold: a label for each sample, or for each of its positions."""
        return TensorSpec(name=self.key, dtype=np.dtype(np.int64), shape=None)

    def find_output(
        self, session: Session, losses: Sequence[OutputLoss], feeds: Iterable[Feed], where: str
    ) -> OutputLoss:
        """The output that the labels are classes of; a user who means another one names it.

        Of those with enough classes, one with exactly as many as there are labels; else one that
        is told to hold scores of classes; else the first.

        Args:
            session: The model.
            losses: Its outputs that may be meant.
            feeds: All samples whose labels count.
            where: How messages name the data.

        Raises:
            ConfigError: No output is of the name that the user gave, or none holds scores.
            DataError: The labels are no classes of the output.
        """
        feeds = list(feeds)
        found = np.concatenate([np.asarray(feed[self.key]).reshape(-1) for feed in feeds])
        counted = found[found != IGNORED]
        if not len(counted) or counted.min() < 0:
            which = "no sample has a class" if not len(counted) else f"{counted.min()} is no class"
            raise DataError(f"{where}: labels {self.key!r}: {which}")
        if not losses:
            raise ConfigError(f"labels {self.key!r}: no output of the model holds finite scores")
        names = [loss.decides or loss.output for loss in losses]
        if self.output is not None and self.output not in names:
            raise ConfigError(
                f"labels {self.key!r}: {self.output!r} is none of the outputs {names}"
            )
        meant = [loss for loss in losses if self.output in (None, loss.decides or loss.output)]
        needed = int(counted.max()) + 1
        made = session.run(feeds[0], [loss.output for loss in meant])
        extents, fitting = {}, []
        for place, given in enumerate(meant):
            loss = self._along_channels(feeds[0], np.shape(made[given.output]), given)
            scores = loss.rows(made[loss.output], samples_in(feeds[0]))
            extents[loss.output] = scores.shape
            fits = self._fit(feeds[0], np.shape(made[loss.output]), loss, scores.shape)
            if fits and scores.shape[-1] >= max(needed, 2):
                rating = (scores.shape[-1] != needed, loss.weighting == "values", place)
                fitting.append((rating, loss))
        if not fitting:
            shown = ", ".join(
                f"{name!r} has {shape[-1]} classes for each of {shape[0]} x {shape[1]}"
                for name, shape in extents.items()
            )
            raise DataError(
                f"{where}: labels {self.key!r}: classes up to {needed - 1}, one for each of "
                f"{' x '.join(map(str, np.shape(feeds[0][self.key]))) or 1}, fit no output: {shown}"
            )
        chosen = min(fitting, key=lambda each: each[0])[1]
        if not any((self.of(feed, chosen) != IGNORED).any() for feed in feeds):
            raise DataError(
                f"{where}: labels {self.key!r}: none counts, as all are of positions of padding"
            )
        return chosen

    def _along_channels(self, feed: Feed, shape: tuple[int, ...], loss: OutputLoss) -> OutputLoss:
        """The loss with its classes among the channels, where labels may mean those.

        Maps of scores, as of a segmentation, are [samples, classes, height, width] where no softmax
        ends the model; nothing but labels [samples, height, width] tells them from images.
        """
        if loss.channels is not None:
            return replace(loss, axis=loss.channels, padding=None)
        labels, taken = np.shape(feed[self.key]), loss.axis % max(len(shape), 1)
        fits = labels == (*shape[:taken], *shape[taken + 1 :])
        if fits or len(labels) < 2 or labels != (*shape[:1], *shape[2:]):
            return loss
        return replace(loss, axis=1 - len(shape), padding=None)

    def _fit(
        self, feed: Feed, shape: tuple[int, ...], loss: OutputLoss, rows: tuple[int, ...]
    ) -> bool:
        """Whether there is a label for each sample of an output, or for each position of it."""
        labels = np.shape(feed[self.key])
        if int(np.prod(labels)) not in (rows[0], rows[0] * rows[1]):
            return False
        places = list(shape)
        del places[loss.axis]
        if loss.positions_first:
            places[:2] = places[1::-1]
        # As many of them in another order of axes are labels of other positions.
        return len(labels) != len(places) or len(labels) < 2 or labels == tuple(places)

    def answers(self, session: Session, classes: OutputLoss, feeds: Iterable[Feed]) -> Answers:
        """Whether a model decides for the right classes.

        By the largest score, or by the decision where the model gives that: what lies between the
        two, such as a quantization, counts.

        Args:
            session: The model.
            classes: The output that these are classes of.
            feeds: Runs that hold them.

        Raises:
            DataError: The output has no row of scores, or no decision, for each label.
            InferenceError: A run fails.
        """
        output = classes.decides or classes.output
        judged = self.decided if classes.decides else self.right
        right, samples, before = [], [], 0
        for feed in feeds:
            right.append(judged(feed, session.run(feed, [output])[output], classes))
            labels, n = self.of(feed, classes), samples_in(feed)
            if n == 1 and np.ndim(feed[self.key]):
                n = len(feed[self.key])  # of arrays that do not agree on samples, labels tell
            own = np.arange(labels.size) * n // labels.size
            samples.append(before + own[labels != IGNORED])
            before += n
        return Answers(np.concatenate(right), np.concatenate(samples))

    def right(self, feed: Feed, output: np.ndarray, loss: OutputLoss) -> np.ndarray:
        """Whether the right class scores highest, bool [labels that count].

        Of an output with positions, whose samples have one label each, the mean over them counts.

        Args:
            feed: The run.
            output: Its scores.
            loss: Says which axis holds the classes.

        Raises:
            DataError: The output has no row of scores for each label.
        """
        scores = loss.rows(output, samples_in(feed))
        each = self.per_position(feed, scores.shape)
        scores = scores.reshape(-1, scores.shape[-1]) if each else scores.mean(1)
        labels = self.of(feed, loss)
        return np.asarray((scores.argmax(-1) == labels)[labels != IGNORED])

    def decided(self, feed: Feed, decisions: np.ndarray, loss: OutputLoss) -> np.ndarray:
        """Whether the class that a model decides for is the right one, bool [labels that count].

        Args:
            feed: The run.
            decisions: The output that holds it, one for each label.
            loss: Says which positions are padding.

        Raises:
            DataError: There is another number of decisions.
        """
        labels, found = self.of(feed, loss), np.reshape(decisions, -1)
        if found.size != labels.size:
            raise DataError(
                f"labels {self.key!r}: {labels.size} of them do not go with {found.size} decisions"
            )
        return np.asarray((found == labels)[labels != IGNORED])

    def notes(self, classes: OutputLoss, losses: Sequence[OutputLoss]) -> tuple[str, ...]:
        """What a report says of them, where several outputs might have been meant."""
        if len(losses) < 2:
            return ()
        return (f"Labels {self.key!r} are classes of output {classes.output!r}.",)

    def of(self, feed: Feed, loss: OutputLoss) -> np.ndarray:
        """The labels of a run, int64 [all]; `IGNORED` at positions that are padding too."""
        labels = np.array(feed[self.key], np.int64).reshape(-1)
        kept = loss.padding.kept(feed) if loss.padding else None
        if kept is not None and kept.size == labels.size > len(kept):
            labels[~kept.reshape(-1)] = IGNORED
        return labels

    def per_position(self, feed: Feed, shape: tuple[int, ...]) -> bool:
        """Whether each position has a label, or each sample.

        Args:
            feed: The run.
            shape: Of the scores: (samples, positions, classes).

        Raises:
            DataError: Neither.
        """
        samples, positions, _ = shape
        count = np.size(feed[self.key])
        if count not in (samples, samples * positions):
            raise DataError(
                f"labels {self.key!r}: {count} of them do not go with scores of {samples} samples "
                f"x {positions} positions"
            )
        return count == samples * positions
