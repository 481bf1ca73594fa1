"""How a model is run, calibrated, measured and compared."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from onnx_utilrank.errors import ConfigError

__all__ = ["AnalyzeConfig", "CalibrationConfig", "RunConfig", "ValidateConfig", "check"]

# The paper states no threshold that we could confirm; this one is ours, and an option everywhere.
DEFAULT_ENERGY = 0.999

# What statistics and activations may take together; models of some 100 M parameters fit.
DEFAULT_MEMORY = 4 * 2**30


def check(fine: bool, message: str) -> None:
    """Refuse options that make no sense.

    Raises:
        ConfigError: They do not.
    """
    if not fine:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How a model is run over samples.

    Attributes:
        samples: Samples to use, those held back included; None for all.
        seed: Seed of the choice of samples, of the split and of all that is drawn.
        provider: The execution provider to run on: ONNX Runtime's name, or that in lower case
            without 'ExecutionProvider'.
        provider_options: Its options, by ONNX Runtime's names.
        custom_op_libraries: Files of operators that ONNX Runtime does not have itself.
        memory_budget: Bytes that weights, running sums and the activations of gradients may take
            together; where the weights take more than half of it, they come on top. Hidden units
            whose decompositions would take more than a quarter of it stay.
        cache: Folder in which statistics and checkpoints are kept and looked up; None for none.

    Raises:
        ConfigError: A value is out of range.
    """

    samples: int | None = None
    seed: int = 0
    provider: str = "cpu"
    provider_options: Mapping[str, object] = field(default_factory=dict)
    custom_op_libraries: tuple[str, ...] = ()
    memory_budget: int = DEFAULT_MEMORY
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check(self.samples is None or self.samples > 0, "samples must be at least 1")
        check(self.seed >= 0, "seed must not be negative")
        check(self.memory_budget >= 2**20, "memory budget must be at least 1 MiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig(RunConfig):
    """How a model is calibrated.

    Attributes:
        include: Shell patterns over node names, weight names and output names; if any are given,
            only nodes that match one count.
        exclude: Patterns of nodes to leave alone; they win over `include`.
        op_types: Operators that count; None for all that can be factored.
        engine: Who collects statistics and decomposes: 'local', this process; 'ray', workers of a
            Ray on this machine (or of the one that is connected to already); 'ray:' and the address
            of the head of a cluster, or 'ray:auto', the workers of that.

    Raises:
        ConfigError: A value is out of range.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    op_types: tuple[str, ...] | None = None
    engine: str = "local"

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        known = self.engine in ("local", "ray") or self.engine.startswith("ray:")
        check(known, f"engine {self.engine!r} is none of local, ray and ray:ADDRESS")


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
        check(0 < self.energy <= 1, f"energy {self.energy} is not in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateConfig:
    """Options of `validate`.

    Attributes:
        providers: The execution providers to run on, as in `RunConfig`.
        provider_options: Options of each, by what it is called in `providers`.
        custom_op_libraries: Files of operators that ONNX Runtime does not have itself.
        max_error: Largest relative output error that passes; None for any.
        min_agreement: Least share of equal decisions that passes, in [0, 1]; None for any.
        labels: The array of the data, int64 [samples] or [samples, positions, …], with the right
            classes: both models are held to them. `KEY=OUTPUT` says which output they are classes
            of, where several could be meant.
        max_drop: Most points of accuracy that may be lost; None for any. It needs labels.
        samples: Samples to use; None for all.
        seed: Seed of the choice of samples.

    Raises:
        ConfigError: A value is out of range.
    """

    providers: tuple[str, ...] = ("cpu",)
    provider_options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    custom_op_libraries: tuple[str, ...] = ()
    max_error: float | None = None
    min_agreement: float | None = None
    labels: str | None = None
    max_drop: float | None = None
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check(len(self.providers) > 0, "at least one provider is needed")
        for name in self.provider_options:
            check(name in self.providers, f"provider {name} has options but is not asked for")
        check(self.max_error is None or self.max_error >= 0, "max error must not be negative")
        least = self.min_agreement
        check(least is None or 0 <= least <= 1, f"min agreement {least} is not in [0, 1]")
        check(self.max_drop is None or self.max_drop >= 0, "max drop must not be negative")
        check(self.max_drop is None or self.labels is not None, "max drop needs labels")
        check(self.samples is None or self.samples > 0, "samples must be at least 1")
        check(self.seed >= 0, "seed must not be negative")
