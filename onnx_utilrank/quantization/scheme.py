"""What a scheme of quantization offers to the rest of the pipeline."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnx_utilrank.calibration.collect import Progress, silent
from onnx_utilrank.calibration.data import Dataset
from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed
from onnx_utilrank.sites.site import Skip
from onnx_utilrank.statistics.divergence import OutputLoss

__all__ = ["Calibration", "Quantized", "Scheme", "require_known", "require_some"]

# Samples, at most, that choices are judged on.
JUDGED = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The samples that a scheme may look at.

    Attributes:
        data: The data set.
        samples: Numbers of the samples: those that calibrate, none that are held back.
        provider: Where models run.
        batch: Samples of a run.
        losses: What counts at the outputs; empty where none holds floating values.
        progress: Called as work goes on.
    """

    data: Dataset
    samples: Sequence[int]
    provider: Provider
    batch: int
    losses: tuple[OutputLoss, ...] = ()
    progress: Progress = silent

    def feeds(self) -> Iterator[Feed]:
        """All of them in runs."""
        return self.data.feeds(self.samples, batch=self.batch)

    def judging(self) -> list[Feed]:
        """The last of them, whole runs, on which one choice is compared with another."""
        run = self.data.run or 1
        few = max(JUDGED // run, 1) * run
        return list(self.data.feeds(self.samples[-few:], batch=self.batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A model in fewer bits.

    Attributes:
        store: The model.
        weights: How messages name the nodes whose weights are.
        left: Nodes with weights that are not, and why.
        in_float: Nodes that could be, and stay for what they would lose, each by the first value
            that it makes: what a plan records, for the choice rests on the samples.
        notes: Sentences that a user has to know.
    """

    store: ModelStore
    weights: tuple[str, ...]
    left: tuple[Skip, ...]
    in_float: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Scheme(Protocol):
    """A way to store weights in fewer bits: a class in this folder, and an entry in `SCHEMES`."""

    key: str

    def check(self, provider: Provider) -> None:
        """Check that what it writes can be run.

        Raises:
            ProviderUnavailableError: The provider has no kernels for it.
        """
        ...

    def matrix_bytes(
        self, op_type: str, outputs: int, inputs: int, dtype: np.dtype[np.generic]
    ) -> float:
        """Bytes in the file of a weight W [outputs, inputs] of an operator.

        With its scales and zero points, and where it is quantized with the nodes that come along.
        A weight that the scheme leaves has those of its own element type `dtype`.
        """
        ...

    def quantize(
        self, store: ModelStore, calibration: Calibration, in_float: Sequence[str] | None = None
    ) -> Quantized:
        """Make the model; the source is not changed.

        Args:
            store: The model.
            calibration: Samples.
            in_float: Nodes that are to stay, as a plan says, each by the first value that it
                makes; None lets the scheme choose.

        Raises:
            ModelError: Nothing can be quantized, a value is of no node, or the model cannot be run.
        """
        ...


def require_known(store: ModelStore, known: Container[str], in_float: Sequence[str]) -> None:
    """Check that what a plan leaves in float is there.

    Raises:
        ModelError: It is not.
    """
    for name in in_float:
        if name not in known:
            raise ModelError(
                f"{store.label}: the plan leaves the node that makes {name!r} in float, and there "
                "is none that could be quantized"
            )


def require_some(
    store: ModelStore, scheme: str, weights: Sequence[object], left: Sequence[Skip]
) -> None:
    """Check that there is something to quantize.

    Raises:
        ModelError: There is nothing; the message says why.
    """
    if not weights:
        why = "; ".join(dict.fromkeys(skip.reason for skip in left)) or "no node holds a weight"
        raise ModelError(f"{store.label}: {scheme}: nothing can be quantized: {why}")
