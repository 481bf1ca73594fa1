"""How good a candidate is, in the terms that the user asked for."""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnx_utilrank.calibration.labels import Answers, Labels
from onnx_utilrank.calibration.own_code import import_function, importable
from onnx_utilrank.calibration.split import HELD_MOST, JUDGED_MOST
from onnx_utilrank.config import CompressConfig, QualityTarget
from onnx_utilrank.errors import ConfigError, DataError
from onnx_utilrank.job import Job
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.sessions import Session
from onnx_utilrank.statistics.divergence import OutputLoss, samples_in
from onnx_utilrank.validation.accuracy import accuracy_drop
from onnx_utilrank.validation.divergence import (
    Divergence,
    OutputRecorder,
    find_losses,
    is_judged,
    open_judged,
)

__all__ = ["Judge", "Quality", "most_judged", "quality_dict", "strict", "with_metric"]

# A metric that shows no loss at all at a divergence above this (nats a decision, or ½ of the
# relative squared error) is saturated: it cannot tell how much more would be too much.
SATURATED = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One candidate on one set of samples.

    Attributes:
        divergence: How far its outputs are from the original's; None where none are floating.
        metric: The user's metric; None without one.
        drop: How much of the metric is lost, above 0 for worse; None without one.
        drop_error: Standard error of the drop over labels; None where the samples are the user's,
            or there is one label.
        saturated: Whether the metric shows no loss though the outputs are far off.
    """

    divergence: Divergence | None
    metric: float | None = None
    drop: float | None = None
    drop_error: float | None = None
    saturated: bool = False

    def figure(self, target: QualityTarget) -> tuple[float, float | None]:
        """The figure that a target limits, with its standard error where it is known."""
        if target.key == "max_drop":
            assert self.drop is not None
            return self.drop, self.drop_error
        found = self.divergence
        if found is None:
            raise ConfigError("no output of the model holds finite floating values to judge it by")
        if target.key == "max_divergence":
            return found.mean, found.standard_error
        if target.key == "min_agreement":
            if found.agreement is None:
                raise ConfigError(
                    "min agreement: no output of the model makes decisions, as far as its values "
                    "tell; an output weighting of softmax says that they do"
                )
            return found.agreement, found.agreement_error
        if found.snr_db is None:
            raise ConfigError("min snr: no output of the model holds values to compare")
        return found.snr_db, found.snr_error

    def meets(self, target: QualityTarget, errors: float = 0.0) -> bool:
        """Whether the target holds, with so many standard errors of tolerance.

        Without tolerance, as a search asks, a saturated metric does not count as met.
        """
        blind = target.key == "max_drop" and self.saturated and not errors
        return self.confirms(target, errors) and not blind

    def confirms(self, target: QualityTarget, errors: float = 0.0) -> bool:
        """Whether the figure is within the limit, with so many standard errors of tolerance."""
        value, error = self.figure(target)
        room = errors * (error if error is not None and math.isfinite(error) else 0.0)
        if target.key in ("min_agreement", "min_snr"):
            return value >= target.limit - room
        return value <= target.limit + room


def most_judged(job: Job, target: QualityTarget | None, memory_budget: int) -> int:
    """Samples to hold back at most: more for a target of quality, where their outputs fit.

    Those of the original are kept, as float64 at times: they may take an eighth of the budget.

    Raises:
        ModelError: The original does not run.
    """
    if target is None:
        return HELD_MOST
    session = open_judged(job.source, job.provider)
    (feed,) = job.feeds(job.data.first(range(len(job.data)), 1))
    made = session.run(feed).values()
    size = sum(y.size for y in made if isinstance(y, np.ndarray)) // samples_in(feed)
    return min(max(memory_budget // (64 * max(size, 1)), HELD_MOST), JUDGED_MOST)


class Judge:
    """Measures candidates against the original on a fixed set of samples."""

    def __init__(
        self,
        job: Job,
        samples: Sequence[int],
        config: CompressConfig,
        losses: Sequence[OutputLoss] = (),
    ) -> None:
        """Run the original.

        Args:
            job: The model.
            samples: The samples.
            config: Says the metric, if there is one, and the weighting of outputs.
            losses: What counts at the outputs; told from the samples where there are none.

        Raises:
            DataError: The metric cannot be imported or gives no number.
            ModelError: The original does not run.
        """
        self._job = job
        self._feeds = job.feeds(samples)
        self._labels = None if config.labels is None else Labels.parse(config.labels)
        given = config.evaluate
        self._metric = import_function(given) if isinstance(given, str) else given
        session = open_judged(job.source, job.provider, losses)
        self.losses = tuple(losses) or find_losses(
            job.source, session, self._feeds, config.weighting
        )
        if self._labels is not None:
            self._classes = self._labels.find_output(
                session, self.losses, self._feeds, job.data.label
            )
        self._recorder = OutputRecorder(session, self.losses, self._feeds)
        self._right = self._correct(session)
        self._baseline = (
            self._right.accuracy if self._right is not None else self._evaluate(job.source)
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report says of the metric."""
        labels = self._labels
        return () if labels is None else labels.notes(self._classes, self.losses)

    def __call__(self, candidate: ModelStore) -> Quality:
        """Measure one candidate.

        Raises:
            ModelError: It does not load or run.
            DataError: The user's metric gives no number.
        """
        # A model of another's making may not have the scores behind its decisions by their names.
        losses = self.losses if is_judged(candidate, self.losses) else ()
        session = open_judged(candidate, self._job.provider, losses)
        found = self._recorder.compare(session) if losses else None
        right = self._correct(session)
        if right is not None and self._right is not None:
            drop, error = accuracy_drop(self._right, right)
            return self._quality(found, right.accuracy, drop, error)
        metric = self._evaluate(candidate)
        if metric is None or self._baseline is None:
            return Quality(divergence=found)
        return self._quality(found, metric, self._baseline - metric, None)

    @staticmethod
    def _quality(
        found: Divergence | None, metric: float, drop: float, error: float | None
    ) -> Quality:
        return Quality(
            divergence=found,
            metric=metric,
            drop=drop,
            drop_error=error,
            saturated=drop <= 0 and found is not None and found.mean > SATURATED,
        )

    def _evaluate(self, store: ModelStore) -> float | None:
        if self._metric is None:
            return None
        with tempfile.TemporaryDirectory(prefix="onnx_utilrank_") as folder:
            path = Path(folder, "model.onnx")
            store.save(path)
            with importable(Path.cwd()):  # a function may import its neighbours when it runs
                value = self._metric(str(path))
        try:
            number = float(value)
        except (TypeError, ValueError) as e:
            raise DataError(f"evaluate: gave {value!r}, which is no number") from e
        if not math.isfinite(number):
            raise DataError(f"evaluate: gave {value!r} for {store.label}, which is not finite")
        return number

    def _correct(self, session: Session) -> Answers | None:
        """What labels say of a model, where there are any."""
        if self._labels is None:
            return None
        return self._labels.answers(session, self._classes, self._feeds)


def with_metric(config: CompressConfig) -> CompressConfig:
    """The options with the user's function imported, so that a wrong name fails at once."""
    if not isinstance(config.evaluate, str):
        return config
    return replace(config, evaluate=import_function(config.evaluate))


def strict(value: dict[str, object]) -> dict[str, object]:
    """Strict JSON has no infinity and no NaN: they become null."""

    def each(value: object) -> object:
        if isinstance(value, dict):
            return {key: each(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [each(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: each(v) for key, v in value.items()}


def quality_dict(quality: Quality | None) -> dict[str, object] | None:
    """A quality as JSON types."""
    return None if quality is None else strict(dataclasses.asdict(quality))
