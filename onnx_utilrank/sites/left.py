"""Operators that hold weights and are not factored, and why."""

import onnx

from onnx_utilrank.model.graph import LAYOUT_OPS, GraphIndex, node_label, qualified
from onnx_utilrank.sites.site import Skip

__all__ = ["QUANTIZED", "REASONS", "is_quantized", "left_alone", "quantized_operand"]

FIRST = "compress the model before it is quantized"
QUANTIZED = f"its weight is quantized: {FIRST}"
STEPS = "its recurrent weight works within the operator"
WHOLE = (
    f"{STEPS}, and its input weight is not split off: it is computed or read elsewhere too, its "
    "bias is computed, the opset is older than 9, the layer has too many units, or it is of "
    "float16 and ONNX Runtime would die of the product"
)
PROCESSOR = "its weight lies as one processor wants it: compress the model before it is optimized"
EXPERTS = "its weights are a stack of experts, of which each sees rows of its own"
FORM = "it is in a form that is not followed"
WITHIN = "its weight is applied within the operator, whose inner values cannot be measured"

# By domain and operator; nodes of these that have no constant matrix are none of ours.
REASONS: dict[tuple[str, str], str] = {
    ("", "ConvInteger"): QUANTIZED,
    ("", "DeformConv"): "each position sees its inputs at places of its own",
    ("", "Einsum"): "its equation is not the product with one constant matrix",
    ("", "GRU"): WHOLE,
    ("", "LSTM"): WHOLE,
    ("", "MatMulInteger"): QUANTIZED,
    ("", "QLinearConv"): QUANTIZED,
    ("", "QLinearMatMul"): QUANTIZED,
    ("", "RNN"): WHOLE,
    ("com.microsoft", "Attention"): f"{FORM}: with a past, rotary embedding, or a mask whose rank "
    "is not known to be 2",
    ("com.microsoft", "AttnLSTM"): STEPS,
    ("com.microsoft", "ConvTransposeWithDynamicPads"): "its padding is computed",
    ("com.microsoft", "DecoderAttention"): WITHIN,
    ("com.microsoft", "DynamicQuantizeLSTM"): QUANTIZED,
    ("com.microsoft", "DynamicQuantizeMatMul"): QUANTIZED,
    ("com.microsoft", "FusedConv"): f"{FORM}: with an activation whose parameters are missing",
    ("com.microsoft", "FusedMatMul"): f"{FORM}: with batch axes behind its rows, or with an input "
    "to transpose whose rank is not known",
    ("com.microsoft", "FusedMatMulActivation"): PROCESSOR,
    ("com.microsoft", "GemmFastGelu"): PROCESSOR,
    ("com.microsoft", "GemmFloat8"): QUANTIZED,
    ("com.microsoft", "LongformerAttention"): WITHIN,
    ("com.microsoft", "MatMulBnb4"): QUANTIZED,
    ("com.microsoft", "MatMulFpQ4"): QUANTIZED,
    ("com.microsoft", "MatMulInteger16"): QUANTIZED,
    ("com.microsoft", "MatMulIntegerToFloat"): QUANTIZED,
    ("com.microsoft", "MatMulNBits"): QUANTIZED,
    ("com.microsoft", "MoE"): EXPERTS,
    ("com.microsoft", "NhwcConv"): PROCESSOR,
    ("com.microsoft", "NhwcFusedConv"): PROCESSOR,
    ("com.microsoft", "PackedAttention"): WITHIN,
    ("com.microsoft", "QAttention"): QUANTIZED,
    ("com.microsoft", "QGemm"): QUANTIZED,
    ("com.microsoft", "QLinearConv"): QUANTIZED,
    ("com.microsoft", "QMoE"): QUANTIZED,
    ("com.microsoft", "QOrderedAttention"): QUANTIZED,
    ("com.microsoft", "QOrderedMatMul"): QUANTIZED,
    ("com.microsoft", "SparseToDenseMatMul"): "its weight is sparse",
    ("com.microsoft.nchwc", "Conv"): PROCESSOR,
    ("com.ms.internal.nhwc", "Conv"): PROCESSOR,
    ("com.ms.internal.nhwc", "ConvTranspose"): PROCESSOR,
    ("com.ms.internal.nhwc", "QLinearConv"): QUANTIZED,
}


def left_alone(index: GraphIndex, node: onnx.NodeProto) -> Skip | None:
    """Why a node of an operator that cannot be factored is left; None where it has no matrix."""
    reason = REASONS.get(qualified(node))
    if reason == WHOLE and index.origin(index.producers[next(filter(None, node.output))]) != node:
        reason = STEPS
    elif reason is None or not any(_is_matrix(index, name) for name in node.input):
        return None
    return Skip(node=node_label(node), op_type=node.op_type, reason=reason)


def quantized_operand(index: GraphIndex, node: onnx.NodeProto) -> Skip | None:
    """Why a node whose weight is a constant behind a DequantizeLinear is left; None elsewhere."""
    if not any(is_quantized(index, name) for name in node.input):
        return None
    return Skip(node=node_label(node), op_type=node.op_type, reason=QUANTIZED)


def _is_matrix(index: GraphIndex, name: str) -> bool:
    if name not in index.constants:
        return is_quantized(index, name)
    kind = index.constant_type(name)
    return kind is not None and len(kind[0]) >= 2


def is_quantized(index: GraphIndex, name: str) -> bool:
    """Whether a value is a constant matrix in integers with a scale."""
    while name in index.producers:
        node = index.node(index.producers[name])
        if node.op_type == "DequantizeLinear":
            return node.input[0] in index.constants and _is_matrix(index, node.input[0])
        if node.op_type not in LAYOUT_OPS or node.domain not in ("", "ai.onnx"):
            return False
        name = node.input[0]
    return False
