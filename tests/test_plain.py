"""Nodes that fuse a product with others: taken apart, measured, and put together again."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import (
    MICROSOFT,
    Feed,
    activations,
    constants,
    index,
    model,
    noise,
    ops,
    run,
)

from onnx_utilrank import CompressConfig, compress
from onnx_utilrank.model.plain import plain_model
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.sites.find import find_sites
from onnx_utilrank.surgery.rewrite import rewrite
from onnx_utilrank.torch_graph.graph import TorchGraph

EXACT = CompressConfig(energy=1.0, force=True)
N, D, H = 12, 7, 8
E, F = 8, 16  # widths of transformers, outside and inside


def float32(seed: int, *shape: int) -> np.ndarray:
    return (noise(seed, *shape) / np.sqrt(shape[0])).astype(np.float32)


def tolerance(*values: np.ndarray, terms: int) -> float:
    """Of sums of so many products that are about as large as their result."""
    eps = float(np.finfo(np.float32).eps)
    return 16 * eps * np.sqrt(terms) * max(1.0, *(float(np.abs(v).max()) for v in values if v.size))


def assert_same(one: onnx.ModelProto, other: onnx.ModelProto | ModelStore, feed: Feed) -> None:
    before, after = run(one, feed), run(other, feed)
    for name, expected in before.items():
        atol = tolerance(expected, *feed.values(), terms=64)
        assert after[name].dtype == expected.dtype
        np.testing.assert_allclose(after[name], expected, rtol=0, atol=atol)


# --- taken apart --------------------------------------------------------------------------------

ACTIVATIONS = {
    "Relu": [],
    "Sigmoid": [],
    "Tanh": [],
    "LeakyRelu": [0.2],
    "HardSigmoid": [0.3, 0.4],
    "Clip": [-0.5, 0.7],
}
X4 = noise(1, 2, 4, 6, 6).astype(np.float32)
ROWS = activations(2, N, D).astype(np.float32)


@pytest.mark.parametrize("opset", [9, 10, 11, 17])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_of_fused_convs_stay_what_they_are(kind: str, opset: int):
    params = f", activation_params={ACTIVATIONS[kind]}" if ACTIVATIONS[kind] else ""
    proto = model(
        "(float[2,4,6,6] x, float[2,5,4,4] z) => (float[2,5,4,4] y)",
        f'y = com.microsoft.FusedConv<activation="{kind}"{params}>(x, W, b, z)',
        opset=opset,
        domains=MICROSOFT,
        W=float32(3, 5, 4, 3, 3),
        b=float32(4, 5),
    )
    feed = {"x": X4, "z": noise(5, 2, 5, 4, 4).astype(np.float32)}
    assert_same(proto, plain_model(ModelStore.load(proto)), feed)
    made = compress(proto, [feed] * 2, EXACT).model
    assert "FusedConv" not in ops(made)
    assert ops(made)[-1] == kind
    assert_same(proto, made, feed)


GEMM_ACTIVATIONS = {
    "Relu": "",
    "Tanh": "",
    "Softplus": "",
    "Elu": ", activation_alpha=0.7",
    "Selu": ", activation_alpha=1.5, activation_gamma=1.1",
    "HardSigmoid": ", activation_alpha=0.3, activation_beta=0.4",
    "ThresholdedRelu": ", activation_alpha=0.5",
}


@pytest.mark.parametrize("kind", GEMM_ACTIVATIONS)
def test_activations_of_fused_gemms_stay_what_they_are(kind: str):
    attrs = f'activation="{kind}", transB=1, beta=0.5{GEMM_ACTIVATIONS[kind]}'
    proto = model(
        f"(float[n,{D}] x) => (float[n,{H}] y)",
        f"y = com.microsoft.FusedGemm<{attrs}>(x, W, b)",
        domains=MICROSOFT,
        W=float32(3, H, D),
        b=float32(4, H),
    )
    made = compress(proto, [{"x": ROWS}] * 2, EXACT).model
    assert ops(made) == ["MatMul", "Gemm", kind]
    assert_same(proto, made, {"x": ROWS})


ATTENTIONS = {
    "plain": ("", ""),
    "causal": (", unidirectional=1", ""),
    "scale": (", scale=0.3", ""),
    "sizes": (", qkv_hidden_sizes=[8, 8, 4]", ""),
    "mask": ("", ", m"),
    "filter": (", mask_filter_value=-3.0", ", m"),
    "causal_mask": (", unidirectional=1", ", m"),
    "scores_bias": ("", ", , , t"),
}
MASK = (np.arange(5) < np.array([[5], [3]])).astype(np.int64)
ATTENDED = {
    "x": noise(6, 2, 5, D).astype(np.float32),
    "mask": MASK,
    "t": noise(7, 2, 2, 5, 5).astype(np.float32),
}


def attention(attrs: str, more: str, width: int = 3 * H, opset: int = 17) -> onnx.ModelProto:
    return model(
        f"(float[n,s,{D}] x, int64[n,s] mask, float[n,2,s,s] t) => (float[n,s,w] y)",
        f"m = Cast<to=6>(mask) y = com.microsoft.Attention<num_heads=2{attrs}>(x, W, b{more})",
        opset=opset,
        domains=MICROSOFT,
        W=float32(8, D, width),
        b=float32(9, width),
    )


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("what", ATTENTIONS)
def test_packed_attention_is_one_weight_and_an_attention(what: str, opset: int):
    attrs, more = ATTENTIONS[what]
    proto = attention(attrs, more, 20 if what == "sizes" else 3 * H, opset)
    graph = index(proto)
    (site,), skips = find_sites(graph)
    assert not skips
    assert (site.weight, site.d, site.bias) == ("W", D, "add")
    assert site.uses[0].label == "Attention 'y'"
    assert_same(proto, graph.store, ATTENDED)
    made = compress(proto, [ATTENDED] * 2, EXACT).model
    assert [op for op in ops(made) if op not in ("Cast", "Constant")] == [
        *("MatMul", "MatMul", "Add", "Split", "MultiHeadAttention")
    ]
    assert_same(proto, made, ATTENDED)


@pytest.mark.parametrize("what", ATTENTIONS)
def test_plain_attention_in_torch_is_the_packed_one(what: str):
    attrs, more = ATTENTIONS[what]
    proto = attention(attrs, more, 20 if what == "sizes" else 3 * H)
    graph = TorchGraph.build(index(proto).store)
    found = graph.run(ATTENDED)["y"].numpy()
    np.testing.assert_allclose(found, run(proto, ATTENDED)["y"], rtol=0, atol=1e-5)


LEFT_ALONE = {
    "past": (
        f"(float[n,s,{D}] x, float[2,n,2,p,4] past) => (float[n,s,{H}] y, float[2,n,2,q,4] kept)",
        "y, kept = com.microsoft.Attention<num_heads=2>(x, W, b, , past)",
        "it is in a form that is not followed: with a past, rotary embedding, or a mask whose rank "
        "is not known to be 2",
    ),
    "mask_of_ends": (
        f"(float[n,s,{D}] x, int32[n] ends) => (float[n,s,{H}] y)",
        "y = com.microsoft.Attention<num_heads=2>(x, W, b, ends)",
        "it is in a form that is not followed: with a past, rotary embedding, or a mask whose rank "
        "is not known to be 2",
    ),
    "batch_behind": (
        f"(float[n,k,{D}] x) => (float[n,k,{3 * H}] y)",
        "y = com.microsoft.FusedMatMul<transBatchA=1>(x, W)",
        "it is in a form that is not followed: with batch axes behind its rows, or with an input "
        "to transpose whose rank is not known",
    ),
    "unknown_rank": (
        f"(float[n,{D}] x) => (float[n,{3 * H}] y)",
        "t = Transpose(x) y = com.microsoft.FusedMatMul<transA=1>(t, W)",
        "it is in a form that is not followed: with batch axes behind its rows, or with an input "
        "to transpose whose rank is not known",
    ),
    "einsum": (
        f"(float[{D},n] x) => (float[{D},{3 * H}] y)",
        'y = Einsum<equation="dn,dh->dh">(x, W)',
        "its equation is not the product with one constant matrix",
    ),
}


def test_one_value_that_meets_many_is_no_product_of_matrices():
    body = 'h = Einsum<equation="ab,bc->ac">(x, W) y = MatMul(h, V)'
    weights = {"W": float32(8, 1, 40), "V": float32(9, 40, 2) @ float32(10, 2, 40)}
    proto = model(f"(float[n,{D}] x) => (float[n,40] y)", body, **weights)
    data = {"x": activations(11, 40, D).astype(np.float32)}
    made = compress(proto, data, CompressConfig(param_ratio=0.8, moves=("low-rank",))).model
    assert ops(made)[0] == "Einsum"
    assert "V" not in constants(made)
    run(made, data)


@pytest.mark.parametrize(
    ("equation", "is_product"),
    [
        *(
            ("bqhd,bkhd->bhqk", True),
            ("aecd,abcd->acbe", True),
            ("ab,bc", True),
            ("ab,cb->ca", True),
        ),
        *(
            ("ab,ab->a", False),
            ("abc,abc->ab", False),
            ("abcd,bcd->a", False),
            ("ab,bc->abc", False),
        ),
        *(("ab,bc->c", False), ("...a,ab->...b", False), ("aa,ab->b", False), ("ab,cd->ac", False)),
    ],
)
def test_products_of_computed_stacks_are_seen_as_such(equation: str, is_product: bool):
    left, _, rest = equation.partition(",")
    right = rest.partition("->")[0]
    extents = (
        dict(zip("abcdehkq", (2, 3, 4, 5, 6, 2, 3, 4), strict=True)) if "." not in equation else {}
    )
    shapes = [[extents.get(i, 2) for i in term.replace("...", "z")] for term in (left, right)]
    x, z = (noise(k, *shape).astype(np.float32) for k, shape in enumerate(shapes))
    dims = [",".join(map(str, shape)) for shape in shapes]
    expected = np.einsum(equation, x, z)
    proto = model(
        f"(float[{dims[0]}] x, float[{dims[1]}] z) => (float[{','.join('i' * expected.ndim)}] y)",
        f'a = Relu(x) b = Relu(z) y = Einsum<equation="{equation}">(a, b)',
    )
    seen = index(proto)
    assert ("MatMul" in ops(seen.store.proto)) == is_product
    feed = {"x": x, "z": z}
    np.testing.assert_allclose(
        run(seen.store, feed)["y"], run(proto, feed)["y"], rtol=1e-5, atol=1e-6
    )
    assert rewrite(seen, []).proto.SerializeToString() == proto.SerializeToString()


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_forms_that_are_not_followed_are_left_with_the_reason(what: str):
    signature, body, reason = LEFT_ALONE[what]
    weights = {"W": float32(8, D, 3 * H)}
    if "b" in body.partition("W")[2]:
        weights["b"] = float32(9, 3 * H)
    proto = model(signature, body, domains=MICROSOFT, **weights)
    graph = index(proto)
    assert graph.store is graph.source
    sites, (skip,) = find_sites(graph)
    assert not sites
    assert skip.reason == reason


# --- groups -------------------------------------------------------------------------------------

GROUPED = {
    "plain": "y = Conv<group=2, pads=[1, 1, 1, 1], strides=[2, 1]>(x, W)",
    "bias": 'y = Conv<group=2, auto_pad="SAME_UPPER">(x, W, b)',
    "activation": 'y = com.microsoft.FusedConv<group=2, activation="Relu">(x, W, b)',
}


def grouped(what: str, opset: int = 17, m: int = 10) -> onnx.ModelProto:
    return model(
        f"(float[n,8,6,6] x) => (float[n,{m},h,w] y)",
        GROUPED[what],
        opset=opset,
        domains=MICROSOFT,
        W=float32(17, m, 4, 3, 3),
        b=float32(18, m),
    )


def planes(count: int) -> Feed:
    return {"x": activations(19, count, 8, 6, 6).astype(np.float32)}


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("what", GROUPED)
def test_groups_of_a_conv_are_factored_each_by_itself(what: str, opset: int):
    proto, feed = grouped(what, opset), planes(3)
    sites, skips = find_sites(index(proto))
    assert not skips
    assert [(s.key, s.m, s.d, s.freed) for s in sites] == [
        (f"W/group_{g}", 5, 36, True) for g in range(2)
    ]
    assert {s.uses[0].label.split()[1] for s in sites} == {"'y'"}
    made = compress(proto, feed, EXACT).model
    assert ops(made).count("Conv") == 4
    assert "W" not in constants(made)
    assert_same(proto, made, feed)
    onnx.checker.check_model(made, full_check=True)


def test_groups_may_keep_different_ranks():
    proto = grouped("bias", m=80)
    (weight,) = (t for t in proto.graph.initializer if t.name == "W")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[1:40] = values[:1]  # the first group makes one thing
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "W"))
    data = planes(60)
    result = compress(
        proto, data, CompressConfig(param_ratio=0.6, moves=("low-rank",), refit=False)
    )
    first, second = result.plan.entries
    assert first.rank is not None
    assert first.rank < 5
    assert second.rank is None
    assert result.quality.divergence.mean < 1e-6
    assert result.plan.parameters_after < 0.6 * (80 * 36 + 80)
    before = sum(v.size for v in constants(proto).values())
    assert result.plan.parameters_before == before


def test_one_group_is_rewritten_where_only_one_is_chosen():
    proto, feed = grouped("bias"), planes(3)
    config = CompressConfig(energy=1.0, force=True, include=("W/group_1",))
    made = compress(proto, feed, config).model
    assert ops(made).count("Conv") == 3
    assert_same(proto, made, feed)


@pytest.mark.parametrize("reader", ["z = Neg(W)", "W2 = Identity(W) z = Add(W2, W2)", ""])
def test_groups_stay_whole_where_their_weight_is_read_elsewhere(reader: str):
    # Each Conv would get pieces of its own, on top of the weight that stays or of each other's.
    second = "" if reader else "z = Conv<group=2, pads=[1, 1, 1, 1]>(h, W)"
    proto = model(
        "(float[n,8,6,6] x) => (float[n,8,6,6] y, float[a,b,c,d] z)",
        f"h = Relu(x) y = Conv<group=2, pads=[1, 1, 1, 1]>(x, W) {reader}{second}",
        W=float32(17, 8, 4, 3, 3),
    )
    sites, skips = find_sites(index(proto))
    assert not sites
    assert len(skips) == 1 + (not reader)
    assert all("a weight that nothing else reads" in skip.reason for skip in skips)


def test_what_holds_for_all_groups_is_said_once():
    _, skips = find_sites(index(grouped("bias")), exclude=["y"])
    assert [(s.node, s.reason) for s in skips] == [("Conv 'y'", "excluded by a pattern")]


MALFORMED = {
    "no operands": "y = com.microsoft.FusedGemm()",
    "one operand": "y = com.microsoft.FusedMatMul(x)",
    "no second operand": "y = com.microsoft.FusedConv(x, , b)",
    "three operands": "y = com.microsoft.FusedMatMul(x, W, b)",
    "no kernel": "y = Conv<group=2>(x, b)",
    "uneven groups": "y = Conv<group=3>(x, W)",
    "no groups": "y = Conv<group=0>(x, W)",
    "equation": 'y = Einsum<equation="x">(x, W)',
    "indices": 'y = Einsum<equation="ab,cde->ae">(x, W)',
    "no equation": "y = Einsum(x, W)",
    "clip of a computed kernel": 'y = com.microsoft.FusedConv<activation="Clip">(x, x, b)',
    "weight of one axis": "y = com.microsoft.Attention(x, b)",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_nodes_that_make_no_sense_stay_as_they_are(what: str):
    proto = model(
        "(float[n,8,6,6] x) => (float[n,10,h,w] y)",
        MALFORMED[what],
        domains=MICROSOFT,
        W=float32(17, 10, 4, 3, 3),
        b=float32(18, 10),
    )
    graph = index(proto)
    assert graph.store is graph.source
    assert not find_sites(graph)[0]


def test_functions_that_hide_an_operator_are_not_it():
    functions = (
        '<opset_import: ["" : 17], domain: "com.microsoft"> FusedMatMul (a, b) => (c) '
        "{ c = Add(a, b) }"
    )
    proto = model(
        f"(float[n,{D}] x) => (float[n,{D}] y)",
        "y = com.microsoft.FusedMatMul(x, W)",
        domains=MICROSOFT,
        functions=functions,
        W=float32(1, 1, D),
    )
    assert not find_sites(index(proto))[0]


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("opset", [13, 17])
def test_products_of_computed_matrices_are_taken_apart_where_a_factor_can_be_cast(
    opset: int, alpha: float
):
    """Of which type the factor has to be is not known; CastLike came with opset 15."""
    proto = model(
        f"(float[n,{D}] x) => (float[n,n] y)",
        f"t = Transpose(x) y = com.microsoft.FusedMatMul<alpha={alpha}>(x, t)",
        opset=opset,
        domains=MICROSOFT,
    )
    plain = plain_model(ModelStore.load(proto))
    assert ("FusedMatMul" in ops(plain.proto)) == (opset == 13 and alpha != 1.0)
    assert_same(proto, plain, {"x": ROWS})


def test_vectors_have_nothing_to_transpose():
    proto = model(
        f"(float[{D}] x) => (float[{H}] y)",
        "y = com.microsoft.FusedMatMul<transA=1>(x, W)",
        domains=MICROSOFT,
        W=float32(3, D, H),
    )
    plain = plain_model(ModelStore.load(proto))
    assert ops(plain.proto) == ["MatMul"]
    assert_same(proto, plain, {"x": ROWS[0]})


# --- measured -----------------------------------------------------------------------------------

LAYERS = {
    "fused": "h = com.microsoft.FusedGemm<activation='Tanh', transB=1>(x, W, b) "
    "y = com.microsoft.FusedMatMul<alpha=0.5>(h, V)",
    "plain": "g = Gemm<transB=1>(x, W, b) h = Tanh(g) p = MatMul(h, V) y = Mul(p, half)",
}
WIDE = 24


def layers(which: str) -> onnx.ModelProto:
    decaying = 0.8 ** np.arange(WIDE)
    return model(
        f"(float[n,{WIDE}] x) => (float[n,8] y)",
        LAYERS[which].replace("'", '"'),
        domains=MICROSOFT,
        W=(noise(10, WIDE, WIDE) * decaying / 3).astype(np.float32),
        V=float32(11, WIDE, 8),
        b=float32(12, WIDE),
        **({"half": np.float32(0.5)} if which == "plain" else {}),
    )


@pytest.mark.parametrize("method", ["two-sided", "one-sided"])
def test_fused_layers_are_measured_as_plain_ones(method: str):
    data = {"x": activations(13, 300, WIDE).astype(np.float32)}
    made = {
        which: compress(
            layers(which),
            data,
            CompressConfig(param_ratio=0.7, method=method, moves=("low-rank",), refit=False),
        )
        for which in LAYERS
    }
    one, other = (made[which].plan.entries for which in ("fused", "plain"))
    assert [e.site for e in one] == [e.site for e in other] == ["W", "V"]
    assert [(e.rank, e.move) for e in one] == [(e.rank, e.move) for e in other]
    assert one[0].rank is not None
    for a, b in zip(one, other, strict=True):
        assert a.predicted_error == pytest.approx(b.predicted_error, rel=1e-3)
    fused = made["fused"]
    # What was left alone is what it was, to the byte.
    assert fused.model.graph.node[-1] == layers("fused").graph.node[-1]
    if method == "two-sided":
        predicted = fused.plan.predicted_divergence
        assert 1e-5 < predicted < 0.1
        assert fused.quality.divergence.mean == pytest.approx(predicted, rel=0.5)


SCORES = {
    "fused": "t = com.microsoft.FusedMatMul<alpha=0.5>(q, k)",
    "plain": "s = MatMul(q, k) t = Mul(s, half)",
}


def heads(which: str) -> onnx.ModelProto:
    decay = 0.6 ** np.tile(np.arange(4), 2)  # of two heads
    return model(
        f"(float[n,5,{E}] x) => (float[n,5,{E}] y)",
        "a = MatMul(x, Q) b = Reshape(a, apart) q = Transpose<perm=[0,2,1,3]>(b) "
        "c = MatMul(x, K) d = Reshape(c, apart) k = Transpose<perm=[0,2,3,1]>(d) "
        "e = MatMul(x, V) f = Reshape(e, apart) v = Transpose<perm=[0,2,1,3]>(f) "
        f"{SCORES[which]} p = Softmax<axis=-1>(t) g = MatMul(p, v) "
        "h = Transpose<perm=[0,2,1,3]>(g) i = Reshape(h, joined) y = MatMul(i, O)",
        domains=MICROSOFT,
        apart=np.array([0, 0, 2, 4]),
        joined=np.array([0, 0, 8]),
        Q=(noise(1, E, 8) * decay).astype(np.float32),
        K=(noise(2, E, 8) * decay).astype(np.float32),
        V=float32(3, E, 8),
        O=float32(4, 8, E),
        **({"half": np.float32(0.5)} if which == "plain" else {}),
    )


def test_heads_are_followed_through_fused_scores():
    data = {"x": activations(20, 60, 5, E).astype(np.float32)}
    config = CompressConfig(param_ratio=0.8, moves=("shrink",))
    made = {which: compress(heads(which), data, config) for which in SCORES}
    fused, plain = (
        [(e.hidden, e.kept) for e in made[which].plan.shrunk] for which in ("fused", "plain")
    )
    assert fused == plain
    assert "Q" in dict(fused)
    (scores,) = (n for n in made["fused"].model.graph.node if n.op_type == "FusedMatMul")
    assert scores in heads("fused").graph.node
    feed = {"x": data["x"][:3]}
    one, other = (run(made[which].model, feed)["y"] for which in ("fused", "plain"))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


# --- constants that are split -------------------------------------------------------------------

# Attention to other rows, as PyTorch exports it: its packed weight is split in the graph.
CROSS = """
    Q, KV = Split<axis=0>(W, sizes)
    Qt = Transpose<perm=[1, 0]>(Q)
    KVt = Transpose<perm=[1, 0]>(KV)
    q0 = MatMul(x, Qt)
    kv0 = MatMul(c, KVt)
    bq, bkv = Split<axis=0>(b, sizes)
    q1 = Add(q0, bq)
    kv1 = Add(kv0, bkv)
    k1, v1 = Split<axis=2>(kv1, halves)
    q2 = Reshape(q1, apart) k2 = Reshape(k1, apart) v2 = Reshape(v1, apart)
    q3 = Transpose<perm=[0, 2, 1, 3]>(q2)
    k3 = Transpose<perm=[0, 2, 3, 1]>(k2)
    v3 = Transpose<perm=[0, 2, 1, 3]>(v2)
    s0 = MatMul(q3, k3)
    s = Softmax(s0)
    a = MatMul(s, v3)
    a1 = Transpose<perm=[0, 2, 1, 3]>(a)
    a2 = Reshape(a1, joined)
    y = MatMul(a2, O)
"""


def cross(more: str = "", out: str = "") -> onnx.ModelProto:
    sizes = {"sizes": [E, 2 * E], "halves": [E, E], "apart": [0, 0, 2, E // 2], "joined": [0, 0, E]}
    weights = {"W": float32(1, 3 * E, E), "b": float32(2, 3 * E), "O": float32(3, E, E)}
    return model(
        f"(float[n,s,{E}] x, float[n,t,{E}] c) => (float[n,s,{E}] y{out})",
        CROSS + more,
        **weights,
        **{name: np.array(value) for name, value in sizes.items()},
    )


def pairs(count: int) -> list[Feed]:
    return [
        {"x": noise(k, 2, 5, E).astype(np.float32), "c": noise(k + 50, 2, 4, E).astype(np.float32)}
        for k in range(count)
    ]


def test_parts_of_a_constant_are_weights():
    proto = cross()
    sites, _ = find_sites(index(proto))
    assert [(s.key, s.m, s.d, s.freed) for s in sites] == [
        *(("Qt", E, E, True), ("KVt", 2 * E, E, True), ("O", E, E, True))
    ]
    made = compress(proto, pairs(3), EXACT).model
    assert "W" not in constants(made)
    assert_same(proto, made, pairs(1)[0])
    onnx.checker.check_model(made, full_check=True)


def test_heads_between_parts_of_a_constant_shrink():
    proto, data = cross(), pairs(30)
    made = compress(proto, data, CompressConfig(param_ratio=0.7, moves=("shrink",)))
    assert made.plan.shrunk
    assert made.plan.param_ratio <= 0.7
    assert made.quality.divergence.mean == pytest.approx(made.plan.predicted_divergence, rel=1)
    onnx.checker.check_model(made.model, full_check=True)


@pytest.mark.parametrize("chosen", ["Qt", "KVt", "O"])
def test_parts_that_are_left_alone_are_held_once(chosen: str):
    proto = cross()
    config = CompressConfig(energy=1.0, force=True, include=(chosen,))
    made = compress(proto, pairs(2), config).model
    split = ops(made).count("Split")
    assert split == (3 if chosen == "O" else 2)
    assert ("W" in constants(made)) == (chosen == "O")
    assert_same(proto, made, pairs(1)[0])


@pytest.mark.parametrize(
    ("more", "out", "freed"),
    [
        ("z = Neg(W)", ", float[a,b] z", ["O"]),  # pieces would come on top of it
        ("", f", float[{E},{E}] Q", ["KVt", "O"]),  # one piece stays, in the place of the whole
    ],
)
def test_parts_that_others_read_stay(more: str, out: str, freed: list[str]):
    sites, _ = find_sites(index(cross(more, out)))
    assert [s.key for s in sites if s.freed] == freed


def test_parts_that_nothing_reads_are_held_no_more():
    proto = model(
        f"(float[n,{E}] x) => (float[n,{E}] y)",
        "A, B, C = Split<axis=0>(W) h = MatMul(x, A) r = Relu(h) y = MatMul(r, B)",
        W=float32(1, 3 * E, E),
    )
    data = {"x": activations(3, 40, E).astype(np.float32)}
    made = compress(proto, data, EXACT).model
    assert "Split" not in ops(made)
    assert sum(v.size for v in constants(made).values()) == 2 * 2 * E * E
    assert_same(proto, made, data)


def test_one_value_that_meets_many_within_a_sum_is_no_product_of_stacks():
    body = 'a = Relu(x) b = Relu(z) y = Einsum<equation="ab,bc->ac">(a, b)'
    proto = model("(float[3,1] x, float[4,5] z) => (float[3,5] y)", body)
    declared = onnx.shape_inference.infer_shapes(proto)
    assert "MatMul" not in ops(index(declared).store.proto)


# --- put together again -------------------------------------------------------------------------

ALL = """
    [one] a = com.microsoft.FusedMatMul<alpha=0.5, transB=1>(x, W)
    [two] b = com.microsoft.FusedMatMul<alpha=0.5, transB=1>(x, W)
    [three] c = com.microsoft.FusedGemm<activation="Relu">(b, V, v)
    [four] d = Einsum<equation="nd,hd->nh">(c, W)
    "d/product" = Neg(d)
    y = Sum(a, "d/product")
"""


def every() -> onnx.ModelProto:
    weights = {"W": float32(14, D, D), "V": float32(15, D, D), "v": float32(16, D)}
    return model(f"(float[n,{D}] x) => (float[n,{D}] y)", ALL, domains=MICROSOFT, **weights)


@pytest.mark.parametrize("chosen", ["one", "two", "three", "four"])
def test_nodes_that_are_left_alone_are_the_ones_that_they_were(chosen: str):
    proto = every()
    onnx.checker.check_model(proto, full_check=True)
    config = CompressConfig(energy=1.0, force=True, include=(chosen,))
    made = compress(proto, [{"x": ROWS}] * 2, config).model
    before, after = ({n.name: n for n in p.graph.node if n.name} for p in (proto, made))
    for name in {"one", "two", "three", "four"} - {chosen}:
        assert after[name] == before[name]
    assert chosen not in after
    assert set(constants(proto)) - set(constants(made)) == ({"V"} if chosen == "three" else set())
    names = [name for node in made.graph.node for name in node.output]
    assert len(set(names)) == len(names)
    assert_same(proto, made, {"x": ROWS})


def test_nothing_is_changed_where_nothing_is_rewritten():
    proto = every()
    made = rewrite(index(proto), []).proto
    assert made.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)


def test_patterns_name_the_nodes_and_values_of_the_given_model():
    proto = every()
    for pattern, count in (("a", 1), ("four", 1), ("W", 3), ("V", 1), ("h", 0)):
        sites, _ = find_sites(index(proto), include=[pattern])
        assert sum(len(site.uses) for site in sites) == count


def test_plan_and_figures_are_of_the_given_model():
    result = compress(every(), [{"x": ROWS}] * 2, EXACT)
    assert result.plan.model_sha256 == ModelStore.load(every()).fingerprint()
    reference = result.validation.reference
    assert reference.parameters == 2 * D * D + D
    assert reference.flops == 2 * 4 * len(ROWS) * D * D
    again = compress(every(), [{"x": ROWS}] * 2, CompressConfig(force=True), plan=result.plan)
    assert again.model.graph.node == result.model.graph.node


# --- as exporters write them --------------------------------------------------------------------

NORM = {"scale": np.ones(E, np.float32), "shift": np.zeros(E, np.float32)}
# A layer of BERT as ONNX Runtime's transformer optimizer leaves it.
BERT = """
    m = Cast<to=6>(mask)
    a = com.microsoft.Attention<num_heads=2>(x, QKV, qkv, m)
    o = MatMul(a, O)
    n = com.microsoft.SkipLayerNormalization<epsilon=1e-5>(o, x, scale, shift, ob)
    u = MatMul(n, U)
    g = com.microsoft.BiasGelu(u, ub)
    d = MatMul(g, P)
    y = com.microsoft.SkipLayerNormalization<epsilon=1e-5>(d, n, scale, shift, pb)
"""
# A layer as ONNX Runtime GenAI writes it, with a cache of keys and values.
LLAMA = """
    n = SimplifiedLayerNormalization<axis=-1, epsilon=1e-5, stash_type=1>(x, scale)
    q = MatMul(n, Q)
    k = MatMul(n, K)
    v = MatMul(n, L)
    a, keys, values = com.microsoft.GroupQueryAttention<
        num_heads=2, kv_num_heads=1, do_rotary=1
    >(q, k, v, past_keys, past_values, lengths, total, cos, sin)
    o = MatMul(a, O)
    s, "", "", t =
        com.microsoft.SkipSimplifiedLayerNormalization<epsilon=1e-5>(x, o, scale)
    gate = MatMul(s, G)
    z = Sigmoid(gate)
    silu = Mul(gate, z)
    up = MatMul(s, U)
    h = Mul(silu, up)
    d = MatMul(h, P)
    y = Add(t, d)
"""


def bert() -> onnx.ModelProto:
    return model(
        f"(float[n,s,{E}] x, int64[n,s] mask) => (float[n,s,{E}] y)",
        BERT,
        domains=MICROSOFT,
        **NORM,
        **{"QKV": float32(1, E, 3 * E), "O": float32(2, E, E)},
        **{"U": float32(3, E, F), "P": float32(4, F, E)},
        **{"qkv": float32(5, 3 * E), "ob": float32(6, E), "ub": float32(7, F), "pb": float32(8, E)},
    )


def texts(count: int, length: int = 6) -> list[Feed]:
    mask = (np.arange(length) < np.array([[length], [length - 2]])).astype(np.int64)
    return [{"x": noise(k, 2, length, E).astype(np.float32), "mask": mask} for k in range(count)]


def test_layer_of_an_optimized_encoder_is_factored_throughout():
    proto = bert()
    sites, skips = find_sites(index(proto))
    assert not skips
    assert [(s.key, s.bias) for s in sites] == [(w, "add") for w in ("QKV", "O", "U", "P")]
    made = compress(proto, texts(3), EXACT).model
    assert [op for op in ops(made) if op not in ("Cast", "Constant")] == [
        *("MatMul", "MatMul", "Add", "Split", "MultiHeadAttention"),
        *("MatMul", "MatMul", "SkipLayerNormalization"),
        *("MatMul", "MatMul", "BiasGelu"),
        *("MatMul", "MatMul", "SkipLayerNormalization"),
    ]
    assert_same(proto, made, texts(1)[0])


# Three products for one attention, whose biases it adds itself.
SEPARATE = """
    m = Cast<to=6>(mask)
    q = MatMul(x, Q)
    k = MatMul(x, K)
    v = MatMul(x, L)
    a = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v, qkv, m)
    o = MatMul(a, O)
    y = com.microsoft.SkipLayerNormalization<epsilon=1e-5>(x, o, scale, shift)
"""


def test_products_around_a_multi_head_attention_are_factored():
    weights = {name: float32(k, E, E) for k, name in enumerate("QKLO")}
    proto = model(
        f"(float[n,s,{E}] x, int64[n,s] mask) => (float[n,s,{E}] y)",
        SEPARATE,
        domains=MICROSOFT,
        qkv=float32(5, 3 * E),
        **weights,
        **NORM,
    )
    graph = index(proto)
    sites, skips = find_sites(graph)
    assert not skips
    # The bias of the attention is theirs; behind the last no Add lies, but can be put there.
    assert [(s.key, s.bias) for s in sites] == [(w, "add") for w in "QKL"] + [("O", "new")]
    made = compress(proto, texts(3), EXACT).model
    assert ops(made).count("MatMul") == 8
    assert_same(proto, made, texts(1)[0])
    result = compress(proto, texts(60), CompressConfig(param_ratio=0.9, force=True))
    assert result.plan.method == "two-sided"
    assert result.plan.changes


@pytest.mark.parametrize("method", ["two-sided", "one-sided"])
def test_biases_behind_take_the_lost_mean(method: str):
    proto, data = bert(), [f | {"x": f["x"] + np.float32(0.7)} for f in texts(40)]
    config = CompressConfig(param_ratio=0.9, method=method, force=True, moves=("low-rank",))
    result = compress(proto, data, config)
    corrected = {e.site for e in result.plan.entries if e.rank is not None and e.bias}
    assert corrected
    names = {"QKV": "qkv", "O": "ob", "U": "ub", "P": "pb"}
    held, now = constants(proto), constants(result.model)
    for site in corrected:
        assert names[site] not in now
        (name,) = (n for n in now if n.startswith(f"{names[site]}_"))
        assert now[name].shape == held[names[site]].shape
        assert not np.array_equal(now[name], held[names[site]])
    assert "Add" not in ops(result.model) or "QKV" in corrected


def llama() -> onnx.ModelProto:
    angles = np.arange(16)[:, None] * 0.1 ** np.arange(8)[None]
    return model(
        f"(float[n,s,{E}] x, float[n,1,p,16] past_keys, float[n,1,p,16] past_values, "
        "int32[n] lengths, int32 total) => "
        f"(float[n,s,{E}] y, float[n,1,q,16] keys, float[n,1,q,16] values)",
        LLAMA,
        domains=MICROSOFT,
        scale=NORM["scale"],
        cos=np.cos(angles).astype(np.float32),
        sin=np.sin(angles).astype(np.float32),
        **{"Q": float32(1, E, 32), "K": float32(2, E, 16), "L": float32(3, E, 16)},
        **{"O": float32(4, 32, E), "G": float32(5, E, F), "U": float32(6, E, F)},
        P=float32(7, F, E),
    )


def prompts(count: int, length: int = 6) -> list[Feed]:
    empty = np.zeros((2, 1, 0, 16), np.float32)
    return [
        {
            "x": noise(k, 2, length, E).astype(np.float32),
            "past_keys": empty,
            "past_values": empty,
            "lengths": np.full(2, length - 1, np.int32),
            "total": np.array(length, np.int32),
        }
        for k in range(count)
    ]


def test_layer_with_grouped_queries_is_factored_throughout():
    proto = llama()
    sites, skips = find_sites(index(proto))
    assert not skips
    assert [s.key for s in sites] == list("QKLOGUP")
    made = compress(proto, prompts(3), EXACT).model
    assert ops(made).count("MatMul") == 14
    assert ops(made).count("GroupQueryAttention") == 1
    assert_same(proto, made, prompts(1)[0])
    result = compress(proto, prompts(30), CompressConfig(param_ratio=0.9))
    assert result.plan.method == "two-sided"
    assert result.plan.changes


def test_weights_may_lie_outside_the_file(tmp_path: Path):
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    onnx.save_model(
        every(), str(source), save_as_external_data=True, size_threshold=0, location="weights"
    )
    result = compress(source, [{"x": ROWS}] * 2, EXACT)
    result.save(target)
    assert_same(every(), ModelStore.load(target), {"x": ROWS})


def test_models_without_such_nodes_are_indexed_as_they_are():
    store = ModelStore.load(
        model(f"(float[n,{D}] x) => (float[n,{H}] y)", "y = MatMul(x, W)", W=float32(1, D, H))
    )
    assert plain_model(store) is store
