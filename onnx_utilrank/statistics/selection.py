"""Which features to keep so that the others are made up for best: column subset selection."""

from dataclasses import dataclass

import numpy as np
import torch

from onnx_utilrank.statistics.factorize import Decomposition

__all__ = ["Selection", "select"]

# Added to every variance, relative to their mean: features that never vary are as good as any.
RIDGE = 1e-7
# Features that are chosen between two looks at all of them, as a share of them all, and among how
# many times as many of the most promising ones.
PER_LOOK, AMONG = 1 / 48, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Features a [n] of which k are kept and the others made up for: a ≈ L_k K_k a.

    Attributes:
        order: The features, the most valuable first, [n].
        found: L and K. Row k of K holds none but the first k + 1 features of `order`, so that
            K_k a is a change of basis of those that are kept; `errors` are those of each k.
    """

    order: np.ndarray
    found: Decomposition

    def basis(self, kept: int) -> tuple[np.ndarray, np.ndarray]:
        """How all follow from those that are kept, [n, k], and the choice of these, [k, n]."""
        n = len(self.order)
        chosen = np.sort(self.order[:kept])
        choice = np.eye(n)[chosen]
        return self.found.kept(kept) @ choice.T, choice


def select(root: np.ndarray, second: np.ndarray) -> Selection:
    """Choose features greedily: min E‖B (a − E[a | those that are kept])‖², one more at a time.

    The next one is the j of largest ‖B C̃_j‖² / C̃_jj, C̃ what is left of the second moment when the
    chosen ones are regressed out (its Schur complement): forward selection, which pivoted Cholesky
    factors bring about.

    Args:
        root: B [q, n], what a change of the features counts.
        second: C [n, n], their second moment.
    """
    n = len(second)
    level = float(np.trace(second)) / n
    rest = torch.from_numpy((second + second.T) / 2 + (RIDGE * level or 1.0) * np.eye(n))
    effect = torch.from_numpy(np.array(root)) @ rest
    expand = torch.zeros(n, n, dtype=torch.float64)
    energy = float(np.sum((root @ second) * root))
    order: list[int] = []
    gains: list[float] = []
    alive = torch.ones(n, dtype=torch.bool)
    step = max(1, int(n * PER_LOOK))
    while len(order) < n:
        count = min(step, n - len(order))
        scores = torch.where(alive, effect.square().sum(0) / rest.diagonal(), -1.0)
        among = torch.topk(scores, min(AMONG * count, int(alive.sum()))).indices
        picked, gained = _greedy(effect[:, among], rest[among][:, among], count)
        chosen = among[picked]
        factor = torch.linalg.cholesky(rest[chosen][:, chosen])
        columns = torch.linalg.solve_triangular(factor, rest[chosen], upper=False).T
        moved = torch.linalg.solve_triangular(factor, effect[:, chosen].T, upper=False).T
        expand[:, len(order) : len(order) + count] = columns
        rest -= columns @ columns.T
        effect -= moved @ columns.T
        alive[chosen] = False
        rest[chosen, chosen] = 1.0  # nothing is left of them, and nothing is divided by it
        order += chosen.tolist()
        gains += gained
    picks = np.array(order)
    reduce = torch.linalg.solve_triangular(
        expand[picks].tril(), torch.eye(n, dtype=torch.float64)[picks], upper=False
    )
    left = np.maximum(energy - np.concatenate([[0.0], np.cumsum(gains)]), 0.0)
    left[-1] = 0.0
    found = Decomposition(
        expand=expand.numpy(),
        reduce=reduce.numpy(),
        errors=np.minimum.accumulate(left),
        energy=energy,
    )
    return Selection(order=picks, found=found)


def _greedy(
    effect: torch.Tensor, rest: torch.Tensor, count: int
) -> tuple[torch.Tensor, list[float]]:
    """The best `count` of some features, one after the other, and what each of them gains."""
    effect, rest = effect.clone(), rest.clone()
    picked, gained = [], []
    free = torch.ones(len(rest), dtype=torch.bool)
    for _ in range(count):
        scores = torch.where(free, effect.square().sum(0) / rest.diagonal(), -1.0)
        best = int(scores.argmax())
        picked.append(best)
        gained.append(float(scores[best]))
        row = rest[best] / rest[best, best]
        effect -= torch.outer(effect[:, best], row)
        rest -= torch.outer(rest[best].clone(), row)
        free[best] = False
        rest[best, best] = 1.0
    return torch.tensor(picked), gained
