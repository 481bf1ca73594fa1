"""MatMul with a constant matrix on either side (ONNX operators, MatMul)."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex, node_label
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.sites.bias import added_bias, product_and_bias
from onnx_utilrank.sites.site import BiasSlot, RowView, Skip, Use
from onnx_utilrank.statistics.factorize import Factors

__all__ = ["MATMUL", "MatMul"]

RIGHT, LEFT = "right", "left"


class MatMul:
    """Y = X B with constant B [d, m] (layout `right`), or Y = A X with constant A [m, d] (`left`).

    A constant of higher rank counts as a matrix where its leading dimensions are all 1.
    """

    op_type = "MatMul"
    listed = True

    def match(self, index: GraphIndex, k: int) -> Use | Skip | None:
        """See `SiteKind.match`."""
        node = index.node(k)
        kinds = [index.constant_type(name) for name in node.input]
        if kinds[0] is None and kinds[1] is None:
            return None
        label = node_label(node)
        if kinds[0] is not None and kinds[1] is not None:
            return Skip(node=label, op_type=self.op_type, reason="both operands are constant")
        layout = RIGHT if kinds[1] is not None else LEFT
        slot = 1 if layout == RIGHT else 0
        shape = (kinds[1] or kinds[0] or ((), None))[0]
        if len(shape) < 2:
            return Skip(node=label, op_type=self.op_type, reason="the constant is a vector")
        if any(n != 1 for n in shape[:-2]):
            reason = f"the constant {list(shape)} is a stack of different matrices"
            return Skip(node=label, op_type=self.op_type, reason=reason)
        d, m = shape[-2:] if layout == RIGHT else shape[:-3:-1]
        axis = -1 if layout == RIGHT else -2
        return Use(
            node=k,
            label=label,
            op_type=self.op_type,
            weight=node.input[slot],
            layout=layout,
            m=m,
            d=d,
            inputs=RowView(tensor=node.input[1 - slot], axis=axis, width=d),
            result=RowView(tensor=node.output[0], axis=axis, width=m),
            affine=True,
            bias=self._bias(index, node, layout, m),
        )

    def _bias(self, index: GraphIndex, node: onnx.NodeProto, layout: str, m: int) -> BiasSlot:
        output = node.output[0]
        if layout == LEFT and index.rank(node.input[1]) == 1:
            return BiasSlot(kind="none")  # A x is a vector, which no column can be added to
        found = added_bias(index, output, m, -1 if layout == RIGHT else -2)
        if found is not None:
            return found
        # After A X, a bias is a column [m, 1]: were X a vector, adding it would change the shape.
        return BiasSlot(kind="new", shape=(m,)) if layout == RIGHT else BiasSlot(kind="none")

    def matrix(self, use: Use, weight: np.ndarray) -> np.ndarray:
        """See `SiteKind.matrix`."""
        matrix = weight.reshape(weight.shape[-2:])
        return matrix.T if use.layout == RIGHT else matrix

    def stored(self, use: Use, weight: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """See `SiteKind.stored`."""
        matrix = matrix.T if use.layout == RIGHT else matrix
        return matrix.reshape(weight.shape[:-2] + matrix.shape)

    def tensors(self, use: Use, weight: np.ndarray, factors: Factors) -> tuple[np.ndarray, ...]:
        """See `SiteKind.tensors`; the first factor keeps leading dimensions of 1."""
        first, second = factors.right, factors.left
        if use.layout == RIGHT:
            first, second = first.T, second.T
        return first.reshape(weight.shape[:-2] + first.shape), second

    def product(
        self, surgeon: Surgeon, use: Use, first: str, second: str, y: gs.Variable
    ) -> list[gs.Node]:
        """See `SiteKind.product`."""
        name = surgeon.index.node(use.node).name or use.result.tensor
        x = surgeon.tensor(use.inputs.tensor)
        hidden = surgeon.value(f"{use.result.tensor}/hidden")
        return [
            self._product(surgeon, name, x, first, use.layout, hidden),
            self._product(surgeon, name, hidden, second, use.layout, y),
        ]

    def chain(
        self, surgeon: Surgeon, use: Use, first: str, second: str, bias: str | None
    ) -> list[gs.Node]:
        """See `SiteKind.chain`."""
        return product_and_bias(self, surgeon, use, first, second, bias)

    def _product(
        self,
        surgeon: Surgeon,
        name: str,
        x: gs.Variable,
        factor: str,
        layout: str,
        y: gs.Variable,
    ) -> gs.Node:
        operands = [x, surgeon.tensor(factor)]
        return gs.Node(
            op="MatMul",
            name=surgeon.unique(f"{name}/low_rank"),
            inputs=operands if layout == RIGHT else operands[::-1],
            outputs=[y],
        )


MATMUL = MatMul()
