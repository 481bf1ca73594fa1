"""Everything a caller can choose, with its defaults and its limits."""

from dataclasses import dataclass

from onnx_utilrank.errors import ConfigError

__all__ = ["AnalyzeConfig", "CompressConfig", "ValidateConfig"]

# The paper states no threshold that we could confirm; this one is ours, and an option everywhere.
DEFAULT_ENERGY = 0.999


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFilter:
    """Which nodes may be measured or factored.

    Attributes:
        include: Shell patterns over node names, weight names and output names; if any are given,
            only nodes that match one count.
        exclude: Patterns of nodes to leave alone; they win over `include`.
        op_types: Operators that count; None for all that can be factored.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    op_types: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeConfig(SiteFilter):
    """Options of `analyze`.

    Attributes:
        energy: Share of the energy that a subspace has to hold, in (0, 1].
        samples: Samples to use; None for all.
        seed: Seed of the choice of samples.
        provider: Key of the execution provider.

    Raises:
        ConfigError: A value is out of range.
    """

    energy: float = DEFAULT_ENERGY
    samples: int | None = None
    seed: int = 0
    provider: str = "cpu"

    def __post_init__(self) -> None:
        _check(0 < self.energy <= 1, f"energy {self.energy} is not in (0, 1]")
        _check(self.samples is None or self.samples > 0, "samples must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressConfig(SiteFilter):
    """Options of `compress`. One of `param_ratio`, `energy` and a plan says how far to go.

    Attributes:
        param_ratio: Parameters to keep over the whole model, in (0, 1].
        energy: Share of the energy that each layer's subspaces hold (the paper's rule), in (0, 1].
        method: Key of the method that spends `param_ratio`.
        force: Factor every site, also where that saves nothing.
        rank_multiple: Ranks are multiples of this; 8 suits the matrix units of GPUs.
        samples: Samples to use, those held back included; None for all.
        seed: Seed of the choice of samples and of the split.
        provider: Key of the execution provider to calibrate and validate on.

    Raises:
        ConfigError: A value is out of range, or two contradict each other.
    """

    param_ratio: float | None = None
    energy: float | None = None
    method: str | None = None
    force: bool = False
    rank_multiple: int = 1
    samples: int | None = None
    seed: int = 0
    provider: str = "cpu"

    def __post_init__(self) -> None:
        ratio, energy = self.param_ratio, self.energy
        _check(ratio is None or 0 < ratio <= 1, f"param ratio {ratio} is not in (0, 1]")
        _check(energy is None or 0 < energy <= 1, f"energy {energy} is not in (0, 1]")
        _check(ratio is None or energy is None, "param ratio and energy exclude each other")
        _check(
            energy is None or self.method in (None, "utilized-rank"),
            f"energy is the rule of method utilized-rank; method {self.method} takes a param ratio",
        )
        _check(self.rank_multiple >= 1, "rank multiple must be at least 1")
        _check(self.samples is None or self.samples > 1, "samples must be at least 2")

    @property
    def method_key(self) -> str:
        """The method that applies."""
        return "utilized-rank" if self.energy is not None else self.method or "one-sided"

    @property
    def target(self) -> dict[str, float]:
        """What was asked for, as plans and reports state it."""
        given = {"param_ratio": self.param_ratio, "energy": self.energy}
        return {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateConfig:
    """Options of `validate`.

    Attributes:
        providers: Keys of the execution providers to run on.
        max_error: Largest relative output error that passes; None for any.
        min_agreement: Least share of equal decisions that passes, in [0, 1]; None for any.
        samples: Samples to use; None for all.
        seed: Seed of the choice of samples.

    Raises:
        ConfigError: A value is out of range.
    """

    providers: tuple[str, ...] = ("cpu",)
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
