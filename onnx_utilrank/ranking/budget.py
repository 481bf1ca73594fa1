"""Spend one budget over all sites: the Lagrangian allocation."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

__all__ = ["allocate", "spend"]

BISECTIONS = 100


class _Priced(Protocol):
    """A move, of one site or of several together."""

    @property
    def cost(self) -> float: ...

    @property
    def error(self) -> float: ...


P_co = TypeVar("P_co", bound=_Priced, covariant=True)


class _Offer(Protocol[P_co]):
    """What one of them is chosen from."""

    @property
    def moves(self) -> Sequence[P_co]: ...


def allocate(choices: Sequence[_Offer[P_co]], budget: float) -> list[P_co] | None:
    """Least total error within a budget of whatever costs are counted in.

    Each site takes the move with the least error + λ·cost; λ is bisected until the budget
    holds, and what is left is spent greedily on the best error per unit of cost. On convex error
    curves this is optimal up to the last site (Everett, "Generalized Lagrange multiplier method",
    Operations Research 11(3), 1963). Dense is a move like any other, so that the break-even of a
    factorization needs no rule of its own.

    Args:
        choices: The sites.
        budget: What all moves may cost together.

    Returns:
        One move a site, or None where even the smallest moves take more than the budget.
    """
    costs = [np.array([m.cost for m in c.moves], dtype=np.float64) for c in choices]
    errors = [np.array([m.error for m in c.moves]) for c in choices]
    if sum(c.min() for c in costs) > budget:
        return None

    def pick(price: float) -> list[int]:
        # Of equals the cheaper: at price 0 a free saving is taken too.
        return [int(np.lexsort((c, e + price * c))[0]) for c, e in zip(costs, errors, strict=True)]

    def spent(taken: list[int]) -> float:
        return float(sum(c[k] for c, k in zip(costs, taken, strict=True)))

    taken = pick(0.0)
    if spent(taken) > budget:
        # Prices span the whole range of errors a unit; they are bisected by their order of
        # magnitude, as errors do.
        low, high = 1e-30, 1.0
        while spent(pick(high)) > budget and high < 1e30:
            high *= 10.0
        for _ in range(BISECTIONS):
            middle = float(np.sqrt(low * high))
            low, high = (low, middle) if spent(pick(middle)) <= budget else (middle, high)
        taken = pick(high)
        if spent(taken) > budget:  # errors too flat for any price to tell moves apart
            taken = [int(c.argmin()) for c in costs]
    _fill(costs, errors, taken, budget - spent(taken))
    return [c.moves[k] for c, k in zip(choices, taken, strict=True)]


def spend(choices: Sequence[_Offer[P_co]], moves: Sequence[P_co], left: float) -> list[P_co]:
    """Better moves, as far as what is left of a budget pays for them.

    Args:
        choices: The sites.
        moves: One of theirs each.
        left: What all may cost together beyond what these do.
    """
    costs = [np.array([m.cost for m in c.moves], dtype=np.float64) for c in choices]
    errors = [np.array([m.error for m in c.moves]) for c in choices]
    taken = [list(c.moves).index(move) for c, move in zip(choices, moves, strict=True)]
    _fill(costs, errors, taken, left)
    return [c.moves[k] for c, k in zip(choices, taken, strict=True)]


def _fill(costs: list[np.ndarray], errors: list[np.ndarray], taken: list[int], left: float) -> None:
    """Spend what is left: again and again the affordable move that gains most a unit."""
    while True:
        best: tuple[float, int, int] | None = None
        for site, (cost, error) in enumerate(zip(costs, errors, strict=True)):
            more = cost - cost[taken[site]]
            gain = error[taken[site]] - error
            worth = np.where((gain > 0) & (more <= left), gain / np.maximum(more, 1.0), 0.0)
            k = int(worth.argmax())
            if worth[k] > 0 and (best is None or worth[k] > best[0]):
                best = (float(worth[k]), site, k)
        if best is None:
            return
        _, site, k = best
        left -= costs[site][k] - costs[site][taken[site]]
        taken[site] = k
