"""Predicted loss of every rank of every site, from the gradients of whole samples."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onnx_utilrank.sensitivity.gradients import GradientPass
from onnx_utilrank.sensitivity.rows import as_rows
from onnx_utilrank.sensitivity.side import SmallerSide
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.statistics.factorize import Decomposition

__all__ = ["Probe", "Quadratics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One decomposition of rows of a site whose loss is to be predicted.

    Attributes:
        found: L and K.
        rows: Of what: the smaller side of the site, the node's output, the inputs, whose gradient
            is had from that of the output, or, by key of a move, what the first of two Convs reads.
        mean: What is taken off the rows before L and K apply: their mean, where a bias makes up
            for what is lost of it.
        weight: W [m, d], for the inputs.
        together: Keys of sites that lose the same features, each by its own probe of this kind.
    """

    found: Decomposition
    rows: str
    mean: np.ndarray
    weight: np.ndarray | None = None
    together: tuple[str, ...] = ()


class Quadratics:
    """½ E[⟨W − Ŵ_r, Σ_positions g x^T⟩²] for r = 0 … k, summed over samples.

    Unlike the product of Cov(x) and Γ it sees errors that agree over the positions of a sample,
    which a later pooling sums. With rows z that become L_r K_r z, and the gradient h with respect
    to them, it is the square of Σ_{i>r} Σ_positions (K z)_i (L^T h)_i: two changes of basis of what
    the run holds anyway; no gradient of a weight is ever formed.

    Sites that lose the same features change together too: the sum over all of them is squared, and
    each is said to lose an equal part of that.
    """

    def __init__(self, probes: Mapping[str, Sequence[Probe]]) -> None:
        """Begin with nothing.

        Args:
            probes: One or more for each site, by its key.
        """
        self._probes = {
            key: [(probe.rows, _tensors(probe)) for probe in of] for key, of in probes.items()
        }
        self._totals = {
            key: [np.zeros(len(p.found.errors)) for p in of] for key, of in probes.items()
        }
        # What is squared as one: a probe by itself, or those of all who lose the same.
        self._as_one: dict[tuple[str, int], tuple[str | int, ...]] = {
            (key, which): probe.together or (key, which)
            for key, of in probes.items()
            for which, probe in enumerate(of)
        }
        self._count = 0

    def of(self, site: Site) -> list[np.ndarray]:
        """The mean over samples (times draws) for each probe of a site, float64 [k + 1]."""
        return [total / max(self._count, 1) for total in self._totals[site.key]]

    def none(self) -> "Quadratics":
        """The same, of no samples."""
        other = copy.copy(self)
        other._totals = {key: [np.zeros_like(t) for t in of] for key, of in self._totals.items()}
        other._count = 0
        return other

    @property
    def state(self) -> tuple[dict[str, list[np.ndarray]], int]:
        """The sums, by key, and of how many samples they are; see `merge`."""
        return self._totals, self._count

    def merge(self, state: tuple[Mapping[str, Sequence[np.ndarray]], int]) -> None:
        """Add the `state` of sums over other samples."""
        totals, count = state
        self._count += count
        for key, of_site in totals.items():
            for total, more in zip(self._totals[key], of_site, strict=True):
                total += more

    def add(
        self,
        backward: GradientPass,
        sides: Mapping[str, SmallerSide],
        feeds: Sequence[Mapping[str, np.ndarray]],
    ) -> Iterator[int]:
        """Add samples; give how many feeds are done.

        Args:
            backward: Gradients of all uses of the sites.
            sides: The rows of their smaller sides, by key.
            feeds: The samples.

        Raises:
            ModelError: A node cannot be computed.
        """
        owner = {node: key for key, side in sides.items() for node in side.nodes}
        for k, feed in enumerate(feeds):
            n = samples_in(feed)
            self._count += n * backward.draws
            summed: dict[tuple[str, int], np.ndarray] = {}
            for use, rows in backward.rows(feed, n):
                key = owner[use.node]
                for which, (kind, basis) in enumerate(self._probes[key]):
                    values, gradients = rows.outputs, rows.gradients
                    if kind == "smaller":
                        values, gradients = sides[key].rows(use, rows, n)
                    elif kind == "inputs":
                        values = as_rows(rows.inputs, use.inputs, n)
                    elif kind in rows.inner:
                        values, gradients = rows.inner[kind]
                    reduce, expand, mean = (part.to(values) for part in basis)
                    # What is not finite has no gradient.
                    hidden = torch.nan_to_num(values - mean, 0.0, 0.0, 0.0) @ reduce
                    each = [torch.einsum("bpk,bpk->bk", hidden, g @ expand) for g in gradients]
                    # Over the uses of one weight, which change together.
                    summed[key, which] = (
                        summed.get((key, which), 0.0) + torch.stack(each).double().cpu().numpy()
                    )
            for places in self._alike(summed):
                coefficients = np.sum([summed[place] for place in places], axis=0)
                tails = np.cumsum(coefficients[..., ::-1], axis=-1)[..., ::-1]
                lost = 0.5 * np.square(tails).sum((0, 1)) / len(places)
                for key, which in places:
                    self._totals[key][which][:-1] += lost
            yield k + 1

    def _alike(self, summed: Mapping[tuple[str, int], np.ndarray]) -> list[list[tuple[str, int]]]:
        """The probes that a run reached, those that are squared as one side by side.

        Where a site cannot tell samples apart, it stays by itself.
        """
        found: dict[tuple[str | int, ...], list[tuple[str, int]]] = {}
        for place, coefficients in summed.items():
            found.setdefault((*self._as_one[place], *coefficients.shape), []).append(place)
        return list(found.values())


def _tensors(probe: Probe) -> tuple[torch.Tensor, ...]:
    """K^T, L (for inputs W L) and the mean, in float32."""
    expand = probe.found.expand
    if probe.weight is not None:
        expand = probe.weight @ expand
    parts = (probe.found.reduce.T, expand, probe.mean)
    return tuple(torch.from_numpy(np.ascontiguousarray(p, dtype=np.float32)) for p in parts)
