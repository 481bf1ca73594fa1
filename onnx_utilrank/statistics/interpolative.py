"""Rows of a matrix that all its rows are combinations of: pure numpy."""

import numpy as np

__all__ = ["interpolative"]

# Combinations are at most this large: pivots are swapped until they are, so that what is stored
# stays in range for half precision and does not magnify rounding.
LARGEST = 1.5
SWAPS_PER_PIVOT = 20


def interpolative(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose r rows of a matrix of rank r, and write the others as combinations of them.

    Pivoted elimination makes a first choice; rows are then swapped while a combination is larger
    than 1.5, which raises the volume of the pivots each time (Goreinov, Oseledets, Savostyanov,
    Tyrtyshnikov, Zamarashkin, "How to find a good submatrix", 2010).

    Args:
        matrix: [m, r] with r at most m.

    Returns:
        The pivots' numbers [r] and the others' [m − r], both ascending, and the combinations T
        [m − r, r]: matrix[rest] = T @ matrix[pivots].
    """
    m, rank = matrix.shape
    pivots = _first_choice(matrix)
    solved = np.linalg.lstsq(matrix[pivots].T, matrix.T, rcond=None)[0].T  # [m, r]
    for _ in range(SWAPS_PER_PIVOT * rank):
        k, j = np.unravel_index(np.abs(solved).argmax(), solved.shape)
        if abs(solved[k, j]) <= LARGEST:
            break
        row = solved[k].copy()
        row[j] -= 1.0
        solved = solved - np.outer(solved[:, j] / solved[k, j], row)
        pivots[j] = k
    pivots = np.sort(pivots)
    rest = np.setdiff1d(np.arange(m), pivots)
    combine = np.linalg.lstsq(matrix[pivots].T, matrix[rest].T, rcond=None)[0].T
    return pivots, rest, combine


def _first_choice(matrix: np.ndarray) -> np.ndarray:
    """Again and again the row that is farthest from the span of those taken."""
    left = matrix / np.maximum(np.linalg.norm(matrix, axis=0), np.finfo(np.float64).tiny)
    free = np.ones(len(left), dtype=bool)
    pivots = []
    for _ in range(matrix.shape[1]):
        norms = np.where(free, np.einsum("ij,ij->i", left, left), -1.0)
        k = int(norms.argmax())
        free[k] = False
        pivots.append(k)
        length = float(np.sqrt(norms[k]))
        if length > 0:
            direction = left[k] / length
            left = left - np.outer(left @ direction, direction)
    return np.array(pivots)
