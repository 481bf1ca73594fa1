"""What fine-tuning and training from labels have in common: the samples, and the trainer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from onnx_utilrank.calibration.augment import Augmentation
from onnx_utilrank.calibration.cache import Cache
from onnx_utilrank.calibration.collect import Progress, usable_batch
from onnx_utilrank.calibration.data import Dataset, DataSource, open_data
from onnx_utilrank.calibration.labels import IGNORED, Labels
from onnx_utilrank.calibration.split import parted
from onnx_utilrank.calibration.survey import check_finite, linear_flops
from onnx_utilrank.config import TrainingConfig
from onnx_utilrank.errors import ConfigError, DataError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import Provider, find_provider
from onnx_utilrank.runtime.sessions import Feed, Session, open_session
from onnx_utilrank.statistics.divergence import OutputLoss, samples_in
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.torch_graph.placement import device_beside, gradient_type
from onnx_utilrank.training.adaptive import AdaptiveRanks
from onnx_utilrank.training.batches import ShuffledBatches
from onnx_utilrank.training.loop import Recipe, Trainer
from onnx_utilrank.training.objective import Objective
from onnx_utilrank.training.student import Student
from onnx_utilrank.training.subspaces import Subspace
from onnx_utilrank.training.teacher import Teacher
from onnx_utilrank.training.weights import Part
from onnx_utilrank.training.windows import window_axes

__all__ = ["DEFAULT_STEPS", "Schedule", "Setting", "make_trainer"]

DEFAULT_STEPS = 500
# Samples of a step, at most and at least, and the operations of the original that it may take.
BATCH, LEAST_BATCH, STEP_FLOPS = 32, 4, 2 * 10**10
# ν of OIALR as a share of all steps.
INTERVAL = 0.04
# Samples that are looked at to tell what inputs and outputs are.
LOOKED_AT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What both verbs work with.

    Attributes:
        data: The samples.
        fitted: Samples that are trained on.
        judged: Samples that tell when to stop.
        held: Samples that what comes out is measured on.
        provider: Where ONNX Runtime runs.
        batch: Samples that one run may take.
    """

    data: Dataset
    fitted: list[int]
    judged: list[int]
    held: list[int]
    provider: Provider
    batch: int

    @classmethod
    def open(cls, store: ModelStore, data: DataSource, config: TrainingConfig) -> "Setting":
        """Read the data and part them: a fifth is held back, and a fifth of the rest judges."""
        provider = find_provider(
            config.provider, config.custom_op_libraries, config.provider_options
        )
        session = open_session(store, provider)
        wanted = list(store.inputs)
        if config.labels is not None:
            wanted.append(Labels.parse(config.labels).spec)
        dataset = open_data(data, wanted)
        rest, held = dataset.split(samples=config.samples, seed=config.seed)
        batch = usable_batch(session, dataset)
        return cls.parted(dataset, rest, held, provider, batch, seed=config.seed)

    @classmethod
    def parted(
        cls,
        data: Dataset,
        rest: Sequence[int],
        held: Sequence[int],
        provider: Provider,
        batch: int,
        *,
        seed: int,
    ) -> "Setting":
        """Part the samples that are not held back: a fifth of them judges.

        Raises:
            DataError: There are too few.
        """
        uses = "to train on, to tell when to stop, and to decide"
        fitted, judged = parted(data, rest, seed, uses)
        return cls(
            data=data,
            fitted=fitted,
            judged=judged,
            held=list(held),
            provider=provider,
            batch=batch,
        )

    @property
    def looked_at(self) -> list[Feed]:
        """A few runs that tell what inputs and outputs are."""
        return self.feeds(self.data.first(self.fitted, LOOKED_AT))

    def feeds(self, samples: Sequence[int]) -> list[Feed]:
        """Samples in runs."""
        return list(self.data.feeds(samples, batch=self.batch))

    def check_finite(self, store: ModelStore, session: Session) -> None:
        """Look for NaN and infinity in what a model gives for a few runs.

        Raises:
            ModelError: There is some; the message names the node that it begins at.
        """
        index, names = GraphIndex.build(store), [o.name for o in store.outputs]
        for feed in self.looked_at:
            check_finite(index, session.run(feed, names), feed, self.provider)

    def classes(self, labels: Labels, session: Session, losses: Sequence[OutputLoss]) -> OutputLoss:
        """The output that labels are classes of; the labels of all samples are looked at.

        Raises:
            DataError: None of the samples to train on, to judge by or held back has a class.
            UtilrankError: See `Labels.find_output`.
        """
        parts = {
            "to train on": self.feeds(self.fitted),
            "that tell when to stop": self.feeds(self.judged),
            "held back": self.feeds(self.held),
        }
        every = [feed for feeds in parts.values() for feed in feeds]
        found = labels.find_output(session, losses, every, self.data.label)
        for what, feeds in parts.items():
            if not any((labels.of(feed, found) != IGNORED).any() for feed in feeds):
                raise DataError(
                    f"{self.data.label}: labels {labels.key!r}: none of the samples {what} has a "
                    "class that counts"
                )
        return found

    def graph(self, store: ModelStore) -> TorchGraph:
        """The model in torch, beside the execution provider."""
        device = device_beside(self.provider.cuda_device)
        return TorchGraph.build(store, device=device, dtype=gradient_type(store))

    def cache(self, store: ModelStore, config: TrainingConfig) -> Cache:
        """Where checkpoints are kept."""
        folder = None if config.cache is None else Path(config.cache)
        libraries = config.custom_op_libraries
        return Cache.open(folder, store, self.data, self.fitted, libraries=libraries)

    def student(self, graph: TorchGraph, parts: Sequence[Part]) -> Student:
        """A student; beside an accelerator it multiplies in bfloat16."""
        return Student(graph, parts, mixed=device_beside(self.provider.cuda_device) != "cpu")

    def batches(
        self,
        store: ModelStore,
        config: TrainingConfig,
        losses: Sequence[OutputLoss],
        teacher: Teacher | None,
    ) -> ShuffledBatches:
        """What is trained on."""
        looked_at = self.looked_at
        padding = next((loss.padding for loss in losses if loss.padding), None)
        single: Feed = next(self.data.feeds(self.fitted, batch=1))
        augmentation = None
        if config.augment:
            labelled = config.labels is not None
            largest = max(looked_at, key=lambda feed: sum(v[:1].nbytes for v in _arrays(feed)))
            if self.data.run is None:
                largest = {name: v[:1] if np.ndim(v) else v for name, v in largest.items()}
            windows = {} if labelled else window_axes(store, largest, losses, self.provider)
            augmentation = Augmentation.of(looked_at, padding, labelled=labelled, windows=windows)
            single = augmentation.cut(single, np.random.default_rng(config.seed))
        batch = config.batch or self._affordable(store, single)
        return ShuffledBatches(
            self.data,
            self.fitted,
            batch=batch,
            most=1 if self.batch == 1 else batch,
            seed=config.seed,
            teacher=teacher,
            augmentation=augmentation if augmentation and augmentation.changes else None,
        )

    def _affordable(self, store: ModelStore, single: Feed) -> int:
        """Samples of a step, by what one costs: many steps of few are better than few of many."""
        own = {name: single[name] for name in (spec.name for spec in store.inputs)}
        flops = linear_flops(store, own, self.provider) / samples_in(own)
        return int(min(max(STEP_FLOPS // max(flops, 1), LEAST_BATCH), BATCH))


def _arrays(feed: Feed) -> list[np.ndarray]:
    return [value for value in feed.values() if np.ndim(value)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """β of OIALR and its delay as a share of all steps, where the user does not say."""

    share: float
    delay: float


def make_trainer(
    student: Student,
    objective: Objective,
    batches: ShuffledBatches,
    judge: Callable[[Student], float],
    recipe: Recipe,
    config: TrainingConfig,
    schedule: Schedule,
    *,
    cache: Cache,
    key: tuple[object, ...],
    progress: Progress,
    into: dict[str, Callable[[torch.Tensor], Subspace]] | None = None,
) -> Trainer:
    """A trainer whose number of steps is settled, with a hook where weights are in bases.

    Args:
        student: See `Trainer`, as the next ones.
        objective: What is to become small.
        batches: What it is trained on.
        judge: Lower is better.
        recipe: How, but for the steps where the options give minutes.
        config: Options.
        schedule: Of OIALR.
        cache: Where checkpoints are kept.
        key: What tells this training from others of the same model and data.
        progress: Called with the steps that are done.
        into: How weights go into bases after the delay, by name.

    Raises:
        ConfigError: The delay takes all steps.
    """

    def made(recipe: Recipe, *, settled: bool = True) -> Trainer:
        hook: AdaptiveRanks | None = None
        if settled and (into or any(isinstance(part, Subspace) for part in student.parts)):
            delay = round(schedule.delay * recipe.steps) if config.delay is None else config.delay
            if delay >= recipe.steps:
                raise ConfigError(f"delay {delay} leaves none of {recipe.steps} steps for bases")
            hook = AdaptiveRanks(
                share=schedule.share if config.share is None else config.share,
                delay=delay,
                interval=config.interval or max(1, round(INTERVAL * recipe.steps)),
                into=into or {},
            )
        options = (config.seed, config.batch, config.augment, config.labels)
        turns = hook and (hook.share, hook.delay, hook.interval)
        return Trainer(
            student,
            objective,
            batches,
            judge,
            recipe,
            progress=progress,
            hook=hook,
            cache=cache,
            key=(*key, options, turns),
        )

    if config.minutes is None:
        return made(recipe)
    steps = made(recipe, settled=False).settled(config.minutes)
    return made(replace(recipe, steps=steps))
