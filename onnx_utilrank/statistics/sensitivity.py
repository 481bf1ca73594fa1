"""What the outputs of a model say about a change of one layer: pure numpy."""

from dataclasses import dataclass

import numpy as np

from onnx_utilrank.statistics.moments import SecondMoment, shrinkage

__all__ = ["Sensitivity"]

# Floor of the metric, relative to its mean: a direction that no gradient was seen for is not free.
DAMPING = 1e-2


@dataclass(slots=True, kw_only=True)
class Sensitivity:
    """Sums over some samples about one site.

    Attributes:
        moment: Moment of x [d], or of W x [m], over the rows that the outputs depend on: padding,
            and tokens that are dropped later, have no gradient and do not count.
        gamma: Sum over samples and draws of Σ_positions g g^T, float64 [m, m].
        samples: Samples times draws.
        decisions: Rows of the outputs that gradients were drawn for: how much independent
            evidence `gamma` holds.
    """

    moment: SecondMoment
    gamma: np.ndarray
    samples: int = 0
    decisions: int = 0

    @property
    def fisher(self) -> np.ndarray:
        """Γ = E[Σ_positions g g^T] over samples, shrunk where there were few decisions, [m, m].

        A few decisions show a few directions only; the others are then not free but unknown, and
        are given the mean (`shrinkage`).
        """
        m = len(self.gamma)
        found = self.gamma / max(self.samples, 1)
        level = float(np.trace(found)) / m
        if not level > 0:
            return np.eye(m)
        mixed = max(shrinkage(found, self.decisions), DAMPING)
        return np.asarray((1 - mixed) * found + mixed * level * np.eye(m))
