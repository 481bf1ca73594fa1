"""What a caller of a benchmark can choose."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnx_utilrank.errors import ConfigError

__all__ = ["BenchmarkConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    """Options of `benchmark`.

    Attributes:
        providers: The execution providers to run on: ONNX Runtime's names, or those in lower case
            without 'ExecutionProvider'.
        provider_options: Options of each, by what it is called in `providers`.
        custom_op_libraries: Files of operators that ONNX Runtime does not have itself.
        batches: Samples of a run, where the models leave that free; each is a case.
        dims: Lengths of other free axes by name, for inputs that are generated; each combination
            of them, with each batch, is a case.
        threads: Threads within an operator; 0 leaves it to ONNX Runtime.
        samples: Samples of the data to use; None for all.
        seed: Seed of the choice of samples, and of inputs that are generated.
        seconds: How long each case is timed on each provider, at least.

    Raises:
        ConfigError: A value is out of range.
    """

    providers: tuple[str, ...] = ("cpu",)
    provider_options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    custom_op_libraries: tuple[str, ...] = ()
    batches: Sequence[int] = (1,)
    dims: Mapping[str, Sequence[int]] = field(default_factory=dict)
    threads: int = 0
    samples: int | None = None
    seed: int = 0
    seconds: float = 5.0

    def __post_init__(self) -> None:
        faults = {
            "at least one provider is needed": not self.providers,
            "at least one batch is needed": not self.batches,
            "a batch holds at least 1 sample": any(b < 1 for b in self.batches),
            "threads must not be negative": self.threads < 0,
            "samples must be at least 1": self.samples is not None and self.samples < 1,
            "seed must not be negative": self.seed < 0,
            "seconds must be a number of at least 0": not 0 <= self.seconds < math.inf,
        }
        for name, lengths in self.dims.items():
            faults[f"axis {name!r} needs lengths of at least 1"] = not lengths or min(lengths) < 1
        for name in self.provider_options:
            faults[f"provider {name} has options but is not asked for"] = name not in self.providers
        for message, wrong in faults.items():
            if wrong:
                raise ConfigError(message)
