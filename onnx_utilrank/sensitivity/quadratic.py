"""Predicted loss of every rank of every site, from the gradients of whole samples."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from onnx_utilrank.sensitivity.gradients import GradientPass
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.statistics.factorize import Decomposition

__all__ = ["sample_quadratics"]


def sample_quadratics(
    backward: GradientPass,
    sites: Sequence[Site],
    decompositions: Mapping[str, Decomposition],
    means: Mapping[str, np.ndarray],
    feeds: Sequence[Mapping[str, np.ndarray]],
    progress: Callable[[int, int], None],
) -> dict[str, np.ndarray]:
    """½ E[⟨W − Ŵ_r, Σ_positions g x^T⟩²] for r = 0 … k, float64 [k + 1] by key of the site.

    Unlike the product of Cov(x) and Γ it sees errors that agree over the positions of a sample,
    which a later pooling sums. With Ŵ = L_r K_r W it is the square of
    Σ_{i>r} Σ_positions (K W x)_i (L^T g)_i: two changes of basis of what the run holds anyway; no
    gradient of a weight is ever formed.

    Args:
        backward: Gradients of all uses of the sites.
        sites: The sites.
        decompositions: L and K of each.
        means: Mean output of the node of each site, [m]: the bias takes what is lost of it.
        feeds: The samples.
        progress: Called with how many feeds are done and how many there are.

    Raises:
        ModelError: A node cannot be computed.
    """
    owner = {use.node: site for site in sites for use in site.uses}
    bases = {
        site.key: tuple(
            torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32))
            for part in (decompositions[site.key].reduce.T, decompositions[site.key].expand)
        )
        for site in sites
    }
    totals = {site.key: np.zeros(len(decompositions[site.key].errors)) for site in sites}
    count = 0
    for k, feed in enumerate(feeds):
        n = samples_in(feed)
        count += n * backward.draws
        summed: dict[str, np.ndarray] = {}
        for use, rows in backward.rows(feed, n):
            key = owner[use.node].key
            reduce, expand = (part.to(rows.outputs) for part in bases[key])
            mean = torch.from_numpy(means[key]).to(rows.outputs)
            hidden = (rows.outputs - mean) @ reduce
            each = [torch.einsum("bpk,bpk->bk", hidden, g @ expand) for g in rows.gradients]
            # Over the uses of one weight, which change together.
            summed[key] = summed.get(key, 0.0) + torch.stack(each).double().cpu().numpy()
        for key, coefficients in summed.items():
            tails = np.cumsum(coefficients[..., ::-1], axis=-1)[..., ::-1]
            totals[key][:-1] += 0.5 * np.square(tails).sum((0, 1))
        progress(k + 1, len(feeds))
    return {key: total / max(count, 1) for key, total in totals.items()}
