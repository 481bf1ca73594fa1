"""What a quantized layer looks like to the rest of the repair."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.sites.find import site_kind
from onnx_utilrank.sites.site import Skip, Use

__all__ = ["Layer", "Reader"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One node that applies a quantized weight, y = Q(W) x + b, seen as one on floats.

    Attributes:
        use: The node as if it were MatMul, Gemm, Conv or ConvTranspose: `inputs` and `result` are
            values of float type, and `bias` is where a constant vector of floats can be added
            without a node more (`new`: with the branch itself, as of a Conv).
        maker: The node that makes `use.result`, where `use.node` makes integers first.
        dtype: Element type of those values.
        sources: Values of float type that may be x: where x is rounded on the way, what it was
            before (which rounding may have clipped, as a Relu does), then what it is after it.
        reader: Gives its weight.
    """

    use: Use
    maker: int
    dtype: np.dtype[np.generic]
    sources: tuple[str, ...]
    reader: "Reader"

    def weight(self, index: GraphIndex) -> np.ndarray:
        """Q(W) as the operator on floats would store it.

        Raises:
            ModelError: Its parts do not fit each other.
        """
        try:
            return self.reader.weight(index, self.use.node)
        except (ValueError, IndexError) as e:
            reason = " ".join(str(e).split())
            raise ModelError(
                f"{index.store.label}: {self.use.label}: its weight cannot be read: {reason}"
            ) from e

    def matrix(self, index: GraphIndex) -> np.ndarray:
        """Q(W), float64 [m, d]."""
        matrix = site_kind(self.use.op_type).matrix(self.use, self.weight(index))
        return matrix.astype(np.float64)


class Reader(Protocol):
    """How one form of quantized node is read: a file in this folder, an entry in `READERS`."""

    def read(self, index: GraphIndex, k: int) -> Layer | Skip | None:
        """See node `k` as a layer; None where it is not of this form at all."""
        ...

    def weight(self, index: GraphIndex, k: int) -> np.ndarray:
        """The weight of node `k` as the operator on floats would store it, in floats."""
        ...
