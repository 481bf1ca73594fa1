"""One low-rank table for both ends of a model: the embedding that picks, the head that multiplies.

The table is W^T [d, m]; it becomes W^T P for one P [m, m] of rank r, so that the embedding gives
P^T y in the place of y = W x, and the head W^T P h in the place of W^T h.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnx_utilrank.ranking.two_sided import TwoSidedSite
from onnx_utilrank.statistics.factorize import Decomposition, Metric, eigenbasis

__all__ = ["tie", "tied"]


def tied(found: Sequence[TwoSidedSite], pairs: Sequence[tuple[str, str]]) -> list[TwoSidedSite]:
    """The sites, those of each pair (keys of a table and its head) decomposed as one.

    Pairs of which one was not measured stay apart.
    """
    by_key = {each.site.key: each for each in found}
    for table, head in pairs:
        if table in by_key and head in by_key:
            by_key[table], by_key[head] = tie(by_key[table], by_key[head])
    return [by_key[each.site.key] for each in found]


def tie(table: TwoSidedSite, head: TwoSidedSite) -> tuple[TwoSidedSite, TwoSidedSite]:
    """Both with one basis P = L K in the place of each its own.

    With Q = I − P, the head loses ½ tr Γ Q C Q^T and the embedding ½ tr C' Q Γ' Q^T, Γ and C of the
    inputs of the one, Γ' and C' of the outputs of the other. The optimum of the sum has no closed
    form; that of ½ tr (Γ + α C') Q (C + Γ'/α) Q^T has one, and is no less for any α. The α that is
    taken makes the two terms that it has too much alike. What either loses is then told by its own
    term, of Γ and C as they were shrunk: a table has tokens that were never seen.

    Args:
        table: The embedding, measured by its outputs.
        head: The layer that multiplies with the table, measured by its inputs.
    """
    seen, weighed = (_covariance(each.found) for each in (table, head))
    first = np.trace(head.gamma) * np.trace(table.gamma)
    second = np.trace(seen) * np.trace(weighed)
    alpha = float(np.sqrt(first / second)) if first > 0 and second > 0 else 1.0
    metric = Metric.of(head.gamma + alpha * seen)
    _, u = eigenbasis(metric.root_t @ (weighed + table.gamma / alpha) @ metric.root_t.T)
    expand, reduce = metric.undone(u), u.T @ metric.root_t
    of_table = _basis(reduce.T, expand.T, table.gamma, seen)
    of_head = _basis(expand, reduce, head.gamma, weighed)
    return (
        replace(
            table,
            site=replace(table.site, tied=head.site.key, freed=True),
            found=of_table,
            errors=of_table.errors / 2,
            seen=of_table.errors / 2,
        ),
        replace(
            head,
            site=replace(head.site, tied=table.site.key),
            found=of_head,
            errors=of_head.errors / 2,
            seen=of_head.errors / 2,
        ),
    )


def _covariance(found: Decomposition) -> np.ndarray:
    """C [m, m] that a decomposition is of, shrunk as it was: K C K^T holds its spectrum."""
    spectrum = -np.diff(found.errors)
    return np.asarray((found.expand * spectrum) @ found.expand.T)


def _basis(
    expand: np.ndarray, reduce: np.ndarray, gamma: np.ndarray, covariance: np.ndarray
) -> Decomposition:
    """A given L and K of full rank, with tr Γ Q_r C Q_r^T, Q_r = I − L_r K_r, for every rank r."""
    energy = float(np.sum(gamma * covariance))
    basis = Decomposition(expand=expand, reduce=reduce, errors=np.zeros(0), energy=energy)
    return replace(basis, errors=basis.errors_under(gamma, covariance))
