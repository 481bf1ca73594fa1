"""What a caller of `quantize` can choose."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from onnx_utilrank.config import CompressConfig, RunConfig, SchemeKey
from onnx_utilrank.statistics.divergence import Weighting

__all__ = ["QuantizeConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig(RunConfig):
    """Options of `quantize`.

    Attributes:
        scheme: `int8`: weights and activations, with ranges from the samples; `int8-dynamic`: with
            ranges at run time; `int4`: weights of matrix products and tables; `fp16`, `bf16`.
        evaluate: The user's metric, see `CompressConfig`.
        labels: Or the array of the data that holds the right classes.
        weighting: What counts at the outputs; None to tell from the model.

    Raises:
        ConfigError: A value is out of range, or two contradict each other.
    """

    scheme: SchemeKey
    evaluate: str | Callable[[str], float] | None = None
    labels: str | None = None
    weighting: Weighting | None = None

    def __post_init__(self) -> None:
        # The rest is what `compress` takes, and is checked as it does.
        self.as_compression()

    def as_compression(self) -> CompressConfig:
        """The same options of a compression that changes nothing before.

        Raises:
            ConfigError: A value is out of range, or two contradict each other.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return CompressConfig(then=own.pop("scheme"), **own)
