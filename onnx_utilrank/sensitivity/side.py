"""The rows that a site is decomposed by: its inputs x or its outputs W x, whichever are fewer."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from onnx_utilrank.sensitivity.gradients import UseRows
from onnx_utilrank.sensitivity.rows import as_rows
from onnx_utilrank.sites.site import Site, Use

__all__ = ["Changes", "SmallerSide"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is done to weights, where that is looked at and not the weights themselves.

    Attributes:
        matrices: The change of each site's weight, [m, d], by its key.
        fingerprint: Of all of them together; statistics of other ones are not these.
    """

    matrices: Mapping[str, np.ndarray]
    fingerprint: str

    def of(self, site: Site) -> np.ndarray:
        """The change of a site's weight, float32 [m, d]."""
        return self.matrices[site.key].astype(np.float32)


class SmallerSide:
    """Rows z [p] of the smaller side of a site, p = min(m, d), and the gradients there.

    Attributes:
        width: p.
        nodes: Those of the site's uses.
    """

    def __init__(
        self,
        site: Site,
        weight: np.ndarray,
        biases: Mapping[int, np.ndarray],
        *,
        applied: bool = True,
    ) -> None:
        """Remember the site.

        Args:
            site: The site.
            weight: W [m, d].
            biases: What the node of each use adds to W x itself, [m], by node.
            applied: Whether W is what the nodes apply, so that their outputs tell W x.
        """
        self.width = site.full_rank
        self.nodes = tuple(use.node for use in site.uses)
        self._outputs = site.wide
        self._biases = biases
        # The outputs are there already, unless something else is in them.
        self._weight = None
        if not (self._outputs and applied and all(use.affine for use in site.uses)):
            # That of a large model is mapped to memory, and there is room for no second one.
            there = weight.dtype == np.float32 and weight.flags.writeable
            self._weight = torch.from_numpy(weight if there else weight.astype(np.float32))

    def rows(
        self, use: Use, rows: UseRows, samples: int
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """z and for each draw the gradient with respect to it, [samples, positions, p]."""
        if self._weight is None:
            own = torch.from_numpy(np.array(self._biases[use.node])).to(rows.outputs)
            return rows.outputs - own, rows.gradients
        x, weight = as_rows(rows.inputs, use.inputs, samples), self._weight.to(rows.outputs)
        if self._outputs:
            return x @ weight.T, rows.gradients
        return x, tuple(g @ weight for g in rows.gradients)
