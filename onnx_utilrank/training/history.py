"""How training went."""

import math
from dataclasses import dataclass, field

__all__ = ["History", "Look"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How things stood at one step.

    Attributes:
        step: Steps done.
        loss: Mean loss of the steps since the look before.
        divergence: Of the student on samples kept apart to judge it; with labels, what training
            makes small, in which they count.
        trained: Numbers that are trained at this step.
        rank: Sum of the ranks of the weights that are in bases; 0 where none are.
    """

    step: int
    loss: float
    divergence: float
    trained: int
    rank: int


@dataclass(slots=True)
class History:
    """What happened.

    Attributes:
        looks: In order; the first is before any step.
        dropped: Steps that were not taken, for their gradients were not finite.
        seconds: Of training.
    """

    looks: list[Look] = field(default_factory=list)
    dropped: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> Look:
        """The look at which the student was best; one that gave no number is the worst."""

        def lost(look: Look) -> float:
            return math.inf if math.isnan(look.divergence) else look.divergence

        return min(self.looks, key=lost)

    @property
    def since_best(self) -> int:
        """Looks after that one."""
        return len(self.looks) - 1 - self.looks.index(self.best)
