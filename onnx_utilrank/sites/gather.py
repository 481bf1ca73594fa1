"""Gather on a constant table: rows picked by ids, as embeddings are (ONNX operators, Gather)."""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex, attributes, node_label
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.sites.bias import added_bias, product_and_bias
from onnx_utilrank.sites.site import FLOAT_TYPES, BiasSlot, RowView, Skip, Use
from onnx_utilrank.statistics.factorize import Factors

__all__ = ["GATHER", "Gather", "is_table"]


def is_table(shape: Sequence[int], dtype: np.dtype[np.generic]) -> bool:
    """Whether a constant of this shape and type may be an embedding that is worth factoring."""
    return dtype.name in FLOAT_TYPES and len(shape) == 2 and shape[0] > shape[1]


class Gather:
    """y = W x with a one-hot x: the table is W^T [d, m], d tokens of m features each.

    A narrow table is looked up instead, and a MatMul makes the features of what is found there.
    """

    op_type = "Gather"
    listed = False

    def match(self, index: GraphIndex, k: int) -> Use | Skip | None:
        """See `SiteKind.match`; what is no table of floats, or looked up once and for all, is none.

        A table with no more tokens than features would have to be seen by its inputs, which are no
        rows of numbers; such tables are small.
        """
        node = index.node(k)
        table, ids = node.input
        kind = None if ids in index.constants else index.constant_type(table)
        if kind is None:
            return None
        shape, dtype = kind
        if dtype.name not in FLOAT_TYPES or len(shape) < 2:
            return None
        axis = attributes(node).get("axis", 0)
        reason = None
        if len(shape) > 2:
            reason = f"the table {list(shape)} has more than two dimensions"
        elif axis not in (0, -2):
            reason = f"it picks columns of the table {list(shape)}, not rows"
        elif shape[0] <= shape[1]:
            reason = f"the table {list(shape)} has no more rows than features"
        if reason:
            return Skip(node=node_label(node), op_type=self.op_type, reason=reason)
        d, m = shape
        y = node.output[0]
        return Use(
            node=k,
            label=node_label(node),
            op_type=self.op_type,
            weight=table,
            layout="rows",
            m=m,
            d=d,
            inputs=RowView(tensor=ids, axis=-1, width=d, one_hot=True),
            result=RowView(tensor=y, axis=-1, width=m),
            affine=True,
            bias=added_bias(index, y, m, -1) or BiasSlot(kind="new", shape=(m,)),
        )

    def matrix(self, use: Use, weight: np.ndarray) -> np.ndarray:
        """See `SiteKind.matrix`."""
        del use
        return weight.T

    def stored(self, use: Use, weight: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """See `SiteKind.stored`."""
        del use, weight
        return matrix.T

    def tensors(self, use: Use, weight: np.ndarray, factors: Factors) -> tuple[np.ndarray, ...]:
        """See `SiteKind.tensors`."""
        del use, weight
        return factors.right.T, factors.left.T

    def product(
        self, surgeon: Surgeon, use: Use, first: str, second: str, y: gs.Variable
    ) -> list[gs.Node]:
        """See `SiteKind.product`."""
        node = surgeon.index.node(use.node)
        name = node.name or use.result.tensor
        hidden = surgeon.value(f"{use.result.tensor}/hidden")
        return [
            gs.Node(
                op=self.op_type,
                name=surgeon.unique(f"{name}/low_rank"),
                attrs=attributes(node),
                inputs=[surgeon.tensor(first), surgeon.tensor(use.inputs.tensor)],
                outputs=[hidden],
            ),
            gs.Node(
                op="MatMul",
                name=surgeon.unique(f"{name}/low_rank"),
                inputs=[hidden, surgeon.tensor(second)],
                outputs=[y],
            ),
        ]

    def chain(
        self, surgeon: Surgeon, use: Use, first: str, second: str, bias: str | None
    ) -> list[gs.Node]:
        """See `SiteKind.chain`."""
        return product_and_bias(self, surgeon, use, first, second, bias)


GATHER = Gather()
