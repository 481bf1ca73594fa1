"""Four bits, weights alone: MatMulNBits and GatherBlockQuantized, ONNX Runtime's own operators.

A block of weights that one output applies to neighbouring inputs has a scale and a zero point:
w = (q − z) s with q, z in 0…15 (ONNX Runtime's ContribOperators.md). Blocks of 32 are its smallest
with fast kernels; their float32 scales make a weight 5 bits, their zero points an eighth more.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex, attributes
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.quantization.nodes import (
    TURNED,
    Weighted,
    gemm_factors,
    is_turned,
    weighted_nodes,
)
from onnx_utilrank.quantization.scheme import Calibration, Quantized, require_some
from onnx_utilrank.ranking.cost import NODE_BYTES
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.sites.site import Skip

__all__ = ["BLOCK", "INT4", "Blocks", "blocks_of"]

BLOCK = 32
MICROSOFT = "com.microsoft"

# Elements from which activations are rounded to int8 within the operator, with a scale a block
# (accuracy level 4). On 2 cores with VNNI that took 0.4 to 0.7 of the time for one row of matrices
# this large, and no less than float32 on smaller ones or for many rows.
FAST, INT8_LEVEL = 2**18, 4


def blocks_of(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round a weight to 4 bits with ONNX Runtime's own kernel.

    Args:
        matrix: W^T, float32 [inputs, outputs].

    Returns:
        Packed values uint8 [outputs, blocks, 16], two a byte, the first in the lower half; scales
        float32 [outputs, blocks]; packed zero points uint8 [outputs, ⌈blocks / 2⌉].
    """
    # Some builds of ONNX Runtime lack it, and need not for anything else.
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    inputs, outputs = matrix.shape
    count = -(-inputs // BLOCK)
    padded = np.zeros((count * BLOCK, outputs), np.float32)
    padded[:inputs] = matrix
    packed = np.zeros((outputs, count, BLOCK // 2), np.uint8)
    scales = np.zeros((outputs, count), np.float32)
    zeros = np.zeros((outputs, -(-count // 2)), np.uint8)
    quantize_matmul_4bits(packed, padded, scales, zeros, BLOCK, outputs, inputs, False)
    return packed, scales, zeros


class Blocks:
    """Int4 weights of matrix products and embedding tables; Convs stay as they are."""

    key = "int4"
    op_types = ("MatMul", "Gemm", "Gather")

    def check(self, provider: Provider) -> None:
        """See `Scheme.check`."""

    def matrix_bytes(
        self, op_type: str, outputs: int, inputs: int, dtype: np.dtype[np.generic]
    ) -> float:
        """See `Scheme.matrix_bytes`: inputs are padded to whole blocks, which run along them.

        Along the features of a table, which are its outputs.
        """
        table = op_type == "Gather"
        if op_type not in self.op_types or dtype != np.float32 or (table and outputs % 2):
            return float(outputs * inputs * dtype.itemsize)
        if table:
            outputs, inputs = inputs, outputs
        count = -(-inputs // BLOCK)
        packed = inputs // 2 if table else count * BLOCK // 2
        return float(outputs * (packed + 4 * count + -(-count // 2)) + NODE_BYTES)

    def quantize(
        self, store: ModelStore, calibration: Calibration, in_float: Sequence[str] | None = None
    ) -> Quantized:
        """See `Scheme.quantize`; nothing is left for what it would lose: 4 bits were asked for."""
        del calibration, in_float
        index = GraphIndex.build(store)
        weights, left = weighted_nodes(
            index, self.op_types, "MatMulNBits holds matrices: other operators stay in float"
        )
        surgeon = Surgeon(index)
        held: dict[Any, list[str]] = {}
        done = []
        for each in weights:
            reason = _reason(index, each)
            if reason:
                left.append(Skip(node=each.label, op_type=each.op_type, reason=reason))
                continue
            make = {"Gather": _table, "Gemm": _gemm, "MatMul": _matmul}[each.op_type]
            surgeon.replace(each.place, make(surgeon, each, held))
            done.append(each.label)
        require_some(store, self.key, done, left)
        made = surgeon.finish()
        if all(o.domain != MICROSOFT for o in made.proto.opset_import):
            made.proto.opset_import.add(domain=MICROSOFT, version=1)
        return Quantized(store=made, weights=tuple(done), left=tuple(left))


def _reason(index: GraphIndex, each: Weighted) -> str | None:
    """Why a weight cannot be: the operators are narrower than those they stand for."""
    node = index.node(each.place)
    if not index.freed_by(each.weight, frozenset(_readers(index, each))):
        return "its weight has other readers and would stay beside its 4 bits"
    if each.op_type == "MatMul" and len(each.shape) > 2:
        return "its weight has axes of extent 1 in front, which would be lost"
    if each.op_type == "Gemm" and is_turned(node):
        return TURNED
    if each.op_type == "Gather" and (len(each.shape) != 2 or each.shape[1] % 2):
        return "its table has rows of an odd number of features, which do not fill bytes"
    return None


def _readers(index: GraphIndex, each: Weighted) -> list[int]:
    """Nodes of the same operator that read the weight the same way."""
    slot = 0 if each.op_type == "Gather" else 1
    return [
        k
        for k in index.consumers.get(each.weight, ())
        if index.node(k).op_type == each.op_type
        and index.node(k).domain in ("", "ai.onnx")
        and index.node(k).input[slot] == each.weight
    ]


def _stored(
    surgeon: Surgeon, each: Weighted, held: dict[Any, list[str]], *, turned: bool, gain: float = 1.0
) -> list[str]:
    """The initializers of a weight; those of nodes that read it the same way are the same."""
    key = each.weight, each.op_type, turned, gain
    if key not in held:
        values = surgeon.index.constant(each.weight)
        assert values is not None
        matrix = (values.T if turned else values) * np.float32(gain)
        packed, scales, zeros = blocks_of(matrix)
        if each.op_type == "Gather":  # a row of the table is not padded
            packed = packed.reshape(len(packed), -1)[:, : each.shape[1] // 2]
        parts = {"int4": packed, "scales": scales, "zeros": zeros}
        held[key] = [
            surgeon.constant(f"{each.weight}/{name}", part) for name, part in parts.items()
        ]
    return held[key]


def _product(
    surgeon: Surgeon, each: Weighted, stored: Sequence[str], y: gs.Variable, shape: tuple[int, int]
) -> gs.Node:
    node = surgeon.index.node(each.place)
    inputs, outputs = shape
    attrs = {"K": inputs, "N": outputs, "bits": 4, "block_size": BLOCK}
    if inputs * outputs >= FAST:
        attrs["accuracy_level"] = INT8_LEVEL
    return gs.Node(
        op="MatMulNBits",
        domain=MICROSOFT,
        name=surgeon.unique(f"{node.name or node.output[0]}/int4"),
        attrs=attrs,
        inputs=[surgeon.tensor(node.input[0]), *map(surgeon.tensor, stored)],
        outputs=[y],
    )


def _matmul(surgeon: Surgeon, each: Weighted, held: dict[Any, list[str]]) -> list[gs.Node]:
    stored = _stored(surgeon, each, held, turned=False)
    y = surgeon.tensor(surgeon.index.node(each.place).output[0])
    return [_product(surgeon, each, stored, y, (each.shape[0], each.shape[1]))]


def _gemm(surgeon: Surgeon, each: Weighted, held: dict[Any, list[str]]) -> list[gs.Node]:
    """alpha x B + beta C as a product and a sum: alpha goes into the weight."""
    node = surgeon.index.node(each.place)
    turned = bool(attributes(node).get("transB", 0))
    alpha, beta = gemm_factors(node)
    stored = _stored(surgeon, each, held, turned=turned, gain=alpha)
    shape = (each.shape[1], each.shape[0]) if turned else (each.shape[0], each.shape[1])
    y = surgeon.tensor(node.output[0])
    if len(node.input) < 3 or not node.input[2]:
        return [_product(surgeon, each, stored, y, shape)]
    label = node.name or node.output[0]
    product = surgeon.value(f"{y.name}/product")
    chain = [_product(surgeon, each, stored, product, shape)]
    added = surgeon.tensor(node.input[2])
    if beta != 1.0:
        scaled = surgeon.value(f"{y.name}/added")
        factor = surgeon.tensor(surgeon.constant(f"{label}/beta", np.array(beta, np.float32)))
        name = surgeon.unique(f"{label}/beta")
        chain.append(gs.Node(op="Mul", name=name, inputs=[added, factor], outputs=[scaled]))
        added = scaled
    name = surgeon.unique(f"{label}/bias")
    chain.append(gs.Node(op="Add", name=name, inputs=[product, added], outputs=[y]))
    return chain


def _table(surgeon: Surgeon, each: Weighted, held: dict[Any, list[str]]) -> list[gs.Node]:
    """Rows of a table: a block is of neighbouring features of a row."""
    node = surgeon.index.node(each.place)
    packed, *rest = _stored(surgeon, each, held, turned=True)
    return [
        gs.Node(
            op="GatherBlockQuantized",
            domain=MICROSOFT,
            name=surgeon.unique(f"{node.name or node.output[0]}/int4"),
            attrs={"bits": 4, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1},
            inputs=[surgeon.tensor(name) for name in (packed, node.input[1], *rest)],
            outputs=[surgeon.tensor(node.output[0])],
        )
    ]


INT4 = Blocks()
