"""Collect, in one pass over the samples, what the two-sided factors of every site rest on."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from onnx_utilrank.sensitivity.gradients import GradientPass, UseRows
from onnx_utilrank.sensitivity.rows import as_rows
from onnx_utilrank.sites.site import Side, Site, Use
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.sensitivity import Sensitivity

__all__ = ["Collector", "collect_sensitivity"]

Feed = Mapping[str, np.ndarray]


class Collector:
    """Sums over runs for one site; `stride` thins the rows that the moment is formed from."""

    def __init__(
        self, site: Site, side: Side, biases: Mapping[int, np.ndarray], rows_wanted: int
    ) -> None:
        self.site = site
        self.side = side
        width = site.m if self.side == "outputs" else site.d
        self.found = Sensitivity(moment=SecondMoment.zero(width), gamma=np.zeros((site.m, site.m)))
        self._biases = biases
        self._wanted = rows_wanted
        self._shift: np.ndarray | None = None

    def add(self, use: Use, rows: UseRows, samples: int, share: float, phase: int) -> None:
        """Count one use in one run.

        Args:
            use: The use.
            rows: Its rows.
            samples: Samples in the run.
            share: Which share of all samples that is.
            phase: Number of the run, which the choice of rows moves with.
        """
        live = torch.stack([g.abs().amax(-1) for g in rows.gradients]).amax(0) > 0
        for gradient in rows.gradients:
            flat = gradient.reshape(-1, gradient.shape[-1])
            self.found.gamma += (flat.T @ flat).double().cpu().numpy()
        if self.side == "outputs":
            x = rows.outputs
            bias = np.array(self._biases[use.node])
            x = x - torch.from_numpy(bias).to(x)
        else:
            x = as_rows(rows.inputs, use.inputs, samples)
        x = x.reshape(-1, x.shape[-1])[live.reshape(-1)]
        stride = max(1, int(len(x) / max(self._wanted * share, 4.0)))
        x = x[phase % stride :: stride]
        if not len(x):
            return
        if self._shift is None:
            self._shift = x.double().mean(0).cpu().numpy()
        z = x - torch.from_numpy(self._shift).to(x)
        self.found.moment.add(
            total=z.double().sum(0).cpu().numpy(),
            outer=(z.T @ z).double().cpu().numpy(),
            rows=len(z),
            shift=torch.from_numpy(self._shift).to(x).double().cpu().numpy(),
        )


def collect_sensitivity(
    backward: GradientPass,
    collectors: Mapping[str, Collector],
    feeds: Sequence[Feed],
    progress: Callable[[int, int], None],
) -> None:
    """Run all feeds through the collectors, by key of their sites.

    Raises:
        ModelError: A node cannot be computed.
    """
    owner = {use.node: c for c in collectors.values() for use in c.site.uses}
    total = sum(samples_in(feed) for feed in feeds)
    for k, feed in enumerate(feeds):
        n = samples_in(feed)
        seen: dict[str, int] = {}
        for use, rows in backward.rows(feed, n):
            collector = owner[use.node]
            share = n / total / len(collector.site.uses)
            collector.add(use, rows, n, share, k)
            seen[collector.site.key] = rows.decisions
        for key, collector in collectors.items():
            collector.found.samples += n * backward.draws
            collector.found.decisions += seen.get(key, 0)
        progress(k + 1, len(feeds))
