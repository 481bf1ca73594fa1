"""How far a model is compressed, and by what."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from onnx_utilrank.config.run import CalibrationConfig, check
from onnx_utilrank.config.training import FinetuneConfig
from onnx_utilrank.statistics.divergence import WEIGHTINGS, Weighting

__all__ = [
    "FAST_MULTIPLE",
    "OPTIMIZE_FOR",
    "QUALITY_KEYS",
    "SCHEME_KEYS",
    "CompressConfig",
    "QualityTarget",
    "SchemeKey",
]

QualityKey = Literal["max_drop", "max_divergence", "min_agreement", "min_snr"]
QUALITY_KEYS: tuple[QualityKey, ...] = ("max_drop", "max_divergence", "min_agreement", "min_snr")

SchemeKey = Literal["int8", "int8-dynamic", "int4", "fp16", "bf16"]
SCHEME_KEYS: tuple[SchemeKey, ...] = ("int8", "int8-dynamic", "int4", "fp16", "bf16")

# Those that round weights, so that there is an error to repair.
INTEGER_SCHEMES: tuple[SchemeKey, ...] = ("int8", "int8-dynamic", "int4")

OptimizeFor = Literal["size", "latency"]
OPTIMIZE_FOR: tuple[OptimizeFor, ...] = ("size", "latency")

# Ranks that vector units and matrix units fill: 8 values of float32 in a register of AVX2, 8 of
# float16 in a tile of tensor cores.
FAST_MULTIPLE = 8


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
        check(self.key in QUALITY_KEYS, f"quality {self.key!r} is none of {QUALITY_KEYS}")
        label = self.key.replace("_", " ")
        check(math.isfinite(self.limit), f"{label} {self.limit} is not a finite number")
        check(self.key == "min_snr" or self.limit >= 0, f"{label} must not be negative")
        check(self.key != "min_agreement" or self.limit <= 1, f"{label} is at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressConfig(CalibrationConfig):
    """Options of `compress`. One target, or a plan, says how far to go.

    Attributes:
        param_ratio: Parameters to keep over the whole model, in (0, 1].
        size_ratio: Bytes of the file to keep, in (0, 1].
        flop_ratio: Operations of matrix products and convolutions to keep, in (0, 1].
        latency_ratio: Time of a run to keep, in (0, 1], as measured on the provider.
        energy: Share of the energy that each layer's subspaces hold (the paper's rule), in (0, 1].
        quality: Smallest model that is still this good.
        evaluate: The user's metric, of which a higher value is better: a function, or
            'package.module:function', that takes the path of an ONNX file and gives a number.
        labels: Or the array of the data, int64 [samples] or [samples, positions, …], with the right
            classes: KEY, or KEY=OUTPUT where it is not plain which output they are classes of. The
            metric is then the accuracy in per cent.
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
        rank_multiple: Ranks are multiples of this; None for 1, for 8 where latency counts, and
            from 8 on between Convs.
        optimize_for: `latency` times every layer and its moves on the provider, makes none that is
            slower, and lets a quality target look for the fastest model in place of the smallest;
            a latency ratio implies it.
        latency_batch: Samples of a run that is timed; None for what validation takes, 32 at most.
        finetune: Train the result after the original's outputs, as these options say; seed,
            provider, libraries, budget and cache are those of this configuration.
        then: Quantize the result by this scheme, last of all. Bytes and quality that are asked for
            are those of the quantized model; parameters and operations are counted before.
        repair_rank: Rank of branches beside what is quantized, where they help on samples held
            back; 0 for none. Candidates of a search have none; the bytes of a file count them.

    Raises:
        ConfigError: A value is out of range, or two contradict each other.
    """

    param_ratio: float | None = None
    size_ratio: float | None = None
    flop_ratio: float | None = None
    latency_ratio: float | None = None
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
    rank_multiple: int | None = None
    optimize_for: OptimizeFor = "size"
    latency_batch: int | None = None
    finetune: FinetuneConfig | None = None
    then: SchemeKey | None = None
    repair_rank: int = 0

    def __post_init__(self) -> None:
        CalibrationConfig.__post_init__(self)
        for name in ("param_ratio", "size_ratio", "flop_ratio", "latency_ratio", "energy"):
            value = getattr(self, name)
            label = name.replace("_", " ")
            check(value is None or 0 < value <= 1, f"{label} {value} is not in (0, 1]")
        check(
            len(self.target) <= 1,
            f"{' and '.join(self.target)} exclude each other".replace("_", " "),
        )
        check(
            self.energy is None or self.method in (None, "utilized-rank"),
            f"energy is the rule of method utilized-rank; method {self.method} takes a param ratio",
        )
        own = None if self.finetune is None else self.finetune.labels
        check(
            own is None or self.labels in (None, own),
            f"labels {self.labels!r} and {own!r} (fine-tuning) differ",
        )
        metrics = (self.evaluate is not None) + (self.labels is not None)
        check(metrics <= 1, "evaluate and labels exclude each other")
        needed = self.quality is not None and self.quality.key == "max_drop"
        check(metrics == 1 or not needed, "max drop needs a metric: evaluate or labels")
        check(
            self.weighting in (None, *WEIGHTINGS),
            f"output weighting {self.weighting!r} is none of {WEIGHTINGS}",
        )
        multiple, batch = self.rank_multiple, self.latency_batch
        check(multiple is None or multiple >= 1, "rank multiple must be at least 1")
        check(batch is None or batch >= 1, "latency batch must be at least 1")
        check(self.optimize_for in OPTIMIZE_FOR, f"optimize for one of {OPTIMIZE_FOR}")
        check(not (self.latency_aware and self.force), "force makes moves that latency refuses")
        check(self.then in (None, *SCHEME_KEYS), f"scheme {self.then!r} is none of {SCHEME_KEYS}")
        check(self.repair_rank >= 0, "repair rank must not be negative")
        quantized = self.then in INTEGER_SCHEMES
        check(quantized or not self.repair_rank, "repair rank goes with then: int8 or int4")
        fewest = 2 if self.finetune is None else 3
        check(self.samples is None or self.samples >= fewest, f"samples must be at least {fewest}")

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
            "latency_ratio": self.latency_ratio,
            "energy": self.energy,
        }
        if self.quality is not None:
            given[self.quality.key] = self.quality.limit
        return {key: value for key, value in given.items() if value is not None}

    @property
    def ratio(self) -> float | None:
        """The share of the budget's unit to keep."""
        return self.param_ratio or self.size_ratio or self.flop_ratio or self.latency_ratio

    @property
    def latency_aware(self) -> bool:
        """Whether the result has to be faster, by measurement."""
        return self.latency_ratio is not None or self.optimize_for == "latency"

    @property
    def multiple(self) -> int:
        """What ranks are multiples of."""
        return self.rank_multiple or (FAST_MULTIPLE if self.latency_aware else 1)
