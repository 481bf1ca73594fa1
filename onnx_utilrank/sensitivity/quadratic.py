"""Predicted loss of every rank of every site, from the gradients of whole samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from onnx_utilrank.sensitivity.gradients import GradientPass
from onnx_utilrank.sensitivity.rows import as_rows
from onnx_utilrank.sensitivity.side import SmallerSide
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.statistics.factorize import Decomposition

__all__ = ["Probe", "sample_quadratics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One decomposition of rows of a site whose loss is to be predicted.

    Attributes:
        found: L and K.
        rows: Of what: the smaller side of the site, the node's output, the input channels, or the
            inputs, whose gradient is had from that of the output.
        mean: What is taken off the rows before L and K apply: their mean, where a bias makes up
            for what is lost of it.
        weight: W [m, d], for the inputs.
    """

    found: Decomposition
    rows: Literal["smaller", "outputs", "channels", "inputs"]
    mean: np.ndarray
    weight: np.ndarray | None = None


def sample_quadratics(
    backward: GradientPass,
    sites: Sequence[Site],
    probes: Mapping[str, Sequence[Probe]],
    sides: Mapping[str, SmallerSide],
    feeds: Sequence[Mapping[str, np.ndarray]],
    progress: Callable[[int, int], None],
) -> dict[str, list[np.ndarray]]:
    """½ E[⟨W − Ŵ_r, Σ_positions g x^T⟩²] for r = 0 … k, float64 [k + 1] by key of the site.

    Unlike the product of Cov(x) and Γ it sees errors that agree over the positions of a sample,
    which a later pooling sums. With rows z that become L_r K_r z, and the gradient h with respect
    to them, it is the square of Σ_{i>r} Σ_positions (K z)_i (L^T h)_i: two changes of basis of what
    the run holds anyway; no gradient of a weight is ever formed.

    Args:
        backward: Gradients of all uses of the sites.
        sites: The sites.
        probes: One or more for each, by key.
        sides: The rows of their smaller sides, by key.
        feeds: The samples.
        progress: Called with how many feeds are done and how many there are.

    Raises:
        ModelError: A node cannot be computed.
    """
    owner = {use.node: site for site in sites for use in site.uses}
    bases = {s.key: [_tensors(probe) for probe in probes[s.key]] for s in sites}
    totals = {s.key: [np.zeros(len(p.found.errors)) for p in probes[s.key]] for s in sites}
    count = 0
    for k, feed in enumerate(feeds):
        n = samples_in(feed)
        count += n * backward.draws
        summed: dict[tuple[str, int], np.ndarray] = {}
        for use, rows in backward.rows(feed, n):
            key = owner[use.node].key
            for which, (probe, basis) in enumerate(zip(probes[key], bases[key], strict=True)):
                values, gradients = rows.outputs, rows.gradients
                if probe.rows == "smaller":
                    values, gradients = sides[key].rows(use, rows, n)
                elif probe.rows == "inputs":
                    values = as_rows(rows.inputs, use.inputs, n)
                elif probe.rows == "channels":
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


def _tensors(probe: Probe) -> tuple[torch.Tensor, ...]:
    """K^T, L (for inputs W L) and the mean, in float32."""
    expand = probe.found.expand
    if probe.weight is not None:
        expand = probe.weight @ expand
    parts = (probe.found.reduce.T, expand, probe.mean)
    return tuple(torch.from_numpy(np.ascontiguousarray(p, dtype=np.float32)) for p in parts)
