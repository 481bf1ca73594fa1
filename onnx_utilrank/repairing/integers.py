"""Products of integers that are scaled to floats: ONNX Runtime's dynamic quantization."""

from dataclasses import dataclass

import numpy as np

from onnx_utilrank.model.graph import GraphIndex, attributes, node_label, qualified
from onnx_utilrank.model.parts import MICROSOFT
from onnx_utilrank.repairing.layer import Layer
from onnx_utilrank.sites.bias import added_bias
from onnx_utilrank.sites.conv import CONV
from onnx_utilrank.sites.site import BiasSlot, RowView, Skip, Use

__all__ = ["INTEGERS"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """Where a node has what; None where it has none of it.

    Attributes:
        scale: Value that holds the scale of the weight.
        zero: Value that holds its zero point.
        maker: Node that makes the floats.
        bias: Place of a bias in floats among its inputs.
    """

    scale: str
    zero: str | None
    maker: int
    bias: int | None = None


class Integers:
    """MatMulInteger and ConvInteger with the Cast and Mul behind them, and what fuses those.

    `onnxruntime.quantization.quantize_dynamic` writes the first two (ONNX operators), behind a
    DynamicQuantizeLinear; DynamicQuantizeMatMul and MatMulIntegerToFloat (ONNX Runtime's contrib
    operators) are what its optimizer makes of them.
    """

    def read(self, index: GraphIndex, k: int) -> Layer | Skip | None:
        """See `Reader.read`."""
        node = index.node(k)
        if qualified(node) not in _OPERATORS or len(node.input) < 2:
            return None
        kind = index.constant_type(node.input[1])
        if kind is None:
            return None
        parts = self._parts(index, k)
        if parts is None or parts.scale not in index.constants:
            reason = "what scales its integers to floats is not in the form that is known"
            return Skip(node=node_label(node), op_type=node.op_type, reason=reason)
        use = self._use(index, k, kind[0], parts)
        if isinstance(use, str):
            return Skip(node=node_label(node), op_type=node.op_type, reason=use)
        scale = index.constant_type(parts.scale)
        assert scale is not None
        return Layer(
            use=use,
            maker=parts.maker,
            dtype=scale[1],
            sources=(use.inputs.tensor,),
            reader=self,
        )

    def weight(self, index: GraphIndex, k: int) -> np.ndarray:
        """See `Reader.weight`: (q - zero point) scale, computed in the type of the scale."""
        node, parts = index.node(k), self._parts(index, k)
        assert parts is not None
        steps, scale = index.constant(node.input[1]), index.constant(parts.scale)
        assert steps is not None
        assert scale is not None
        whole = steps.astype(np.int32)
        if parts.zero:
            zero = index.constant(parts.zero)
            assert zero is not None
            whole = whole - _aligned(zero.astype(np.int32), node.op_type, whole.ndim)
        return np.asarray(whole.astype(scale.dtype) * _aligned(scale, node.op_type, whole.ndim))

    def _parts(self, index: GraphIndex, k: int) -> _Parts | None:
        node = index.node(k)
        inputs = [*node.input, *[""] * 7]
        if node.op_type == "DynamicQuantizeMatMul":
            return _Parts(scale=inputs[2], zero=inputs[3], maker=k, bias=4)
        if node.op_type == "MatMulIntegerToFloat":
            return _Parts(scale=inputs[3], zero=inputs[5], maker=k, bias=6)
        # MatMulInteger or ConvInteger, then Cast, then Mul with the product of both scales.
        cast = _only_reader(index, node.output[0], "Cast")
        product = None if cast is None else _only_reader(index, index.node(cast).output[0], "Mul")
        if cast is None or product is None:
            return None
        scales = [n for n in index.node(product).input if n != index.node(cast).output[0]]
        maker = index.producers.get(scales[0]) if scales else None
        if maker is None or index.node(maker).op_type != "Mul":
            return None
        own = [name for name in index.node(maker).input if name in index.constants]
        return _Parts(scale=own[0], zero=inputs[3], maker=product) if len(own) == 1 else None

    def _use(self, index: GraphIndex, k: int, shape: tuple[int, ...], parts: _Parts) -> Use | str:
        """The node as one on floats, or why it is none."""
        node = index.node(k)
        x = node.input[0]
        if node.op_type != "DynamicQuantizeMatMul":
            maker = index.producers.get(x)
            rounds = ("DynamicQuantizeLinear", "QuantizeLinear")
            if maker is None or index.node(maker).op_type not in rounds:
                return "its input is not rounded by a node before it, but comes in integers"
            x = index.node(maker).input[0]
        y = index.node(parts.maker).output[0]
        if node.op_type == "ConvInteger":
            given = attributes(node)
            if given.get("group", 1) != 1 or len(shape) < 3:
                return "grouped convolution"
            m, patches = CONV.seen(shape, given)
            d, axis = int(np.prod(shape[1:])), 1
            bias = added_bias(index, y, m, 1 - len(shape)) or BiasSlot(kind="new", shape=(m,))
            inputs = RowView(
                tensor=x, axis=1, width=d, patches=None if patches.pointwise else patches
            )
        else:
            if len(shape) != 2:
                return f"the constant {list(shape)} is not a matrix"
            (d, m), axis = shape, -1
            own = self._own_bias(index, parts, m)
            bias = own or added_bias(index, y, m, -1) or BiasSlot(kind="none")
            inputs = RowView(tensor=x, axis=-1, width=d)
        return Use(
            node=k,
            label=node_label(node),
            op_type="Conv" if node.op_type == "ConvInteger" else "MatMul",
            weight=node.input[1],
            layout="kernel" if node.op_type == "ConvInteger" else "right",
            m=m,
            d=d,
            inputs=inputs,
            result=RowView(tensor=y, axis=axis, width=m),
            affine=True,
            bias=bias,
        )

    def _own_bias(self, index: GraphIndex, parts: _Parts, m: int) -> BiasSlot | None:
        if parts.bias is None:
            return None
        names = list(index.node(parts.maker).input)
        if len(names) <= parts.bias or names[parts.bias] not in index.constants:
            return None
        return BiasSlot(kind="input", node=parts.maker, name=names[parts.bias], shape=(m,))


def _aligned(values: np.ndarray, op_type: str, rank: int) -> np.ndarray:
    """One value, or one an output: of a kernel those come first, of a matrix last."""
    if values.size == 1:
        return values.reshape(())
    return values.reshape(-1, *[1] * (rank - 1)) if op_type == "ConvInteger" else values.reshape(-1)


def _only_reader(index: GraphIndex, name: str, op_type: str) -> int | None:
    readers = index.consumers.get(name, [])
    if len(readers) != 1 or name in index.pinned:
        return None
    return readers[0] if index.node(readers[0]).op_type == op_type else None


_OPERATORS = frozenset(
    {
        ("", "MatMulInteger"),
        ("", "ConvInteger"),
        (MICROSOFT, "DynamicQuantizeMatMul"),
        (MICROSOFT, "MatMulIntegerToFloat"),
    }
)

INTEGERS = Integers()
