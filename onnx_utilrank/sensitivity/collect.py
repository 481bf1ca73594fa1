"""Collect, in one pass over the samples, what the two-sided factors of every site rest on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from onnx_utilrank.calibration.taps import ROWS_KEPT
from onnx_utilrank.sensitivity.gradients import GradientPass, UseRows
from onnx_utilrank.sensitivity.rows import as_rows
from onnx_utilrank.sensitivity.side import SmallerSide
from onnx_utilrank.sensitivity.sums import RowSums
from onnx_utilrank.sites.site import Site, Use
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.sensitivity import Sensitivity
from onnx_utilrank.statistics.tokens import TokenCounts

__all__ = ["Collector", "Seen", "collect_sensitivity"]

# Rows a feature that the moment of hidden units is formed from, which is dear: they are many.
ROWS_PER_INPUT = 2

Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What some samples show of a site; two of them add up to what both sets show.

    Attributes:
        side: Of its smaller side.
        inner: Of what the first of two Convs reads, by key of the move.
        inputs: The moment of the inputs, where it was asked for.
        input_total: Their sum, where it was asked for, [d].
        input_rows: Rows of that sum.
        tokens: The tokens that a table was looked up at.
    """

    side: Sensitivity
    inner: Mapping[str, Sensitivity] = field(default_factory=dict)
    inputs: SecondMoment | None = None
    input_total: np.ndarray | None = None
    input_rows: int = 0
    tokens: TokenCounts | None = None

    @property
    def input_mean(self) -> np.ndarray | None:
        """The mean of the inputs, [d]."""
        return None if self.input_total is None else self.input_total / max(self.input_rows, 1)

    @property
    def is_finite(self) -> bool:
        """Whether no sum has overflowed."""
        sides = [self.side, *self.inner.values()]
        sums = [part for side in sides for part in (side.moment.outer, side.gamma, *side.blocks)]
        sums += [part.outer for part in (self.inputs,) if part is not None]
        sums += [part for part in (self.input_total,) if part is not None]
        return all(bool(np.isfinite(part).all()) for part in sums)

    def __add__(self, other: "Seen") -> "Seen":
        inputs, total = self.inputs, self.input_total
        if inputs is not None and other.inputs is not None:
            inputs = inputs + other.inputs
        if total is not None and other.input_total is not None:
            total = total + other.input_total
        tokens = self.tokens
        if tokens is not None and other.tokens is not None:
            tokens = tokens + other.tokens
        return Seen(
            side=self.side + other.side,
            inner={move: own + other.inner[move] for move, own in self.inner.items()},
            inputs=inputs,
            input_total=total,
            input_rows=self.input_rows + other.input_rows,
            tokens=tokens,
        )


class Collector:
    """Sums over runs for one site."""

    def __init__(
        self,
        site: Site,
        side: SmallerSide,
        rows_wanted: int,
        *,
        inner: Mapping[str, int] | None = None,
        groups: Sequence[slice] = (),
        input_mean: bool = False,
        inputs: int = 0,
    ) -> None:
        """Begin with nothing.

        Args:
            site: The site.
            side: Its rows.
            rows_wanted: Rows that moments are formed from, about.
            inner: How many features the first of two Convs reads, by key of the move.
            groups: Outputs that make up a group of hidden features, equally many each.
            input_mean: Whether the mean of the inputs is asked for.
            inputs: Width of the inputs, where their second moment is asked for; 0 elsewhere.
        """
        self.site = site
        self._side = side
        self._rows = RowSums(side.width, rows_wanted)
        self._samples = self._decisions = 0
        self._inner = {move: RowSums(n, rows_wanted) for move, n in (inner or {}).items()}
        wanted = max(ROWS_PER_INPUT * inputs, ROWS_KEPT)
        self._inputs = RowSums(inputs, wanted, gradients=False) if inputs else None
        self._groups = tuple(groups)
        self._blocks = [
            torch.zeros(g.stop - g.start, g.stop - g.start, dtype=torch.float64) for g in groups
        ]
        self._input_total = np.zeros(site.d) if input_mean else None
        self._input_rows = 0
        self._tokens = TokenCounts.zero(site.d) if site.one_hot else None

    @property
    def seen(self) -> Seen:
        """What was collected."""
        return Seen(
            side=self._sensitivity(self._rows, [block.numpy() for block in self._blocks]),
            inner={move: self._sensitivity(sums) for move, sums in self._inner.items()},
            inputs=self._inputs.moment if self._inputs else None,
            input_total=self._input_total,
            input_rows=self._input_rows,
            tokens=self._tokens,
        )

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
        if self._tokens is not None:
            ids = rows.inputs
            if use.inputs.positions_first:
                ids = ids.transpose(0, 1)
            self._tokens.add(ids.reshape(live.shape).cpu().numpy(), live.cpu().numpy())
        for block, columns in zip(self._blocks, self._groups, strict=True):
            for gradient in rows.gradients:
                flat = gradient.reshape(-1, gradient.shape[-1])[:, columns]
                block += (flat.T @ flat).cpu()
        if self._input_total is not None:
            x = as_rows(rows.inputs, use.inputs, samples)[live]
            self._input_total += x.sum(0, dtype=torch.float64).cpu().numpy()
            self._input_rows += len(x)
        if self._inputs:
            self._inputs.add(as_rows(rows.inputs, use.inputs, samples), (), live, share, phase)
        for move, sums in self._inner.items():
            x, gradients = rows.inner[move]
            alive = torch.stack([g.abs().amax(-1) for g in gradients]).amax(0) > 0
            sums.add(x, gradients, alive, share, phase)

    @property
    def state(self) -> dict[str, np.ndarray]:
        """All there is to go on from; see `restore`."""
        held = {"counts": np.array([self._samples, self._decisions, self._input_rows])}
        held |= {f"block {k}": block.numpy() for k, block in enumerate(self._blocks)}
        if self._input_total is not None:
            held["input total"] = self._input_total
        if self._tokens is not None:
            held |= {f"tokens {part}": array for part, array in self._tokens.state.items()}
        for name, sums in self._sums.items():
            held |= {f"{name} {part}": array for part, array in sums.state.items()}
        return held

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken of a collector like this one.

        Raises:
            KeyError: An array is missing.
            ValueError: An array has another shape.
        """
        self._samples, self._decisions, self._input_rows = map(int, state["counts"])
        for k, block in enumerate(self._blocks):
            np.copyto(block.numpy(), state[f"block {k}"], casting="no")
        if self._input_total is not None:
            np.copyto(self._input_total, state["input total"], casting="no")
        if self._tokens is not None:
            self._tokens.restore({part: state[f"tokens {part}"] for part in self._tokens.state})
        for name, sums in self._sums.items():
            parts = (key for key in state if key.startswith(f"{name} "))
            sums.restore({key.removeprefix(f"{name} "): state[key] for key in parts})

    @property
    def shifts(self) -> dict[str, np.ndarray]:
        """What is taken off rows before they are summed, as far as there were any; see `begin`."""
        found = {name: sums.shift for name, sums in self._sums.items()}
        return {name: shift for name, shift in found.items() if shift is not None}

    def begin(self, shifts: Mapping[str, np.ndarray]) -> None:
        """Take the shifts of a collector like this one, whose sums these are to be added to."""
        for name, shift in shifts.items():
            self._sums[name].shift = shift

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Add the `state` of a collector like this one, which began with the shifts of this."""
        own = self.state

        def both(name: str, more: np.ndarray) -> np.ndarray:
            if name.endswith(" shift"):
                return more
            return (
                np.concatenate([own[name], more]) if name.endswith(" waiting") else own[name] + more
            )

        self.restore({name: both(name, more) for name, more in state.items()})

    @property
    def _sums(self) -> dict[str, RowSums]:
        found = {"side": self._rows, **self._inner, "inputs": self._inputs}
        return {name: sums for name, sums in found.items() if sums is not None}

    def count(self, samples: int, decisions: int) -> None:
        """Count the samples (times draws) and decisions of one run, whether or not it was used."""
        self._samples += samples
        self._decisions += decisions

    def _sensitivity(self, sums: RowSums, blocks: Sequence[np.ndarray] = ()) -> Sensitivity:
        return Sensitivity(
            moment=sums.moment,
            gamma=sums.gamma,
            blocks=tuple(blocks),
            samples=self._samples,
            decisions=self._decisions,
        )


def collect_sensitivity(
    backward: GradientPass,
    collectors: Mapping[str, Collector],
    feeds: Sequence[Feed],
    first: int = 0,
    total: int | None = None,
) -> Iterator[int]:
    """Run feeds through the collectors, by key of their sites; give how many feeds are done.

    Args:
        backward: Gradients of all uses of the sites.
        collectors: By key of their sites.
        feeds: All feeds; or, with `total`, those from the first on.
        first: The feed to begin with: earlier ones were counted before.
        total: Samples of all feeds, where only some are given.

    Raises:
        ModelError: A node cannot be computed.
    """
    owner = {use.node: c for c in collectors.values() for use in c.site.uses}
    if total is None:
        total, feeds = sum(map(samples_in, feeds)), feeds[first:]
    for k, feed in enumerate(feeds, start=first):
        n = samples_in(feed)
        seen: dict[str, int] = {}
        for use, rows in backward.rows(feed, n):
            collector = owner[use.node]
            share = n / total / len(collector.site.uses)
            collector.add(use, rows, n, share, k)
            seen[collector.site.key] = rows.decisions
        for key, collector in collectors.items():
            collector.count(n * backward.draws, seen.get(key, 0))
        yield k + 1
