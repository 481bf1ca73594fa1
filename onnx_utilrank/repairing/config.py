"""What a caller of `repair` can choose."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from onnx_utilrank.config import CalibrationConfig, CompressConfig, QualityTarget
from onnx_utilrank.errors import ConfigError
from onnx_utilrank.statistics.divergence import Weighting

__all__ = ["RepairConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairConfig(CalibrationConfig):
    """Options of `repair`. One of rank, bytes and quality says how far to go.

    Attributes:
        rank: Of the branch at every layer that is predicted to gain by it; 0 for none at all.
        extra_bytes: What branches may add to the file, as a share of the quantized model's bytes.
        quality: Smallest branches with which the model is this good.
        evaluate: The user's metric; see `CompressConfig`.
        labels: Or the array of the data that holds the right classes; see `CompressConfig`.
        weighting: What counts at the outputs; None to tell from the model.
        augment: Calibrate on variations of the samples too, where that is cheap.

    Raises:
        ConfigError: A value is out of range, or there is not just one target.
    """

    rank: int | None = None
    extra_bytes: float | None = None
    quality: QualityTarget | None = None
    evaluate: str | Callable[[str], float] | None = None
    labels: str | None = None
    weighting: Weighting | None = None
    augment: bool = True

    def __post_init__(self) -> None:
        CalibrationConfig.__post_init__(self)
        if len(self.target) != 1:
            raise ConfigError("one target is needed: a rank, extra bytes or a quality")
        if self.rank is not None and self.rank < 0:
            raise ConfigError("rank must not be negative")
        if self.extra_bytes is not None and not 0 <= self.extra_bytes < float("inf"):
            raise ConfigError("extra bytes must be a share that is not negative")
        self.measuring()  # what it shares with compress is checked there

    @property
    def target(self) -> dict[str, float]:
        """What was asked for, as reports state it."""
        given: dict[str, float | None] = {"rank": self.rank, "extra_bytes": self.extra_bytes}
        if self.quality is not None:
            given[self.quality.key] = self.quality.limit
        return {key: value for key, value in given.items() if value is not None}

    def measuring(self) -> CompressConfig:
        """The same as options of `compress`, which measures and judges by them."""
        shared = {field.name for field in fields(CompressConfig)}
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return CompressConfig(**{name: own[name] for name in own if name in shared})
