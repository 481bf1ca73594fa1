"""Which nodes are sites, how they see their weights, and why the others are left alone."""

import math

import numpy as np
import onnx
import pytest
from builders import (
    FORMS,
    GATHERS,
    UNRUNNABLE,
    Feed,
    Form,
    activations,
    constants,
    index,
    model,
    noise,
    ops,
    root_error,
    run,
)

from onnx_utilrank import CompressConfig, ConfigError, ModelError, analyze, compress
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.sites.find import find_sites, site_matrix
from onnx_utilrank.sites.site import Site, Skip

EXACT = CompressConfig(energy=1.0, force=True)
TRUNCATED = CompressConfig(param_ratio=1.0, method="one-sided", force=True)
W = noise(20, 7, 5).astype(np.float32)  # as a MatMul's right operand
SQUARE = noise(21, 6, 6).astype(np.float32)
PLANES = "(float[n,4,8,8] x) => (float[n,4,a,b] y)"
ROWS = "(float[n,7] x) => (float[n,k] y)"


def sites_of(proto: onnx.ModelProto, **options: object) -> tuple[Site, ...]:
    return find_sites(index(proto), **options)[0]  # type: ignore[arg-type]


def skips_of(proto: onnx.ModelProto, **options: object) -> tuple[Skip, ...]:
    return find_sites(index(proto), **options)[1]  # type: ignore[arg-type]


def rows(width: int, count: int = 6) -> list[Feed]:
    return [{"x": activations(k, 12, width).astype(np.float32)} for k in range(count)]


# --- sites --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMS, *GATHERS, *UNRUNNABLE], ids=str)
def test_form_is_one_site_with_its_weight_as_a_matrix(form: Form):
    graph = index(form.proto)
    sites, skips = find_sites(graph)
    (site,) = sites
    assert not skips
    assert (site.m, site.d) == form.weight.shape
    assert site.parameters == form.weight.size
    assert site.dtype == form.dtype
    assert site.freed
    assert site.key == site.weight
    assert (site.bias != "none") == bool(form.corrected)
    np.testing.assert_array_equal(site_matrix(graph, site), form.weight)


@pytest.mark.parametrize(("m", "d"), [(1, 1), (2, 2), (5, 7), (7, 5), (64, 64), (1, 99)])
def test_break_even_rank_is_the_last_that_saves(m: int, d: int):
    weight = np.ones((d, m), np.float32)
    (site,) = sites_of(model(f"(float[n,{d}] x) => (float[n,{m}] y)", "y = MatMul(x, W)", W=weight))
    rank = site.break_even_rank
    assert rank * (m + d) < m * d <= (rank + 1) * (m + d)


# --- refusals -----------------------------------------------------------------------------------

REFUSED = {
    "depthwise": (
        PLANES,
        "y = Conv<group=4>(x, W)",
        {"W": np.ones((4, 1, 3, 3), np.float32)},
        "grouped convolution (depthwise)",
    ),
    "groups": (
        "(float[n,18,8,8] x) => (float[n,9,a,b] y)",
        "y = Conv<group=9>(x, W)",
        {"W": np.ones((9, 2, 3, 3), np.float32)},
        "grouped convolution (9 groups; up to 8, with a constant bias or none and a weight that "
        "nothing else reads, are factored one by one)",
    ),
    "groups_with_a_computed_bias": (
        "(float[n,4,8,8] x, float[4] b) => (float[n,4,a,b] y)",
        "y = Conv<group=2>(x, W, b)",
        {"W": np.ones((4, 2, 3, 3), np.float32)},
        "grouped convolution (2 groups; up to 8, with a constant bias or none and a weight that "
        "nothing else reads, are factored one by one)",
    ),
    "computed_kernel": (
        "(float[n,4,8,8] x, float[4,4,3,3] k) => (float[n,4,a,b] y)",
        "y = Conv(x, k)",
        {},
        "no operand is a constant weight",
    ),
    "stack": (
        "(float[2,n,7] x) => (float[2,n,5] y)",
        "y = MatMul(x, W)",
        {"W": np.stack([W, W])},
        "the constant [2, 7, 5] is a stack of different matrices",
    ),
    "vector_right": (
        "(float[n,7] x) => (float[n] y)",
        "y = MatMul(x, W)",
        {"W": W[:, 0]},
        "the constant is a vector",
    ),
    "vector_left": (
        "(float[5,n] x) => (float[n] y)",
        "y = MatMul(W, x)",
        {"W": W[0]},
        "the constant is a vector",
    ),
    "both_constant": (
        "(float[5,5] x) => (float[5,5] y)",
        "c = MatMul(V, W) y = Add(c, x)",
        {"W": W, "V": W.T},
        "both operands are constant",
    ),
    "both_constant_gemm": (
        "(float[5,5] x) => (float[5,5] y)",
        "y = Gemm<transA=1>(W, W, x)",
        {"W": W},
        "both operands are constant",
    ),
    "no_constant": (
        "(float[n,n] x) => (float[n,n] y)",
        "y = MatMul(x, x)",
        {},
        "no operand is a constant weight",
    ),
    "no_constant_gemm": (
        "(float[n,n] x) => (float[n,n] y)",
        "y = Gemm(x, x, C)",
        {"C": W[0, :1]},
        "no operand is a constant weight",
    ),
    "computed_from_a_weight": (
        "(float[n,7] x) => (float[n,5] y)",
        "w = Neg(W) y = MatMul(x, w)",
        {"W": W},
        "no operand is a constant weight",
    ),
    "dequantized": (
        "(float[n,7] x) => (float[n,5] y)",
        "w = DequantizeLinear(W, s) y = MatMul(x, w)",
        {"W": np.ones((7, 5), np.int8), "s": np.float32(0.5)},
        "its weight is quantized: compress the model before it is quantized",
    ),
    "integers": (
        "(int32[n,7] x) => (int32[n,5] y)",
        "y = MatMul(x, W)",
        {"W": np.ones((7, 5), np.int32)},
        "the weight is int32, not a floating-point type",
    ),
    "integers_gemm": (
        "(int64[n,7] x) => (int64[n,5] y)",
        "y = Gemm(x, W)",
        {"W": np.ones((7, 5), np.int64)},
        "the weight is int64, not a floating-point type",
    ),
    "empty": (
        "(float[n,7] x) => (float[n,0] y)",
        "y = MatMul(x, W)",
        {"W": np.ones((7, 0), np.float32)},
        "the weight is empty",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_why(case: str):
    signature, body, weights, reason = REFUSED[case]
    proto = model(signature, body, **weights)
    onnx.checker.check_model(proto, full_check=True)
    assert not sites_of(proto)
    (skip,) = skips_of(proto)
    assert skip.reason == reason
    assert skip.op_type in skip.node
    assert skip.op_type in ops(proto)


def test_refusals_reach_plan_and_report():
    proto = model(ROWS, "h = MatMul(x, W) t = Transpose(h) y = MatMul(h, t)", W=W)
    expected = [("MatMul 'y'", "MatMul", "no operand is a constant weight")]
    skipped = analyze(proto, rows(7)).skipped
    assert [(s.node, s.op_type, s.reason) for s in skipped] == expected
    plan = compress(proto, rows(7), TRUNCATED, dry_run=True).plan
    assert plan.skipped == skipped


def test_kernel_without_spatial_dimensions_is_refused():
    proto = model("(float[n,4] x) => (float[n,4] y)", "y = Conv(x, W)", W=SQUARE[:4, :4])
    assert [s.reason for s in skips_of(proto)] == ["the kernel [4, 4] has no spatial dimension"]


@pytest.mark.parametrize("body", ["y = MatMul(x)", "y = Gemm(x)", "y = Conv(, W)"])
def test_node_without_its_operands_is_an_error_of_the_model(body: str):
    proto = model(ROWS, body, W=W)
    assert not sites_of(proto)
    with pytest.raises(ModelError, match="ONNX Runtime cannot load it"):
        compress(proto, rows(7), TRUNCATED)


def test_opsets_that_broadcast_by_attributes_are_refused():
    proto = model(ROWS, "y = MatMul(x, W)", opset=6, W=W)
    assert [s.reason for s in skips_of(proto)] == ["opset 6 is older than 7"]


@pytest.mark.parametrize("opset", [7, 21])
def test_operators_of_other_domains_are_none_of_ours(opset: int):
    proto = model(
        ROWS, "h = other.MatMul(x, W) y = Neg(h)", domains=', "other" : 1', opset=opset, W=W
    )
    assert find_sites(index(proto)) == ((), ())


BRANCHES = """
    y = If (flag) <
        then_branch = one () => (float[n,k] a) { [inner] a = MatMul(x, W) },
        else_branch = two () => (float[n,k] b) {
            b = If (flag) <
                then_branch = three () => (float[n,k] c) { [deep] c = Gemm(x, W) },
                else_branch = four () => (float[n,k] e) { e = Identity(h) }
            >
        }
    >
"""


def test_nodes_of_subgraphs_and_functions_are_left_alone():
    functions = '<opset_import: ["" : 17], domain: "local"> f (a, w) => (b) { b = MatMul(a, w) }'
    proto = model(
        "(float[n,7] x, bool flag) => (float[n,5] y)",
        f"h = local.f(x, V) {BRANCHES}",
        domains=', "local" : 1',
        functions=functions,
        W=W,
        V=W,
    )
    onnx.checker.check_model(proto, full_check=True)
    assert not sites_of(proto)
    assert {(s.node, s.reason) for s in skips_of(proto)} == {
        ("MatMul 'inner'", "inside a subgraph of If 'y'"),
        ("Gemm 'deep'", "inside a subgraph of If 'b'"),
        ("MatMul 'b' in function 'f'", "inside a model-local function"),
    }


def test_all_that_holds_weights_in_subgraphs_and_functions_is_listed():
    functions = """
        <opset_import: ["" : 17], domain: "local"> f (a, w, r) => (b) {
            p, b = LSTM<hidden_size = 5>(a, w, r)
        }
    """
    branches = """
        y = If (flag) <
            then_branch = one () => (float[n,k] a) { a = com.microsoft.FusedMatMul(x, W) },
            else_branch = two () => (float[n,k] b)
            <float[9,5] own = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19,
             20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41,
             42, 43, 44}> {
                c = Einsum<equation = "ab,bc->ac">(x, W)
                d = Gather(own, ids)
                e = Gather(W, ids)
                s = Shape(x)
                i = Gather(s, ids)
                q = local.MatMul(x, W)
                b = com.microsoft.MatMulNBits<K = 7, N = 5, bits = 4, block_size = 16>(x, W, W)
            }
        >
    """
    proto = model(
        "(float[n,7] x, int64[3] ids, bool flag) => (float[n,5] y)",
        f"h = local.f(x, W, W) {branches}",
        domains=', "local" : 1, "com.microsoft" : 1',
        functions=functions,
        W=W,
    )
    inside = "inside a subgraph of If 'y'"
    assert [(s.node, s.reason) for s in skips_of(proto)] == [
        ("FusedMatMul 'a'", inside),
        ("Einsum 'c'", inside),
        ("Gather 'd'", inside),
        ("Gather 'e'", inside),
        ("MatMulNBits 'b'", inside),
        ("LSTM 'p' in function 'f'", "inside a model-local function"),
    ]


def test_bodies_of_loops_are_left_alone():
    body = """
        y = Loop (trips, keep, x) <
            body = step (int64 i, bool c, float[n,6] s) => (bool d, float[n,6] t) {
                d = Identity(c)
                t = MatMul(s, W)
            }
        >
    """
    proto = model(
        "(float[n,6] x) => (float[n,6] y)",
        body,
        trips=np.array(3),
        keep=np.array(True),
        W=SQUARE,
    )
    assert not sites_of(proto)
    assert [s.reason for s in skips_of(proto)] == ["inside a subgraph of Loop 'y'"]


# --- choosing -----------------------------------------------------------------------------------

THREE = model(
    "(float[n,6] x) => (float[n,6] y)",
    "[block_0_up] a = MatMul(x, U) [block_0_down] b = Gemm(a, D) [head] y = MatMul(b, H)",
    U=SQUARE,
    D=SQUARE,
    H=SQUARE,
)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "UDH"),
        ({"op_types": ["Gemm"]}, "D"),
        ({"op_types": ["MatMul", "Conv"]}, "UH"),
        ({"include": ["block_*"]}, "UD"),
        ({"include": ["*_up", "y"]}, "UH"),
        ({"include": ["H"]}, "H"),
        ({"include": ["h"]}, ""),
        ({"exclude": ["head", "a"]}, "D"),
        ({"include": ["block_*"], "exclude": ["*down"]}, "U"),
        ({"include": ["block_[01]_u?"]}, "U"),
        ({"exclude": ["*"]}, ""),
    ],
)
def test_patterns_and_op_types_choose_the_sites(options: dict[str, list[str]], found: str):
    assert "".join(site.key for site in sites_of(THREE, **options)) == found
    assert len(skips_of(THREE, **options)) == 3 - len(found)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"op_types": ["Conv"]}, "operator MatMul is not among the op types asked for"),
        ({"include": ["a"], "exclude": ["a"]}, "excluded by a pattern"),
        ({"include": ["b"]}, "not included by any pattern"),
    ],
)
def test_what_is_not_chosen_says_so(options: dict[str, list[str]], reason: str):
    assert skips_of(THREE, **options)[0].reason == reason


def test_unknown_op_type_is_a_usage_error():
    with pytest.raises(ConfigError, match=r"'LSTM' cannot be factored; choose from .*'Conv'"):
        sites_of(THREE, op_types=["MatMul", "LSTM"])


# --- weights with several readers ---------------------------------------------------------------

TWO_INPUTS = "(float[n,7] x, float[k,7] z) => (float[n,5] y, float[k,5] v)"


def pairs(count: int = 6) -> list[Feed]:
    return [
        {
            "x": activations(k, 12, 7).astype(np.float32),
            "z": 3 - activations(99 - k, 8, 7).astype(np.float32),
        }
        for k in range(count)
    ]


def outputs_agree(before: onnx.ModelProto, after: onnx.ModelProto, feed: Feed) -> None:
    expected, actual = run(before, feed), run(after, feed)
    for name, values in expected.items():
        # Sums of at most 12 products of values below 10, and of factors of norm below 10.
        np.testing.assert_allclose(actual[name], values, rtol=0, atol=1e-4)


def test_shared_weight_is_factored_once_and_stays_shared():
    proto = model(TWO_INPUTS, "y = MatMul(x, W) v = MatMul(z, W)", W=W)
    (site,) = sites_of(proto)
    assert (site.key, len(site.uses), site.freed) == ("W", 2, True)
    result = compress(proto, pairs(), EXACT)
    assert ops(result.model) == ["MatMul"] * 4
    assert {name: a.shape for name, a in constants(result.model).items()} == {
        "W/right": (7, 5),
        "W/left": (5, 5),
    }
    outputs_agree(proto, result.model, pairs()[0])
    (layer,) = analyze(proto, pairs()).layers
    assert layer.nodes == ("MatMul 'y'", "MatMul 'v'")
    assert layer.rows == 6 * (12 + 8)


SHARED = {
    "new": ("y = MatMul(x, W) v = MatMul(z, W)", "", {"W/bias", "W/bias_1"}),
    "add_and_new": ("h = MatMul(x, W) y = Add(h, b) v = MatMul(z, W)", "b", {"b_1", "W/bias"}),
    "one_bias": ("y = Gemm(x, W, b) v = Gemm<beta=3.0>(z, W, b)", "b", {"b_1", "b_2"}),
    "alpha": (
        "y = Gemm<alpha=-2.0>(x, W, b) v = Gemm<alpha=-2.0>(z, W, c)",
        "bc",
        {"b_1", "c_1"},
    ),
}


@pytest.mark.parametrize("case", SHARED)
def test_every_use_of_a_shared_weight_gets_its_own_bias(case: str):
    body, held, made = SHARED[case]
    biases = {name: noise(22, 5).astype(np.float32) for name in held}
    proto = model(TWO_INPUTS, body, W=W, **biases)
    data = pairs()
    result = compress(proto, data, TRUNCATED)
    (entry,) = result.plan.entries
    assert entry.bias
    assert set(constants(result.model)) == {"W/right", "W/left"} | made
    # The prediction is over the rows of both together, about their common mean.
    chosen, _ = open_data(data, index(proto).store.inputs).split()
    x = np.concatenate([data[k][name] for k in chosen for name in ("x", "z")])
    outputs = (2.0 if case == "alpha" else 1.0) * x.astype(np.float64) @ W
    before, after = (
        np.concatenate([run(p, data[k])[name] for k in chosen for name in ("y", "v")])
        for p in (proto, result.model)
    )
    measured = root_error(before - after, outputs - outputs.mean(0))
    assert measured == pytest.approx(math.sqrt(entry.predicted_error), abs=1e-4)


def test_bias_is_left_alone_where_one_use_cannot_take_it():
    signature = "(float[n,7] x, float[k,7] z, float[k,5] c) => (float[n,5] y, float[k,5] v)"
    proto = model(signature, "y = Gemm(x, W) v = Gemm(z, W, c)", W=W)
    (site,) = sites_of(proto)
    assert site.bias == "none"
    feeds = [feed | {"c": feed["z"][:, :5]} for feed in pairs()]
    assert ops(compress(proto, feeds, TRUNCATED).model) == ["MatMul", "MatMul", "MatMul", "Gemm"]


def test_bias_of_two_adds_stays_while_one_of_them_reads_it():
    body = "g = MatMul(x, W) y = Add(g, b) h = MatMul(z, V) v = Add(b, h)"
    biases = {"b": noise(23, 5).astype(np.float32)}
    proto = model(TWO_INPUTS, body, W=W, V=W + 1, **biases)
    both = compress(proto, pairs(), TRUNCATED)
    assert [entry.bias for entry in both.plan.entries] == [True, True]
    factors = {"W/right", "W/left", "V/right", "V/left"}
    assert set(constants(both.model)) == factors | {"b_1", "b_2"}
    one = compress(proto, pairs(), CompressConfig(param_ratio=1.0, force=True, exclude=("V",)))
    assert set(constants(one.model)) == {"W/right", "W/left", "V", "b", "b_1"}
    node = one.model.graph.node[-1]
    assert list(node.input) == ["b", "h"]
    np.testing.assert_array_equal(constants(one.model)["b"], biases["b"])


@pytest.mark.parametrize("chain", ["", "v = Identity(W)", "u = Identity(W) v = Identity(u)"])
def test_a_weight_by_other_names_is_one(chain: str):
    """Exporters that drop doubles let layers that share a weight read it through Identity."""
    body = (
        f"{chain} a = MatMul(x, W) b = Tanh(a) c = MatMul(b, {'v' if chain else 'W'}) y = Tanh(c)"
    )
    wide = noise(40, 40, 40).astype(np.float32)
    proto = model("(float[n,40] x) => (float[n,40] y)", body, W=wide)
    (site,) = sites_of(proto)
    assert (site.key, site.weight, site.freed, len(site.uses)) == ("W", "W", True, 2)
    data = {"x": noise(41, 20, 40).astype(np.float32)}
    result = compress(proto, data, CompressConfig(param_ratio=0.7, method="svd"))
    assert ops(result.model) == ["MatMul", "MatMul", "Tanh"] * 2
    assert set(constants(result.model)) == {"W/right", "W/left"}


@pytest.mark.parametrize(
    "body",
    [
        "v = Identity(SQ) y = MatMul(x, SQ) z = MatMul(v, x)",
        "v = Identity(SQ) y = MatMul(x, SQ) z = Identity(v)",
        "v = Identity(SQ) y = MatMul(x, SQ) z = Relu(v)",
    ],
)
def test_a_weight_that_is_needed_by_another_name_is_not_freed(body: str):
    proto = model("(float[6,6] x) => (float[6,6] y, float[6,6] z)", body, SQ=SQUARE)
    assert not any(site.freed for site in sites_of(proto))


def test_a_bias_that_is_the_shift_of_a_norm_too_leaves_it_alone():
    """Exporters store zeros once; a lost mean goes into the bias, and not into the shift."""
    body = """
        h = MatMul(x, W)
        y = com.microsoft.SkipLayerNormalization<epsilon=1e-5>(h, s, scale, {}, zeros)
    """
    signature = "(float[n,k,7] x, float[n,k,5] s) => (float[n,k,5] y)"
    domains = ', "com.microsoft" : 1'
    scale = {"scale": np.ones(5, np.float32)}
    zeros = {name: np.zeros(5, np.float32) for name in ("zeros", "others")}
    feeds = [
        {"x": pair["x"][None] + 1, "s": noise(30 + k, 1, len(pair["x"]), 5).astype(np.float32)}
        for k, pair in enumerate(pairs())
    ]
    made = []
    for shift in ("zeros", "others"):
        held = {name: zeros[name] for name in {"zeros", shift}}
        proto = model(signature, body.format(shift), domains=domains, W=W, **scale, **held)
        result = compress(proto, feeds, TRUNCATED)
        (entry,) = result.plan.entries
        assert entry.bias
        (norm,) = (n for n in result.model.graph.node if n.op_type.startswith("Skip"))
        assert norm.input[3] == shift
        made.append(run(result.model, feeds[0])["y"])
    np.testing.assert_array_equal(*made)


TWICE_SEEN = {
    "gemm_and_matmul": (
        "(float[n,6] x) => (float[n,6] y, float[n,6] v)",
        "y = MatMul(x, W) v = Gemm<transB=1>(x, W)",
    ),
    "one_label": (
        "(float[n,6] x) => (float[n,6] y, float[n,6] v)",
        "[v] y = Gemm(x, W) v = Gemm<transB=1>(x, W)",
    ),
    "left_and_right": (
        "(float[6,6] x) => (float[6,6] y, float[6,6] v)",
        "y = MatMul(x, W) v = MatMul(W, x)",
    ),
}


@pytest.mark.parametrize("case", TWICE_SEEN)
def test_weight_that_is_seen_in_two_ways_is_not_freed(case: str):
    proto = model(*TWICE_SEEN[case], W=SQUARE)
    sites = sites_of(proto)
    assert len({site.key for site in sites}) == 2
    assert [site.freed for site in sites] == [False, False]
    feeds = [{"x": activations(k, 6, 6).astype(np.float32)} for k in range(10)]
    plan = compress(proto, feeds, CompressConfig(param_ratio=1.0), dry_run=True).plan
    assert not plan.factored
    assert {e.reason.split(":")[0] for e in plan.entries} == {
        "its weight has other readers and would stay"
    }
    forced = compress(proto, feeds, EXACT)
    assert "W" not in constants(forced.model)
    assert forced.plan.parameters_after == count_parameters(forced.store) == 4 * 36
    outputs_agree(proto, forced.model, feeds[0])


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("(float[n,7] x) => (float[n,5] y, float[2,5] v)", "y = MatMul(x, W) v = Gather(W, at)"),
        ("(float[n,7] x) => (float[n,5] y, float[7,5] v)", "y = MatMul(x, W) v = Identity(W)"),
        ("(float[n,7] x) => (float[n,5] y, float[7,5] W)", "y = MatMul(x, W)"),
        (
            "(float[n,7] x, bool f) => (float[n,5] y, float[a,b] v)",
            "y = MatMul(x, W) v = If (f) <then_branch = one () => (float[a,b] p) {p = Neg(W)},"
            " else_branch = two () => (float[a,b] q) {q = Abs(W)}>",
        ),
        (
            "(float[n,7] x) => (float[n,5] y, float[7,5] v)",
            "T = Transpose(W) V = Transpose(T) y = MatMul(x, V) U = Transpose(T) v = Neg(U)",
        ),
    ],
    ids=["gather", "identity", "output", "captured", "layout"],
)
def test_weight_with_another_reader_stays(signature: str, body: str):
    proto = model(signature, body, W=W, at=np.array([1, 2]))
    (site,) = sites_of(proto)
    assert not site.freed
    feeds = [feed | {"f": np.array(True)} for feed in rows(7)]
    plan = compress(proto, feeds, CompressConfig(param_ratio=1.0), dry_run=True).plan
    assert [entry.rank for entry in plan.entries] == [None]
    assert "other readers" in plan.entries[0].reason
    forced = compress(proto, feeds, EXACT)
    np.testing.assert_array_equal(constants(forced.model)["W"], W)
    onnx.checker.check_model(forced.model, full_check=True)
    outputs_agree(proto, forced.model, feeds[0])
