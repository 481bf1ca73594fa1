"""Two low-rank nodes in a row: y = L (R x) + b."""

import numpy as np

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.moves.move import Matrix
from onnx_utilrank.moves.stored import corrected_bias, store
from onnx_utilrank.sites.find import site_kind
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.factorize import Factors

__all__ = ["LOW_RANK", "LowRank"]


class LowRank:
    """A chain of two nodes of the site's own operator; smaller where r (m + d) < m d."""

    key = "low-rank"

    def applies(self, index: GraphIndex, site: Site) -> bool:
        """See `MoveKind.applies`."""
        del index, site
        return True

    def top_rank(self, site: Site) -> int:
        """See `MoveKind.top_rank`."""
        return min(site.break_even_rank, site.full_rank)

    def pays(self, site: Site, rank: int, rows: float) -> bool:
        """See `MoveKind.pays`; on small matrices it need not, and validation then says so."""
        del site, rank, rows
        return True

    def parameters(self, site: Site, rank: int) -> int:
        """See `MoveKind.parameters`."""
        return rank * (site.m + site.d)

    def matrices(self, site: Site, rank: int) -> tuple[Matrix, ...]:
        """See `MoveKind.matrices`; rows of a smaller table are made large by a product."""
        second = "MatMul" if site.one_hot else site.op_type
        return (site.op_type, rank, site.d), (second, site.m, rank)

    def multiplications(self, site: Site, rank: int) -> float:
        """See `MoveKind.multiplications`."""
        return rank * (site.m if site.one_hot else site.m + site.d * site.density)

    def replace(
        self, surgeon: Surgeon, site: Site, factors: Factors, lost_mean: np.ndarray | None
    ) -> None:
        """See `MoveKind.replace`."""
        kind = site_kind(site.op_type)
        weight = surgeon.index.constant(site.weight)
        assert weight is not None
        first, second = (
            store(surgeon, site, f"{site.weight}/{part}", values)
            for part, values in zip(
                ("right", "left"), kind.tensors(site.uses[0], weight, factors), strict=True
            )
        )
        for use in site.uses:
            bias = None
            if lost_mean is not None:
                bias = corrected_bias(surgeon, site, use, lost_mean)
            surgeon.replace(use.node, kind.chain(surgeon, use, first, second, bias))


LOW_RANK = LowRank()
