"""Least squares between what a layer should give and what it gives: pure numpy."""

from dataclasses import dataclass

import numpy as np

from onnx_utilrank.statistics.factorize import eigenbasis

__all__ = ["CrossMoment", "regression"]

# Ridges that are tried, relative to the mean variance of the regressors. The last stands for none
# at all: the weight stays as it is.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, np.inf)


@dataclass(slots=True, kw_only=True)
class CrossMoment:
    """Sums over pairs of rows: a target y [p], and the x [p] that there is in its place.

    Attributes:
        targets: Σ y, [p].
        regressors: Σ x, [p].
        cross: Σ y x^T, [p, p].
        square: Σ x x^T, [p, p].
        rows: Number of pairs.
    """

    targets: np.ndarray
    regressors: np.ndarray
    cross: np.ndarray
    square: np.ndarray
    rows: int = 0

    @classmethod
    def zero(cls, p: int) -> "CrossMoment":
        """The sums over no rows."""
        return cls(
            targets=np.zeros(p),
            regressors=np.zeros(p),
            cross=np.zeros((p, p)),
            square=np.zeros((p, p)),
        )

    def add(self, y: np.ndarray, x: np.ndarray) -> None:
        """Add pairs of rows, [n, p] both; products are formed in float32 or wider."""
        y, x = (v.astype(np.promote_types(v.dtype, np.float32), copy=False) for v in (y, x))
        self.targets += y.sum(0, dtype=np.float64)
        self.regressors += x.sum(0, dtype=np.float64)
        self.cross += y.T @ x
        self.square += x.T @ x
        self.rows += len(y)

    def __add__(self, other: "CrossMoment") -> "CrossMoment":
        return CrossMoment(
            targets=self.targets + other.targets,
            regressors=self.regressors + other.regressors,
            cross=self.cross + other.cross,
            square=self.square + other.square,
            rows=self.rows + other.rows,
        )

    def centred(self) -> tuple[np.ndarray, np.ndarray]:
        """Cov(y, x) and Cov(x, x)."""
        n = max(self.rows, 1)
        y, x = self.targets / n, self.regressors / n
        return self.cross / n - np.outer(y, x), self.square / n - np.outer(x, x)


def regression(halves: tuple[CrossMoment, CrossMoment], gram: np.ndarray) -> np.ndarray:
    """M = argmin E‖y − M x‖² + ρ‖M − I‖², with the ridge ρ that predicts best.

    Each half of the rows predicts the other: where rows are too few to learn from, the largest
    ridge wins and M is the identity; so it is where a half has no rows at all.

    Args:
        halves: Sums over two disjoint sets of rows.
        gram: G [p, p], symmetric, that errors e are measured by: e^T G e.
    """
    if min(half.rows for half in halves) < 2:
        return np.eye(len(gram))
    scores = np.zeros(len(RIDGES))
    for fit, test in (halves, halves[::-1]):
        scores += _scores(fit, test, gram)
    best = RIDGES[max(k for k in range(len(RIDGES)) if scores[k] == scores.min())]
    whole = halves[0] + halves[1]
    cross, square = whole.centred()
    ridge = best * float(np.trace(square)) / len(square)
    if not np.isfinite(ridge) or not ridge > 0:
        return np.eye(len(gram))
    ridges = ridge * np.eye(len(square))
    return np.asarray(np.linalg.solve(square + ridges, (cross + ridges).T).T)


def _scores(fit: CrossMoment, test: CrossMoment, gram: np.ndarray) -> np.ndarray:
    """For each ridge what M of one half loses on the other, less what no ridge changes.

    E‖y − M x‖² = tr G Cov(y) − 2 tr G M Cov(x, y) + tr G M Cov(x) M^T with
    M = (Cov(y, x) + ρ I) V (Λ + ρ)^{-1} V^T, Cov(x) = V Λ V^T of the half that is fitted. All
    but one of the products are the same for every ridge.
    """
    cross, square = fit.centred()
    level = float(np.trace(square)) / len(square)
    values, vectors = eigenbasis(square)
    tested_cross, tested_square = test.centred()
    turned = cross @ vectors
    weighed, weighed_vectors = gram @ turned, gram @ vectors
    aimed = gram @ (tested_cross @ vectors)
    spread = vectors.T @ tested_square @ vectors
    scores = np.empty(len(RIDGES))
    for k, relative in enumerate(RIDGES):
        ridge = relative * level
        if not np.isfinite(ridge) or not ridge > 0:  # M is the identity
            scores[k] = np.sum(gram * tested_square) - 2 * np.sum(gram * tested_cross)
            continue
        shrunk = 1 / (values + ridge)
        found = (turned + ridge * vectors) * shrunk
        weighed_found = (weighed + ridge * weighed_vectors) * shrunk
        scores[k] = np.sum(weighed_found * (found @ spread)) - 2 * np.sum(aimed * found)
    return scores
