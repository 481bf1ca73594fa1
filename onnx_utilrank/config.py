"""Everything a caller can choose, with its defaults and its limits."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from onnx_utilrank.errors import ConfigError
from onnx_utilrank.statistics.divergence import WEIGHTINGS, Weighting

__all__ = [
    "FINETUNE_METHODS",
    "QUALITY_KEYS",
    "SCHEME_KEYS",
    "TRAIN_METHODS",
    "AnalyzeConfig",
    "CompressConfig",
    "FinetuneConfig",
    "FinetuneMethod",
    "QualityTarget",
    "RunConfig",
    "SchemeKey",
    "TrainConfig",
    "TrainMethod",
    "TrainingConfig",
    "ValidateConfig",
]

QualityKey = Literal["max_drop", "max_divergence", "min_agreement", "min_snr"]
QUALITY_KEYS: tuple[QualityKey, ...] = ("max_drop", "max_divergence", "min_agreement", "min_snr")

FinetuneMethod = Literal["factors", "biases", "oialr"]
FINETUNE_METHODS: tuple[FinetuneMethod, ...] = ("factors", "biases", "oialr")
TrainMethod = Literal["oialr", "dense"]
TRAIN_METHODS: tuple[TrainMethod, ...] = ("oialr", "dense")

SchemeKey = Literal["int8", "int8-dynamic", "int4", "fp16", "bf16"]
SCHEME_KEYS: tuple[SchemeKey, ...] = ("int8", "int8-dynamic", "int4", "fp16", "bf16")

# The paper states no threshold that we could confirm; this one is ours, and an option everywhere.
DEFAULT_ENERGY = 0.999

# What statistics and activations may take together; models of some 100 M parameters fit.
DEFAULT_MEMORY = 4 * 2**30


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityTarget:
    """How good the smallest model has to be.

    Attributes:
        key: `max_drop` of the user's metric, of which a higher value is better; `max_divergence`
            of the outputs (nats a decision, or ½ of the relative squared error of values);
            `min_agreement` of decisions, in [0, 1]; `min_snr` of output values, in dB.
        limit: The value.

    Raises:
        ConfigError: The limit is out of range.
    """

    key: QualityKey
    limit: float

    def __post_init__(self) -> None:
        _check(self.key in QUALITY_KEYS, f"quality {self.key!r} is none of {QUALITY_KEYS}")
        label = self.key.replace("_", " ")
        _check(math.isfinite(self.limit), f"{label} {self.limit} is not a finite number")
        _check(self.key == "min_snr" or self.limit >= 0, f"{label} must not be negative")
        _check(self.key != "min_agreement" or self.limit <= 1, f"{label} is at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How a model is run over samples.

    Attributes:
        samples: Samples to use, those held back included; None for all.
        seed: Seed of the choice of samples, of the split and of all that is drawn.
        provider: Key of the execution provider to run on.
        custom_op_libraries: Files of operators that ONNX Runtime does not have itself.
        memory_budget: Bytes that running sums and the activations of gradients may take together;
            hidden units whose decompositions would take more than a quarter of it stay.
        cache: Folder in which statistics and checkpoints are kept and looked up; None for none.

    Raises:
        ConfigError: A value is out of range.
    """

    samples: int | None = None
    seed: int = 0
    provider: str = "cpu"
    custom_op_libraries: tuple[str, ...] = ()
    memory_budget: int = DEFAULT_MEMORY
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _check(self.samples is None or self.samples > 0, "samples must be at least 1")
        _check(self.seed >= 0, "seed must not be negative")
        _check(self.memory_budget >= 2**20, "memory budget must be at least 1 MiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig(RunConfig):
    """How a model is calibrated.

    Attributes:
        include: Shell patterns over node names, weight names and output names; if any are given,
            only nodes that match one count.
        exclude: Patterns of nodes to leave alone; they win over `include`.
        op_types: Operators that count; None for all that can be factored.

    Raises:
        ConfigError: A value is out of range.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    op_types: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeConfig(CalibrationConfig):
    """Options of `analyze`.

    Attributes:
        energy: Share of the energy that a subspace has to hold, in (0, 1].

    Raises:
        ConfigError: A value is out of range.
    """

    energy: float = DEFAULT_ENERGY

    def __post_init__(self) -> None:
        CalibrationConfig.__post_init__(self)
        _check(0 < self.energy <= 1, f"energy {self.energy} is not in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig(RunConfig):
    """How weights are trained.

    Attributes:
        steps: Steps of the optimizer; None for the default, or what `minutes` has room for.
        minutes: Or how long it may take; a few steps are timed, and their number is then fixed.
        batch: Samples of a step; None for as many as are cheap to run, 32 at most.
        learning_rate: The highest; None for the method's own.
        labels: Array of the data, int64 [samples], that holds the right class of each sample.
        augment: Whether samples are varied: moved, with noise, with tokens exchanged.
        share: β of OIALR: directions whose singular value is below this share of the largest go.
        interval: ν of OIALR: steps between two looks at them; None for a share of all steps.
        delay: Steps of OIALR before the first of them; None for a share of all steps.

    Raises:
        ConfigError: A value is out of range.
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
        _check(self.samples is None or self.samples > 2, "samples must be at least 3")
        _check(self.steps is None or self.minutes is None, "steps and minutes exclude each other")
        _check(self.steps is None or self.steps > 0, "steps must be at least 1")
        _check(self.minutes is None or self.minutes > 0, "minutes must be positive")
        _check(self.batch is None or self.batch > 0, "batch must be at least 1")
        rate = self.learning_rate
        _check(rate is None or 0 < rate < math.inf, "learning rate must be positive")
        _check(self.share is None or 0 <= self.share < 1, f"share {self.share} is not in [0, 1)")
        _check(self.interval is None or self.interval > 0, "interval must be at least 1")
        _check(self.delay is None or self.delay >= 0, "delay must not be negative")


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
        _check(
            self.method in FINETUNE_METHODS, f"method {self.method!r} is none of {FINETUNE_METHODS}"
        )
        _check(
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
        _check(self.method in TRAIN_METHODS, f"method {self.method!r} is none of {TRAIN_METHODS}")
        _check(self.labels is not None, "training needs labels")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressConfig(CalibrationConfig):
    """Options of `compress`. One target, or a plan, says how far to go.

    Attributes:
        param_ratio: Parameters to keep over the whole model, in (0, 1].
        size_ratio: Bytes of the file to keep, in (0, 1].
        flop_ratio: Operations of matrix products and convolutions to keep, in (0, 1].
        energy: Share of the energy that each layer's subspaces hold (the paper's rule), in (0, 1].
        quality: Smallest model that is still this good.
        evaluate: The user's metric, of which a higher value is better: a function, or
            'package.module:function', that takes the path of an ONNX file and gives a number.
        labels: Or the array of the data, int64 [samples], that holds the right class of each
            sample: the metric is then the accuracy in per cent.
        method: Key of the method; None for two-sided factors, or one-sided ones where gradients
            cannot be had.
        weighting: What counts at the outputs: `softmax`, `logits` or `values`; None to tell from
            the model and its outputs.
        moves: Keys of the moves that may be made, wherever they are smaller; None for all that
            the method has, where they should be faster too.
        refit: Fit layers anew to what they get behind compressed ones, if that is better on
            samples kept apart for it.
        augment: Calibrate on variations of the samples too, where gradients are taken and a model
            is cheap to run.
        force: Factor every site, also where that saves nothing.
        rank_multiple: Ranks are multiples of this; 8 suits the matrix units of GPUs.
        finetune: Train the result after the original's outputs, as these options say; seed,
            provider, libraries, budget and cache are those of this configuration.
        then: Quantize the result by this scheme, last of all. Bytes and quality that are asked for
            are those of the quantized model; parameters and operations are counted before.

    Raises:
        ConfigError: A value is out of range, or two contradict each other.
    """

    param_ratio: float | None = None
    size_ratio: float | None = None
    flop_ratio: float | None = None
    energy: float | None = None
    quality: QualityTarget | None = None
    evaluate: str | Callable[[str], float] | None = None
    labels: str | None = None
    method: str | None = None
    weighting: Weighting | None = None
    moves: tuple[str, ...] | None = None
    refit: bool = True
    augment: bool = True
    force: bool = False
    rank_multiple: int = 1
    finetune: FinetuneConfig | None = None
    then: SchemeKey | None = None

    def __post_init__(self) -> None:
        CalibrationConfig.__post_init__(self)
        for name in ("param_ratio", "size_ratio", "flop_ratio", "energy"):
            value = getattr(self, name)
            label = name.replace("_", " ")
            _check(value is None or 0 < value <= 1, f"{label} {value} is not in (0, 1]")
        _check(
            len(self.target) <= 1,
            f"{' and '.join(self.target)} exclude each other".replace("_", " "),
        )
        _check(
            self.energy is None or self.method in (None, "utilized-rank"),
            f"energy is the rule of method utilized-rank; method {self.method} takes a param ratio",
        )
        metrics = (self.evaluate is not None) + (self.labels is not None)
        _check(metrics <= 1, "evaluate and labels exclude each other")
        needed = self.quality is not None and self.quality.key == "max_drop"
        _check(metrics == 1 or not needed, "max drop needs a metric: evaluate or labels")
        _check(
            self.weighting in (None, *WEIGHTINGS),
            f"output weighting {self.weighting!r} is none of {WEIGHTINGS}",
        )
        _check(self.rank_multiple >= 1, "rank multiple must be at least 1")
        _check(self.then in (None, *SCHEME_KEYS), f"scheme {self.then!r} is none of {SCHEME_KEYS}")
        fewest = 2 if self.finetune is None else 3
        _check(self.samples is None or self.samples >= fewest, f"samples must be at least {fewest}")

    @property
    def method_key(self) -> str | None:
        """The method that applies; None for the best that the model allows."""
        return "utilized-rank" if self.energy is not None else self.method

    @property
    def target(self) -> dict[str, float]:
        """What was asked for, as plans and reports state it."""
        given = {
            "param_ratio": self.param_ratio,
            "size_ratio": self.size_ratio,
            "flop_ratio": self.flop_ratio,
            "energy": self.energy,
        }
        if self.quality is not None:
            given[self.quality.key] = self.quality.limit
        return {key: value for key, value in given.items() if value is not None}

    @property
    def ratio(self) -> float | None:
        """The share of the budget's unit to keep."""
        return self.param_ratio or self.size_ratio or self.flop_ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateConfig:
    """Options of `validate`.

    Attributes:
        providers: Keys of the execution providers to run on.
        custom_op_libraries: Files of operators that ONNX Runtime does not have itself.
        max_error: Largest relative output error that passes; None for any.
        min_agreement: Least share of equal decisions that passes, in [0, 1]; None for any.
        samples: Samples to use; None for all.
        seed: Seed of the choice of samples.

    Raises:
        ConfigError: A value is out of range.
    """

    providers: tuple[str, ...] = ("cpu",)
    custom_op_libraries: tuple[str, ...] = ()
    max_error: float | None = None
    min_agreement: float | None = None
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check(len(self.providers) > 0, "at least one provider is needed")
        _check(self.max_error is None or self.max_error >= 0, "max error must not be negative")
        least = self.min_agreement
        _check(least is None or 0 <= least <= 1, f"min agreement {least} is not in [0, 1]")
        _check(self.samples is None or self.samples > 0, "samples must be at least 1")
        _check(self.seed >= 0, "seed must not be negative")
