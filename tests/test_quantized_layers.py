"""Quantized weights are read as ONNX Runtime applies them, and branches make up for them."""

import math

import ml_dtypes
import numpy as np
import onnx
import pytest
from builders import DTYPES, activations, model, noise, run
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.plain import index_model
from onnx_utilrank.model.quantized import index_quantized
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.two_sided import two_sided_site
from onnx_utilrank.repairing.branch import Branch, with_branches
from onnx_utilrank.repairing.layer import Layer
from onnx_utilrank.repairing.match import match_layers
from onnx_utilrank.repairing.readers import read_layers
from onnx_utilrank.sites.find import find_sites
from onnx_utilrank.statistics.factorize import Factors
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.sensitivity import Sensitivity

EPS = float(np.finfo(np.float32).eps)
MICROSOFT = ', "com.microsoft" : 1'
few = settings(max_examples=30, deadline=None)


def only_layer(proto: onnx.ModelProto) -> tuple[Layer, np.ndarray]:
    index = index_quantized(ModelStore.load(proto))
    layers, skips = read_layers(index)
    assert not skips
    (layer,) = layers
    return layer, layer.matrix(index)


def applied(proto: onnx.ModelProto, d: int) -> np.ndarray:
    """The matrix [m, d] that ONNX Runtime applies to rows, one column at a time."""
    y = run(proto, {"x": np.eye(d, dtype=np.float32)})["y"]
    return y.astype(np.float64).T


@few
@given(data=st.data())
def test_packed_weights_are_read_as_they_are_applied(data: st.DataObject):
    bits = data.draw(st.sampled_from([2, 4, 8]))
    block = data.draw(st.sampled_from([16, 32, 64]))
    d, m = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 9))
    # ONNX Runtime runs 8 bits with zero points of 8 bits alone.
    kind = data.draw(st.sampled_from(["none", "packed", "float"][: 2 if bits == 8 else 3]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    blocks = -(-d // block)
    weights = {
        "B": random.integers(0, 256, (m, blocks, block * bits // 8), np.uint8),
        "s": random.uniform(-2, 2, (m, blocks)).astype(np.float32),
    }
    if kind == "packed":
        weights["z"] = random.integers(0, 256, (m, -(-blocks * bits // 8)), np.uint8)
    elif kind == "float":
        weights["z"] = random.uniform(0, 2**bits - 1, (m, blocks)).astype(np.float32)
    names = ", ".join(("x", *weights))
    proto = model(
        f"(float[n,{d}] x) => (float[n,{m}] y)",
        f"y = com.microsoft.MatMulNBits<K={d}, N={m}, bits={bits}, block_size={block}>({names})",
        domains=MICROSOFT,
        **weights,
    )
    layer, matrix = only_layer(proto)
    assert (layer.use.m, layer.use.d) == (m, d)
    # Of a row of zeros and a one no sum rounds; kernels may subtract the zero point afterwards.
    largest = float(np.abs(weights["s"]).max()) * 2**bits
    np.testing.assert_allclose(matrix, applied(proto, d), rtol=0, atol=4 * EPS * largest)


@few
@given(data=st.data())
def test_weights_behind_dequantize_linear_are_read_as_they_are_applied(data: st.DataObject):
    dtype = data.draw(
        st.sampled_from([np.int8, np.uint8, ml_dtypes.int4, ml_dtypes.uint4, np.int16])
    )
    way = data.draw(st.sampled_from(["tensor", "axis", "block"]))
    d, m = data.draw(st.integers(2, 20)), data.draw(st.integers(2, 9))
    turned = data.draw(st.booleans())
    shape = (m, d) if turned else (d, m)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    low, high = (0, 16) if dtype is ml_dtypes.uint4 else (0, 200) if dtype is np.uint8 else (-8, 8)
    axis = data.draw(st.integers(0, 1))
    block = data.draw(st.integers(1, shape[axis]))
    sizes = {"tensor": (), "axis": (shape[axis],), "block": shape}[way]
    if way == "block":
        sizes = tuple(-(-n // block) if k == axis else n for k, n in enumerate(shape))
    given_axis = "" if way == "tensor" else f"<axis={axis}>"
    if way == "block":
        given_axis = f"<axis={axis}, block_size={block}>"
    weights = {
        "Q": random.integers(low, high, shape).astype(dtype),
        "s": random.uniform(0.1, 2, sizes).astype(np.float32),
        "z": random.integers(max(low, 0), min(high, 8), sizes).astype(dtype),
    }
    product = "V = Transpose<perm=[1, 0]>(W) y = MatMul(x, V)" if turned else "y = MatMul(x, W)"
    proto = model(
        f"(float[n,{d}] x) => (float[n,{m}] y)",
        f"W = DequantizeLinear{given_axis}(Q, s, z) {product}",
        opset=21,
        **weights,
    )
    layer, matrix = only_layer(proto)
    assert (layer.use.m, layer.use.d) == (m, d)
    np.testing.assert_array_equal(matrix, applied(proto, d))


@few
@given(data=st.data())
def test_products_of_integers_are_read_as_they_are_applied(data: st.DataObject):
    d, m = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 9))
    per_column, fused = data.draw(st.booleans()), data.draw(st.booleans())
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count = (m,) if per_column else ()
    weights = {
        "B": random.integers(-100, 100, (d, m)).astype(np.int8),
        "s": random.uniform(0.01, 1, count).astype(np.float32),
        "z": random.integers(-9, 9, count).astype(np.int8),
    }
    body = "y = com.microsoft.DynamicQuantizeMatMul(x, B, s, z)"
    if not fused:
        body = """
            q, t, u = DynamicQuantizeLinear(x)
            i = MatMulInteger(q, B, u, z)
            f = Cast<to=1>(i)
            v = Mul(t, s)
            y = Mul(f, v)
        """
    proto = model(f"(float[n,{d}] x) => (float[n,{m}] y)", body, domains=MICROSOFT, **weights)
    layer, matrix = only_layer(proto)
    assert layer.use.result.tensor == "y"
    assert layer.use.inputs.tensor == "x"
    # Rows of zeros and a one are hit by the steps of the rounding, but for that of the scale.
    np.testing.assert_allclose(matrix, applied(proto, d), rtol=8 * EPS, atol=0)


# --- branches -----------------------------------------------------------------------------------


BODIES = {
    "MatMul": ("(float[n,5,7] x) => (float[n,5,4] y)", "MatMul(x, {W})", (7, 4)),
    "MatMul on the left": ("(float[n,7,5] x) => (float[n,4,5] y)", "MatMul({W}, x)", (4, 7)),
    "Gemm": ("(float[n,7] x) => (float[n,4] y)", "Gemm<alpha=0.5, transB=1>(x, {W})", (4, 7)),
    "Conv": (
        "(float[n,3,6,6] x) => (float[n,4,k,l] y)",
        "Conv<pads=[1, 1, 1, 1], strides=[2, 2]>(x, {W})",
        (4, 3, 3, 3),
    ),
    "Conv in one dimension": (
        "(float[n,3,9] x) => (float[n,4,k] y)",
        "Conv<dilations=[2]>(x, {W})",
        (4, 3, 2),
    ),
    "ConvTranspose": (
        "(float[n,3,6,6] x) => (float[n,4,k,l] y)",
        "ConvTranspose<strides=[2, 2]>(x, {W})",
        (3, 4, 2, 2),
    ),
}


@pytest.mark.parametrize("form", BODIES)
@pytest.mark.parametrize("dtype", ["float", "double", "float16"])
def test_branch_of_full_rank_gives_what_the_float_weight_gives(form: str, dtype: str):
    """Q(W) x + (W - Q(W)) x = W x, up to the rounding of sums and factors."""
    signature, body, shape = BODIES[form]
    kind = DTYPES[dtype]
    if dtype == "double" and "Conv" in form:
        pytest.skip("ONNX Runtime has no Conv in double precision")
    signature = signature.replace("float[", f"{dtype}[")
    weight = noise(1, *shape).astype(kind)
    # With two bits the error is far beyond what half precision rounds.
    scale = np.abs(weight.astype(np.float64)).max() / 2
    weights = {"Q": np.clip(np.rint(weight / scale), -2, 1).astype(np.int8)}
    # To double precision a DequantizeLinear takes a Cast.
    back = "V = DequantizeLinear(Q, s)"
    weights["s"] = np.asarray(scale, np.float32 if dtype == "double" else kind)
    if dtype == "double":
        back = "F = DequantizeLinear(Q, s) V = Cast<to=11>(F)"
    reference = model(signature, f"y = {body.format(W='W')}", opset=21, W=weight)
    small = model(signature, f"{back} y = {body.format(W='V')}", opset=21, **weights)
    index = index_quantized(ModelStore.load(small))
    plain = index_model(ModelStore.load(reference))
    pairs, skips = match_layers(plain, find_sites(plain)[0], index, read_layers(index)[0])
    assert not skips
    (pair,) = pairs
    error = pair.residual(plain, index)
    factors = Factors(left=np.eye(len(error)), right=error)
    made = with_branches(index, [Branch(pair=pair, factors=factors, lost_mean=None)])
    x = activations(2, *_extents(signature)).astype(kind)
    expected, got, lost = (
        run(m, {"x": x})["y"].astype(np.float64) for m in (reference, made, small)
    )
    terms = error.shape[1] + len(error)
    size = math.sqrt(terms) * float(np.abs(x).max() * np.abs(weight).max())
    bound = 4 * float(np.finfo(kind).eps) * size
    assert np.abs(got - expected).max() <= bound
    assert np.abs(lost - expected).max() > 10 * bound
    onnx.checker.check_model(made.proto, full_check=True)


def _extents(signature: str) -> list[int]:
    """Those of the input, 3 where they are free."""
    words = signature[signature.index("[") + 1 : signature.index("]")].split(",")
    return [int(word) if word.isdigit() else 3 for word in words]


@few
@given(
    m=st.integers(1, 8),
    d=st.integers(1, 8),
    rank=st.integers(0, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_error_is_what_is_predicted_and_falls_with_rank(m: int, d: int, rank: int, seed: int):
    """½ E[(gᵀ (D - B A) x)²] over the rows, for gradients g as independent of x as Γ takes them."""
    random = np.random.default_rng(seed)
    x, g = random.normal(size=(200, d)), random.normal(size=(300, m)) * np.arange(1, m + 1)
    error = random.normal(size=(m, d))
    proto = model(f"(double[n,{d}] x) => (double[n,{m}] y)", "y = MatMul(x, W)", W=error.T.copy())
    index = index_model(ModelStore.load(proto))
    (site,) = find_sites(index)[0]
    wide = m <= d
    rows, h = (x @ error.T, g) if wide else (x, g @ error)
    seen = Sensitivity(moment=SecondMoment.of(rows), gamma=h.T @ h, samples=300, decisions=10**9)
    found = two_sided_site(site, error, seen, 0)
    rank = min(rank, m, d)
    left = error - found.factors_of(error, rank).product
    c = np.cov(x.T, bias=True).reshape(d, d)
    # The metric is damped: what is predicted is of the damped one.
    gamma = found.gamma if wide else None
    if gamma is not None:
        expected = np.trace(gamma @ left @ c @ left.T) / 2
        np.testing.assert_allclose(found.errors[rank], expected, rtol=1e-9, atol=1e-9)
    assert np.all(np.diff(found.errors) <= 1e-12 * found.errors[0])


def test_forms_that_are_not_read_say_why():
    weights = {
        "B": np.zeros((4, 1, 16), np.uint8),
        "s": np.ones((4, 1), np.float32),
        "g": np.zeros(32, np.int32),
    }
    common = "K=32, N=4, bits=4, block_size=32"
    cases = {
        f"y = com.microsoft.MatMulNBits<{common}>(x, B, s, , g)": "order of its blocks",
        f"y = com.microsoft.MatMulNBits<{common}>(x, B, t)": "computed",
        f"y = com.microsoft.MatMulNBits<{common}, weight_prepacked=1>(x, B, s)": "one processor",
        f"y = com.microsoft.MatMulNBits<{common.replace('bits=4', 'bits=3')}>(x, B, s)": "3 bits",
    }
    for body, reason in cases.items():
        proto = model(
            "(float[n,32] x, float[4,1] t) => (float[n,4] y)", body, domains=MICROSOFT, **weights
        )
        layers, (skip,) = read_layers(index_quantized(ModelStore.load(proto)))
        assert not layers
        assert reason in skip.reason
    proto = model(
        "(uint8[n,4] q) => (int32[n,4] y)",
        "y = MatMulInteger(q, B)",
        B=np.ones((4, 4), np.int8),
    )
    _, (skip,) = read_layers(index_quantized(ModelStore.load(proto)))
    assert "scales its integers" in skip.reason


@pytest.mark.parametrize(
    ("name", "shape"), [("s", (3,)), ("B", (4, 1, 7)), ("z", (4, 5)), ("B", (0, 1, 16))]
)
def test_parts_that_do_not_fit_are_named(name: str, shape: tuple[int, ...]):
    weights = {
        "B": np.zeros((4, 1, 16), np.uint8),
        "s": np.ones((4, 1), np.float32),
        "z": np.zeros((4, 1), np.float32),
    }
    weights[name] = np.zeros(shape, weights[name].dtype)
    proto = model(
        "(float[n,32] x) => (float[n,4] y)",
        "[the_node] y = com.microsoft.MatMulNBits<K=32, N=4, bits=4, block_size=32>(x, B, s, z)",
        domains=MICROSOFT,
        **weights,
    )
    index = index_quantized(ModelStore.load(proto))
    ((layer,), _) = read_layers(index)
    with pytest.raises(ModelError, match="the_node"):
        layer.matrix(index)


def test_operators_on_integers_go_back_to_what_they_were():
    weights = {
        "Q": np.arange(-10, 10).reshape(5, 4).astype(np.int8),
        "s": np.full(4, 0.1, np.float32),
        "z": np.zeros(4, np.int8),
        "xs": np.float32(0.02),
        "xz": np.uint8(3),
        "ys": np.float32(0.05),
        "yz": np.uint8(128),
    }
    proto = model(
        "(float[n,5] x) => (float[n,4] y)",
        """
        q = QuantizeLinear(x, xs, xz)
        [whole] p = QLinearMatMul(q, xs, xz, Q, s, z, ys, yz)
        y = DequantizeLinear(p, ys, yz)
        """,
        **weights,
    )
    index = index_quantized(ModelStore.load(proto))
    assert [n.op_type for n in index.store.proto.graph.node].count("QLinearMatMul") == 0
    layers, _ = read_layers(index)
    (layer,) = layers
    assert layer.sources[0] == "x"
    assert with_branches(index, []).proto is proto
    feed = {"x": activations(1, 6, 5).astype(np.float32)}
    # What it is seen as computes the same, but for a step of the rounding here and there.
    steps = np.abs(run(index.store, feed)["y"] - run(proto, feed)["y"]) / weights["ys"]
    assert steps.max() < 1.5
    assert (steps > 0.5).mean() < 0.1


def test_weights_rounded_in_the_graph_are_read_too():
    """Training with rounding exports a float weight, QuantizeLinear and DequantizeLinear."""
    weight = noise(1, 6, 4).astype(np.float32)
    proto = model(
        "(float[n,6] x) => (float[n,4] y)",
        "q = QuantizeLinear(W, s, z) V = DequantizeLinear(q, s, z) y = MatMul(x, V)",
        W=weight,
        s=np.float32(0.1),
        z=np.int8(0),
    )
    _, matrix = only_layer(proto)
    np.testing.assert_array_equal(matrix, applied(proto, 6))
