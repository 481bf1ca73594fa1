"""How weights are trained."""

import math
from dataclasses import dataclass
from typing import Literal

from onnx_utilrank.config.run import RunConfig, check
from onnx_utilrank.statistics.divergence import WEIGHTINGS, Weighting

__all__ = [
    "FINETUNE_METHODS",
    "TRAIN_METHODS",
    "FinetuneConfig",
    "FinetuneMethod",
    "TrainConfig",
    "TrainMethod",
    "TrainingConfig",
]

# Beyond it, a step of relative size or of Adam's leaves nothing of a weight.
FASTEST = 1.0

FinetuneMethod = Literal["factors", "biases", "oialr"]
FINETUNE_METHODS: tuple[FinetuneMethod, ...] = ("factors", "biases", "oialr")
TrainMethod = Literal["oialr", "dense"]
TRAIN_METHODS: tuple[TrainMethod, ...] = ("oialr", "dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig(RunConfig):
    """How weights are trained.

    Attributes:
        steps: Steps of the optimizer; None for the default, or what `minutes` has room for.
        minutes: Or how long the steps may take; a few are timed, and their number is then fixed.
            Looks at how good the student is come on top.
        batch: Samples of a step; None for as many as are cheap to run, 32 at most.
        learning_rate: The highest; None for the method's own.
        labels: Array of the data, int64 [samples] or [samples, positions, …], with the right
            classes: KEY, or KEY=OUTPUT where it is not plain which output they are classes of.
        augment: Whether samples are varied: moved, with noise, with tokens exchanged.
        share: β of OIALR: directions whose singular value is below this share of the largest go.
        interval: ν of OIALR: steps between two looks at them; None for a share of all steps.
        delay: Steps of OIALR before the first of them; None for a share of all steps.

    Raises:
        ConfigError: A value is out of range, or goes with another method.
    """

    steps: int | None = None
    minutes: float | None = None
    batch: int | None = None
    learning_rate: float | None = None
    labels: str | None = None
    augment: bool = True
    share: float | None = None
    interval: int | None = None
    delay: int | None = None

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        check(self.samples is None or self.samples > 2, "samples must be at least 3")
        check(self.steps is None or self.minutes is None, "steps and minutes exclude each other")
        check(self.steps is None or self.steps > 0, "steps must be at least 1")
        check(
            self.minutes is None or 0 < self.minutes < math.inf, "minutes must be positive, and end"
        )
        check(self.batch is None or self.batch > 0, "batch must be at least 1")
        rate = self.learning_rate
        check(
            rate is None or 0 < rate <= FASTEST, f"learning rate {rate} is not in (0, {FASTEST:g}]"
        )
        check(self.share is None or 0 <= self.share < 1, f"share {self.share} is not in [0, 1)")
        check(self.interval is None or self.interval > 0, "interval must be at least 1")
        check(self.delay is None or self.delay >= 0, "delay must not be negative")

    def _check_schedule(self, method: str) -> None:
        given = [name for name in ("share", "interval", "delay") if getattr(self, name) is not None]
        check(method == "oialr" or not given, f"{' and '.join(given)}: of method oialr alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Options of `finetune`.

    Attributes:
        method: `factors` trains all weights that differ from the reference's, with their biases;
            `biases` trains biases and norms alone; `oialr` trains the mixing between the bases of
            factors, and lets them lose directions (Coquelin et al., arXiv 2401.08505).
        weighting: What counts at the outputs; None to tell from the model.
        blocks: Whether values between blocks are to be as in the reference too.

    Raises:
        ConfigError: A value is out of range.
    """

    method: FinetuneMethod = "factors"
    weighting: Weighting | None = None
    blocks: bool = False

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        check(
            self.method in FINETUNE_METHODS, f"method {self.method!r} is none of {FINETUNE_METHODS}"
        )
        self._check_schedule(self.method)
        check(
            self.weighting in (None, *WEIGHTINGS),
            f"output weighting {self.weighting!r} is none of {WEIGHTINGS}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(TrainingConfig):
    """Options of `train`; labels are needed.

    Attributes:
        method: `oialr` as published, or `dense`, to compare with.

    Raises:
        ConfigError: A value is out of range.
    """

    method: TrainMethod = "oialr"
    augment: bool = False

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        check(self.method in TRAIN_METHODS, f"method {self.method!r} is none of {TRAIN_METHODS}")
        self._check_schedule(self.method)
        check(self.labels is not None, "training needs labels")
