"""Taps against numpy on the very rows, strides, and values that are not finite."""

import itertools
import re
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from builders import FORMS, Feed, Form, activations, conv, index, model, noise, right

from onnx_utilrank import AnalyzeConfig, CompressConfig, ModelError, analyze, compress
from onnx_utilrank.calibration.collect import Collected, collect, usable_batch
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.calibration.survey import expose, linear_flops, survey
from onnx_utilrank.calibration.taps import insert_taps, row_stride, view_rows
from onnx_utilrank.measurement import rows_notes
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.method import site_moment
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sites.find import find_sites
from onnx_utilrank.sites.site import RowView, Use
from onnx_utilrank.statistics.moments import SecondMoment


def gather(index: GraphIndex, views: Sequence[RowView], feeds: list[Feed]) -> Collected:
    data = open_data(feeds, index.store.inputs)
    return collect(index, views, data, range(len(data)), CPU, batch=32, progress=lambda *_: None)


def tapped(
    proto: onnx.ModelProto, view: RowView, feeds: list[Feed], stride: int
) -> tuple[SecondMoment, list[int], int]:
    """The moment with a chosen stride, the rows of each run, and the stride that was stated."""
    store = ModelStore.load(proto)
    observed = survey(store, [view.tensor], feeds[0], CPU)
    made = insert_taps(store, [view], observed, {view: stride})
    (tap,) = made.taps
    session = open_session(made.store, CPU)
    moment, counts = SecondMoment.zero(view.width), []
    for k, feed in enumerate(feeds):
        values = session.run(feed | {n: np.array([k % s]) for s, n in made.phases.items()})
        counts.append(int(values[tap.matrix][tap.row_axis]))
        outer, total = values[tap.outer], values[tap.total]
        moment.add(outer=outer, total=total, rows=counts[-1], shift=tap.shift)
    return moment, counts, tap.stride


def assert_moments_of(rows: np.ndarray, moment: SecondMoment, dtype: np.dtype) -> None:
    """Equal up to the rounding of a float32 sum over the rows, where they are not float64."""
    assert moment.rows == len(rows)
    eps = np.finfo(np.float64 if dtype == np.float64 else np.float32).eps
    if dtype == np.float16:
        eps = np.finfo(np.float16).eps
    squares = float(np.square(rows).sum(0).max())
    sums = float(np.abs(rows).sum(0).max())
    bound = 4 * eps * np.sqrt(len(rows))
    np.testing.assert_allclose(moment.outer, rows.T @ rows, rtol=0, atol=bound * squares)
    np.testing.assert_allclose(moment.total, rows.sum(0), rtol=0, atol=bound * sums)


# --- the very rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_taps_give_the_moments_of_the_rows(form: Form):
    graph, feeds = index(form.proto), form.data()
    (site,), _ = find_sites(graph)
    (use,) = site.uses
    views = [use.inputs, *([use.outputs] if use.outputs else [])]
    collected = gather(graph, views, feeds)
    assert set(collected.strides.values()) == {1}
    x = form.all_rows(feeds)
    assert_moments_of(x, collected.moments[use.inputs], form.dtype)
    if use.outputs:
        own = use.bias.values(graph, site.m) if use.bias.kind == "input" else np.zeros(site.m)
        moment = site_moment(site, "outputs", collected.moments, {use.node: own})
        assert_moments_of(x @ form.weight.T, moment, form.dtype)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_flops_are_two_a_multiplication(form: Form):
    feed = form.data()[0]
    flops = linear_flops(ModelStore.load(form.proto), feed, CPU)
    rows = len(form.rows(feed))
    if "conv_transpose" in form.name:  # whose rows are full of zeros that cost nothing
        rows = feed["x"].size // feed["x"].shape[1]
    assert flops == 2 * rows * form.weight.size


def test_flops_of_a_sparse_weight_are_those_of_a_dense_one():
    proto = model("(float[n,4] x) => (float[n,3] y)", "y = MatMul(x, W)")
    values = onnx.numpy_helper.from_array(np.ones(2, np.float32), "W")
    at = onnx.numpy_helper.from_array(np.array([1, 5]), "W_at")
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, at, [4, 3]))
    assert linear_flops(ModelStore.load(proto), {"x": np.ones((5, 4), np.float32)}, CPU) == 120


def test_tensors_that_are_read_twice_have_one_moment():
    body = "a = MatMul(x, Q) b = MatMul(x, K) y = Concat<axis=-1>(a, b)"
    weights = {name: noise(8, 3, 4).astype(np.float32) for name in ("Q", "K")}
    graph = index(model("(float[n,3] x) => (float[n,8] y)", body, **weights))
    sites, _ = find_sites(graph)
    views = [site.uses[0].inputs for site in sites]
    assert len(views) == 2
    collected = gather(graph, views, [{"x": np.ones((9, 3), np.float32)}])
    assert [m.rows for m in collected.moments.values()] == [9]


def test_shift_keeps_the_covariance_of_values_far_from_zero():
    feeds = [{"x": (1000 + noise(k, 200, 7)).astype(np.float32)} for k in range(5)]
    (site,), _ = find_sites(graph := index(right(2).proto))
    view = site.uses[0].inputs
    moment = gather(graph, [view], feeds).moments[view]
    exact = SecondMoment.of(np.concatenate([feed["x"] for feed in feeds]))
    # Without it, rounding alone would be 1000² · 2⁻²⁴ = 0.06.
    np.testing.assert_allclose(moment.covariance, exact.covariance, rtol=0, atol=1e-4)


def test_taps_avoid_the_names_of_the_model():
    kinds = ("reshape", "constant", "sub", "transpose", "matmul", "reducesum", "shape")
    # Taps are numbered from how many names there are: here some more than 280.
    taken = [f"utilrank_{kind}_{k}" for kind in kinds for k in range(280, 320)]
    chain = " ".join(f"{b} = Identity({a})" for a, b in itertools.pairwise(["x", *taken]))
    body = f"{chain} y = MatMul({taken[-1]}, W)"
    proto = model("(float[n,7] x) => (float[n,5] y)", body, W=right(2).weight.T.astype(np.float32))
    (site,), _ = find_sites(graph := index(proto))
    feeds = right(2).data()
    view = site.uses[0].inputs
    rows = right(2).all_rows(feeds)
    assert_moments_of(rows, gather(graph, [view], feeds).moments[view], np.dtype(np.float32))


def test_survey_gives_inputs_and_inner_values_and_nothing_else():
    store = ModelStore.load(model("(float[n] x) => (float[n] y)", "h = Neg(x) y = Neg(h)"))
    before = store.proto.SerializeToString(deterministic=True)
    x = np.ones(3, np.float32)
    assert list(survey(store, ["x"], {"x": x}, CPU)) == ["x"]
    assert survey(store, ["h", "y"], {"x": x}, CPU)["h"].tolist() == [-1] * 3
    assert [o.name for o in expose(store, ["h", "y"]).proto.graph.output] == ["y", "h"]
    assert store.proto.SerializeToString(deterministic=True) == before


# --- batches ------------------------------------------------------------------------------------


def batch_of(body: str, x: np.ndarray, **initializers: np.ndarray) -> int:
    graph = index(model("(float[n,4] x) => (float[k,4] y)", body, **initializers))
    data = open_data({"x": x}, graph.store.inputs)
    return usable_batch(open_session(graph.store, CPU), data)


def test_batch_is_one_where_the_model_only_claims_that_it_is_free(caplog):
    x, shape = np.ones((8, 4), np.float32), np.array([1, 4])
    assert batch_of("y = Neg(x)", x) == 32
    assert not caplog.records
    assert batch_of("y = Reshape(x, s)", x, s=shape) == 1
    assert "one sample at a time" in caplog.text


def test_model_that_runs_on_no_batch_is_an_error():
    with pytest.raises(ModelError, match="ONNX Runtime"):
        batch_of("y = Reshape(x, s)", np.ones((8, 4), np.float32), s=np.array([3, 4]))


# --- strides ------------------------------------------------------------------------------------

STRIDED = [
    *(f for f in FORMS if f.name in ("matmul_right_x1", "matmul_right_x2", "matmul_right_x3")),
    *(f for f in FORMS if f.name in ("matmul_left_x2", "matmul_left_x3", "matmul_left_x4")),
    *(f for f in FORMS if f.name in ("gemm_right_00", "gemm_right_10", "gemm_left_01")),
    *(f for f in FORMS if f.name in ("conv1d_pointwise", "conv2d_pointwise", "conv2d_same_upper")),
]


def only_use(form: Form) -> Use:
    (site,), _ = find_sites(index(form.proto))
    return site.uses[0]


@pytest.mark.parametrize("form", STRIDED, ids=str)
@pytest.mark.parametrize("stride", [2, 3, 50])
def test_runs_of_rotating_phase_see_every_row_once(form: Form, stride: int):
    feed = form.data()[0]
    moment, counts, stated = tapped(form.proto, only_use(form).inputs, [feed] * stride, stride)
    assert stated == stride
    assert_moments_of(form.rows(feed).astype(np.float64), moment, form.dtype)
    assert max(counts) < len(form.rows(feed)) or len(form.rows(feed)) == 1


@pytest.mark.parametrize(
    ("sizes", "kernel", "stride", "each"),
    [
        ((30,), (3,), 5, 5),
        ((12, 13), (3, 3), 4, 2),
        ((12, 13), (3, 3), 11, 3),
        ((7, 6, 5), (2,) * 3, 8, 2),
    ],
)
def test_patches_are_thinned_along_every_axis(sizes, kernel, stride, each):
    plain = conv("", sizes, kernel)
    coarse = conv("", sizes, kernel, strides=(each,) * len(kernel))
    feeds = plain.data()
    moment, _, stated = tapped(plain.proto, only_use(plain).inputs, feeds, stride)
    assert stated == each ** len(kernel)
    assert_moments_of(coarse.all_rows(feeds), moment, plain.dtype)


@pytest.mark.parametrize(
    ("auto_pad", "before", "after"),
    [("SAME_UPPER", (0, 1), (1, 1)), ("SAME_LOWER", (1, 1), (0, 1))],
)
def test_patches_that_pad_themselves_are_thinned_too(auto_pad, before, after):
    plain = conv("", (12, 13), (2, 3), auto_pad=auto_pad)
    coarse = conv("", (12, 13), (2, 3), strides=(2, 2), pads=(before, after))
    feeds = plain.data()
    moment, _, stated = tapped(plain.proto, only_use(plain).inputs, feeds, 4)
    assert stated == 4
    assert_moments_of(coarse.all_rows(feeds), moment, plain.dtype)


@pytest.mark.parametrize("opset", [7, 9])
def test_before_slice_had_steps_all_rows_count(opset: int):
    form = right(2, opset=opset)
    feeds = form.data()
    moment, _, stated = tapped(form.proto, only_use(form).inputs, feeds, 4)
    assert stated == 1
    assert_moments_of(form.all_rows(feeds), moment, form.dtype)


def test_tensors_with_many_rows_are_strided_and_the_report_says_so():
    feeds = [{"x": activations(k, 4096, 7).astype(np.float32)} for k in range(8)]
    for feed in feeds:
        feed["x"][:, 0] = np.arange(4096) % 4
    graph = index(right(2).proto)
    (site,), _ = find_sites(graph)
    view = site.uses[0].inputs
    collected = gather(graph, [view], feeds)
    assert collected.strides[view] == 4
    moment = collected.moments[view]
    assert moment.rows == 8192
    full = SecondMoment.of(np.concatenate([feed["x"] for feed in feeds]))
    assert moment.mean[0] == pytest.approx(1.5)  # not always the same rows of a run
    # Var(x_i x_j) of these values is below 15; entries are averages of 8,192 of them.
    deviation = np.sqrt(15 / 8192)
    assert np.abs(moment.uncentred - full.uncentred).max() < 4 * deviation
    report = analyze(right(2).proto, feeds, AnalyzeConfig())
    assert [layer.rows for layer in report.layers] == [8192]
    assert any(re.search(r"\brows?\b.*\b4\b", note) for note in report.notes)


@pytest.mark.parametrize(
    "body", ["y = MatMul(x, W)", "t = Transpose<perm=[0,2,1]>(x) y = MatMul(V, t)"]
)
def test_runs_with_fewer_rows_than_the_stride_are_fine(body: str):
    weight = noise(9, 5, 7).astype(np.float32)
    proto = model("(float[b,n,7] x) => (float[b,k,l] y)", body, W=weight.T, V=weight)
    (site,), _ = find_sites(index(proto))
    lengths = [40, 1, 2, 3, 1, 5, 1, 1]
    feeds = [{"x": activations(k, 1, n, 7).astype(np.float32)} for k, n in enumerate(lengths)]
    moment, counts, _ = tapped(proto, site.uses[0].inputs, feeds, 8)
    picked = [feed["x"][0, k % 8 :: 8] for k, feed in enumerate(feeds)]
    assert counts == [len(rows) for rows in picked]
    assert 0 in counts
    rows = np.concatenate(picked).astype(np.float64)
    assert_moments_of(rows, moment, np.dtype(np.float32))


@pytest.mark.parametrize("width", [1, 64, 1024])
def test_stride_leaves_rows_enough_over_all_and_in_each_run(width: int):
    for rows, runs in itertools.product([1, 10**4, 10**6, 10**8], [1, 7, 1000, 10**5]):
        stride = row_stride(rows, rows // runs, width)
        assert stride >= 1
        if stride > 1:
            assert rows // stride >= max(16 * width, 8192)
            assert rows // runs // stride >= 4


@pytest.mark.parametrize("form", [f for f in FORMS if "conv" not in f.name], ids=str)
def test_rows_of_a_view_are_counted_from_its_shape(form: Form):
    feed = form.data()[0]
    view = only_use(form).inputs
    shape = survey(index(form.proto).store, [view.tensor], feed, CPU)[view.tensor].shape
    assert view_rows(view, shape) == len(form.rows(feed))


# --- values that are not finite -----------------------------------------------------------------

SQUARE = {name: noise(10, 4, 4).astype(np.float32) for name in ("W", "V")}
ZERO = {"zero": np.zeros(1, np.float32)}
BROKEN = SQUARE["W"].copy()
BROKEN[1, 2] = np.nan
MASKED = "bad = IsNaN(h) y = Where(bad, zero, h)"


@pytest.mark.parametrize(
    ("body", "constants", "named"),
    [
        ("l = Log(x) h = MatMul(l, W) y = MatMul(h, V)", SQUARE, ("Log 'l'", "'y'")),
        ("[inner] l = Log(x) y = MatMul(l, W)", SQUARE, ("Log 'inner'", "value 'l'")),
        ("z = Sub(x, x) q = Div(z, z) y = MatMul(q, W)", SQUARE, ("Div 'q'",)),
        ("z = Sub(x, x) q = Div(x, z) y = Add(q, x) h = MatMul(x, W)", SQUARE, ("Div 'q'",)),
        ("h = MatMul(x, W) y = MatMul(h, V)", SQUARE | {"W": BROKEN}, ("MatMul 'h'",)),
        ("h = MatMul(x, W) y = Log(h)", SQUARE, ("Log 'y'", "output 'y'")),
        # What never reaches an output is found by the taps.
        (f"l = Log(x) h = MatMul(l, W) {MASKED}", SQUARE | ZERO, ("value 'l'", "Log 'l'")),
    ],
)
@pytest.mark.parametrize(
    ("verb", "config"),
    [
        (analyze, AnalyzeConfig()),
        (compress, CompressConfig(param_ratio=0.7, method="one-sided")),
    ],
)
def test_values_that_are_not_finite_are_errors_that_name_the_node(
    body, constants, named, verb, config
):
    proto = model("(float[n,4] x) => (float[n,4] y)", body, **constants)
    feeds = [{"x": noise(k, 9, 4).astype(np.float32)} for k in range(5)]
    with pytest.raises(ModelError) as caught:
        verb(proto, feeds, config)
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in named)


def test_squares_that_overflow_are_an_error():
    feeds = [{"x": np.full((9, 7), sign * 1e30, np.float32)} for sign in (1, -1)]
    with pytest.raises(ModelError, match=r"'x' at the graph input .* overflow float32"):
        analyze(right(2).proto, feeds)


def test_infinities_of_a_mask_are_no_error():
    body = "h = MatMul(x, W) m = Add(h, mask) p = Softmax(m) y = MatMul(p, V)"
    mask = np.array([0, 0, -np.inf, 0], np.float32)
    proto = model("(float[n,4] x) => (float[n,4] y)", body, **SQUARE, mask=mask)
    report = analyze(proto, [{"x": noise(k, 9, 4).astype(np.float32)} for k in range(5)])
    assert len(report.layers) == 2


def test_culprit_is_the_first_nan_not_the_infinities_before_it():
    body = "m = Add(x, mask) p = Softmax(m) q = Neg(p) l = Log(q) y = MatMul(l, W)"
    mask = np.array([0, 0, -np.inf, 0], np.float32)
    proto = model("(float[n,4] x) => (float[n,4] y)", body, W=SQUARE["W"], mask=mask)
    with pytest.raises(ModelError, match="begins at Log 'l', value 'l'"):
        analyze(proto, [{"x": noise(k, 9, 4).astype(np.float32)} for k in range(5)])


@pytest.mark.parametrize("method", ["svd", "one-sided"])
def test_weight_that_is_not_finite_is_left_alone_and_the_others_are_not(method: str):
    wide = noise(11, 8, 8).astype(np.float32)
    wide[0, 0] = np.inf
    proto = model(
        "(float[n,8] x) => (float[n,8] y)",
        """
            h = MatMul(x, W) i = IsInf(h) n = IsNaN(h) bad = Or(i, n) t = Where(bad, zero, h)
            y = MatMul(t, V)
        """,
        W=wide,
        V=noise(12, 8, 8).astype(np.float32),
        **ZERO,
    )
    feeds = [{"x": noise(k, 9, 8).astype(np.float32)} for k in range(5)]
    config = CompressConfig(param_ratio=0.8, method=method, moves=("low-rank",), force=True)
    result = compress(proto, feeds, config)
    assert [e.site for e in result.plan.factored] == ["V"]
    (skipped,) = result.plan.skipped
    assert (skipped.node, skipped.reason) == ("MatMul 'h'", "the weight holds NaN or infinity")


@pytest.mark.parametrize(
    ("strides", "expected"),
    [((1, 2, 2), "of those one row in 2 was used"), ((2, 5), "one row in 2 to one in 5 was used")],
)
def test_note_of_rows_left_out_names_how_many(strides: tuple[int, ...], expected: str):
    views = [RowView(tensor=str(k), axis=1, width=4) for k in range(len(strides))]
    (note,) = rows_notes({"w": (100, True)}, dict(zip(views, strides, strict=True)))
    assert expected in note
