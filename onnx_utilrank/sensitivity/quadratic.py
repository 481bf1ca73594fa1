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
    decompositions: Mapping[str, Sequence[tuple[Decomposition, np.ndarray]]],
    channels: Mapping[str, tuple[Decomposition, np.ndarray]],
    feeds: Sequence[Mapping[str, np.ndarray]],
    progress: Callable[[int, int], None],
) -> dict[str, list[np.ndarray]]:
    """½ E[⟨W − Ŵ_r, Σ_positions g x^T⟩²] for r = 0 … k, float64 [k + 1] by key of the site.

    Unlike the product of Cov(x) and Γ it sees errors that agree over the positions of a sample,
    which a later pooling sums. With Ŵ = L_r K_r W it is the square of
    Σ_{i>r} Σ_positions (K W x)_i (L^T g)_i: two changes of basis of what the run holds anyway; no
    gradient of a weight is ever formed.

    Args:
        backward: Gradients of all uses of the sites.
        sites: The sites.
        decompositions: L and K, one or more for each, and what is taken off the output of its
            node, [m], before they apply: the mean, where a bias makes up for what is lost of it.
        channels: The same for the input channels of some of the sites, by key.
        feeds: The samples.
        progress: Called with how many feeds are done and how many there are.

    Raises:
        ModelError: A node cannot be computed.
    """
    owner = {use.node: site for site in sites for use in site.uses}
    all_of = {
        s.key: [*decompositions[s.key], *([channels[s.key]] if s.key in channels else [])]
        for s in sites
    }
    bases = {key: [_tensors(*one) for one in of_site] for key, of_site in all_of.items()}
    totals = {
        key: [np.zeros(len(found.errors)) for found, _ in of_site]
        for key, of_site in all_of.items()
    }
    count = 0
    for k, feed in enumerate(feeds):
        n = samples_in(feed)
        count += n * backward.draws
        summed: dict[tuple[str, int], np.ndarray] = {}
        for use, rows in backward.rows(feed, n):
            key = owner[use.node].key
            for which, basis in enumerate(bases[key]):
                values, gradients = rows.outputs, rows.gradients
                if which == len(decompositions[key]):
                    assert rows.channels is not None
                    values, gradients = rows.channels
                reduce, expand, mean = (part.to(values) for part in basis)
                # What is not finite has no gradient.
                hidden = torch.nan_to_num(values - mean, 0.0, 0.0, 0.0) @ reduce
                each = [torch.einsum("bpk,bpk->bk", hidden, g @ expand) for g in gradients]
                # Over the uses of one weight, which change together.
                summed[key, which] = (
                    summed.get((key, which), 0.0) + torch.stack(each).double().cpu().numpy()
                )
        for (key, which), coefficients in summed.items():
            tails = np.cumsum(coefficients[..., ::-1], axis=-1)[..., ::-1]
            totals[key][which][:-1] += 0.5 * np.square(tails).sum((0, 1))
        progress(k + 1, len(feeds))
    return {key: [t / max(count, 1) for t in of_site] for key, of_site in totals.items()}


def _tensors(found: Decomposition, mean: np.ndarray) -> tuple[torch.Tensor, ...]:
    """K^T, L and the mean, in float32."""
    parts = (found.reduce.T, found.expand, mean)
    return tuple(torch.from_numpy(np.ascontiguousarray(p, dtype=np.float32)) for p in parts)
