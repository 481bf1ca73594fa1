"""The torch executor against ONNX's own tests, ONNX Runtime and finite differences."""

import importlib
import os
import warnings
from pathlib import Path

import builders
import numpy as np
import onnx
import pytest
import torch

from onnx_utilrank.errors import DataError, ModelError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.torch_graph.graph import TorchGraph, UnsupportedOperatorError
from onnx_utilrank.torch_graph.operators import OPERATORS

ROOT = Path(__file__).parent.parent
ZOO = Path(os.environ.get("ONNX_UTILRANK_ZOO") or ROOT.parent / "shared" / "zoo")


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("backend_cases")


def graph_of(proto, **options):
    return TorchGraph.build(ModelStore.load(proto), **options)


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# --- ONNX's own tests ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(8))
def test_backend_cases(part, cases):
    """Every test of the onnx package whose operators are claimed; each fails under its name."""
    failed = {}
    for case in [c for c in cases.cases() if not c.left_out][part::8]:
        try:
            case.check()
        except (AssertionError, ModelError) as e:
            failed[case.name] = str(e)[:300]
    assert not failed


def test_backend_cases_cover_the_table(cases):
    found = [c for c in cases.cases() if not c.left_out]
    assert len(found) > 1000
    covered = {key for case in found for key in case.operators}
    ours = {name for domain, name in OPERATORS.keys() - covered if not domain}
    assert ours <= {"GlobalLpPool", "SimplifiedLayerNormalization"}


def test_left_out_cases_exist_and_fail(cases):
    by_name = {c.name: c for c in cases.cases()}
    for name in cases.LEFT_OUT:
        with pytest.raises((AssertionError, ModelError)):
            by_name[name].check()


# --- ONNX Runtime -------------------------------------------------------------------------------


def same(proto, feed, tolerance=100, outputs=None):
    """Equal to ONNX Runtime up to so many units in the last place."""
    expected = builders.run(proto, feed)
    made = graph_of(proto).run(feed, outputs)
    for name in expected if outputs is None else outputs:
        wanted, array = expected[name], made[name].numpy()
        assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype)
        if wanted.dtype.kind != "f":
            np.testing.assert_array_equal(array, wanted)
            continue
        bound = tolerance * np.finfo(wanted.dtype).eps * np.abs(wanted).max(initial=1e-30)
        assert np.abs(array - wanted).max(initial=0) <= bound


OLD = {
    "softmax_flattens": (11, "y = Softmax<axis=1>(x)", {}),
    "log_softmax_flattens": (7, "y = LogSoftmax(x)", {}),
    "softmax_one_axis": (13, "y = Softmax<axis=1>(x)", {}),
    "squeeze_attribute": (11, "u = Unsqueeze<axes=[0, 4]>(x) y = Squeeze<axes=[-1]>(u)", {}),
    "squeeze_input": (13, "u = Unsqueeze(x, a) y = Squeeze(u)", {"a": np.array([0, -1])}),
    "clip_attributes": (7, "y = Clip<min=-0.5, max=0.25>(x)", {}),
    "clip_one_attribute": (7, "y = Clip<max=0.25>(x)", {}),
    "clip_inputs": (13, "y = Clip(x, , h)", {"h": np.float32(0.25)}),
    "reduce_attribute": (11, "y = ReduceSum<axes=[0, -1], keepdims=0>(x)", {}),
    "reduce_input": (13, "y = ReduceSum(x, a)", {"a": np.array([1])}),
    "reduce_noop": (13, "y = ReduceSum<noop_with_empty_axes=1>(x)", {}),
    "reduce_mean_18": (18, "y = ReduceMean<keepdims=0>(x, a)", {"a": np.array([-2])}),
    "slice_attributes": (9, "y = Slice<starts=[1, -2], ends=[9, 9], axes=[1, 2]>(x)", {}),
    "slice_backwards": (
        13,
        "y = Slice(x, s, e, a, t)",
        {
            "s": np.array([-1, 5]),
            "e": np.array([-(2**31), 0]),
            "a": np.array([2, 1]),
            "t": np.array([-2, -1]),
        },
    ),
    "split_attribute": (11, "y, z = Split<axis=2, split=[1, 4]>(x)", {}),
    "split_equal": (13, "z, y = Split<axis=1>(x)", {}),
    "split_uneven": (18, "z, y = Split<axis=2, num_outputs=2>(x)", {}),
    "pad_attributes": (9, 'y = Pad<mode="reflect", pads=[0, 1, 2, 1, 0, 1]>(x)', {}),
    "pad_axes": (18, "y = Pad(x, p, , a)", {"p": np.array([1, -1]), "a": np.array([-1])}),
    "upsample_9": (
        9,
        'y = Upsample<mode="nearest">(x, s)',
        {"s": np.array([1, 2, 1.5], np.float32)},
    ),
    "resize_10": (10, 'y = Resize<mode="linear">(x, s)', {"s": np.array([1, 1, 2.0], np.float32)}),
    "topk_10": (10, "y, i = TopK<axis=1>(x, k)", {"k": np.array([2])}),
    "dropout_7": (7, "y = Dropout<ratio=0.5>(x)", {}),
    "batch_norm_9": (
        9,
        "y = BatchNormalization<epsilon=0.1>(x, s, b, m, v)",
        {n: np.array([0.5, 1, 2, 3], np.float32) for n in "sbmv"},
    ),
    "average_pool": (
        19,
        "y = AveragePool<kernel_shape=[3], pads=[1, 1], strides=[2], ceil_mode=1>(x)",
        {},
    ),
    "average_pool_counts_padding": (
        19,
        "y = AveragePool<kernel_shape=[3], pads=[1, 1], strides=[3], ceil_mode=1,"
        " count_include_pad=1>(x)",
        {},
    ),
    "max_pool_same": (
        12,
        'y, i = MaxPool<kernel_shape=[2], strides=[2], auto_pad="SAME_LOWER">(x)',
        {},
    ),
    "mean_variance": (13, "y = MeanVarianceNormalization<axes=[0, 2]>(x)", {}),
    "global_lp_pool": (7, "y = GlobalLpPool<p=3>(x)", {}),
    "scatter": (
        9,
        "y = Scatter<axis=1>(x, i, u)",
        {"i": np.array([[[1]], [[-1]]]), "u": np.ones((2, 1, 1), np.float32)},
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_versions_of_operators(name):
    opset, body, constants = OLD[name]
    proto = builders.model("(float[2,4,5] x) => (float[?] y)".replace("[?]", ""), body, opset=opset)
    for key, values in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), key))
    same(proto, {"x": noise(1, 2, 4, 5).astype(np.float32)})


H = 8
HEADS = {"W": noise(3, H, 3 * H) / 3, "B": noise(4, 3 * H) / 5}
GROUPED = {"Q": noise(6, H, 64) / 3, "V": noise(7, H, 32) / 3}
CONTRIB = {
    "FusedMatMul": ("y = com.microsoft.FusedMatMul<alpha=0.5, transB=1>(x, x)", {}),
    "FusedGemm": (
        "s = Constant<value_ints=[-1, 8]>() f = Reshape(x, s)"
        ' y = com.microsoft.FusedGemm<alpha=0.5, activation="LeakyRelu",'
        " activation_alpha=0.1>(f, W, B)",
        HEADS,
    ),
    "FusedConv": (
        'y = com.microsoft.FusedConv<kernel_shape=[3], pads=[1, 1], activation="Relu">(x, K, c)',
        {"K": noise(5, 6, 4, 3), "c": noise(6, 6)},
    ),
    "BiasGelu": ("y = com.microsoft.BiasGelu(x, b)", {"b": noise(5, H)}),
    "FastGelu": ("y = com.microsoft.FastGelu(x, b)", {"b": noise(5, H)}),
    "Gelu": ("y = com.microsoft.Gelu(x)", {}),
    "QuickGelu": ("y = com.microsoft.QuickGelu<alpha=1.5>(x)", {}),
    "SkipLayerNormalization": (
        "y, m, i, s = com.microsoft.SkipLayerNormalization<epsilon=0.01>(x, x, g, b, b)",
        {"g": noise(5, H), "b": noise(6, H)},
    ),
    "SkipSimplifiedLayerNormalization": (
        "y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.01>(x, x, g, b)",
        {"g": noise(5, H), "b": noise(6, H)},
    ),
    "SimplifiedLayerNormalization": (
        "y = SimplifiedLayerNormalization<axis=-1>(x, g)",
        {"g": noise(5, H)},
    ),
    "Attention": ("y = com.microsoft.Attention<num_heads=2>(x, W, B)", HEADS),
    "AttentionCausal": (
        "y = com.microsoft.Attention<num_heads=2, unidirectional=1>(x, W, B)",
        HEADS,
    ),
    "AttentionMask": (
        "y = com.microsoft.Attention<num_heads=2>(x, W, B, m)",
        {**HEADS, "m": np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32)},
    ),
    "AttentionLengths": (
        "y = com.microsoft.Attention<num_heads=4>(x, W, B, m)",
        {**HEADS, "m": np.array([3, 2], np.int32)},
    ),
    "AttentionPast": (
        "y, z = com.microsoft.Attention<num_heads=2, unidirectional=1>(x, W, B, , p)",
        {**HEADS, "p": noise(5, 2, 2, 2, 3, 4)},
    ),
    "MultiHeadAttention": (
        "q = MatMul(x, V) y = com.microsoft.MultiHeadAttention<num_heads=2>(q, x, x, B, m)",
        {**HEADS, "V": noise(7, H, H), "m": np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32)},
    ),
    "MultiHeadAttentionPast": (
        "y, k, v = com.microsoft.MultiHeadAttention<num_heads=2>(x, x, x, , , a, p, q)",
        {"a": noise(8, 1, 2, 4, 6), "p": noise(5, 2, 2, 2, 4), "q": noise(6, 2, 2, 2, 4)},
    ),
    "GroupQueryAttention": (
        "q = MatMul(x, Q) k = MatMul(x, V) y, c, d = com.microsoft.GroupQueryAttention<"
        "num_heads=4, kv_num_heads=2, local_window_size=3>(q, k, k, p, p, l, t)",
        {
            **GROUPED,
            "p": np.zeros((2, 2, 0, 16)),
            "l": np.array([3, 3], np.int32),
            "t": np.array(4, np.int32),
        },
    ),
    "GroupQueryAttentionPast": (
        "o = Reshape(x, n) q = MatMul(o, Q) k = MatMul(o, V)"
        " y, e, d = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>"
        "(q, k, k, p, p, l, t, c, s)",
        {
            **GROUPED,
            "n": np.array([1, 8, 8]),
            "p": noise(5, 1, 2, 3, 16),
            "l": np.array([10], np.int32),
            "t": np.array(11, np.int32),
            "c": np.cos(noise(5, 11, 8)),
            "s": np.sin(noise(5, 11, 8)),
        },
    ),
    "RotaryEmbedding": (
        "y = com.microsoft.RotaryEmbedding(x, p, c, s)",
        {
            "p": np.array([1]),
            "c": np.cos(noise(5, 9, 2)),
            "s": np.sin(noise(5, 9, 2)),
        },
    ),
    "RotaryEmbeddingInterleaved": (
        "y = com.microsoft.RotaryEmbedding<interleaved=1>(x, p, c, s)",
        {
            "p": np.array([[0, 1, 2, 3], [4, 5, 6, 7]]),
            "c": np.cos(noise(5, 9, 2)),
            "s": np.sin(noise(5, 9, 2)),
        },
    ),
}


def single(values):
    values = np.asarray(values)
    return values.astype(np.float32) if values.dtype == np.float64 else values


@pytest.mark.parametrize("name", CONTRIB)
def test_operators_of_onnx_runtime(name):
    body, constants = CONTRIB[name]
    proto = builders.model(
        "(float[2,4,8] x) => (float y)",
        body,
        domains=', "com.microsoft" : 1',
        **{k: single(v) for k, v in constants.items()},
    )
    same(proto, {"x": noise(1, 2, 4, H).astype(np.float32)})


def test_embed_layer_normalization():
    given = {"w": noise(1, 9, H), "p": noise(2, 6, H), "s": noise(3, 2, H), "g": noise(4, H)}
    proto = builders.model(
        "(int32[2,4] i, int32[2,4] k) => (float y, int32 m)",
        "y, m = com.microsoft.EmbedLayerNormalization(i, k, w, p, s, g, g, k)",
        domains=', "com.microsoft" : 1',
        **{k: single(v) for k, v in given.items()},
    )
    ids = np.array([[1, 8, 3, 0], [4, 4, 2, 7]], np.int32)
    same(proto, {"i": ids, "k": (ids > 3).astype(np.int32)}, outputs=["y"])


ALIGNED = 'y = Resize<mode="{mode}", coordinate_transformation_mode="{transform}">(x, , s)'


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("transform", ["half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("scale", [0.6, 1.7, 2.0])
def test_resize(mode, transform, scale):
    body = ALIGNED.format(mode=mode, transform=transform)
    scales = np.array([1, 1, scale, scale], np.float32)
    proto = builders.model("(float[1,2,7,5] x) => (float y)", body, s=scales)
    same(proto, {"x": noise(1, 1, 2, 7, 5).astype(np.float32)})


# --- subgraphs, functions, order ----------------------------------------------------------------

BRANCHES = """
    t = ReduceMax<keepdims=0>(x)  c = Greater(t, z)
    y = If (c) <then_branch = g1 () => (float[2,3] a) { a = Mul(x, w) },
                else_branch = g2 () => (float[2,3] b) { b = Neg(x) }>
"""
PAIR = "(float[2,3] x) => (float[2,3] y)"
GIVEN = {"w": np.float32([2, 3, 4]), "z": np.float32(0)}


@pytest.mark.parametrize("sign", [1, -1])
def test_if_reads_what_is_around_it(sign):
    proto = builders.model(PAIR, BRANCHES, **GIVEN)
    same(proto, {"x": (sign * np.abs(noise(1, 2, 3))).astype(np.float32)})


LOOP = """
    y, s = Loop (n, , x) <body = g1 (int64 i, bool c, float[2,3] a)
        => (bool d, float[2,3] b, float[2,3] r) { d = Identity(c) b = Mul(a, w) r = Neg(b) }>
"""


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_loop(rounds):
    proto = builders.model("(float[2,3] x, int64 n) => (float[2,3] y, float s)", LOOP, w=GIVEN["w"])
    same(proto, {"x": noise(1, 2, 3).astype(np.float32), "n": np.array(rounds)})


def test_functions_are_inlined():
    proto = builders.model(
        PAIR,
        "y = own.twice(x)",
        domains=', "own" : 1',
        functions='<domain: "own", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }',
    )
    graph = graph_of(proto)
    assert [n.op_type for n in graph.nodes] == builders.ops(graph.store.proto) == ["Add"]
    x = noise(1, 2, 3).astype(np.float32)
    np.testing.assert_array_equal(graph.run({"x": x})["y"], 2 * x)


def test_nodes_out_of_order_are_sorted():
    proto = builders.model(PAIR, "h = Neg(x) y = Abs(h)")
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    graph = graph_of(proto)
    assert builders.ops(graph.store.proto) == ["Neg", "Abs"]
    assert builders.ops(proto) == ["Abs", "Neg"]
    x = noise(1, 2, 3).astype(np.float32)
    np.testing.assert_array_equal(graph.run({"x": x})["y"], np.abs(x))


# --- running ------------------------------------------------------------------------------------

BODY = "h = MatMul(x, W) r = Relu(h) n = Shape(r) f = Reshape(r, n) y = Add(f, b) e = Neg(h)"
WEIGHTS = {"W": noise(2, 3, 4).astype(np.float32), "b": noise(3, 4).astype(np.float32)}
X = {"x": noise(1, 5, 3).astype(np.float32)}


def chain(**options):
    return graph_of(builders.model("(float[5,3] x) => (float[5,4] y)", BODY, **WEIGHTS), **options)


def test_step_by_step_equals_run():
    graph = chain()
    assert list(graph.parameters) == ["W", "b"]
    assert graph.dead_after == (("x",), (), (), ("r", "n"), ("f",), ("h", "e"))
    state = graph.start(X)
    made = []
    for k, dead in enumerate(graph.dead_after):
        made += graph.step(k, state)
        for name in dead:
            del state[name]
    assert made == ["h", "r", "n", "f", "y", "e"]
    assert set(state) == {"W", "b", "y"}
    torch.testing.assert_close(state["y"], graph.run(X)["y"], rtol=0, atol=0)


def test_inner_values_can_be_asked_for():
    made = chain().run(X, ["h", "x", "y"])
    assert list(made) == ["h", "x", "y"]
    np.testing.assert_allclose(made["h"], X["x"] @ WEIGHTS["W"], rtol=1e-5)
    with pytest.raises(ModelError, match="no value is named 'none'"):
        chain().run(X, ["none"])


def test_visit_sees_and_replaces_every_value():
    seen = []

    def visit(name, value):
        seen.append(name)
        return torch.zeros_like(value) if name == "h" else value

    made = chain().run(X, visit=visit)
    assert seen == ["x", "h", "r", "n", "f", "y", "e"]
    np.testing.assert_array_equal(made["y"], np.broadcast_to(WEIGHTS["b"], (5, 4)))


def test_parameters_can_be_replaced():
    weight = torch.zeros(3, 4, requires_grad=True)
    graph = chain()
    made = graph.run(X, parameters={"W": weight})["y"]
    made.sum().backward()
    assert weight.grad is not None
    np.testing.assert_array_equal(made.detach(), np.broadcast_to(WEIGHTS["b"], (5, 4)))
    assert not any(t.requires_grad for t in graph.parameters.values())


def test_one_type_for_everything():
    body = """
        c = Constant<value_float=0.1>()  s = Shape(x)  z = ConstantOfShape(s)
        i = Cast<to=1>(n)  h = Mul(x, c)  k = Add(h, z)  l = Add(k, i)  m = Cast<to=10>(l)
        y = Softmax(m)
    """
    proto = builders.model("(float[2,3] x, int64[3] n) => (float16[2,3] y)", body)
    feed = {"x": noise(1, 2, 3), "n": np.arange(3)}
    made = graph_of(proto, dtype=torch.float64).run(feed)["y"]
    logits = feed["x"] * 0.1 + feed["n"]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert made.dtype == torch.float64
    np.testing.assert_allclose(made, expected, rtol=1e-7)  # 0.1 itself is stored in float32


def test_float64_of_a_float32_model_equals_onnx_runtime():
    """The same network, once as float32 model in float64 mode, once written in float64."""

    def proto(kind, dtype):
        weights = {n: v.astype(dtype) for n, v in BLOCK_WEIGHTS.items() if n not in "Kc"}
        return builders.model(f"({kind}[2,36,8] t) => ({kind} y)", TOKENS, **weights)

    x = noise(1, 2, 36, 8)
    expected = builders.run(proto("double", np.float64), {"t": x})["y"]
    made = graph_of(proto("float", np.float32), dtype=torch.float64)
    wide = {n: torch.from_numpy(v) for n, v in BLOCK_WEIGHTS.items()}
    np.testing.assert_allclose(made.run({"t": x}, parameters=wide)["y"], expected, rtol=1e-11)


META = {
    "pad": ("y = Pad(x, p, v)", {"p": np.array([0, 1, 1, 0]), "v": np.float32(2)}),
    "resize": ("y = Resize(x, , s)", {"s": np.float32([1, 2])}),
    "constant": (
        "v = Constant<value_float=2.0>() y = Pad(x, p, v)",
        {"p": np.array([0, 1, 1, 0])},
    ),
    "mask": (
        "n = Shape(x) m = ConstantOfShape<value=bool[1] {1}>(n) z = Neg(x) y = Where(m, x, z)",
        {},
    ),
    "gather": ("y = Gather<axis=1>(x, i)", {"i": np.array([0, -1])}),
}


@pytest.mark.parametrize("name", META)
def test_shapes_are_never_read_from_the_device(name):
    """On torch's meta device, which holds no data, any such reading fails."""
    body, constants = META[name]
    proto = builders.model("(float[2,3] x) => (float y)", body, **constants)
    graph = graph_of(proto, device="meta")
    made = graph.run({"x": np.ones((2, 3), np.float32)})["y"]
    assert made.device.type == "meta"
    assert made.shape == graph_of(proto).run({"x": np.ones((2, 3), np.float32)})["y"].shape


# --- gradients ----------------------------------------------------------------------------------

# A convolution, the tokens of its picture, a normalization, and attention with one head.
TOKENS = """
    n = LayerNormalization(t, g, b)  k = MatMul(n, A)  v = MatMul(n, V)
    w = Transpose<perm=[0, 2, 1]>(k)  s = MatMul(n, w)  a = Softmax(s)  o = MatMul(a, v)
    e = Tanh(o)  r = Add(t, e)  u = ReduceMean<axes=[1], keepdims=0>(r)  y = MatMul(u, U)
"""
BLOCK = "p = Conv(x, K, c)  f = Reshape(p, q)  t = Transpose<perm=[0, 2, 1]>(f)" + TOKENS
BLOCK_WEIGHTS = {
    "K": noise(2, 8, 3, 3, 3) / 4,
    "c": noise(3, 8),
    "g": 1 + noise(4, 8) / 4,
    "b": noise(5, 8) / 4,
    "A": noise(6, 8, 8) / 3,
    "V": noise(7, 8, 8) / 3,
    "U": noise(8, 8, 4),
}


def gradients_are_right(proto, feed, names):
    graph = graph_of(proto, dtype=torch.float64)
    leaves = [torch.from_numpy(np.asarray(feed.get(n, v))) for n, v in names.items()]

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        own = {n: t for n, t in given.items() if n not in feed}
        return tuple(graph.run({**feed, **given}, parameters=own).values())

    inputs = [leaf.double().requires_grad_() for leaf in leaves]
    # One random direction: a full Jacobian of a network takes long and shows no more.
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_gradients_of_a_network():
    single_weights = {n: v.astype(np.float32) for n, v in BLOCK_WEIGHTS.items()}
    proto = builders.model(
        "(float[2,3,8,8] x) => (float y)", BLOCK, q=np.array([0, 8, 36]), **single_weights
    )
    gradients_are_right(proto, {"x": noise(1, 2, 3, 8, 8)}, {"x": None, **BLOCK_WEIGHTS})


@pytest.mark.parametrize("name", sorted(CONTRIB.keys() - {"AttentionPast", "FusedConv"}))
def test_gradients_of_operators_of_onnx_runtime(name):
    body, constants = CONTRIB[name]
    proto = builders.model(
        "(float[2,4,8] x) => (float y)",
        body,
        domains=', "com.microsoft" : 1',
        **{k: single(v) for k, v in constants.items()},
    )
    gradients_are_right(proto, {"x": noise(1, 2, 4, H)}, {"x": None})


SMOOTH = {
    "lstm": (
        "y = LSTM<hidden_size=4>(x, W, R)",
        {"W": noise(1, 1, 16, 8) / 4, "R": noise(2, 1, 16, 4) / 4},
    ),
    "gru": (
        "y = GRU<hidden_size=4, linear_before_reset=1>(x, W, R)",
        {"W": noise(1, 1, 12, 8) / 4, "R": noise(2, 1, 12, 4) / 4},
    ),
    "batch_norm": (
        "y = BatchNormalization(x, W, R, R, K)",
        {"W": noise(1, 4), "R": noise(2, 4), "K": 1 + noise(3, 4) ** 2},
    ),
    "instance_norm": (
        "y = InstanceNormalization(x, s, s)",
        {"s": noise(1, 4)},
    ),
    "pool": ("y = AveragePool<kernel_shape=[3], pads=[1, 0], strides=[2]>(x)", {}),
    "max_pool": ("y = MaxPool<kernel_shape=[3], pads=[1, 1], strides=[2]>(x)", {}),
    "transposed": (
        "y = ConvTranspose<strides=[2], pads=[1, 0], output_padding=[1]>(x, K)",
        {"K": noise(1, 4, 3, 3)},
    ),
    "resize": ('y = Resize<mode="cubic">(x, , s)', {"s": np.array([1, 1, 1.5])}),
    "einsum": ('y = Einsum<equation="bij, bkj -> bik">(x, x)', {}),
    "gather": ("y = Gather<axis=1>(x, i)", {"i": np.array([[0, -1], [2, 2]])}),
    "pad": ('y = Pad<mode="reflect">(x, p)', {"p": np.array([0, 1, 2, 0, 1, 1])}),
    "norm": ("y = ReduceL2<axes=[1]>(x)", {}),
    "scatter": (
        'y = ScatterND<reduction="add">(x, i, x)',
        {"i": np.array([[1], [1]])},
    ),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_of_operators(name):
    body, constants = SMOOTH[name]
    proto = builders.model(
        "(float[2,4,8] x) => (float y)", body, **{k: single(v) for k, v in constants.items()}
    )
    weights = {k: v for k, v in constants.items() if k in "WRK"}
    gradients_are_right(proto, {"x": noise(9, 2, 4, 8)}, {"x": None, **weights})


# --- errors -------------------------------------------------------------------------------------


def test_unknown_operator_is_found_before_anything_runs():
    proto = builders.model(PAIR, "h = Neg(x) y = own.Magic(h)", domains=', "own" : 1')
    proto.graph.node[1].name = "wand"
    with pytest.raises(
        UnsupportedOperatorError,
        match=r"^model 'g': Magic 'wand': this operator has no differentiable form here$",
    ):
        graph_of(proto)


def test_unknown_operator_in_a_subgraph():
    body = BRANCHES.replace("Neg(x)", "own.Magic(x)")
    proto = builders.model(PAIR, body, domains=', "own" : 1', **GIVEN)
    with pytest.raises(UnsupportedOperatorError, match="Magic 'b'"):
        graph_of(proto)


def test_operator_that_fails_is_named():
    proto = builders.model("(float[a,b] x) => (float y)", "y = MatMul(x, W)", W=WEIGHTS["W"])
    with pytest.raises(ModelError, match="model 'g': MatMul 'y': "):
        graph_of(proto).run({"x": np.ones((2, 2), np.float32)})


def test_missing_input():
    with pytest.raises(DataError, match="hold nothing for input 'x'"):
        chain().run({})


def test_old_opset():
    with pytest.raises(ModelError, match="opset 6 is older than 7"):
        graph_of(builders.model(PAIR, "y = Neg(x)", opset=6))


def test_nodes_in_a_circle():
    proto = builders.model(PAIR, "a = Add(x, b) b = Neg(a) y = Abs(b)")
    with pytest.raises(ModelError, match="waits for its own output"):
        graph_of(proto)


# --- real models --------------------------------------------------------------------------------


@pytest.mark.zoo
@pytest.mark.parametrize("model", sorted(ZOO.glob("*/model.onnx")), ids=lambda m: m.parent.name)
def test_zoo(model, cases):
    store = ModelStore.load(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cases.difference(store, cases.zoo_feed(model, store))
    assert found
    # Many layers of sums: a hundred units in the last place of the largest element.
    assert all(d.largest <= 100 * d.epsilon for d in found)
