"""What a move stores, and that the rewritten model is the one with the product for a weight."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from builders import (
    CONVS,
    FORMS,
    GATHERS,
    GEMMS,
    MATMULS,
    Form,
    activations,
    conv,
    gemm,
    index,
    model,
    noise,
    ops,
    right,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_utilrank import CompressConfig, ConfigError, ModelError, compress
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.moves.low_rank import LOW_RANK
from onnx_utilrank.moves.move import MoveKind
from onnx_utilrank.moves.moves import MOVES, find_move
from onnx_utilrank.moves.pivot import PIVOT
from onnx_utilrank.moves.two_convs import TwoConvs
from onnx_utilrank.ranking.cost import bias_cost, count_parameters
from onnx_utilrank.sites.find import find_sites
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.factorize import Factors
from onnx_utilrank.statistics.interpolative import LARGEST, interpolative
from onnx_utilrank.surgery.rewrite import Replacement, check_contract, rewrite

# A shared machine may stall for longer than any deadline.
law = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**32 - 1)
# Those that store a product of plain factors; tests/test_two_convs.py has the others.
KINDS = [kind for kind in MOVES if not isinstance(kind, TwoConvs)]


def only_site(proto: onnx.ModelProto) -> tuple[GraphIndex, Site]:
    graph = index(proto)
    (site,), _ = find_sites(graph)
    return graph, site


def moved(
    proto: onnx.ModelProto, kind: MoveKind, factors: Factors, lost: np.ndarray | None
) -> onnx.ModelProto:
    """The model after one move at its only site."""
    graph, site = only_site(proto)
    made = Replacement(site=site, move=kind.key, factors=factors, lost_mean=lost)
    store = rewrite(graph, [made])
    check_contract(graph.store, store)
    onnx.checker.check_model(store.proto, full_check=True)
    return store.proto


def random_factors(seed: int, m: int, d: int, rank: int) -> Factors:
    return Factors(left=noise(seed, m, rank), right=noise(seed + 1, rank, d) / math.sqrt(d))


def applies(kind: MoveKind, form: Form) -> bool:
    return kind.applies(*only_site(form.proto))


CASES = [
    pytest.param(kind, form, id=f"{kind.key}-{form}")
    for kind in KINDS
    for form in (*FORMS, *GATHERS)
    if applies(kind, form)
]


def test_pivots_are_tried_on_every_operator():
    tried = [form for kind, form in (case.values for case in CASES) if kind is PIVOT]
    names = {form.name for form in tried}
    assert {"matmul_right_x3", "add_m", "add_m1_left", "conv1d", "conv2d_bias"} <= names
    assert {"gemm_no_c", "gemm_no_c_left", "gemm_c_1m", "conv2d_add_m11"} <= names
    assert len(tried) > len(FORMS) / 2


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_moved_model_has_the_product_for_its_weight(kind: MoveKind, form: Form):
    _, site = only_site(form.proto)
    for rank in sorted({1, 3, min(site.full_rank, site.m - 1)}):
        factors = random_factors(rank, site.m, site.d, rank)
        lost = None if site.bias == "none" else noise(9, site.m)
        made = moved(form.proto, kind, factors, lost)
        change = factors.product - form.weight
        # Pivots are rows of the product, and no combination of them is above 1.5.
        norms = (
            np.linalg.norm(factors.left) * np.linalg.norm(factors.right)
            if kind is LOW_RANK
            else np.linalg.norm(factors.product) * LARGEST * math.sqrt(rank * site.m)
        )
        for feed in form.data()[:2]:
            x = form.rows(feed).astype(np.float64)
            expected = form.output_rows(run(form.proto, feed)["y"])
            expected = expected + form.alpha * (x @ change.T)
            if lost is not None:
                expected = expected + form.alpha * lost
            actual = run(made, feed)["y"]
            assert actual.dtype == form.dtype
            # Sums of d, then of r products, and those of the weight that the source has.
            size = np.linalg.norm(x, axis=1).max() * (norms + np.linalg.norm(form.weight))
            size = abs(form.alpha) * size + np.abs(expected).max()
            eps = float(np.finfo(form.dtype).eps)
            atol = 4 * eps * math.sqrt(site.d + rank) * size
            np.testing.assert_allclose(form.output_rows(actual), expected, rtol=0, atol=atol)


def turned_gemms() -> list[Form]:
    """Gemm as pivots want it (alpha of 1), over both flags, sides and kinds of bias."""
    made = []
    for side in ("right", "left"):
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            flags = {"side": side, "transA": a, "transB": b}
            vector = noise(3, 5) if side == "right" else noise(3, 5)[:, None]
            made += [
                gemm(f"{side}_{a}{b}_none", **flags),
                gemm(f"{side}_{a}{b}_c", vector, beta=0.5, **flags),
                gemm(
                    f"{side}_{a}{b}_add",
                    body=f"h = Gemm<transA={a}, transB={b}>"
                    f"({'x, W' if side == 'right' else 'W, x'}) y = Add(h, b)",
                    b=vector,
                    **flags,
                ),
            ]
    return made


@pytest.mark.parametrize("form", turned_gemms(), ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.key)
def test_gemm_is_moved_whatever_is_transposed(kind: MoveKind, form: Form):
    assert applies(kind, form)
    test_moved_model_has_the_product_for_its_weight(kind, form)


# A C that beta of 0 ignores is freed with the Gemm, and was never asked for.
PLAIN = [*MATMULS, *GEMMS, *CONVS, *turned_gemms()]
PLAIN = [form for form in PLAIN if "beta_0" not in form.name]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.key)
def test_parameters_are_what_the_model_stores(kind: MoveKind):
    tried = 0
    for form in PLAIN:
        graph, site = only_site(form.proto)
        if not kind.applies(graph, site):
            continue
        extra = 0 if site.bias == "none" else bias_cost(graph, site)
        lost = None if site.bias == "none" else noise(9, site.m)
        for rank in (1, 2, 3):
            made = moved(form.proto, kind, random_factors(5, site.m, site.d, rank), lost)
            stored = sum(math.prod(t.dims) for t in made.graph.initializer)
            before = count_parameters(graph.store) - site.parameters
            assert stored == before + kind.parameters(site, rank) + extra, form.name
            tried += 1
    assert tried > 60


@law
@given(m=st.integers(1, 12), d=st.integers(1, 12))
def test_top_rank_is_the_largest_that_is_smaller(m, d):
    proto = model("(float[n,a] x) => (float[n,b] y)", "y = MatMul(x, W)", W=np.zeros((d, m), "f4"))
    _, site = only_site(proto)
    for kind in KINDS:
        smaller = [r for r in range(1, min(m, d) + 1) if kind.parameters(site, r) < m * d]
        assert kind.top_rank(site) == max(smaller, default=0)


def test_pivots_take_less_than_two_factors():
    _, site = only_site(right(2).proto)
    for rank in range(1, site.full_rank):
        assert PIVOT.multiplications(site, rank) == rank * (site.m + site.d - rank)
        assert PIVOT.multiplications(site, rank) < LOW_RANK.multiplications(site, rank)
    assert PIVOT.top_rank(site) > LOW_RANK.top_rank(site)


REFUSED = ["gemm_no_c_alpha", "gemm_right_00", "gemm_c_computed", "conv2d_computed_bias"]
REFUSED += ["gemm_c_nm", "matmul_opset9", "matmul_left_x2"]


@pytest.mark.parametrize("name", REFUSED)
def test_pivots_are_refused_where_the_bias_cannot_follow(name: str):
    (form,) = (f for f in FORMS if f.name == name)
    assert not applies(PIVOT, form)
    assert applies(LOW_RANK, form)
    config = CompressConfig(param_ratio=1.0, method="one-sided", moves=("pivot",))
    result = compress(form.proto, form.data(), config)
    assert not result.plan.factored

    config = replace(config, moves=None, force=True)
    plan = compress(form.proto, form.data(), config, dry_run=True).plan
    (entry,) = plan.entries
    plan = replace(plan, entries=(replace(entry, move="pivot"),))
    with pytest.raises(ModelError, match=r"makes move 'pivot' at .* which cannot be"):
        compress(form.proto, form.data(), CompressConfig(force=True), plan=plan)


def test_moves_that_do_not_exist_are_refused():
    assert [find_move(kind.key) for kind in MOVES] == list(MOVES)
    with pytest.raises(
        ConfigError, match=r"'tucker' is not known; choose from: low-rank, channels, separable"
    ):
        find_move("tucker")
    form = right(2)
    config = CompressConfig(param_ratio=0.9, method="one-sided", moves=("low-rank", "tucker"))
    with pytest.raises(ConfigError, match="'tucker' is not known"):
        compress(form.proto, form.data(), config)


@pytest.mark.parametrize(
    "form",
    [
        right(3, weight=noise(1, 9, 12), inputs={"x": (4, 5, 12)}, W=noise(1, 9, 12).T),
        conv("c", (6, 7), (3, 3), pads=((1, 1), (1, 1)), bias=noise(3, 5)),
    ],
    ids=["matmul", "conv"],
)
def test_compress_stores_pivots_and_counts_them(form: Form):
    config = CompressConfig(param_ratio=0.95, method="two-sided", moves=("pivot",), force=True)
    result = compress(form.proto, form.data(), config)
    (entry,) = result.plan.factored
    assert entry.move == "pivot"
    assert ops(result.model).count("Gather") == ops(result.model).count("Concat") == 1
    assert result.plan.parameters_after == sum(
        math.prod(t.dims) for t in result.model.graph.initializer
    )
    assert result.plan.parameters_after <= 0.95 * result.plan.parameters_before


@pytest.mark.parametrize("form", [right(2), right(2, name="add"), gemm("none")], ids=str)
def test_pivots_make_no_bias_where_there_is_none(form: Form):
    _, site = only_site(form.proto)
    made = moved(form.proto, PIVOT, random_factors(5, site.m, site.d, 2), None)
    assert not {"Add", "Gemm"} & set(ops(made)) or form.name == "none"
    stored = sum(math.prod(t.dims) for t in made.graph.initializer)
    assert stored == PIVOT.parameters(site, 2)


def test_methods_that_make_none_of_the_moves_are_refused():
    form = right(2)
    for method, moves in (("utilized-rank", ("pivot",)), ("utilized-rank", ("pivot", "shrink"))):
        config = CompressConfig(energy=0.9, method=method, moves=moves)
        with pytest.raises(ConfigError, match=f"method {method} makes none of the moves pivot"):
            compress(form.proto, form.data(), config)
    for moves in (("shrink",), ("pivot",)):
        config = CompressConfig(param_ratio=0.9, method="svd", moves=moves)
        with pytest.raises(ConfigError, match=f"method svd makes none of the moves {moves[0]}"):
            compress(form.proto, form.data(), config)


def test_weight_of_two_nodes_is_moved_in_both():
    weight = noise(1, 7, 5).astype(np.float32)
    bias = noise(2, 5).astype(np.float32)
    body = "a = MatMul(x, W) y = Add(a, b) z = MatMul(x2, W)"
    signature = "(float[n,7] x, float[n,7] x2) => (float[n,5] y, float[n,5] z)"
    proto = model(signature, body, W=weight, b=bias)
    factors = random_factors(4, 5, 7, 2)
    made = moved(proto, PIVOT, factors, noise(6, 5))
    feed = {k: activations(j, 9, 7).astype(np.float32) for j, k in enumerate(("x", "x2"))}
    got = run(made, feed)
    size = np.linalg.norm(feed["x"]) * np.linalg.norm(factors.product) * LARGEST * math.sqrt(10)
    atol = 4 * float(np.finfo(np.float32).eps) * math.sqrt(9) * (size + 1)
    lost = noise(6, 5)
    wanted = {"y": feed["x"] @ factors.product.T + bias + lost}
    wanted["z"] = feed["x2"] @ factors.product.T + lost
    for name, expected in wanted.items():
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=atol)


# --- rows that span the others ------------------------------------------------------------------


@law
@given(seed=SEEDS, m=st.integers(1, 20), r=st.integers(1, 8), spread=st.sampled_from((0, 4, 8)))
def test_pivots_and_combinations_give_the_matrix(seed, m, r, spread):
    r = min(m, r)
    rng = np.random.default_rng(seed)
    # Rows and columns of very different size, as balanced factors have.
    matrix = rng.normal(size=(m, r)) * 10.0 ** (-spread * rng.random((1, r)))
    pivots, rest, combine = interpolative(matrix)
    assert sorted([*pivots, *rest]) == list(range(m))
    assert (np.diff(pivots) > 0).all()
    assert (np.diff(rest) > 0).all()
    assert combine.shape == (m - r, r)
    assert np.abs(combine).max(initial=0) <= LARGEST * (1 + 1e-6)
    rebuilt = np.empty_like(matrix)
    rebuilt[pivots], rebuilt[rest] = matrix[pivots], combine @ matrix[pivots]
    # Backward stable: small against each column's own size where combinations are bounded.
    bound = 100 * r * m * float(np.finfo(np.float64).eps) * np.abs(matrix).max()
    np.testing.assert_allclose(rebuilt, matrix, rtol=0, atol=bound)


@pytest.mark.parametrize("matrix", [np.eye(4), np.ones((5, 1)), np.triu(np.ones((6, 6)))[:, :3]])
def test_pivots_of_special_matrices(matrix):
    pivots, rest, combine = interpolative(matrix)
    np.testing.assert_allclose(combine @ matrix[pivots], matrix[rest], rtol=0, atol=1e-14)


def test_swaps_bound_what_elimination_leaves_large():
    """Kahan's matrix: rows of nearly equal length hide that the last one is nearly dependent."""
    n, c = 12, 0.285
    s = math.sqrt(1 - c * c)
    kahan = np.diag(s ** np.arange(n)) @ (np.eye(n) - c * np.triu(np.ones((n, n)), 1))
    _, _, combine = interpolative(kahan.T[:, : n - 3])
    assert np.abs(combine).max() <= LARGEST
