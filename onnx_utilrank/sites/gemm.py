"""Gemm with a constant matrix on either side (ONNX operators, Gemm)."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex, attributes, node_label
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.sites.bias import added_bias
from onnx_utilrank.sites.site import BiasSlot, RowView, Skip, Use
from onnx_utilrank.statistics.factorize import Factors

__all__ = ["GEMM", "Gemm"]

RIGHT, LEFT = "right", "left"
FIRST_OPSET_WITHOUT_C = 11  # where C became optional


class Gemm:
    """Y = alpha op(A) op(B) + beta C, with constant B (layout `right`) or constant A (`left`).

    The layout says too whether the constant is transposed, as the factors are not.
    """

    op_type = "Gemm"
    listed = True

    def match(self, index: GraphIndex, k: int) -> Use | Skip | None:
        """See `SiteKind.match`."""
        node = index.node(k)
        kinds = [index.constant_type(name) for name in node.input[:2]]
        if kinds[0] is None and kinds[1] is None:
            return None
        label = node_label(node)
        if kinds[0] is not None and kinds[1] is not None:
            return Skip(node=label, op_type=self.op_type, reason="both operands are constant")
        slot, side = (1, RIGHT) if kinds[1] is not None else (0, LEFT)
        shape = (kinds[1] or kinds[0] or ((), None))[0]
        if len(shape) != 2:
            reason = f"the constant {list(shape)} is not a matrix"
            return Skip(node=label, op_type=self.op_type, reason=reason)
        given = attributes(node)
        transposed = [bool(given.get("transA", 0)), bool(given.get("transB", 0))]
        rows, columns = shape[::-1] if transposed[slot] else shape
        d, m = (rows, columns) if side == RIGHT else (columns, rows)
        bias = self._bias(index, node, side, m)
        # The rows of x lie along the last axis of op(A), but along the first of op(B).
        last = (side == RIGHT) != transposed[1 - slot]
        alpha = given.get("alpha", 1.0)
        assert isinstance(alpha, float)
        return Use(
            node=k,
            label=label,
            op_type=self.op_type,
            weight=node.input[slot],
            layout=side + ("-transposed" if transposed[slot] else ""),
            m=m,
            d=d,
            inputs=RowView(tensor=node.input[1 - slot], axis=-1 if last else -2, width=d),
            result=RowView(tensor=node.output[0], axis=-1 if side == RIGHT else -2, width=m),
            affine=alpha == 1.0 and bias.kind != "none",
            bias=bias,
            gain=alpha,
        )

    def _bias(self, index: GraphIndex, node: onnx.NodeProto, side: str, m: int) -> BiasSlot:
        beta = attributes(node).get("beta", 1.0)
        assert isinstance(beta, float)
        shape = (m,) if side == RIGHT else (m, 1)
        if len(node.input) < 3 or not node.input[2] or beta == 0:
            axis = -1 if side == RIGHT else -2
            found = added_bias(index, node.output[0], m, axis)
            return found or BiasSlot(kind="new", shape=shape)
        kind = index.constant_type(node.input[2])
        if kind is None:
            return BiasSlot(kind="none")
        # C broadcasts to [rows, m] (right) or [m, columns] (left): it must be one value a feature.
        aligned = (1,) * (2 - len(kind[0])) + kind[0]
        feature, other = aligned[::-1] if side == RIGHT else aligned
        if other != 1 or feature not in (1, m) or not index.is_finite(node.input[2]):
            return BiasSlot(kind="none")
        return BiasSlot(kind="input", name=node.input[2], shape=shape, scale=beta)

    def matrix(self, use: Use, weight: np.ndarray) -> np.ndarray:
        """See `SiteKind.matrix`."""
        return weight.T if use.layout in (RIGHT, f"{LEFT}-transposed") else weight

    def stored(self, use: Use, weight: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """See `SiteKind.stored`."""
        del weight
        return self.matrix(use, matrix)  # the transposition, if any, undoes itself

    def tensors(self, use: Use, weight: np.ndarray, factors: Factors) -> tuple[np.ndarray, ...]:
        """See `SiteKind.tensors`."""
        del weight
        if use.layout.startswith(RIGHT):
            return factors.right.T, factors.left.T
        return factors.right, factors.left

    def product(
        self, surgeon: Surgeon, use: Use, first: str, second: str, y: gs.Variable
    ) -> list[gs.Node]:
        """See `SiteKind.product`.

        MatMul, not Gemm: before opset 11 a Gemm needs a C, and there is none.
        """
        node = surgeon.index.node(use.node)
        right = use.layout.startswith(RIGHT)
        x = surgeon.tensor(use.inputs.tensor)
        hidden = surgeon.value(f"{use.result.tensor}/hidden")
        name = node.name or use.result.tensor
        chain = []
        if attributes(node).get("transA" if right else "transB", 0):
            turned = surgeon.value(f"{x.name}/transposed")
            chain.append(
                gs.Node(
                    op="Transpose",
                    name=surgeon.unique(f"{name}/transpose"),
                    attrs={"perm": [1, 0]},
                    inputs=[x],
                    outputs=[turned],
                )
            )
            x = turned
        for given, factor, made in ((x, first, hidden), (hidden, second, y)):
            operands = [given, surgeon.tensor(factor)]
            chain.append(
                gs.Node(
                    op="MatMul",
                    name=surgeon.unique(f"{name}/low_rank"),
                    inputs=operands if right else operands[::-1],
                    outputs=[made],
                )
            )
        return chain

    def chain(
        self, surgeon: Surgeon, use: Use, first: str, second: str, bias: str | None
    ) -> list[gs.Node]:
        """See `SiteKind.chain`."""
        node = surgeon.index.node(use.node)
        given = attributes(node)
        chain = self.product(surgeon, use, first, second, surgeon.tensor(use.result.tensor))
        last = chain[-1]
        attrs = {key: given[key] for key in ("alpha", "beta") if key in given}
        if bias is not None and use.bias.kind in ("input", "new"):
            last.inputs.append(surgeon.tensor(bias))
            attrs.pop("beta", None)
        elif len(node.input) > 2 and node.input[2]:
            last.inputs.append(surgeon.tensor(node.input[2]))
        plain = len(last.inputs) == 2 and attrs.get("alpha", 1.0) == 1.0
        if not plain:
            assert len(last.inputs) == 3 or surgeon.index.store.opset >= FIRST_OPSET_WITHOUT_C
            last.op, last.attrs = "Gemm", attrs
        return chain


GEMM = Gemm()
