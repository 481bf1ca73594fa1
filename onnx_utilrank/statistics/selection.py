"""Which features to keep so that the others are made up for best: column subset selection."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_utilrank.statistics.factorize import Decomposition

__all__ = ["Selection", "select", "select_together"]

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
    (selection,) = select_together([(root, second)])
    return selection


def select_together(views: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Selection, ...]:
    """Choose the same features for several who see them, each of whom makes up for the others.

    What is kept is worth the sum of what it is worth to each: features that are read at several
    places have values of their own at each of them, as before and behind a gate or a pooling.

    Args:
        views: B [q, n] and C [n, n] of each, see `select`; q may differ.
    """
    watching = [_View.of(root, second) for root, second in views]
    n = len(watching[0].rest)
    order: list[int] = []
    alive = np.ones(n, dtype=bool)
    step = max(1, int(n * PER_LOOK))
    while len(order) < n:
        count = min(step, n - len(order))
        places = np.flatnonzero(alive)
        scores = np.sum([_scores(view.effect, view.rest) for view in watching], axis=0)
        among = places[np.argsort(-scores[places], kind="stable")[: AMONG * count]]
        picked, gained = _greedy(
            [(view.effect[:, among], view.rest[np.ix_(among, among)]) for view in watching], count
        )
        chosen = among[picked]
        for view, gains in zip(watching, gained, strict=True):
            view.take(chosen, len(order))
            view.gains += gains
        alive[chosen] = False
        order += chosen.tolist()
    return tuple(view.selection(order) for view in watching)


@dataclass(slots=True, kw_only=True)
class _View:
    """Features as one sees them, with what is left of them when the chosen ones are regressed out.

    Attributes:
        energy: E‖B a‖².
        rest: C̃ [n, n].
        effect: B C̃ [q, n].
        columns: V [n, n], as far as features are chosen.
        gains: What each of those gained.
    """

    energy: float
    rest: np.ndarray
    effect: np.ndarray
    columns: np.ndarray
    gains: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, root: np.ndarray, second: np.ndarray) -> "_View":
        rest = _definite((second + second.T) / 2)
        return cls(
            energy=float(np.sum((root @ second) * root)),
            rest=rest,
            effect=root @ rest,
            columns=np.zeros(second.shape),
        )

    def take(self, chosen: np.ndarray, at: int) -> None:
        factor = np.linalg.cholesky(self.rest[np.ix_(chosen, chosen)])
        columns = np.linalg.solve(factor, self.rest[chosen]).T
        moved = np.linalg.solve(factor, self.effect[:, chosen].T).T
        self.columns[:, at : at + len(chosen)] = columns
        self.rest -= columns @ columns.T
        self.effect -= moved @ columns.T

    def selection(self, order: Sequence[int]) -> Selection:
        left = np.maximum(self.energy - np.concatenate([[0.0], np.cumsum(self.gains)]), 0.0)
        left[-1] = 0.0
        return Selection(
            order=np.array(order),
            columns=self.columns,
            errors=np.minimum.accumulate(left),
            energy=self.energy,
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


def _greedy(
    views: Sequence[tuple[np.ndarray, np.ndarray]], count: int
) -> tuple[list[int], list[list[float]]]:
    """The best `count` of some features, one after the other, and what each gains in each view.

    Args:
        views: B C̃ [q, n] and C̃ [n, n] of each.
        count: How many.
    """
    picked: list[int] = []
    gained: list[list[float]] = [[] for _ in views]
    for _ in range(count):
        scores = [_scores(effect, rest) for effect, rest in views]
        total = np.sum(scores, axis=0)
        total[picked] = -1.0
        best = int(total.argmax())
        picked.append(best)
        for gains, score in zip(gained, scores, strict=True):
            gains.append(float(score[best]))
        views = [_without(best, effect, rest) for effect, rest in views]
    return picked, gained


def _without(best: int, effect: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    row = rest[best] / rest[best, best]
    return effect - np.outer(effect[:, best], row), rest - np.outer(rest[best], row)
