"""Collect, in one pass over the samples, what the two-sided factors of every site rest on."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from onnx_utilrank.sensitivity.gradients import GradientPass, UseRows
from onnx_utilrank.sensitivity.rows import as_rows
from onnx_utilrank.sensitivity.side import SmallerSide
from onnx_utilrank.sites.site import Site, Use
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.sensitivity import Sensitivity

__all__ = ["Collector", "RowSums", "collect_sensitivity"]

Feed = Mapping[str, np.ndarray]


class RowSums:
    """Sums over rows and their gradients; rows are thinned before their moment is formed."""

    def __init__(self, width: int, rows_wanted: int) -> None:
        self.found = Sensitivity(moment=SecondMoment.zero(width), gamma=np.zeros((width, width)))
        self._wanted = rows_wanted
        self._shift: np.ndarray | None = None

    def add(
        self,
        x: torch.Tensor,
        gradients: Sequence[torch.Tensor],
        live: torch.Tensor,
        share: float,
        phase: int,
    ) -> None:
        """Count the rows of one run, [samples, positions, features].

        Args:
            x: The rows.
            gradients: For each draw, at the same positions.
            live: Where the outputs depend on them, [samples, positions].
            share: Which share of all samples the run is.
            phase: Number of the run, which the choice of rows moves with.
        """
        for gradient in gradients:
            flat = gradient.reshape(-1, gradient.shape[-1])
            self.found.gamma += (flat.T @ flat).double().cpu().numpy()
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


class Collector:
    """Sums over runs for one site."""

    def __init__(
        self,
        site: Site,
        side: SmallerSide,
        rows_wanted: int,
        *,
        channels: int = 0,
        groups: Sequence[slice] = (),
        input_mean: bool = False,
    ) -> None:
        """Begin with nothing.

        Args:
            site: The site.
            side: Its rows.
            rows_wanted: Rows that moments are formed from, about.
            channels: Input channels that are looked at beside W; 0 for none.
            groups: Outputs that make up a group of hidden features, equally many each.
            input_mean: Whether the mean of the inputs is asked for.
        """
        self.site = site
        self._side = side
        self._rows = RowSums(side.width, rows_wanted)
        self._channels = RowSums(channels, rows_wanted) if channels else None
        self._groups = tuple(groups)
        if groups:
            n = groups[0].stop - groups[0].start
            self._rows.found.blocks = np.zeros((len(groups), n, n))
        self._input_total = np.zeros(site.d) if input_mean else None
        self._input_rows = 0

    @property
    def found(self) -> Sensitivity:
        """What was collected of the site's smaller side."""
        return self._rows.found

    @property
    def channels(self) -> Sensitivity | None:
        """And of the input channels."""
        return self._channels.found if self._channels else None

    @property
    def input_mean(self) -> np.ndarray | None:
        """The mean of the inputs, where it was asked for, [d]."""
        if self._input_total is None:
            return None
        return self._input_total / max(self._input_rows, 1)

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
        self._rows.add(*self._side.rows(use, rows, samples), live, share, phase)
        for block, columns in zip(self.found.blocks, self._groups, strict=True):
            for gradient in rows.gradients:
                flat = gradient.reshape(-1, gradient.shape[-1])[:, columns]
                block += (flat.T @ flat).double().cpu().numpy()
        if self._input_total is not None:
            x = as_rows(rows.inputs, use.inputs, samples)[live]
            self._input_total += x.sum(0, dtype=torch.float64).cpu().numpy()
            self._input_rows += len(x)
        if self._channels and rows.channels:
            x, of_channels = rows.channels
            alive = torch.stack([g.abs().amax(-1) for g in of_channels]).amax(0) > 0
            self._channels.add(x, of_channels, alive, share, phase)

    def count(self, samples: int, decisions: int) -> None:
        """Count the samples (times draws) and decisions of one run, whether or not it was used."""
        for found in filter(None, (self.found, self.channels)):
            found.samples += samples
            found.decisions += decisions


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
            collector.count(n * backward.draws, seen.get(key, 0))
        progress(k + 1, len(feeds))
