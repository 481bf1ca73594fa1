"""Layers that change, and what becomes of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnx_utilrank.ranking.inner import InnerFeatures
from onnx_utilrank.ranking.two_sided import TwoSidedSite
from onnx_utilrank.statistics.factorize import Decomposition, Factors
from onnx_utilrank.statistics.spill import spilled

__all__ = ["Layer", "Refitted", "as_measured"]


@dataclass(frozen=True, kw_only=True)  # slots would leave no place for what is computed once
class Layer:
    """One site that is to be factored, or that shrinks with hidden features, or both.

    Attributes:
        measured: Its decomposition.
        weight: W [m, d], as the model has it.
        rank: The rank of its factors; None where it only shrinks.
        biases: What the node of each use adds to W x itself, [m], by node.
        behind: What an Add behind it adds, [m] (of a site that shrinks).
        inner: The move, where the factors are of what the first of two Convs reads; else None.
        kept: Columns of `measured.heads` that are kept; None where it makes no hidden features
            that shrink, and only meets or reads them.
        units: How many of the units that it reads are kept; None for all.
    """

    measured: TwoSidedSite
    weight: np.ndarray
    rank: int | None
    biases: Mapping[int, np.ndarray]
    behind: np.ndarray
    inner: str | None = None
    kept: int | None = None
    units: int | None = None

    @property
    def projected(self) -> bool:
        """Whether what it reads is projected before all else."""
        return self.inner is not None or self.units is not None

    @cached_property
    def projected_weight(self) -> np.ndarray:
        """W [m, d] of what the projection leaves of its inputs."""
        if not self.projected:
            return self.weight
        expand, places = self._projection
        kernels = self.weight.reshape(len(self.weight), len(expand), -1)  # a tap each, if any
        of_kept = np.tensordot(expand, kernels, axes=(0, 1)).swapaxes(0, 1)
        if places.ndim == 1:
            projected = np.zeros_like(kernels)
            projected[:, places] = of_kept
        else:
            projected = np.tensordot(places, of_kept, axes=(0, 1)).swapaxes(0, 1)
        return spilled(projected.reshape(self.weight.shape))

    @property
    def _projection(self) -> tuple[np.ndarray, np.ndarray]:
        """L [n, k] and K [k, n]: how they are. Of units the places [k] of those that K chooses."""
        if self.units is not None:
            assert self.measured.units is not None
            return self.measured.units.selection.basis(self.units)
        assert self.rank is not None
        found = self.inner_features.found
        return found.expand[:, : self.rank], found.reduce[: self.rank]

    @property
    def inner_features(self) -> InnerFeatures:
        """What the first of two Convs reads, decomposed."""
        found = self.measured.inner_of(self.inner or "")
        assert found is not None
        return found

    @property
    def outputs(self) -> bool:
        """Whether it is fitted by its outputs: Ŵ = A W. Else it is by its inputs."""
        return self.measured.site.wide or self.projected


@dataclass(frozen=True, slots=True, kw_only=True)
class Refitted:
    """What a layer became.

    Attributes:
        weight: What takes the place of W, [m, d], hidden features as they were; None where that
            is the product of its factors.
        lost_mean: What the bias has to take, [m]; None where it can take nothing.
        turn: A [m, m] with Ŵ = A W (of W behind the projection, if there is one), where it was
            fitted by its outputs, or is cut behind the projection.
        factors: Where it is factored.
        heads: How the hidden features that it makes are to shrink.
    """

    weight: np.ndarray | None
    lost_mean: np.ndarray | None
    turn: np.ndarray | None = None
    factors: Factors | None = None
    heads: Decomposition | None = None

    @property
    def matrix(self) -> np.ndarray:
        """What takes the place of W, [m, d]."""
        if self.weight is not None:
            return self.weight
        assert self.factors is not None
        return self.factors.product

    def of_columns(self, columns: slice, values: np.ndarray) -> np.ndarray:
        """What it makes of values of some of its columns alone, [m]."""
        if self.weight is not None:
            return np.asarray(self.weight[:, columns] @ values)
        assert self.factors is not None
        return np.asarray(self.factors.left @ (self.factors.right[:, columns] @ values))

    def whole(self, layer: Layer) -> np.ndarray:
        """The weight [m, d] that the node comes to as a whole, hidden features as they were."""
        if not layer.projected:
            return self.matrix
        projected = layer.projected_weight
        return projected if self.turn is None else self.turn @ projected


def as_measured(layer: Layer) -> Refitted:
    """The layer as it is without a refit.

    What heads lose of their mean is not in it: the weight that reads them takes that.
    """
    measured = layer.measured
    heads = measured.heads.found if layer.kept is not None and measured.heads else None
    if layer.rank is None and layer.units is None:
        return Refitted(weight=layer.weight, lost_mean=None, heads=heads)
    if layer.inner is not None:
        assert layer.rank is not None
        inner = layer.inner_features
        return Refitted(
            weight=layer.weight,
            lost_mean=inner.lost(layer.weight, layer.rank) if measured.centred else None,
            factors=inner.factors(layer.weight, layer.rank),
        )
    lost, turn, factors = None, None, None
    if layer.rank is not None:
        if measured.centred:
            lost = measured.lost_of(layer.weight, layer.rank)
        factors = measured.factors_of(layer.weight, layer.rank)
    if layer.units is not None:
        assert measured.units is not None
        if measured.site.bias in ("input", "add"):
            weight = layer.weight if factors is None else factors.product
            of_units = measured.units.lost(weight, layer.units)
            lost = of_units if lost is None else lost + of_units
        if layer.rank is not None:  # it is wide: no other unit's reader is of low rank too
            turn = measured.found.kept(layer.rank)
    return Refitted(
        weight=layer.weight if factors is None else None,
        lost_mean=lost,
        turn=turn,
        factors=factors,
        heads=heads,
    )
