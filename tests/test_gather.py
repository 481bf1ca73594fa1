"""Tables of embeddings: tokens counted, tables factored, and what becomes of tokens never seen."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest
from builders import Feed, constants, index, model, noise, ops, run

from onnx_utilrank import AnalyzeConfig, CompressConfig, ModelError, analyze, compress
from onnx_utilrank.calibration.collect import collect
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.job import Job
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.planning import make_ledger
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.ranking.tied import tie
from onnx_utilrank.ranking.two_sided import TwoSidedSite, two_sided_site
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.sites.find import find_sites, site_matrix
from onnx_utilrank.sites.site import Site
from onnx_utilrank.sites.tied import find_tied
from onnx_utilrank.statistics.factorize import feature_scale
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.sensitivity import Sensitivity
from onnx_utilrank.statistics.tokens import COLUMNS, TokenCounts

V, N, C, L = 60, 8, 4, 6
TABLE = noise(70, V, N).astype(np.float32)
HEAD = noise(71, N, C).astype(np.float32)
POOLED = "e = Gather(T, ids) s = Tanh(e) p = ReduceMean<axes=[1], keepdims=0>(s) y = MatMul(p, H)"
SENTENCES = "(int64[b,l] ids) => (float[b,4] y)"
DRAWN = np.arange(V) // 2  # half of the vocabulary, the first tokens twice as often as the last


def sentences(seed: int, count: int, tokens: Sequence[int] | np.ndarray = DRAWN) -> list[Feed]:
    """Runs of 4 sentences each."""
    generator = np.random.default_rng(seed)
    return [{"ids": generator.choice(np.asarray(tokens), (4, L))} for _ in range(count)]


def pooled(table: np.ndarray = TABLE, **changes: np.ndarray) -> onnx.ModelProto:
    return model(SENTENCES, POOLED, **{"T": table, "H": HEAD} | changes)


def table_site(proto: onnx.ModelProto) -> Site:
    (site,) = (s for s in find_sites(index(proto))[0] if s.op_type == "Gather")
    return site


def rows_of(proto: onnx.ModelProto, width: int, name: str = "e") -> np.ndarray:
    """What a model gives for each token of the vocabulary, [V, width]."""
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    shown.graph.output.append(onnx.ValueInfoProto(name=name))
    return run(shown, {"ids": np.arange(V)[None]})[name].reshape(V, width).astype(np.float64)


def counted(feeds: Sequence[Feed], size: int = V) -> TokenCounts:
    counts = TokenCounts.zero(size)
    for feed in feeds:
        counts.add(feed["ids"])
    return counts


# --- counting -----------------------------------------------------------------------------------


def test_counts_take_ids_from_the_end_and_only_what_counts():
    ids = np.array([[0, 1, -1], [4, -5, 2]], np.int32)
    live = np.array([[True, True, True], [True, True, False]])
    counts = TokenCounts.zero(5)
    counts.add(ids, live)
    np.testing.assert_array_equal(counts.counts, [2, 1, 0, 0, 2])
    np.testing.assert_array_equal(counts.holders, [2, 1, 0, 0, 2])
    assert (counts.samples, counts.rows) == (2, 5)


def test_counts_of_parts_add_up():
    first, second = sentences(1, 3), sentences(2, 2)
    both, whole = counted(first) + counted(second), counted([*first, *second])
    np.testing.assert_array_equal(both.counts, whole.counts)
    np.testing.assert_array_equal(both.holders, whole.holders)
    assert both.unseen == whole.unseen


def test_share_of_the_unseen_is_what_samples_lack_of_each_other_and_one_of_new_tokens():
    rows = np.concatenate([feed["ids"] for feed in sentences(3, 4, range(V))])
    counts = counted([{"ids": rows}])
    new = [
        np.isin(row, np.delete(rows, k, axis=0), invert=True).sum() for k, row in enumerate(rows)
    ]
    assert 0 < sum(new) < rows.size
    assert counts.unseen == pytest.approx((sum(new) + L) / (rows.size + L), rel=1e-12)


def test_unseen_tokens_are_never_ruled_out_nor_is_any_token_without_data():
    many = TokenCounts.zero(V)
    many.add(np.zeros((1000, L), int))
    assert many.unseen == pytest.approx(1 / 1001)
    assert TokenCounts.zero(V).unseen == 1.0
    np.testing.assert_allclose(TokenCounts.zero(V).weights, 1 / V)


def test_moment_is_that_of_rows_as_often_as_they_are_expected():
    size = COLUMNS + 3  # two parts
    counts = TokenCounts.zero(size)
    ids = np.random.default_rng(4).integers(0, size, (5, 40))
    ids[:, :20] = size - 1  # which every sample holds, and which lies in the second part
    counts.add(ids)
    table = noise(5, size, 3)
    moment = counts.moment(table.T)
    p = counts.weights
    assert p.sum() == pytest.approx(1.0)
    assert p.min() > 0
    assert moment.rows == 200
    # Sums of `size` products in float64.
    np.testing.assert_allclose(moment.mean, p @ table, rtol=0, atol=1e-13 * np.abs(table).max())
    np.testing.assert_allclose(moment.uncentred, (table.T * p) @ table, rtol=1e-12)


@pytest.mark.parametrize("shape", [(), (L,), (4, L), (4, 2, L)])
def test_ids_are_counted_by_sample_as_the_model_runs(shape: tuple[int, ...]):
    dims = ",".join(f"d{k}" for k in range(len(shape)))
    given = f"int32[{dims}] ids" if shape else "int32 ids"
    proto = model(
        f"({given}) => (float[...] y)".replace("[...]", ""),
        "i = Neg(ids) y = Gather(T, i)",
        T=TABLE,
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    generator = np.random.default_rng(6)
    feeds = [{"ids": generator.integers(1, V, shape, np.int32)} for _ in range(3)]
    graph = index(proto)
    (use,) = table_site(proto).uses
    data = open_data(feeds, graph.store.inputs)
    found = collect(
        graph, [use.inputs], data, range(len(data)), CPU, batch=4, progress=lambda *_: None
    )
    (counts,) = found.tokens.values()
    assert not found.moments
    expected = np.concatenate([-f["ids"].ravel() for f in feeds])
    np.testing.assert_array_equal(counts.counts, np.bincount(expected % V, minlength=V))
    assert counts.samples == sum(shape[0] if shape else 1 for _ in feeds)


# --- which tables -------------------------------------------------------------------------------

SMALL = noise(72, N, N).astype(np.float32)
LEFT = {
    "as_many_features_as_rows": ("y = Gather(S, ids)", "has no more rows than features"),
    "columns": ("y = Gather<axis=1>(T, ids)", "it picks columns of the table [60, 8], not rows"),
    "three_dimensions": ("y = Gather(D, ids)", "the table [2, 4, 8] has more than two dimensions"),
}
NONE = {
    "vector": "y = Gather(B, ids)",
    "integers": "i = Gather(I, ids) y = Cast<to=1>(i)",
    "computed_table": "n = Neg(T) y = Gather(n, ids)",
    "constant_ids": "c = Gather(T, at) f = Cast<to=1>(ids) y = Add(c, f)",
    "shapes": "s = Shape(ids) h = Gather(s, zero) f = Cast<to=1>(h) y = Add(B, f)",
    "in_a_branch": (
        "y = If (f) <then_branch = one () => (float[a,8] p) {p = Gather(T, zero)},"
        " else_branch = two () => (float[a,8] q) {q = Identity(T)}>"
    ),
}


def of_body(body: str) -> onnx.ModelProto:
    held = {
        "T": TABLE,
        "S": SMALL,
        "D": noise(73, 2, 4, N).astype(np.float32),
        "B": TABLE[:, 0],
        "I": np.arange(3 * V).reshape(V, 3),
        "at": np.array([3, 5]),
        "zero": np.array([0]),
    }
    return model("(int64[l] ids, bool f) => (float y)", body, **held)


@pytest.mark.parametrize("case", LEFT)
def test_table_that_cannot_be_factored_is_left_with_a_reason(case: str):
    body, reason = LEFT[case]
    sites, skips = find_sites(index(of_body(body)))
    assert not sites
    assert [skip.op_type for skip in skips] == ["Gather"]
    assert reason in skips[0].reason


@pytest.mark.parametrize("case", NONE)
def test_gather_that_is_no_embedding_is_not_a_line_of_the_report(case: str):
    assert find_sites(index(of_body(NONE[case]))) == ((), ())


def test_table_that_is_not_asked_for_is_a_line():
    (skip,) = find_sites(index(of_body("y = Gather(T, ids)")), op_types=("MatMul",))[1]
    assert skip.op_type == "Gather"


def test_table_of_two_lookups_is_factored_once():
    body = (
        "a = Gather(T, ids) b = Gather(T, other) s = Add(a, b) t = Tanh(s)"
        " p = ReduceMean<axes=[1], keepdims=0>(t) y = MatMul(p, H)"
    )
    proto = model("(int64[b,l] ids, int64[b,l] other) => (float[b,4] y)", body, T=TABLE, H=HEAD)
    feeds = [
        a | {"other": b["ids"]} for a, b in zip(sentences(7, 10), sentences(8, 10), strict=True)
    ]
    result = compress(proto, feeds, CompressConfig(param_ratio=0.7))
    assert len(table_site(proto).uses) == 2
    assert ops(result.model).count("Gather") == 2
    assert [e.op_type for e in result.plan.factored] == ["Gather"]
    assert count_parameters(result.store) == result.plan.parameters_after
    expected, made = (run(proto, feeds[0])["y"] for proto in (proto, result.model))
    assert np.abs(made - expected).max() < np.abs(expected).max()


# --- tied tables ---------------------------------------------------------------------------------

# A language model in small: a table at both ends, and an MLP between them.
ENDS = {
    "transpose": "t = Transpose<perm=[1,0]>(T) y = MatMul(h, t)",
    "gemm": "f = Reshape(h, flat) y = Gemm<transB=1>(f, T)",
    "bias": "t = Transpose<perm=[1,0]>(T) z = MatMul(h, t) y = Add(z, b)",
    "left": "f = Reshape(h, flat) g = Transpose(f) z = MatMul(T, g) y = Transpose(z)",
}
LOW = (noise(79, V, 3) @ noise(80, 3, N) + 0.2 * TABLE).astype(np.float32)


def tied(end: str, body: str = "", **held: np.ndarray) -> onnx.ModelProto:
    start = "e = Gather(T, ids) a = MatMul(e, M) h = Tanh(a)"
    dims = "b,60" if "flat" in ENDS[end] else "b,l,60"
    given = {"T": LOW, "M": noise(81, N, N).astype(np.float32), "flat": np.array([-1, N])}
    given["b"] = noise(82, V).astype(np.float32)
    return model(
        f"(int64[b,l] ids) => (float[{dims}] y)", f"{start} {ENDS[end]} {body}", **given | held
    )


def only_tied(ratio: float, **options: object) -> CompressConfig:
    chosen = {"include": ("T", "e", "y", "z"), "param_ratio": ratio}
    return CompressConfig(**chosen | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("end", ENDS)
def test_tied_table_is_factored_once_for_both_its_readers(end: str):
    proto, feeds = tied(end), sentences(23, 40, range(V))
    result = compress(proto, feeds, only_tied(0.8))
    factored = {e.op_type: e for e in result.plan.factored}
    assert factored.keys() == {"Gather", "Gemm" if end == "gemm" else "MatMul"}
    (rank,) = {e.rank for e in factored.values()}
    shapes = [a.shape for n, a in constants(result.model).items() if n.startswith("T/")]
    assert sorted(s for s in shapes if len(s) == 2) == sorted([(V, rank), (rank, N)])
    assert "T" not in constants(result.model)
    assert count_parameters(result.store) == result.plan.parameters_after
    assert count_parameters(result.store) <= 0.8 * count_parameters(ModelStore.load(proto))
    onnx.checker.check_model(result.model, full_check=True)
    replayed = compress(proto, feeds, plan=result.plan)
    assert replayed.model.SerializeToString() == result.model.SerializeToString()


def test_tied_factors_are_one_table_at_both_ends():
    proto = tied("transpose")
    result = compress(proto, sentences(24, 40, range(V)), only_tied(0.8))
    held = constants(result.model)
    ((a, b),) = [[held[n] for n in ("T/right", "T/left")]]
    assert ops(result.model).count("Transpose") == 2
    head = [n for n in result.model.graph.node if n.op_type == "MatMul"][-2:]
    turned = {n.output[0]: n.input[0] for n in result.model.graph.node if n.op_type == "Transpose"}
    assert [turned[n.input[1]] for n in head] == ["T/left", "T/right"]
    # As near to the table as P of that rank can be, about: of its energy 3 directions hold most.
    assert np.linalg.norm(a @ b - LOW) < 0.3 * np.linalg.norm(LOW)


def test_tied_loss_is_predicted():
    result = compress(tied("transpose"), sentences(25, 60, range(V)), only_tied(0.8, refit=False))
    assert result.quality is not None
    assert result.quality.divergence is not None
    assert result.plan.predicted_divergence is not None
    ratio = result.quality.divergence.mean / result.plan.predicted_divergence
    assert 1 / 3 < ratio < 3


def test_tied_table_is_left_where_that_pays():
    # Of full rank; the MLP is not.
    generator = np.linalg.qr(noise(83, V, N))[0].astype(np.float32)
    thin = (noise(84, N, 1) @ noise(85, 1, 40)).astype(np.float32)
    body = "h1 = MatMul(e, A) h2 = Tanh(h1) h = MatMul(h2, B) t = Transpose<perm=[1,0]>(T)"
    proto = model(
        "(int64[b,l] ids) => (float[b,l,60] y)",
        f"e = Gather(T, ids) {body} y = MatMul(h, t)",
        T=10 * generator,
        A=thin,
        B=noise(86, 40, N).astype(np.float32),
    )
    feeds = sentences(26, 40, range(V))
    result = compress(proto, feeds, CompressConfig(param_ratio=0.8))
    entries = {e.op_type + e.site: e for e in result.plan.entries}
    assert entries["GatherT@e"].rank is None
    assert "T" in constants(result.model)


def of_rows(width: int, seed: int) -> Sensitivity:
    """What 400 rows with a spectrum of their own, and gradients with another, show."""
    scale = 2.0 ** -np.arange(width)
    gradients = noise(seed, 400, width) * scale @ np.linalg.qr(noise(seed + 1, width, width))[0]
    rows = noise(seed + 2, 400, width) * scale @ np.linalg.qr(noise(seed + 3, width, width))[0]
    gamma = gradients.T @ gradients
    return Sensitivity(moment=SecondMoment.of(rows), gamma=gamma, samples=400, decisions=4000)


def test_tied_basis_loses_what_it_says_and_less_than_those_of_the_ends():
    graph = index(tied("bias"))
    ((table, head),) = find_tied(graph, find_sites(graph)[0])
    ends = [
        two_sided_site(site, site_matrix(graph, site), of_rows(N, 90 + 10 * k), 0)
        for k, site in enumerate((table, head))
    ]
    both = tie(*ends)
    assert [one.site.tied for one in both] == [head.key, table.key]
    assert [one.site.freed for one in both] == [True, False]
    np.testing.assert_allclose(both[0].found.expand, both[1].found.reduce.T)
    np.testing.assert_allclose(both[0].found.reduce, both[1].found.expand.T)

    def lost(end: TwoSidedSite, kept: np.ndarray) -> float:
        gone = np.eye(N) - kept
        return float(np.trace(end.gamma @ gone @ end.moment.covariance @ gone.T)) / 2

    separate: list[list[float]] = []
    together: list[float] = []
    highest = [0.0, 0.0]  # of all larger ranks too: no rank is taken for worse than a lower one
    for rank in range(N, -1, -1):
        kept = both[1].found.kept(rank)
        losses = [lost(ends[0], kept.T), lost(ends[1], kept)]
        highest = [max(pair) for pair in zip(highest, losses, strict=True)]
        scale = 1e-9 * max(one.errors[0] for one in both)
        np.testing.assert_allclose([one.errors[rank] for one in both], highest, rtol=0, atol=scale)
        if 0 < rank < N:
            own = [ends[0].found.kept(rank).T, ends[1].found.kept(rank)]
            separate.append([lost(ends[0], p.T) + lost(ends[1], p) for p in own])
            together.append(sum(losses))
    # By far better than the basis of either end, where the two have nothing in common.
    assert np.log(together).mean() < np.log(separate).mean(0).min() - 1


def test_tied_basis_is_the_same_in_any_unit_of_the_loss():
    graph = index(tied("bias"))
    ((table, head),) = find_tied(graph, find_sites(graph)[0])
    kept = []
    for unit in (1.0, 1e4):
        ends = []
        for k, site in enumerate((table, head)):
            seen = of_rows(N, 90 + 10 * k)
            seen = replace(seen, gamma=unit * seen.gamma)
            ends.append(two_sided_site(site, site_matrix(graph, site), seen, 0))
        _, both = tie(*ends)
        kept.append([both.found.kept(rank) for rank in range(N)])
    np.testing.assert_allclose(kept[0], kept[1], rtol=0, atol=1e-6)


def test_tied_ends_both_make_up_for_their_mean():
    config = only_tied(0.8, refit=False)
    result = compress(tied("bias"), sentences(24, 40, range(V)), config)
    assert [e.bias for e in result.plan.factored] == [True, True]
    held = constants(result.model)
    assert np.abs(held["b_1"] - constants(tied("bias"))["b"]).max() > 1e-3
    assert np.abs(held["T/bias"]).max() > 1e-3


def test_tied_table_of_which_one_token_came_is_factored():
    feeds = [{"ids": np.full((4, L), 7)} for _ in range(20)]
    result = compress(tied("transpose"), feeds, only_tied(0.8))
    assert len({e.rank for e in result.plan.factored}) == 1
    assert "T" not in constants(result.model)


def test_tied_ends_are_measured_together_where_memory_is_short():
    # Half of the budget is for sums: those of a weight and its gradients, [80, 80] each, of two
    # halves of the samples, take 200 KiB. There are three weights.
    proto = model(
        "(int64[b,l] ids) => (float[b,l,200] y)",
        "e = Gather(T, ids) a = MatMul(e, M) h = Tanh(a) t = Transpose<perm=[1,0]>(T)"
        " y = MatMul(h, t)",
        T=(noise(87, 200, 5) @ noise(88, 5, 80)).astype(np.float32),
        M=noise(89, 80, 80).astype(np.float32) / 9,
    )
    config = CompressConfig(param_ratio=0.6, memory_budget=2**20)
    result = compress(proto, sentences(31, 10, range(200)), config)
    assert any("passes over the samples" in note for note in result.notes)
    assert [e.op_type for e in result.plan.entries] == ["Gather", "MatMul", "MatMul"]
    assert "T" not in constants(result.model)


def test_tied_ranks_that_differ_are_refused():
    proto, feeds = tied("transpose"), sentences(27, 40)
    plan = compress(proto, feeds, only_tied(0.8), dry_run=True).plan
    entries = tuple(
        replace(e, rank=e.rank + 1) if e.op_type == "MatMul" and e.rank else e for e in plan.entries
    )
    with pytest.raises(ModelError, match=r"share one weight: it cannot be of rank \d and \d"):
        compress(proto, feeds, plan=replace(plan, entries=entries))


@pytest.mark.parametrize(
    ("body", "other"),
    [
        ("u = Neg(T)", "Neg 'u'"),
        ("u = Identity(T) q = Abs(u)", "Abs 'q'"),
    ],
)
def test_table_with_a_reader_of_another_kind_is_left_and_that_is_named(body: str, other: str):
    plan = compress(tied("transpose", body), sentences(28, 20), only_tied(1.0), dry_run=True).plan
    assert not plan.factored
    reasons = {e.op_type: e.reason for e in plan.entries}
    assert f"factors would come on top of it (MatMul 'y', {other})" in reasons["Gather"]
    assert f"on top of it (Gather 'e', {other})" in reasons["MatMul"]


def test_table_that_is_an_output_too_is_left():
    proto = tied("transpose")
    proto.graph.output.append(onnx.helper.make_tensor_value_info("T", 1, [V, N]))
    plan = compress(proto, sentences(29, 20), only_tied(1.0), dry_run=True).plan
    assert not plan.factored


@pytest.mark.parametrize("method", ["one-sided", "svd"])
def test_tied_table_is_left_by_simpler_methods(method: str):
    config = only_tied(1.0, method=method)
    plan = compress(tied("gemm"), sentences(30, 20), config, dry_run=True).plan
    assert not plan.factored
    assert "factors would come on top of it (Gemm 'y')" in plan.entries[0].reason


# --- what is lost -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["one-sided", "utilized-rank"])
def test_predicted_error_is_that_of_tokens_as_often_as_they_are_expected(method: str):
    feeds = sentences(10, 12)
    config = CompressConfig(param_ratio=0.6, method=method, include=("T",))
    result = compress(pooled(), feeds, config)
    (entry,) = result.plan.factored
    assert "Gather" in ops(result.model)
    assert ops(result.model)[1] == "MatMul"
    chosen, _ = open_data(feeds, ModelStore.load(pooled()).inputs).split()
    p = counted([feeds[k] for k in chosen]).weights[:, None]
    lost = TABLE - rows_of(result.model, N)
    mean = np.sum(p * TABLE, 0) if method == "one-sided" else 0.0
    scale = feature_scale(np.sum(p * (TABLE - mean) ** 2, 0)) if method == "one-sided" else 1.0
    relative = np.sum(p * (lost / scale) ** 2) / np.sum(p * ((TABLE - mean) / scale) ** 2)
    assert entry.trusted
    # Factors, products and the bias are rounded: their errors are relative to the rows.
    rounding = 4 * np.finfo(np.float32).eps * math.sqrt(N)
    assert relative == pytest.approx(entry.predicted_error, rel=100 * float(rounding))


def test_frequent_tokens_are_kept_better_than_rare_ones():
    often, seldom = range(V // 2), range(V // 2, V)
    drawn = [*often] * 20 + [*seldom]
    config = CompressConfig(param_ratio=0.5, method="one-sided", include=("T",))
    table = TABLE.copy()
    table[: V // 2, N // 2 :] *= 0.1  # each half has directions of its own
    table[V // 2 :, : N // 2] *= 0.1
    made = compress(pooled(table), sentences(11, 50, drawn), config)
    lost = np.square(table - rows_of(made.model, N)).sum(1) / np.square(table).sum(1)
    assert np.median(lost[: V // 2]) < 0.1 < np.median(lost[V // 2 :])


def apart() -> np.ndarray:
    """A table whose second half of tokens has directions that the first half does not."""
    table = np.zeros((V, N), np.float32)
    table[: V // 2, : N // 2] = TABLE[: V // 2, : N // 2]
    table[V // 2 :, N // 2 :] = TABLE[V // 2 :, N // 2 :]
    return table


@pytest.mark.parametrize("method", [None, "one-sided"])
def test_tokens_never_seen_are_not_destroyed(method: str | None):
    # There is room for 6 of 8 directions; the tokens that are seen have 4.
    config = CompressConfig(param_ratio=0.95, method=method, include=("T",), force=True)
    result = compress(pooled(apart()), sentences(12, 12), config)
    (entry,) = result.plan.factored
    assert entry.rank is not None
    assert N // 2 < entry.rank < N
    lost = np.square(apart() - rows_of(result.model, N)).sum(1) / np.square(apart()).sum(1)
    assert np.median(lost[V // 2 :]) < 0.75  # all of it, if they had no say


def test_loss_of_tokens_never_seen_is_predicted():
    config = CompressConfig(param_ratio=0.6, method="one-sided", include=("T",))
    result = compress(pooled(apart()), sentences(13, 12), config)
    (entry,) = result.plan.factored
    assert entry.rank == N // 2  # all that the tokens seen have
    counts = counted(sentences(13, 12))
    assert entry.predicted_error is not None
    assert entry.predicted_error > counts.unseen / 8


def test_two_sided_table_predicts_what_the_model_loses():
    table = (noise(74, V, 3) @ noise(75, 3, N) + 0.05 * TABLE).astype(np.float32)
    feeds = sentences(14, 40, range(V))
    result = compress(pooled(table), feeds, CompressConfig(param_ratio=0.6))
    assert [e.op_type for e in result.plan.factored] == ["Gather"]
    assert result.quality is not None
    assert result.quality.divergence is not None
    assert result.plan.predicted_divergence is not None
    ratio = result.quality.divergence.mean / result.plan.predicted_divergence
    assert 1 / 3 < ratio < 3


def test_padding_does_not_count():
    body = (
        "e = Gather(T, ids) f = Cast<to=1>(mask) u = Unsqueeze(f, last) k = Mul(e, u) s = Tanh(k)"
        " p = ReduceSum(s, one) q = Squeeze(p, one) y = MatMul(q, H)"
    )
    held = {"T": TABLE, "H": HEAD, "last": np.array([2]), "one": np.array([1])}
    proto = model("(int64[b,l] ids, int64[b,l] mask) => (float[b,4] y)", body, **held)
    feeds = [f | {"mask": (np.arange(L) < 4) * np.ones((4, 1), int)} for f in sentences(15, 20)]
    plan = compress(proto, feeds, CompressConfig(param_ratio=0.8), dry_run=True).plan
    (entry,) = (e for e in plan.entries if e.op_type == "Gather")
    chosen, _ = open_data(feeds, ModelStore.load(proto).inputs).split()
    assert entry.rows == sum(int(feeds[k]["mask"].sum()) for k in chosen)


def test_positions_are_a_table_too():
    body = (
        "e = Gather(T, ids) s = Shape(ids) l = Gather(s, one) r = Range(zero, l, step)"
        " q = Gather(P, r) h = Add(e, q) t = Tanh(h) p = ReduceMean<axes=[1], keepdims=0>(t)"
        " y = MatMul(p, H)"
    )
    held = {"P": noise(76, 40, N).astype(np.float32), "one": np.array(1)}
    held |= {"zero": np.array(0), "step": np.array(1), "T": TABLE, "H": HEAD}
    proto = model(SENTENCES, body, **held)
    feeds = sentences(16, 20)
    result = compress(proto, feeds, CompressConfig(param_ratio=0.8, include=("P", "T")))
    tables = {e.site: e for e in result.plan.entries}
    assert set(tables) == {"P", "T"}
    assert not any(s.op_type == "Gather" for s in result.plan.skipped)
    longer = {"ids": np.zeros((2, 30), int)}  # positions that no sample had
    assert np.isfinite(run(result.model, longer)["y"]).all()


# --- the pipeline -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["two-sided", "one-sided", "utilized-rank", "svd"])
def test_every_method_factors_a_table(method: str):
    feeds = sentences(17, 40)
    result = compress(pooled(), feeds, CompressConfig(param_ratio=0.6, method=method))
    assert "Gather" in {e.op_type for e in result.plan.factored}
    assert count_parameters(result.store) <= 0.6 * count_parameters(ModelStore.load(pooled()))
    replayed = compress(pooled(), feeds, plan=result.plan)
    for name, held in constants(result.model).items():
        np.testing.assert_array_equal(constants(replayed.model)[name], held)


def test_half_precision_stays():
    proto = model(
        SENTENCES.replace("float", "float16"),
        POOLED,
        T=TABLE.astype(np.float16),
        H=HEAD.astype(np.float16),
    )
    made = compress(proto, sentences(18, 20), CompressConfig(param_ratio=0.7, include=("T",)))
    assert made.plan.factored
    assert {a.dtype for a in constants(made.model).values()} == {np.dtype(np.float16)}


def test_table_takes_no_operations_and_its_factors_do():
    proto = pooled()
    feeds = sentences(19, 20)
    job = Job.open(proto, feeds, CompressConfig(), lambda *_: None)
    (site,) = (s for s in job.sites if s.one_hot)
    ledger = make_ledger(job, "operations", job.sites, range(8))
    assert ledger.dense(site) == 0
    plan = compress(proto, feeds, CompressConfig(flop_ratio=0.9), dry_run=True).plan
    assert "Gather" not in {e.op_type for e in plan.factored}
    made = compress(proto, feeds, CompressConfig(param_ratio=0.7, include=("T",)))
    (entry,) = made.plan.factored
    assert entry.rank is not None
    grown = made.validation.candidate.flops - made.validation.reference.flops
    assert grown == 2 * feeds[0]["ids"].size * entry.rank * N


def test_analyze_tells_how_many_features_tokens_use():
    table = (noise(77, V, 3) @ noise(78, 3, N)).astype(np.float32)
    report = analyze(pooled(table), sentences(20, 20), AnalyzeConfig(energy=0.9999))
    (layer,) = (x for x in report.layers if x.op_type == "Gather")
    assert (layer.m, layer.d, layer.input_rank, layer.output_rank) == (N, V, V, 3)


def test_refit_leaves_tables_as_they_were_measured():
    feeds = sentences(21, 40)
    config = CompressConfig(param_ratio=0.6)
    made = [
        compress(pooled(), feeds, config),
        compress(pooled(), feeds, CompressConfig(param_ratio=0.6, refit=False)),
    ]
    tables = [{k: v for k, v in constants(r.model).items() if k.startswith("T")} for r in made]
    assert tables[0].keys() == tables[1].keys()
    for name, held in tables[0].items():
        np.testing.assert_array_equal(tables[1][name], held)


def test_features_between_a_table_and_its_reader_do_not_shrink():
    proto = model(
        SENTENCES,
        "e = Gather(T, ids) s = Relu(e) q = MatMul(s, H) y = ReduceMean<axes=[1], keepdims=0>(q)",
        T=TABLE,
        H=HEAD,
    )
    plan = compress(proto, sentences(22, 20), CompressConfig(param_ratio=0.7), dry_run=True).plan
    assert not plan.hidden
