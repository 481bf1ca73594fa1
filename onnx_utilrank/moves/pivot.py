"""r of the outputs as they are, the others as combinations of those: y = Π [h; T h] + b.

Any Ŵ of rank r has r rows that all others are combinations of, Ŵ = Π [I; T] Ŵ_pivots (the
interpolative decomposition, Cheng, Gimbutas, Martinsson, Rokhlin, "On the compression of low rank
matrices", SIAM J. Sci. Comput. 26(4), 2005). It takes r (m + d − r) elements and pays at every
rank below full; the price at run time is a concatenation and a permutation of the outputs.
"""

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.plain_recurrent import is_recurrent
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.moves.move import Matrix
from onnx_utilrank.moves.stored import corrected_bias, store
from onnx_utilrank.sites.find import site_kind
from onnx_utilrank.sites.site import Site, Use
from onnx_utilrank.statistics.factorize import Factors
from onnx_utilrank.statistics.interpolative import interpolative

__all__ = ["PIVOT", "Pivot"]

# The opset in which Concat and Gather took to counting axes from the end.
NEGATIVE_AXES = 11

# What Gather takes for each element, in multiply-accumulates of a matrix product in the same time:
# features on the last axis are copied one by one, on another axis in whole runs; and what it takes
# to start the three nodes more. `tools/move_costs.py` measures them.
MOVED_SINGLY = 500
MOVED_IN_RUNS = 25
STARTED = 400_000


class Pivot:
    """A node for the pivots, one for the rest, Concat and Gather."""

    key = "pivot"

    def applies(self, index: GraphIndex, site: Site) -> bool:
        """Where the bias can be added behind the permutation, and nothing scales the output.

        A table that is looked up gains next to nothing by it.
        """
        if site.one_hot or site.tied:
            return False
        if any(is_recurrent(index.origin(use.node)) for use in site.uses):
            return False  # what makes the outputs becomes the input weight of the layer behind
        counted_from_the_end = any(use.result.axis < 0 for use in site.uses)
        if counted_from_the_end and index.store.opset < NEGATIVE_AXES:
            return False
        return site.bias != "none" and all(use.gain == 1.0 for use in site.uses)

    def top_rank(self, site: Site) -> int:
        """See `MoveKind.top_rank`."""
        ranks = range(min(site.full_rank, site.m - 1), 0, -1)
        return next((r for r in ranks if self.parameters(site, r) < site.parameters), 0)

    def pays(self, site: Site, rank: int, rows: float) -> bool:
        """Whether the work saved is more than that of ordering the outputs."""
        saved = rows * (site.parameters * site.density - self.multiplications(site, rank))
        each = MOVED_SINGLY if site.uses[0].result.axis == -1 else MOVED_IN_RUNS
        return saved > each * rows * site.m + STARTED * len(site.uses)

    def parameters(self, site: Site, rank: int) -> int:
        """See `MoveKind.parameters`; the permutation counts too."""
        return rank * (site.m + site.d - rank) + site.m

    def matrices(self, site: Site, rank: int) -> tuple[Matrix, ...]:
        """See `MoveKind.matrices`."""
        return (site.op_type, rank, site.d), (site.op_type, site.m - rank, rank)

    def multiplications(self, site: Site, rank: int) -> float:
        """See `MoveKind.multiplications`."""
        return rank * (site.m + site.d * site.density - rank)

    def replace(
        self, surgeon: Surgeon, site: Site, factors: Factors, lost_mean: np.ndarray | None
    ) -> None:
        """See `MoveKind.replace`."""
        kind = site_kind(site.op_type)
        weight = surgeon.index.constant(site.weight)
        assert weight is not None
        pivots, rest, combine = interpolative(factors.left)
        parts = Factors(left=combine, right=factors.left[pivots] @ factors.right)
        first, second = (
            store(surgeon, site, f"{site.weight}/{part}", values)
            for part, values in zip(
                ("pivots", "rest"), kind.tensors(site.uses[0], weight, parts), strict=True
            )
        )
        places = np.empty(site.m, dtype=np.int32)
        places[np.concatenate([pivots, rest])] = np.arange(site.m, dtype=np.int32)
        order = surgeon.constant(f"{site.weight}/order", places)
        for use in site.uses:
            bias = None
            if use.bias.kind == "add":
                if lost_mean is not None:
                    corrected_bias(surgeon, site, use, lost_mean)
            elif lost_mean is not None or use.bias.kind == "input":
                lost = 0.0 if lost_mean is None else lost_mean
                values = use.bias.values(surgeon.index, site.m) + lost
                axis = use.result.axis
                behind = -axis - 1 if axis < 0 else weight.ndim - 2  # a Conv's spatial axes
                bias = store(
                    surgeon, site, f"{site.weight}/bias", values.reshape(-1, *(1,) * behind)
                )
            self._replace(surgeon, use, first, second, order, bias)

    def _replace(
        self, surgeon: Surgeon, use: Use, first: str, second: str, order: str, bias: str | None
    ) -> None:
        kind = site_kind(use.op_type)
        y = surgeon.tensor(use.result.tensor)
        label = surgeon.index.node(use.node).name or y.name
        rest, joined = surgeon.value(f"{y.name}/rest"), surgeon.value(f"{y.name}/joined")
        chain = kind.product(surgeon, use, first, second, rest)
        hidden = chain[-2].outputs[0]
        ordered = y if bias is None else surgeon.value(f"{y.name}/ordered")
        chain += [
            gs.Node(
                op="Concat",
                name=surgeon.unique(f"{label}/join"),
                attrs={"axis": use.result.axis},
                inputs=[hidden, rest],
                outputs=[joined],
            ),
            gs.Node(
                op="Gather",
                name=surgeon.unique(f"{label}/order"),
                attrs={"axis": use.result.axis},
                inputs=[joined, surgeon.tensor(order)],
                outputs=[ordered],
            ),
        ]
        if bias is not None:
            chain.append(
                gs.Node(
                    op="Add",
                    name=surgeon.unique(f"{label}/bias"),
                    inputs=[ordered, surgeon.tensor(bias)],
                    outputs=[y],
                )
            )
        surgeon.replace(use.node, chain)


PIVOT = Pivot()
