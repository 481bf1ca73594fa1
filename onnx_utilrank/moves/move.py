"""What a move offers to the rest of the pipeline."""

from typing import Protocol

import numpy as np

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.factorize import Factors

__all__ = ["Matrix", "MoveKind"]

# Operator, output features and input features of a weight.
Matrix = tuple[str, int, int]


class MoveKind(Protocol):
    """A way to store a rank-r weight: one file in this folder, and an entry in `MOVES`."""

    key: str

    def applies(self, index: GraphIndex, site: Site) -> bool:
        """Whether the site's nodes allow it."""
        ...

    def top_rank(self, site: Site) -> int:
        """The largest rank at which it is smaller than the weight; 0 where none is."""
        ...

    def pays(self, site: Site, rank: int, rows: float) -> bool:
        """Whether it should be faster than the dense weight.

        Args:
            site: The site.
            rank: The rank.
            rows: Rows of output that one sample has.
        """
        ...

    def parameters(self, site: Site, rank: int) -> int:
        """Elements of all it stores, a bias correction apart."""
        ...

    def matrices(self, site: Site, rank: int) -> tuple[Matrix, ...]:
        """The weights that it stores; what `parameters` counts beside them are other constants."""
        ...

    def multiplications(self, site: Site, rank: int) -> float:
        """Multiply-accumulates a row of the output."""
        ...

    def replace(
        self, surgeon: Surgeon, site: Site, factors: Factors, lost_mean: np.ndarray | None
    ) -> None:
        """Rewrite every use of the site.

        Args:
            surgeon: The graph under the knife.
            site: The site.
            factors: Ŵ, float64.
            lost_mean: (W − Ŵ) E[x], float64 [m], to be added to the bias; None leaves the bias.

        Raises:
            ModelError: A factor does not fit the dtype of the weight.
        """
        ...
