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
        own: Σ y y^T, [p, p].
        rows: Number of pairs.
    """

    targets: np.ndarray
    regressors: np.ndarray
    cross: np.ndarray
    square: np.ndarray
    own: np.ndarray
    rows: int = 0

    @classmethod
    def zero(cls, p: int) -> "CrossMoment":
        """The sums over no rows."""
        return cls(
            targets=np.zeros(p),
            regressors=np.zeros(p),
            cross=np.zeros((p, p)),
            square=np.zeros((p, p)),
            own=np.zeros((p, p)),
        )

    def add(self, y: np.ndarray, x: np.ndarray) -> None:
        """Add pairs of rows, [n, p] both; products are formed in float32 or wider."""
        y, x = (v.astype(np.promote_types(v.dtype, np.float32), copy=False) for v in (y, x))
        self.targets += y.sum(0, dtype=np.float64)
        self.regressors += x.sum(0, dtype=np.float64)
        self.cross += y.T @ x
        self.square += x.T @ x
        self.own += y.T @ y
        self.rows += len(y)

    def __add__(self, other: "CrossMoment") -> "CrossMoment":
        return CrossMoment(
            targets=self.targets + other.targets,
            regressors=self.regressors + other.regressors,
            cross=self.cross + other.cross,
            square=self.square + other.square,
            own=self.own + other.own,
            rows=self.rows + other.rows,
        )

    def centred(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cov(y, x), Cov(x, x) and Cov(y, y)."""
        n = max(self.rows, 1)
        y, x = self.targets / n, self.regressors / n
        return (
            self.cross / n - np.outer(y, x),
            self.square / n - np.outer(x, x),
            self.own / n - np.outer(y, y),
        )


def regression(halves: tuple[CrossMoment, CrossMoment], metric: np.ndarray) -> np.ndarray:
    """M = argmin E‖y − M x‖² + ρ‖M − I‖², with the ridge ρ that predicts best.

    Each half of the rows predicts the other: where rows are too few to learn from, the largest
    ridge wins and M is the identity; so it is where a half has no rows at all.

    Args:
        halves: Sums over two disjoint sets of rows.
        metric: G [q, p] that errors are measured through, ‖G (y − M x)‖².
    """
    if min(half.rows for half in halves) < 2:
        return np.eye(metric.shape[1])
    gram = metric.T @ metric  # every error below is a trace with it: q may be much larger than p
    scores = np.zeros(len(RIDGES))
    for fit, test in (halves, halves[::-1]):
        cross, square, _ = fit.centred()
        c, s, o = test.centred()
        level = float(np.trace(square)) / max(len(square), 1)
        values, vectors = eigenbasis(square)
        for k, ridge in enumerate(RIDGES):
            found = _solve(cross, values, vectors, ridge * level)
            weighed = gram @ found
            # An output of the regressors is as far from its target as the two together say.
            lost = np.sum(gram * o) - 2 * np.sum(weighed * c) + np.sum((weighed @ s) * found)
            scores[k] += float(lost)
    whole = halves[0] + halves[1]
    cross, square, _ = whole.centred()
    level = float(np.trace(square)) / max(len(square), 1)
    values, vectors = eigenbasis(square)
    best = max(k for k in range(len(RIDGES)) if scores[k] == scores.min())
    return _solve(cross, values, vectors, RIDGES[best] * level)


def _solve(cross: np.ndarray, values: np.ndarray, vectors: np.ndarray, ridge: float) -> np.ndarray:
    """(Cov(y, x) + ρ I)(Cov(x, x) + ρ I)^{-1}, by the eigenvectors of Cov(x, x)."""
    p = len(cross)
    if not np.isfinite(ridge) or not ridge > 0:
        return np.eye(p)
    return np.asarray(((cross + ridge * np.eye(p)) @ vectors / (values + ridge)) @ vectors.T)
