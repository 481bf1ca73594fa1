"""Quantization: what is stored, what stays, and that outputs are those of what is stored."""

import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import index, model, noise, ops
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from onnx.parser import parse_model

import onnx_utilrank
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.calibration.split import hold_back
from onnx_utilrank.config import SCHEME_KEYS
from onnx_utilrank.errors import ModelError, ProviderUnavailableError, TargetMissedError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.quantization.between import between
from onnx_utilrank.quantization.blockwise import BLOCK, INT4, blocks_of
from onnx_utilrank.quantization.config import QuantizeConfig
from onnx_utilrank.quantization.floating import BF16, FP16
from onnx_utilrank.quantization.integer import INT8, INT8_DYNAMIC, LOOKS, TOLERATED, culprits
from onnx_utilrank.quantization.nodes import weighted_nodes
from onnx_utilrank.quantization.ort import calling, tools
from onnx_utilrank.quantization.scheme import Calibration
from onnx_utilrank.quantization.schemes import SCHEMES
from onnx_utilrank.ranking.cost import NODE_BYTES
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.validation.divergence import find_losses

ON_CPU = [scheme for scheme in SCHEMES if scheme is not BF16]
KEYS = [scheme.key for scheme in ON_CPU]

D, M = 48, 40
ROWS = 40


def graph(body: str, opset: int = 17, ir: int = 8, **arrays: np.ndarray) -> onnx.ModelProto:
    """A model of x float [n, D] and y, whose initializers are given by name."""
    return model(f"(float[n,{D}] x) => (float[n,k] y)", body, opset=opset, ir=ir, **arrays)


W = (noise(1, D, M) / np.sqrt(D)).astype(np.float32)
V = (noise(2, M, D) / np.sqrt(M)).astype(np.float32)
B = noise(3, M).astype(np.float32)
X = noise(4, ROWS, D).astype(np.float32)

MLP = graph(
    "h = MatMul(x, W) r = Relu(h) y = Gemm(r, V, c)", W=W, V=V, c=noise(5, D).astype(np.float32)
)


def calibration(proto: onnx.ModelProto | ModelStore, arrays: object = None) -> Calibration:
    store = ModelStore.load(proto)
    data = open_data({"x": X} if arrays is None else arrays, store.inputs)
    samples = list(range(len(data)))
    session = open_session(store, CPU)
    feeds = list(data.feeds(samples, batch=16))
    return Calibration(
        data=data,
        samples=samples,
        provider=CPU,
        batch=16,
        losses=find_losses(store, session, feeds),
    )


def quantized(scheme, proto, arrays=None, in_float=None):
    store = ModelStore.load(proto)
    return scheme.quantize(store, calibration(store, arrays), in_float)


def outputs(proto: onnx.ModelProto | ModelStore, feed=None) -> dict[str, np.ndarray]:
    return open_session(ModelStore.load(proto), CPU).run({"x": X} if feed is None else feed)


def relative(expected: np.ndarray, actual: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def initializers(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


# --- what every scheme holds to -----------------------------------------------------------------

# Relative error of two layers: float16 has 11 bits, int8 a step of 1/255 of the range of sums whose
# extremes are 4 deviations, int4 a step of 1/15 of the range of a block.
ERRORS = {"fp16": 2e-3, "int8": 0.03, "int8-dynamic": 0.03, "int4": 0.12}


@pytest.mark.parametrize("scheme", ON_CPU, ids=KEYS)
def test_outputs_are_near_and_the_file_is_smaller(scheme):
    made = quantized(scheme, MLP)
    onnx.checker.check_model(made.store.proto)
    assert len(made.weights) == 2
    assert not made.left
    assert made.store.file_bytes < ModelStore(proto=MLP).file_bytes
    assert made.store.inputs == ModelStore(proto=MLP).inputs
    assert made.store.proto.graph.output == MLP.graph.output
    error = relative(outputs(MLP)["y"], outputs(made.store)["y"])
    assert 0 < error < ERRORS[scheme.key]


@pytest.mark.parametrize("scheme", ON_CPU, ids=KEYS)
def test_the_source_stays_as_it_is_and_nothing_is_left_behind(
    scheme, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "user").mkdir()
    path = tmp_path / "user" / "model.onnx"
    path.write_bytes(MLP.SerializeToString())
    handlers, filters = list(logging.getLogger().handlers), list(logging.getLogger().filters)
    search = list(sys.path)
    store = ModelStore.load(path)
    made = quantized(scheme, store)
    assert made.store.proto is not store.proto
    assert path.read_bytes() == MLP.SerializeToString()
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    del made
    assert not list((tmp_path / "tmp").iterdir())
    assert capsys.readouterr().out == ""
    assert (logging.getLogger().handlers, logging.getLogger().filters) == (handlers, filters)
    assert sys.path == search


@pytest.mark.parametrize("scheme", ON_CPU, ids=KEYS)
def test_weights_outside_stay_outside(scheme, tmp_path):
    wide = noise(7, D, 400).astype(np.float32)
    ModelStore(proto=graph("y = MatMul(x, W)", W=wide)).save(
        tmp_path / "m.onnx", save_as_external_data=True
    )
    store = ModelStore.load(tmp_path / "m.onnx")
    made = quantized(scheme, store)
    assert made.store.has_external_data
    error = relative(outputs(store)["y"], outputs(made.store)["y"])
    assert error < ERRORS[scheme.key]
    made.store.save(tmp_path / "q.onnx")
    again = outputs(ModelStore.load(tmp_path / "q.onnx"))
    np.testing.assert_array_equal(again["y"], outputs(made.store)["y"])


@pytest.mark.parametrize("scheme", ON_CPU, ids=KEYS)
def test_what_is_not_touched_keeps_names_and_metadata(scheme):
    proto = onnx.ModelProto()
    proto.CopyFrom(MLP)
    proto.producer_name, proto.doc_string = "somebody", "of use"
    proto.metadata_props.add(key="owner", value="me")
    proto.graph.node[1].name = "the middle"
    made = quantized(scheme, proto).store.proto
    assert (made.producer_name, made.doc_string) == ("somebody", "of use")
    assert [(p.key, p.value) for p in made.metadata_props] == [("owner", "me")]
    assert [n.name for n in made.graph.node if n.op_type == "Relu"] == ["the middle"]


@pytest.mark.parametrize("scheme", ON_CPU, ids=KEYS)
@pytest.mark.parametrize(
    ("body", "arrays"),
    [
        ("h = MatMul(x, W) y = MatMul(h, V)", {"W": W, "V": V}),  # no node has a name
        ("t = Transpose(U) y = MatMul(x, t)", {"U": W.T.copy()}),
        ("t = Identity(W) y = MatMul(x, t)", {"W": W}),
        ("y = Gemm<transB = 1, alpha = 0.5>(x, U)", {"U": W.T.copy()}),
        ("y = Gemm<alpha = 2.0, beta = 0.5>(x, W, B)", {"W": W, "B": B}),
        ("h = MatMul(x, W) k = MatMul(x, W) y = Add(h, k)", {"W": W}),
    ],
    ids=["nameless", "transposed", "identity", "gemm-turned", "gemm-scaled", "shared"],
)
def test_weights_are_found_where_exporters_put_them(scheme, body, arrays):
    proto = graph(body, **arrays)
    made = quantized(scheme, proto)
    onnx.checker.check_model(made.store.proto)
    assert relative(outputs(proto)["y"], outputs(made.store)["y"]) < ERRORS[scheme.key]
    if scheme is not FP16:
        assert not made.left
        held = [v for v in initializers(made.store.proto).values() if v.size >= W.size]
        assert all(v.dtype.name in ("int8", "uint8") for v in held)


@pytest.mark.parametrize("scheme", ON_CPU, ids=KEYS)
def test_weights_in_constant_nodes(scheme):
    proto = graph("y = MatMul(x, W)")
    tensor = numpy_helper.from_array(W, "W")
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["W"], value=tensor))
    made = quantized(scheme, proto)
    assert made.store.file_bytes < proto.ByteSize()
    assert relative(outputs(proto)["y"], outputs(made.store)["y"]) < ERRORS[scheme.key]


@pytest.mark.parametrize("scheme", ON_CPU, ids=KEYS)
def test_initializers_that_are_inputs_too(scheme):
    shape = np.array([D, M], np.int64)
    body = "w = Reshape(W, shape) h = MatMul(x, w) y = Add(h, B)"
    proto = graph(body, opset=9, ir=3, W=W.reshape(2, -1, M), B=B, shape=shape)
    made = quantized(scheme, proto)
    assert [v.name for v in made.store.inputs] == ["x"]
    assert relative(outputs(proto)["y"], outputs(made.store)["y"]) < ERRORS[scheme.key]


@pytest.mark.parametrize("scheme", ON_CPU, ids=KEYS)
def test_nothing_to_quantize_is_an_error_with_the_reason(scheme):
    proto = graph("y = Cast<to = 1>(x)")
    with pytest.raises(ModelError, match=r"no node holds a weight|no node can be of float16"):
        quantized(scheme, proto)


@pytest.mark.parametrize("scheme", ON_CPU, ids=KEYS)
def test_a_plan_that_names_what_is_not_there_is_refused(scheme):
    if scheme is INT4:
        pytest.skip("nothing is chosen there")
    with pytest.raises(ModelError, match="'nowhere' in float"):
        quantized(scheme, MLP, in_float=["nowhere"])


def test_every_scheme_that_can_be_named_is_there():
    assert tuple(scheme.key for scheme in SCHEMES) == SCHEME_KEYS


@pytest.mark.parametrize("scheme", ON_CPU, ids=KEYS)
def test_what_is_quantized_already_stays(scheme):
    once = quantized(INT8, MLP)
    if scheme is FP16:  # the rest of it may well be in fewer bits
        made = quantized(scheme, once.store)
        np.testing.assert_allclose(
            outputs(made.store)["y"], outputs(once.store)["y"], atol=0.02 * np.abs(X).max()
        )
        return
    with pytest.raises(ModelError, match="its weight is quantized already"):
        quantized(scheme, once.store)


# --- int8 ---------------------------------------------------------------------------------------


def dequantized(proto: onnx.ModelProto) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By name of each int8 initializer behind DequantizeLinear: its values, and half a step."""
    held = initializers(proto)
    found = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in held:
            q, scale, zero = (held[n] for n in node.input)
            if q.dtype != np.int8:
                continue
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            shape = [1] * q.ndim
            if scale.ndim:
                shape[axis] = -1
            scale = scale.reshape(shape)
            values = (q.astype(np.float64) - zero.reshape(shape)) * scale
            found[node.input[0]] = values, scale / 2
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(-6, 6))
def test_int8_weights_are_within_half_a_step(seed, magnitude):
    rng = np.random.default_rng(seed)
    spread = 10.0 ** rng.uniform(-2, 2, size=M)  # of channels, each with its own scale
    w = (rng.standard_normal((D, M)) * spread * 10.0**magnitude).astype(np.float32)
    made = quantized(INT8, graph("y = MatMul(x, W)", W=w), in_float=[])
    ((values, half),) = dequantized(made.store.proto).values()
    assert (np.abs(values - w) <= half * (1 + 1e-5)).all()


def test_what_products_make_stays_in_float():
    made = quantized(INT8, graph("h = MatMul(x, W) y = Softmax(h)", W=W)).store.proto
    assert sorted(ops(made)) == [
        *("DequantizeLinear", "DequantizeLinear", "MatMul", "QuantizeLinear", "Softmax")
    ]


@pytest.mark.parametrize("scheme", [INT8, INT8_DYNAMIC], ids=["int8", "int8-dynamic"])
def test_a_layer_that_does_not_bear_it_stays(scheme):
    """One value in a thousand times larger than the others: they all become one step."""
    x = X.copy()
    x[:, 0] *= 1e4
    w = W.copy()
    w[0] = 0
    proto = graph("h = MatMul(x, W) r = Relu(h) y = MatMul(r, V)", W=w, V=V)
    made = quantized(scheme, proto, {"x": x})
    assert made.in_float == ("h",)
    assert [s.reason for s in made.left] == ["quantized it alone would move the outputs too far"]
    assert len(made.weights) == 1
    error = relative(outputs(proto, {"x": x})["y"], outputs(made.store, {"x": x})["y"])
    assert error < ERRORS[scheme.key]
    again = quantized(scheme, proto, {"x": x}, in_float=made.in_float)
    assert again.store.proto == made.store.proto
    blind = quantized(scheme, proto, {"x": x}, in_float=[])
    assert relative(outputs(proto, {"x": x})["y"], outputs(blind.store, {"x": x})["y"]) > 0.3


def test_where_no_layer_bears_it_there_is_no_model():
    x = X.copy()
    x[:, 0] *= 1e4
    w = W.copy()
    w[0] = 0
    with pytest.raises(ModelError, match="each of its weights would move the outputs too far"):
        quantized(INT8, graph("y = MatMul(x, W)", W=w), {"x": x})


@given(st.lists(st.floats(0, 0.02), min_size=1, max_size=30))
def test_culprits_are_those_that_lose_too_much_alone(losses):
    def lost(names):
        return sum(losses[int(n)] for n in names)

    found = culprits([str(k) for k in range(len(losses))], lost)
    bad = tuple(str(k) for k, v in enumerate(losses) if v > TOLERATED / 2)
    assert found == (() if sum(losses) <= TOLERATED else bad if len(losses) > 1 else ("0",))


def test_few_culprits_are_found_in_few_looks():
    looks = []

    def lost(names):
        looks.append(names)
        return 1.0 * ("77" in names)

    assert culprits([str(k) for k in range(256)], lost) == ("77",)
    assert len(looks) == 1 + 2 * 8


def test_of_many_the_worst_are_found_in_as_many_looks_as_there_may_be():
    looks = []

    def lost(names):
        looks.append(names)
        return sum(5.0 if n in ("3", "400") else 0.006 for n in names)

    assert {"3", "400"} <= {*culprits([str(k) for k in range(500)], lost)}
    assert len(looks) <= LOOKS


CNN = """a = Conv<pads = [1, 1, 1, 1]>(x, K) b = Relu(a) c = Conv<pads = [1, 1, 1, 1]>(b, L)
d = Add(c, b) e = GlobalAveragePool(d) f = Flatten(e) y = Gemm(f, G)"""


def cnn() -> onnx.ModelProto:
    arrays = {"K": noise(1, 16, 3, 3, 3), "L": noise(2, 16, 16, 3, 3) / 12, "G": noise(3, 16, 40)}
    held = {name: values.astype(np.float32) for name, values in arrays.items()}
    return model("(float[n,3,8,8] x) => (float[n,40] y)", CNN, **held)


def test_between_convs_everything_is_int8():
    proto = cnn()
    held = index(proto)
    weights, _ = weighted_nodes(held, INT8.op_types, "")
    assert list(between(held, weights).values()) == ["Relu", "Add", "GlobalAveragePool", "Flatten"]
    x = noise(9, 32, 3, 8, 8).astype(np.float32)
    made = quantized(INT8, proto, {"x": x})
    assert relative(outputs(proto, {"x": x})["y"], outputs(made.store, {"x": x})["y"]) < 0.03
    assert "Relu" not in ops(made.store.proto)  # it is in the scale of the Conv


def test_a_residual_stream_is_not_touched():
    body = "h = MatMul(x, W) r = Relu(h) k = MatMul(r, V) y = Add(k, x)"
    held = index(graph(body, W=W, V=V))
    weights, _ = weighted_nodes(held, INT8.op_types, "")
    assert len(weights) == 2
    assert between(held, weights) == {}


def test_what_leaves_the_convs_is_not_int8():
    """The Add and the pooling feed a Softmax in the end, and so does the Relu through the Add."""
    proto = cnn()
    proto.graph.node[-1].CopyFrom(onnx.helper.make_node("Softmax", ["f"], ["y"]))
    held = index(proto)
    weights, _ = weighted_nodes(held, INT8.op_types, "")
    assert between(held, weights) == {}


def test_an_old_opset_is_converted_and_the_user_is_told():
    proto = graph("y = MatMul(x, W)", opset=9, ir=4, W=W)
    made = quantized(INT8, proto)
    assert made.store.opset == 13
    assert "converted from opset 9 to 13" in made.notes[0]
    assert relative(outputs(proto)["y"], outputs(made.store)["y"]) < 0.03
    assert quantized(INT4, proto).store.opset == 9


def test_tables_are_stored_in_8_bits():
    table = noise(4, 300, 16).astype(np.float32)
    proto = parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[n,5] ids) => (float[n,5,40] y) { e = Gather(T, ids) y = MatMul(e, H) }"""
    )
    head = noise(5, 16, 40).astype(np.float32)
    proto.graph.initializer.extend(
        [numpy_helper.from_array(table, "T"), numpy_helper.from_array(head, "H")]
    )
    ids = {"ids": np.random.default_rng(0).integers(0, 300, (ROWS, 5))}
    for scheme in (INT8, INT8_DYNAMIC, INT4):
        made = quantized(scheme, proto, ids)
        assert len(made.weights) == 2, scheme.key
        error = relative(outputs(proto, ids)["y"], outputs(made.store, ids)["y"])
        assert error < ERRORS[scheme.key]
        assert made.store.file_bytes < 0.45 * proto.ByteSize()


def test_ranges_rest_on_the_samples_that_calibrate_alone():
    """On all of them, in whichever run, while held-back samples may be anything."""
    x = noise(6, 100, D).astype(np.float32)
    calibrating, held = hold_back(len(x), samples=None, seed=0)
    wild, other = x.copy(), x.copy()
    wild[held] *= 1e6
    other[calibrating[-1]] *= 10
    first, same, wider = (
        onnx_utilrank.quantize(MLP, {"x": given}, QuantizeConfig(scheme="int8")).store.proto
        for given in (x, wild, other)
    )
    assert first == same
    assert first != wider


def test_a_value_that_is_not_finite_has_no_range():
    proto = graph("h = MatMul(x, W) l = Log(h) r = Relu(l) y = MatMul(r, V)", W=W, V=V)
    with pytest.raises(ModelError, match="not finite"):
        quantized(INT8, proto)


def test_errors_of_the_quantizer_are_one_line():
    line = r"^m.onnx: int8: onnxruntime.quantization: bad thing$"
    with pytest.raises(ModelError, match=line), calling("m.onnx", "int8"):
        raise ValueError("bad\nthing")
    with pytest.raises(KeyboardInterrupt), calling("m.onnx", "int8"):
        raise KeyboardInterrupt


def test_its_advice_is_kept_from_the_user(caplog, capsys):
    with calling("m.onnx", "int8"):
        logging.warning("Please consider pre-processing")
        print("Collecting tensor data")
    assert not caplog.records
    assert capsys.readouterr().out == ""
    assert tools().__name__ == "onnxruntime.quantization"


# --- int4 ---------------------------------------------------------------------------------------


def unpacked(packed: np.ndarray) -> np.ndarray:
    """Values of 4 bits, the first of a byte in its lower half."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def restored(packed, scales, zeros, inputs: int) -> np.ndarray:
    """W^T as stored, float64 [inputs, outputs]."""
    count = scales.shape[1]
    q = unpacked(packed).reshape(len(packed), count, BLOCK).astype(np.float64)
    z = unpacked(zeros)[:, :count, None].astype(np.float64)
    return ((q - z) * scales[:, :, None]).reshape(len(packed), -1)[:, :inputs].T


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100), st.integers(1, 20), st.integers(0, 2**31))
def test_int4_weights_are_within_half_a_step(inputs, out, seed):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((inputs, out)) * 10.0 ** rng.uniform(-3, 3)).astype(np.float32)
    packed, scales, zeros = blocks_of(w)
    count = -(-inputs // BLOCK)
    assert packed.shape == (out, count, BLOCK // 2)
    assert zeros.shape == (out, -(-count // 2))
    step = np.repeat(scales, BLOCK, axis=1)[:, :inputs].T
    assert (np.abs(restored(packed, scales, zeros, inputs) - w) <= 0.5 * step * (1 + 1e-4)).all()


@pytest.mark.parametrize("inputs", [16, 32, 33, 48, 64, 100])
def test_int4_computes_with_what_is_stored(inputs):
    w = noise(inputs, inputs, 24).astype(np.float32)
    x = noise(1, 7, inputs).astype(np.float32)
    proto = model(f"(float[n,{inputs}] x) => (float[n,24] y)", "y = MatMul(x, W)", W=w)
    made = quantized(INT4, proto, {"x": x})
    held = initializers(made.store.proto)
    stored = restored(*(held[f"W/{part}"] for part in ("int4", "scales", "zeros")), inputs)
    # Sums of float32 of as many terms.
    bound = 4 * inputs * np.finfo(np.float32).eps * np.abs(x).sum(1).max() * np.abs(w).max()
    np.testing.assert_allclose(outputs(made.store, {"x": x})["y"], x @ stored, atol=bound)


def test_large_matrices_take_int8_kernels_and_small_ones_do_not():
    wide = noise(1, 512, 512).astype(np.float32) / 22
    body = "h = MatMul(x, W) y = MatMul(h, V)"
    proto = model("(float[n,512] x) => (float[n,20] y)", body, W=wide, V=wide[:, :20].copy())
    made = quantized(INT4, proto, {"x": noise(2, 8, 512).astype(np.float32)})
    levels = [
        [a.i for a in n.attribute if a.name == "accuracy_level"]
        for n in made.store.proto.graph.node
    ]
    assert levels == [[4], []]


def test_int4_of_a_gemm_is_a_product_and_a_sum():
    proto = graph("y = Gemm<alpha = 2.0, beta = 0.5>(x, W, B)", W=W, B=B)
    assert ops(quantized(INT4, proto).store.proto) == ["MatMulNBits", "Mul", "Add"]
    assert ops(quantized(INT4, graph("y = Gemm(x, W)", W=W)).store.proto) == ["MatMulNBits"]


@pytest.mark.parametrize(
    ("body", "arrays", "reason"),
    [
        ("t = Transpose(x) y = Gemm<transA = 1>(t, W)", {"W": W}, "its input is transposed"),
        (
            "s = ReduceMax<keepdims = 0>(W) h = MatMul(x, W) y = Mul(h, s)",
            {"W": W},
            "other readers",
        ),
        (
            "g = Identity(W) h = MatMul(x, W) i = MatMul(x, g) y = Add(h, i)",
            {"W": W},
            "other reader",
        ),
        ("y = MatMul(x, W)", {"W": W[None]}, "axes of extent 1 in front"),
        ("y = MatMul(x, W)", {"W": W.astype(np.float64)}, "its weight is of float64"),
        ("t = Transpose(x) h = MatMul(W, t) y = Transpose(h)", {"W": W.T.copy()}, "left operand"),
        ("y = MatMul(x, W)", {"W": W[:, :2].copy()}, "so small that"),
    ],
)
def test_what_int4_leaves_has_a_reason(body, arrays, reason):
    held = ModelStore.load(graph(body, **arrays))
    with pytest.raises(ModelError, match=reason):
        INT4.quantize(held, Calibration(data=None, samples=(), provider=CPU, batch=1))


def test_odd_tables_stay_and_the_ledger_knows():
    table = noise(4, 300, 17).astype(np.float32)
    proto = parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[n,5] ids) => (float[n,5,17] y) { y = Gather(T, ids) }"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(table, "T"))
    with pytest.raises(ModelError, match="odd number of features"):
        quantized(INT4, proto, {"ids": np.zeros((4, 5), np.int64)})
    assert INT4.matrix_bytes("Gather", 17, 300, table.dtype) == table.nbytes


# --- bytes --------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(20, 130), st.integers(20, 130), st.sampled_from(ON_CPU), st.booleans())
def test_bytes_are_foreseen_within_what_nodes_take(inputs, out, scheme, table):
    """The difference to the file without the weight is what the ledger says."""
    w = noise(inputs, inputs, out).astype(np.float32)
    if table:
        text = f"g (int64[n] x) => (float[n,{out}] y) {{ y = Gather(W, x) }}"
        arrays = {"x": np.zeros(8, np.int64)}
        if scheme is INT4 and out % 2:
            out, w = out - 1, w[:, 1:].copy()
            text = text.replace(str(out + 1), str(out))
        kind, outs, ins = "Gather", out, inputs
    else:
        text = f"g (float[n,{inputs}] x) => (float[n,{out}] y) {{ y = MatMul(x, W) }}"
        arrays = {"x": noise(1, 8, inputs).astype(np.float32)}
        kind, outs, ins = "MatMul", out, inputs
    proto = parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    empty = proto.ByteSize()
    proto.graph.initializer.append(numpy_helper.from_array(w, "W"))
    made = quantized(scheme, proto, arrays, in_float=[])
    foreseen = scheme.matrix_bytes(kind, outs, ins, w.dtype)
    assert abs(made.store.file_bytes - empty - foreseen) <= 4 * NODE_BYTES


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.key)
def test_what_a_scheme_leaves_has_its_own_bytes(scheme):
    double = np.dtype(np.float64)
    assert scheme.matrix_bytes("MatMul", 10, 20, double) == 1600
    if scheme in (INT4, INT8_DYNAMIC):
        assert scheme.matrix_bytes("Conv", 10, 20, np.dtype(np.float32)) == 800


def test_at_4_bits_thin_factors_pay_for_their_padding():
    """A factor with r inputs takes whole blocks of them: rank 33 costs as much as rank 64."""
    f4 = np.dtype(np.float32)
    costs = [INT4.matrix_bytes("MatMul", 100, r, f4) for r in (32, 33, 64, 65)]
    assert costs[0] < costs[1] == costs[2] < costs[3]


# --- fp16 and bf16 ------------------------------------------------------------------------------


def types(proto: onnx.ModelProto) -> dict[str, int]:
    return {t.name: t.data_type for t in proto.graph.initializer}


def test_inputs_and_outputs_stay_float32():
    made = quantized(FP16, MLP).store
    assert set(types(made.proto).values()) == {TensorProto.FLOAT16}
    assert ops(made.proto) == ["Cast", "MatMul", "Relu", "Gemm", "Cast"]
    assert [v.dtype for v in (*made.inputs, *made.outputs)] == [np.float32] * 2


# Where all of it is of float16, all but the last of these end the process that loads them.
@pytest.mark.parametrize("between", ["Identity", "Dropout"])
@pytest.mark.parametrize("perm", [(1, 0, 2), (1, 2, 0), (1, 2, 0, 3), (1, 2, 3, 0), (0, 2, 1)])
def test_products_behind_transposes_of_the_batch_axis_load(perm: tuple[int, ...], between: str):
    rank = len(perm)
    shape = [5, 6, 7, 8][:rank]
    held = noise(1, shape[perm[-1]], 64).astype(np.float32)
    proto = model(
        f"(float[{','.join(map(str, shape))}] x) => (float[{','.join('abcd'[:rank])}] y)",
        f"t = Transpose<perm={list(perm)}>(x) s = {between}(t) y = MatMul(s, W)",
        W=held,
    )
    feed = {"x": noise(2, *shape).astype(np.float32)}
    made = quantized(FP16, proto, {"x": np.stack([feed["x"]] * 2)})
    assert not made.in_float  # no replay has to be told
    turns = perm != (0, 2, 1)
    assert [skip.op_type for skip in made.left] == ["Transpose"] * turns
    first = ["Transpose", "Cast"] if turns else ["Cast", "Transpose"]
    assert ops(made.store.proto)[:2] == first  # of float32 where it moves the batch axis
    assert relative(outputs(proto, feed)["y"], outputs(made.store, feed)["y"]) < ERRORS["fp16"]


@pytest.mark.parametrize(
    ("body", "arrays", "stays"),
    [
        (
            "h = MatMul(x, W) b = Mul(h, big) s = Mul(b, small) y = MatMul(s, V)",
            {"big": 1e6, "small": 1e-6},
            {"b", "s"},
        ),
        ("h = MatMul(x, W) b = Add(h, tiny) y = MatMul(b, V)", {"tiny": 1e-12}, {"b"}),
        (
            "h = MatMul(x, W) b = Add(h, low) s = Softmax(b) y = MatMul(s, V)",
            {"low": -3e38},
            {"b", "s"},
        ),
    ],
    ids=["overflow", "underflow", "mask"],
)
def test_what_float16_cannot_hold_stays_in_float32(body, arrays, stays):
    scalars = {name: np.float32(value) for name, value in arrays.items()}
    proto = graph(body, W=W, V=V, **{n: np.asarray(v) for n, v in scalars.items()})
    made = quantized(FP16, proto)
    assert set(made.in_float) == stays
    result = outputs(made.store)["y"]
    assert np.isfinite(result).all()
    assert relative(outputs(proto)["y"], result) < ERRORS["fp16"]
    assert types(made.store.proto)["W"] == TensorProto.FLOAT16
    again = quantized(FP16, proto, in_float=made.in_float)
    assert again.store.proto == made.store.proto


def test_weights_beyond_the_range_stay():
    w = W.copy()
    w[3, 4] = 1e5
    proto = graph(
        "h = MatMul(x, W) s = Mul(h, c) y = MatMul(s, V)", W=w, V=V, c=np.float32(1e-3).reshape(1)
    )
    made = quantized(FP16, proto)
    assert types(made.store.proto)["W"] == TensorProto.FLOAT
    assert "h" in made.in_float
    assert np.isfinite(outputs(made.store)["y"]).all()


def test_values_that_both_read_have_two_versions():
    """A subgraph reads by name, so what it captures stays float32 under its own name."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,{D}] x, bool on) => (float[n,k] y) {{
        h = MatMul(x, W)
        z = If(on) <
            then_branch = t () => (float[n,k] a) {{ a = Relu(h) }},
            else_branch = e () => (float[n,k] b) {{ b = Identity(h) }}
        >
        p = Tanh(h)
        y = Add(z, p)
    }}"""
    proto = parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(W, "W"))
    feed = {"x": X, "on": np.array(True)}
    made = quantized(FP16, proto, [feed])
    assert [s.reason for s in made.left if s.op_type == "If"] == [
        "its operator has no form for float16"
    ]
    for on in (True, False):
        feed = {"x": X, "on": np.array(on)}
        error = relative(outputs(proto, feed)["y"], outputs(made.store, feed)["y"])
        assert error < ERRORS["fp16"]


def test_inputs_that_are_always_float32_stay():
    signature = "(float[1,1,4,4] x) => (float[1,1,8,8] y)"
    scales = np.array([1, 1, 2, 2], np.float32)
    proto = model(signature, "r = Relu(x) y = Resize(r, , scales)", scales=scales)
    feed = {"x": noise(1, 1, 1, 4, 4).astype(np.float32)}
    made = quantized(FP16, proto, feed)
    assert ops(made.store.proto) == ["Cast", "Relu", "Resize", "Cast"]
    assert types(made.store.proto) == {"scales": TensorProto.FLOAT}
    assert relative(outputs(proto, feed)["y"], outputs(made.store, feed)["y"]) < ERRORS["fp16"]


def test_bfloat16_needs_a_provider_that_has_it():
    with pytest.raises(ProviderUnavailableError, match="no bfloat16 kernels on provider cpu"):
        onnx_utilrank.quantize(MLP, {"x": X}, QuantizeConfig(scheme="bf16"))
    assert BF16.key == "bf16"


def test_bfloat16_is_written_where_it_can_be_run():
    """What would be given to such a provider: valid, with half of the bytes."""
    made = quantized(BF16, MLP).store
    onnx.checker.check_model(made.proto, full_check=True)
    assert set(types(made.proto).values()) == {TensorProto.BFLOAT16}
    assert made.file_bytes < 0.6 * MLP.ByteSize()


# --- the verb -----------------------------------------------------------------------------------


def test_quantize_reports_the_stage():
    result = onnx_utilrank.quantize(MLP, {"x": X}, QuantizeConfig(scheme="int8"))
    assert result.verdict in ("smaller", "slower", "faster")
    assert result.report.beside_plain is None
    assert [s.name for s in result.report.stages] == ["int8"]
    figures = result.stage.validation
    assert figures.candidate.parameters == figures.reference.parameters
    assert figures.candidate.flops == figures.reference.flops
    assert figures.candidate.file_bytes == result.store.file_bytes
    assert result.stage.quality.divergence.samples == ROWS // 5
    assert result.samples == ROWS - ROWS // 5


def test_outputs_that_are_far_off_are_called_that():
    """A weight that is large where the data are small leaves no bits for the others."""
    x, w = X.copy(), W.copy()
    x[:, ::2] *= 1e-3
    w[::2] *= 1e3
    proto = graph("y = MatMul(x, W)", W=w)
    result = onnx_utilrank.quantize(proto, {"x": x}, QuantizeConfig(scheme="int4"))
    assert result.stage.quality.divergence.mean > 0.05
    assert any("FAR FROM THE ORIGINAL" in note for note in result.notes)
    fine = onnx_utilrank.quantize(MLP, {"x": X}, QuantizeConfig(scheme="int8"))
    assert not fine.notes


def test_what_would_be_larger_is_refused():
    name = "h" * 2000  # the nodes that come along repeat it
    small = graph(f"{name} = MatMul(x, W) y = Relu({name})", W=noise(1, D, 6).astype(np.float32))
    with pytest.raises(TargetMissedError, match="int8-dynamic would be larger"):
        onnx_utilrank.quantize(small, {"x": X}, QuantizeConfig(scheme="int8-dynamic"))


@pytest.mark.parametrize("key", ["int8", "int8-dynamic", "int4", "fp16"])
def test_two_processes_make_the_same_file(key, tmp_path):
    (tmp_path / "m.onnx").write_bytes(
        cnn().SerializeToString() if key == "int8" else MLP.SerializeToString()
    )
    x = noise(9, 32, 3, 8, 8).astype(np.float32) if key == "int8" else X
    np.savez(tmp_path / "x.npz", x=x)
    for seed in ("1", "2"):
        subprocess.run(
            [
                sys.executable,
                "-m",
                "onnx_utilrank",
                "quantize",
                "m.onnx",
                "-o",
                f"{seed}.onnx",
                "--data",
                "x.npz",
                "--to",
                key,
            ],
            cwd=tmp_path,
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()
    left = Counter(p.suffix for p in tmp_path.iterdir())
    assert left == {".onnx": 3, ".npz": 1}
    assert isinstance(Path(tmp_path), Path)
