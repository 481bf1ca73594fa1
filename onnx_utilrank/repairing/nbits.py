"""MatMulNBits of ONNX Runtime: weights of 2, 4 or 8 bits in blocks, packed into bytes."""

import numpy as np

from onnx_utilrank.model.graph import GraphIndex, attributes, node_label, qualified
from onnx_utilrank.model.parts import MICROSOFT
from onnx_utilrank.repairing.layer import Layer
from onnx_utilrank.sites.bias import added_bias
from onnx_utilrank.sites.site import BiasSlot, RowView, Skip, Use

__all__ = ["NBITS", "unpacked"]

# Places among the inputs of the node.
SCALES, ZEROS, GROUPS, BIAS = 2, 3, 4, 5


class NBits:
    """Y = X W with W [K, N], float, held as N rows of blocks along K.

    ONNX Runtime's contrib operators, com.microsoft.MatMulNBits: a block of `block_size` values of
    `bits` bits has one scale, and a zero point or none, which means 2^(bits - 1); the last block of
    a row is padded.
    """

    def read(self, index: GraphIndex, k: int) -> Layer | Skip | None:
        """See `Reader.read`."""
        node = index.node(k)
        if qualified(node) != (MICROSOFT, "MatMulNBits"):
            return None
        label, given = node_label(node), attributes(node)
        inputs = [*node.input, *[""] * (BIAS + 1)]
        reason = None
        if any(name and name not in index.constants for name in inputs[1:BIAS]):
            reason = "its weight is computed, not constant"
        elif inputs[GROUPS]:
            reason = "the order of its blocks is an input (g_idx)"
        elif given.get("weight_prepacked", 0):
            reason = "its weight lies as one processor wants it"
        elif given.get("bits", 4) not in (2, 4, 8):
            reason = f"weights of {given.get('bits')} bits are not known"
        if reason:
            return Skip(node=label, op_type=node.op_type, reason=reason)
        d, m = given["K"], given["N"]
        assert isinstance(d, int)
        assert isinstance(m, int)
        scales = index.constant_type(inputs[SCALES])
        assert scales is not None
        y = node.output[0]
        bias = added_bias(index, y, m, -1)
        if inputs[BIAS]:
            own = inputs[BIAS] in index.constants
            bias = BiasSlot(kind="input", node=k, name=inputs[BIAS], shape=(m,)) if own else None
        return Layer(
            use=Use(
                node=k,
                label=label,
                op_type="MatMul",
                weight=node.input[1],
                layout="right",
                m=m,
                d=d,
                inputs=RowView(tensor=node.input[0], axis=-1, width=d),
                result=RowView(tensor=y, axis=-1, width=m),
                affine=True,
                bias=bias or BiasSlot(kind="none"),
            ),
            maker=k,
            dtype=scales[1],
            sources=(node.input[0],),
            reader=self,
        )

    def weight(self, index: GraphIndex, k: int) -> np.ndarray:
        """See `Reader.weight`."""
        node, given = index.node(k), attributes(index.node(k))
        inputs = [*node.input, *[""] * (BIAS + 1)]
        packed, scales = index.constant(inputs[1]), index.constant(inputs[SCALES])
        zeros = index.constant(inputs[ZEROS]) if inputs[ZEROS] else None
        d, m, bits, block = (given.get(key, 4) for key in ("K", "N", "bits", "block_size"))
        assert packed is not None
        assert scales is not None
        assert isinstance(d, int)
        assert isinstance(m, int)
        assert isinstance(bits, int)
        assert isinstance(block, int)
        return unpacked(packed, scales, zeros, d=d, m=m, bits=bits, block=block).T


def unpacked(
    packed: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    *,
    d: int,
    m: int,
    bits: int,
    block: int,
) -> np.ndarray:
    """W [m, d] of a MatMulNBits in the type of its scales: (q - zero point) scale.

    Args:
        packed: uint8 [m, blocks, block · bits / 8], the lowest bits of a byte first.
        scales: [m · blocks], in any shape.
        zeros: Zero points: uint8, packed likewise with whole bytes for each of the m rows; of
            another type one number each; None for 2^(bits - 1).
        d: K, values of a row.
        m: N, rows.
        bits: Of a value.
        block: Values of a block.
    """
    blocks = -(-d // block)
    steps = _bits(packed.reshape(m, -1), bits).reshape(m, blocks, block).astype(np.float32)
    if zeros is None:
        zero: np.ndarray = np.full((m, blocks), 2 ** (bits - 1), np.float32)
    elif zeros.dtype == np.uint8:
        zero = _bits(zeros.reshape(m, -1), bits)[:, :blocks].astype(np.float32)
    else:
        zero = zeros.reshape(m, blocks).astype(np.float32)
    made = (steps - zero[..., None]) * scales.reshape(m, blocks, 1).astype(np.float32)
    return np.asarray(made.reshape(m, -1)[:, :d].astype(scales.dtype))


def _bits(held: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [m, n] as values [m, 8 n / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.asarray((held[..., None] >> shifts) & (2**bits - 1)).reshape(len(held), -1)


NBITS = NBits()
