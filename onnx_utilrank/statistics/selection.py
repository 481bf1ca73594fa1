"""Which features to keep so that the others are made up for best: column subset selection."""

from dataclasses import dataclass

import numpy as np

from onnx_utilrank.statistics.factorize import Decomposition

__all__ = ["Selection", "select"]

# Added to every variance, relative to itself and to the mean of them: features that never vary are
# still features. Tenfold, so often at most, where features repeat each other: sums of float32
# products are positive semi-definite up to their rounding only.
RIDGE = 1e-7
TENFOLD = 6
LEAST = float(np.finfo(np.float64).tiny)
# Features that are chosen between two looks at all of them, as a share of them all, and among how
# many times as many of the most promising ones.
PER_LOOK, AMONG = 1 / 48, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Features a [n] of which k are kept and the others made up for.

    Attributes:
        order: The features, the most valuable first, [n].
        columns: Partial Cholesky factor V [n, n] of their second moment in that order: rows
            `order` are lower triangular.
        errors: Expected squared error for k = 0 … n kept, float64 [n + 1], non-increasing.
        energy: The expected square that relative errors refer to.
    """

    order: np.ndarray
    columns: np.ndarray
    errors: np.ndarray
    energy: float

    @property
    def found(self) -> Decomposition:
        """The same as a ≈ L_k K_k a, which is made anew each time: L is V.

        Row k of K = V_S^{-1} a_S holds none but the first k + 1 features of `order`, so that K_k a
        is a change of basis of those that are kept.
        """
        picks = self.order
        choice = np.eye(len(picks))[picks]
        return Decomposition(
            expand=self.columns,
            reduce=np.linalg.solve(np.tril(self.columns[picks]), choice),
            errors=self.errors,
            energy=self.energy,
        )

    def basis(self, kept: int) -> tuple[np.ndarray, np.ndarray]:
        """How all follow from those that are kept, [n, k], and which these are, [k], ascending."""
        picks = self.order[:kept]
        own = np.tril(self.columns[picks, :kept])
        expand = np.linalg.solve(own.T, self.columns[:, :kept].T).T
        ascending = np.argsort(picks)
        return expand[:, ascending], picks[ascending]

    def lost(self, values: np.ndarray, kept: int) -> np.ndarray:
        """What is lost of some values [n] of them."""
        expand, picks = self.basis(kept)
        return np.asarray(values - expand @ values[picks])


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
    rest = _definite((second + second.T) / 2)
    effect = root @ rest
    energy = float(np.sum((root @ second) * root))
    expand = np.zeros((n, n))
    order: list[int] = []
    gains: list[float] = []
    alive = np.ones(n, dtype=bool)
    step = max(1, int(n * PER_LOOK))
    while len(order) < n:
        count = min(step, n - len(order))
        places = np.flatnonzero(alive)
        among = places[np.argsort(-_scores(effect, rest)[places], kind="stable")[: AMONG * count]]
        picked, gained = _greedy(effect[:, among], rest[np.ix_(among, among)], count)
        chosen = among[picked]
        factor = np.linalg.cholesky(rest[np.ix_(chosen, chosen)])
        columns = np.linalg.solve(factor, rest[chosen]).T
        moved = np.linalg.solve(factor, effect[:, chosen].T).T
        expand[:, len(order) : len(order) + count] = columns
        rest -= columns @ columns.T
        effect -= moved @ columns.T
        alive[chosen] = False
        order += chosen.tolist()
        gains += gained
    left = np.maximum(energy - np.concatenate([[0.0], np.cumsum(gains)]), 0.0)
    left[-1] = 0.0
    return Selection(
        order=np.array(order),
        columns=expand,
        errors=np.minimum.accumulate(left),
        energy=energy,
    )


def _definite(second: np.ndarray) -> np.ndarray:
    """A second moment with the least ridge of which half is enough; the rest is for rounding."""
    variances = np.diagonal(second)
    level = float(variances.mean())
    ridge = np.diag(RIDGE * (variances + level)) if level > 0 else np.eye(len(second))
    for _ in range(TENFOLD):
        try:
            np.linalg.cholesky(second + ridge / 2)
        except np.linalg.LinAlgError:
            ridge = 10 * ridge
        else:
            break
    return np.asarray(second + ridge)


def _scores(effect: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """What each feature would gain next."""
    with np.errstate(over="ignore"):  # where rounding is all that is left of a chosen one
        return np.asarray(np.square(effect).sum(0) / np.maximum(np.diagonal(rest), LEAST))


def _greedy(effect: np.ndarray, rest: np.ndarray, count: int) -> tuple[list[int], list[float]]:
    """The best `count` of some features, one after the other, and what each of them gains."""
    picked: list[int] = []
    gained: list[float] = []
    for _ in range(count):
        scores = _scores(effect, rest)
        scores[picked] = -1.0
        best = int(scores.argmax())
        picked.append(best)
        gained.append(float(scores[best]))
        row = rest[best] / rest[best, best]
        effect = effect - np.outer(effect[:, best], row)
        rest = rest - np.outer(rest[best], row)
    return picked, gained
