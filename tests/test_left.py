"""Operators that hold weights and are not factored are listed, each with its reason."""

import numpy as np
import onnx
import pytest
from builders import MICROSOFT, activations, index, model, noise
from onnx import helper, numpy_helper

from onnx_utilrank import CompressConfig, compress
from onnx_utilrank.sites.find import SITE_KINDS, find_sites
from onnx_utilrank.sites.left import REASONS, WHOLE

W = noise(1, 8, 8).astype(np.float32)
QUANTIZED = "its weight is quantized: compress the model before it is quantized"


# Forms of operators that are factored in other forms.
UNKNOWN = {
    "Attention": {"do_rotary": 1},
    "FusedConv": {"activation": "Clip"},
    "FusedMatMul": {"transBatchA": 1},
}


def one_node(domain: str, op_type: str, weight: str) -> onnx.ModelProto:
    """A model that is not valid, but says enough: a node of this operator reads `weight`."""
    attributes = UNKNOWN.get(op_type, {})
    node = helper.make_node(op_type, ["x", weight], ["y"], name="it", domain=domain, **attributes)
    proto = model("(float[n,8] x) => (float[n,8] y)", "z = Neg(x)", W=W, b=W[0])
    proto.graph.node.append(node)
    return proto


@pytest.mark.parametrize(("domain", "op_type"), REASONS)
def test_operators_with_weights_say_why_they_are_left(domain: str, op_type: str):
    graph = index(one_node(domain, op_type, "W"))
    sites, (skip,) = find_sites(graph)
    assert not sites
    assert (skip.node, skip.op_type) == (f"{op_type} 'it'", op_type)
    assert skip.reason == REASONS[domain, op_type]


@pytest.mark.parametrize(("domain", "op_type"), REASONS)
def test_operators_without_a_matrix_are_none_of_ours(domain: str, op_type: str):
    for name in ("x", "b", "z"):
        assert find_sites(index(one_node(domain, op_type, name))) == ((), ())


def test_what_is_factored_has_no_reason_to_be_left():
    assert not {kind.op_type for kind in SITE_KINDS} & {op for domain, op in REASONS if not domain}


@pytest.mark.parametrize("op_type", ["LSTM", "Einsum"])
def test_the_domain_of_onnx_has_two_names(op_type: str):
    _, (skip,) = find_sites(index(one_node("ai.onnx", op_type, "W")))
    assert skip.reason == REASONS["", op_type]


BYTES = np.random.default_rng(2).integers(-100, 100, (8, 8)).astype(np.int8)
SCALE, ZERO = np.float32(0.01), np.int8(0)
DEQUANTIZED = {
    "tensor": ("V = DequantizeLinear(Q, s, zero)", {"s": SCALE, "zero": ZERO}, 17),
    "channel": (
        "V = DequantizeLinear<axis=1>(Q, s)",
        {"s": np.full(8, 0.01, np.float32)},
        17,
    ),
    "blocks": (
        "V = DequantizeLinear<axis=0, block_size=4>(Q, s)",
        {"s": np.full((2, 8), 0.01, np.float32)},
        21,
    ),
    "layout": ("U = DequantizeLinear(Q, s) V = Transpose(U)", {"s": SCALE}, 17),
    "before": ("U = Transpose(Q) V = DequantizeLinear(U, s)", {"s": SCALE}, 17),
}


@pytest.mark.parametrize("how", DEQUANTIZED)
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_weights_behind_dequantize_linear_are_left(how: str, op: str):
    """The rest of the model is factored, and the pairs around activations stay."""
    before, constants, opset = DEQUANTIZED[how]
    pair = "q = QuantizeLinear(x, t, z) d = DequantizeLinear(q, t, z)"
    if how == "blocks":  # ONNX Runtime 1.31 fuses them in a way that it cannot run
        pair = "d = Identity(x)"
    proto = model(
        "(float[n,8] x) => (float[n,8] y)",
        f"{before} {pair} h = {op}(d, V) y = MatMul(h, W)",
        opset=opset,
        Q=BYTES,
        W=W,
        t=np.float32(0.05),
        z=np.int8(0),
        **constants,
    )
    onnx.checker.check_model(proto, full_check=True)
    data = {"x": activations(3, 60, 8).astype(np.float32)}
    result = compress(proto, data, CompressConfig(energy=1.0, force=True))
    assert [(s.node, s.reason) for s in result.plan.skipped] == [(f"{op} 'h'", QUANTIZED)]
    assert list(result.model.graph.node)[:-2] == list(proto.graph.node)[:-1]


def test_quantized_weights_of_other_operators_are_matrices_too():
    proto = one_node("", "LSTM", "V")
    proto.graph.node.insert(0, helper.make_node("DequantizeLinear", ["Q", "s"], ["V"]))
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), k) for k, v in {"Q": BYTES, "s": SCALE}.items()
    )
    _, (skip,) = find_sites(index(proto))
    assert skip.reason == WHOLE


def test_quantized_bias_is_no_quantized_weight():
    proto = model(
        "(float[n,8] x, float[8,8] v) => (float[n,8] y)",
        "c = DequantizeLinear(Q, s) y = Gemm(x, v, c)",
        Q=BYTES[0],
        s=SCALE,
    )
    (reason,) = {skip.reason for skip in find_sites(index(proto))[1]}
    assert reason == "no operand is a constant weight"


LEFT = {
    "lstm": (
        "s = Unsqueeze(x, one) i = Tanh(I) r, h, c = LSTM<hidden_size=8>(s, i, R) "
        "t = Squeeze(h, zero)",
        {
            "I": noise(3, 1, 32, 8).astype(np.float32),
            "R": noise(4, 1, 32, 8).astype(np.float32),
            "one": np.array([0]),
            "zero": np.array([0]),
        },
        "LSTM",
        WHOLE,
    ),
    "matmul_integer": (
        "q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, Q, z) t = Cast<to=1>(i)",
        {"Q": BYTES},
        "MatMulInteger",
        QUANTIZED,
    ),
    "dynamic": (
        "t = com.microsoft.DynamicQuantizeMatMul(x, Q, s)",
        {"Q": BYTES, "s": SCALE},
        "DynamicQuantizeMatMul",
        QUANTIZED,
    ),
    "four_bits": (
        "t = com.microsoft.MatMulNBits<K=16, N=8, bits=4, block_size=16>(w, Q, s)",
        {
            "Q": BYTES.view(np.uint8).reshape(8, 1, 8),
            "s": np.full(8, 0.01, np.float32),
        },
        "MatMulNBits",
        QUANTIZED,
    ),
}


@pytest.mark.parametrize("what", LEFT)
def test_rest_of_a_model_is_factored_beside_what_is_left(what: str):
    body, constants, op_type, reason = LEFT[what]
    wide = "w = Concat<axis=1>(x, x)" if "(w," in body else ""
    proto = model(
        "(float[n,8] x) => (float[n,8] y)",
        f"{wide} {body} y = MatMul(t, W)",
        opset=17,
        domains=MICROSOFT,
        W=W,
        **constants,
    )
    data = {"x": activations(3, 60, 8).astype(np.float32)}
    plan = compress(proto, data, CompressConfig(energy=1.0, force=True)).plan
    assert [(s.op_type, s.reason) for s in plan.skipped] == [(op_type, reason)]
    assert [e.site for e in plan.entries] == ["W"]
