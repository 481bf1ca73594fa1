"""What the outputs of a model say about a change of one layer: pure numpy."""

from dataclasses import dataclass

import numpy as np

from onnx_utilrank.statistics.moments import SecondMoment, shrinkage

__all__ = ["Sensitivity"]

# Floor of the metric, relative to its mean: a direction that no gradient was seen for is not free.
DAMPING = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Sums over some samples about the rows on one side of a site, x [p = d] or W x [p = m].

    Attributes:
        moment: Moment of the rows that the outputs depend on: padding, and tokens that are dropped
            later, have no gradient and do not count.
        gamma: Sum over samples and draws of Σ_positions g g^T, float64 [p, p], of the gradients g
            with respect to those rows.
        blocks: The same for each group of hidden features among the outputs, [n, n] each.
        samples: Samples times draws.
        decisions: Rows of the outputs that gradients were drawn for: how much independent
            evidence `gamma` holds.
    """

    moment: SecondMoment
    gamma: np.ndarray
    blocks: tuple[np.ndarray, ...] = ()
    samples: int = 0
    decisions: int = 0

    def __add__(self, other: "Sensitivity") -> "Sensitivity":
        blocks = zip(self.blocks, other.blocks, strict=True)
        return Sensitivity(
            moment=self.moment + other.moment,
            gamma=self.gamma + other.gamma,
            blocks=tuple(one + two for one, two in blocks),
            samples=self.samples + other.samples,
            decisions=self.decisions + other.decisions,
        )

    def fisher(self, target: np.ndarray | None = None) -> np.ndarray:
        """Γ = E[Σ_positions g g^T] over samples, shrunk where there were few decisions, [p, p].

        A few decisions show a few directions only; the others are then not free but unknown, and
        are given the mean (`shrinkage`).

        Args:
            target: What Γ is taken to be where nothing is known, up to its size, positive
                semi-definite [p, p]; None for the identity.
        """
        return self._shrunk(self.gamma, target)

    @property
    def observed(self) -> np.ndarray:
        """Γ as it was seen, however few decisions there were, [p, p]."""
        return np.asarray(self.gamma / max(self.samples, 1))

    @property
    def observed_blocks(self) -> list[np.ndarray]:
        """The same of every group of hidden features, [n, n] each."""
        return [block / max(self.samples, 1) for block in self.blocks]

    def block_fishers(self) -> list[np.ndarray]:
        """Γ of every group of hidden features, [n, n] each."""
        return [self._shrunk(block) for block in self.blocks]

    def _shrunk(self, total: np.ndarray, target: np.ndarray | None = None) -> np.ndarray:
        p = len(total)
        found = total / max(self.samples, 1)
        level = float(np.trace(found)) / p
        prior = np.eye(p)
        if target is not None and np.trace(target) > 0:
            prior = target * (p / np.trace(target)) + DAMPING**2 * prior  # it may be singular
        if not level > 0:
            return prior
        mixed = max(shrinkage(found, self.decisions), DAMPING)
        return np.asarray((1 - mixed) * found + mixed * level * prior)
