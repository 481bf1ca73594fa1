"""Regressions with known answers, and refitted layers against those that were not."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from builders import Feed, activations, index, model, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_utilrank import CompressConfig, compress
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.two_sided import TwoSidedSite, two_sided_site
from onnx_utilrank.refit.layer import Layer, Refitted
from onnx_utilrank.refit.propagate import propagate
from onnx_utilrank.refit.regression import RIDGES, CrossMoment, regression
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sites.find import find_sites, site_matrix
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.padding import Padding
from onnx_utilrank.statistics.sensitivity import Sensitivity
from onnx_utilrank.surgery.rewrite import Replacement, rewrite
from onnx_utilrank.torch_graph.graph import TorchGraph

# A shared machine may stall for longer than any deadline.
law = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**32 - 1)
EPS = float(np.finfo(np.float32).eps)


def quiet(*progress: object) -> None:
    del progress


def halves(y: np.ndarray, x: np.ndarray) -> tuple[CrossMoment, CrossMoment]:
    made = (CrossMoment.zero(y.shape[1]), CrossMoment.zero(y.shape[1]))
    for k, half in enumerate(made):
        half.add(y[k::2], x[k::2])
    return made


# --- regression ---------------------------------------------------------------------------------


@law
@given(seed=SEEDS, n=st.integers(2, 40), p=st.integers(1, 6))
def test_cross_moments_are_those_of_the_rows(seed, n, p):
    rng = np.random.default_rng(seed)
    y, x = rng.normal(size=(n, p)) + 2, rng.normal(size=(n, p)) - 1
    one, other = halves(y, x)
    whole = one + other
    assert whole.rows == n
    y, x = y - y.mean(0), x - x.mean(0)
    for made, expected in zip(whole.centred(), (y.T @ x, x.T @ x), strict=True):
        np.testing.assert_allclose(made, expected / n, rtol=0, atol=1e-12 * n)


@law
@given(seed=SEEDS, p=st.integers(1, 6))
def test_linear_map_is_found_where_there_are_rows(seed, p):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, p)) + rng.normal(size=p)
    true = np.eye(p) + rng.normal(size=(p, p))
    y = x @ true.T + rng.normal(size=p)  # an offset is the bias's business
    found = regression(halves(y, x), np.eye(p))
    # M = T + ρ (I − T)(S + ρ)⁻¹: nothing is left but the least ridge.
    s = np.cov(x.T, bias=True).reshape(p, p)
    ridge = RIDGES[0] * np.trace(s) / p
    slack = ridge / (np.linalg.eigvalsh(s)[0] + ridge) * np.linalg.norm(np.eye(p) - true, 2)
    # Ridges are told apart by squared errors: what is below the root of their rounding looks alike.
    rounding = math.sqrt(64 * np.finfo(np.float64).eps) * (1 + np.linalg.norm(true))
    assert np.linalg.norm(found - true, 2) <= slack + rounding


@pytest.mark.parametrize("rows", [0, 1, 12, 24])
def test_identity_where_rows_are_too_few(rows: int):
    p = 12
    for seed in range(5):
        x = noise(seed, rows, p)
        y = x + noise(seed + 50, rows, p)
        np.testing.assert_array_equal(regression(halves(y, x), np.eye(p)), np.eye(p))


@law
@given(seed=SEEDS, rows=st.integers(48, 200))
def test_noise_is_hardly_learnt_from(seed, rows):
    """Where the identity is right, what is fitted is no farther from it than least squares."""
    rng, p = np.random.default_rng(seed), 6
    x = rng.normal(size=(rows, p))
    found = regression(halves(x + rng.normal(size=(rows, p)), x), np.eye(p))
    # Least squares have p² coefficients of variance 1 / (n − p − 1), and their sum scatters.
    assert np.sum((found - np.eye(p)) ** 2) < 4 * p * p / (rows - p - 1)


def test_equal_rows_leave_the_identity():
    x = noise(1, 100, 5)
    np.testing.assert_allclose(regression(halves(x, x), np.eye(5)), np.eye(5), atol=1e-13)


def test_only_what_the_metric_sees_is_fitted():
    """Noise along a direction that counts nothing does not keep the rest from being learnt."""
    x = noise(1, 60, 3)
    true = np.diag([1.5, 0.5, 1.0])
    y = x @ true.T
    y[:, 2] += 50 * noise(2, 60)
    found = regression(halves(y, x), np.diag([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(found[:2], true[:2], atol=1e-3)


# --- layers -------------------------------------------------------------------------------------

D, H, C = 8, 6, 7
FIRST, SECOND = noise(1, H, D) / math.sqrt(D), noise(2, C, H) / math.sqrt(H)
CHAIN = "h = MatMul(x, W) t = Add(h, b) u = MatMul(t, V) y = Add(u, c)"


def two_layers(**weights: np.ndarray) -> onnx.ModelProto:
    given = {"W": FIRST.T, "V": SECOND.T, "b": noise(3, H), "c": noise(4, C)} | weights
    cast = {name: value.astype(np.float32) for name, value in given.items()}
    outputs = cast["V"].shape[1]
    signature = f"(float[n,p,{cast['W'].shape[0]}] x) => (float[n,p,{outputs}] y)"
    return model(signature, CHAIN, **cast)


def feeds(count: int = 12, width: int = D) -> list[Feed]:
    return [{"x": activations(k, 3, 5, width).astype(np.float32)} for k in range(count)]


def layer(graph: GraphIndex, weight: str, rank: int, rows: np.ndarray) -> Layer:
    """A layer whose outputs all count alike, known from the rows x that it gets."""
    (site,) = (s for s in find_sites(graph)[0] if s.weight == weight)
    w = site_matrix(graph, site)
    moment = SecondMoment.of(rows @ w.T if site.wide else rows)
    gamma = np.eye(site.m) if site.wide else w.T @ w
    known = Sensitivity(moment=moment, gamma=gamma, samples=1, decisions=10**9)
    measured = two_sided_site(site, w, known, 0)
    biases = {use.node: np.zeros(site.m) for use in site.uses}
    return Layer(measured=measured, weight=w, rank=rank, biases=biases, behind=np.zeros(site.m))


def layers(proto: onnx.ModelProto, runs: list[Feed], ranks: dict[str, int]) -> list[Layer]:
    graph = index(proto)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    x = np.concatenate([f["x"] for f in runs]).reshape(-1, runs[0]["x"].shape[-1])
    rows = {"W": x.astype(np.float64)}
    rows["V"] = rows["W"] @ held["W"] + held["b"]
    return [layer(graph, name, rank, rows[name]) for name, rank in ranks.items()]


def plain(made: Layer) -> Refitted:
    """The layer as it is without a refit."""
    found: TwoSidedSite = made.measured
    lost = found.lost_of(made.weight, made.rank)
    factors = found.factors_of(made.weight, made.rank)
    return Refitted(weight=factors.product, factors=factors, lost_mean=lost)


def refitted(proto: onnx.ModelProto, wanted: list[Layer], runs: list[Feed]) -> dict[str, Refitted]:
    graph = TorchGraph.build(ModelStore.load(proto))
    steps: dict[str, list[tuple[int, int]]] = {}

    def take(stage: str, done: int, total: int) -> None:
        steps.setdefault(stage, []).append((done, total))

    made = propagate(graph, wanted, runs, None, take)
    for stage, parts in (("refitting", len(graph.nodes)), ("solving", len(wanted))):
        assert sorted(set(steps[stage])) == [(k, parts) for k in range(parts + 1)]
        assert steps[stage] == sorted(steps[stage])
    return made


def output_error(
    proto: onnx.ModelProto, wanted: list[Layer], made: dict[str, Refitted], runs: list[Feed]
) -> float:
    """Mean squared change of the outputs."""
    replacements = [
        Replacement(
            site=w.measured.site,
            factors=made[w.measured.site.key].factors,
            lost_mean=made[w.measured.site.key].lost_mean,
        )
        for w in wanted
    ]
    cut = open_session(rewrite(index(proto), replacements), CPU)
    whole = open_session(ModelStore.load(proto), CPU)
    changes = [cut.run(feed)["y"] - whole.run(feed)["y"] for feed in runs]
    return float(np.mean(np.sum(np.square(changes, dtype=np.float64), -1)))


# Both sides that statistics are taken of: V sees its inputs (7 x 6), or its outputs (4 x 6).
SIDES = {"inputs": two_layers(), "outputs": two_layers(V=SECOND.T[:, :4], c=noise(4, 4))}


@pytest.mark.parametrize("side", SIDES)
def test_second_layer_is_fitted_to_what_the_first_one_leaves(side: str):
    proto, runs = SIDES[side], feeds(60)
    wanted = layers(proto, runs, {"W": 2, "V": 2})
    assert wanted[1].measured.site.wide == (side == "outputs")
    made = refitted(proto, wanted, runs)
    before = {w.measured.site.key: plain(w) for w in wanted}
    # Nothing lies before the first layer.
    for name in ("left", "right"):
        np.testing.assert_allclose(
            getattr(made["W"].factors, name), getattr(before["W"].factors, name), atol=1e-4
        )
    np.testing.assert_allclose(made["W"].lost_mean, before["W"].lost_mean, atol=1e-4)
    old, new = (output_error(proto, wanted, each, runs) for each in (before, made))
    assert new < old
    # Rank 2 is all that is left: the second layer loses nothing more.
    only_first = output_error(proto, wanted[:1], before, runs)
    assert new == pytest.approx(only_first, rel=1e-3)
    held = [{"x": activations(k + 900, 3, 5, D).astype(np.float32)} for k in range(60)]
    assert output_error(proto, wanted, made, held) < output_error(proto, wanted, before, held)


@pytest.mark.parametrize("side", SIDES)
def test_mean_of_the_outputs_is_kept(side: str):
    """What is cut and fitted anew has the outputs' mean of the original, on the rows it saw."""
    proto, runs = SIDES[side], feeds()
    wanted = layers(proto, runs, {"W": 1, "V": 1})
    made = refitted(proto, wanted, runs)
    graph = index(proto)
    replacements = [
        Replacement(site=w.measured.site, factors=r.factors, lost_mean=r.lost_mean)
        for w, r in ((w, made[w.measured.site.key]) for w in wanted)
    ]
    sessions = [open_session(s, CPU) for s in (graph.store, rewrite(graph, replacements))]
    means = [
        np.mean([s.run(f)["y"].reshape(-1, s.run(f)["y"].shape[-1]).mean(0) for f in runs], axis=0)
        for s in sessions
    ]
    size = max(float(np.abs(s.run(runs[0])["y"]).max()) for s in sessions)
    atol = 16 * EPS * math.sqrt(D + H) * size
    np.testing.assert_allclose(means[1], means[0], rtol=0, atol=atol)


@pytest.mark.parametrize("side", SIDES)
def test_full_rank_changes_nothing(side: str):
    proto, runs = SIDES[side], feeds()
    outputs = 7 if side == "inputs" else 4
    wanted = layers(proto, runs, {"W": min(H, D), "V": min(H, outputs)})
    made = refitted(proto, wanted, runs)
    for w in wanted:
        new = made[w.measured.site.key]
        atol = 100 * EPS * np.linalg.norm(w.weight)
        np.testing.assert_allclose(new.factors.product, w.weight, rtol=0, atol=atol)
        np.testing.assert_allclose(new.lost_mean, 0, atol=10 * atol)
    assert output_error(proto, wanted, made, runs) < 1e-8


def test_weights_of_several_nodes_keep_their_factors():
    square = noise(5, D, D) / math.sqrt(D)
    body = "h = MatMul(x, W) t = Add(h, b) u = MatMul(t, W) y = Add(u, c)"
    weights = {"W": square, "b": noise(3, D), "c": noise(4, D)}
    cast = {name: value.astype(np.float32) for name, value in weights.items()}
    proto = model(f"(float[n,p,{D}] x) => (float[n,p,{D}] y)", body, **cast)
    runs = feeds()
    x = np.concatenate([f["x"] for f in runs]).reshape(-1, D).astype(np.float64)
    wanted = layer(index(proto), "W", 3, np.concatenate([x, x @ square + cast["b"]]))
    assert len(wanted.measured.site.uses) == 2
    made = refitted(proto, [wanted], runs)["W"]
    expected = plain(wanted)
    np.testing.assert_array_equal(made.factors.left, expected.factors.left)
    np.testing.assert_array_equal(made.factors.right, expected.factors.right)
    np.testing.assert_array_equal(made.lost_mean, expected.lost_mean)


def test_second_layer_without_room_for_a_mean_keeps_its_factors():
    """V x has no bias and can get none: W is cut before it all the same."""
    body = "h = MatMul(W, x) t = Relu(h) y = MatMul(V, t)"
    cast = {"W": FIRST.astype(np.float32), "V": SECOND.astype(np.float32)}
    proto = model(f"(float[n,{D},p] x) => (float[n,{C},p] y)", body, **cast)
    runs = [{"x": np.moveaxis(f["x"], -1, -2)} for f in feeds()]
    rows = np.concatenate([f["x"] for f in feeds()]).reshape(-1, D).astype(np.float64)
    hidden = np.maximum(rows @ FIRST.T, 0)
    wanted = [layer(index(proto), "W", 2, rows), layer(index(proto), "V", 2, hidden)]
    made = refitted(proto, wanted, runs)
    for w in wanted:
        assert not w.measured.centred
        np.testing.assert_array_equal(
            made[w.measured.site.key].factors.product, plain(w).factors.product
        )
        assert made[w.measured.site.key].lost_mean is None


def test_padded_rows_are_not_fitted_to():
    proto = two_layers()
    runs = feeds()
    live = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    other = []
    for feed in runs:
        feed["mask"] = live
        x = np.where(live[..., None] == 1, feed["x"], np.float32(30))
        other.append({"x": x, "mask": live})
    wanted = layers(proto, runs, {"W": 2, "V": 2})
    graph = TorchGraph.build(ModelStore.load(proto))
    first, second = (
        propagate(graph, wanted, each, Padding("mask"), quiet) for each in (runs, other)
    )
    for key, value in first.items():
        expected, made = value.factors.product, second[key].factors.product
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5)
    blind = propagate(graph, wanted, other, None, quiet)
    assert np.abs(blind["V"].factors.product - first["V"].factors.product).max() > 1e-3


def test_halves_are_of_different_samples(monkeypatch):
    """Rows of one sample are too alike to tell whether another one is predicted."""
    seen = []

    def spy(halves: tuple[CrossMoment, CrossMoment], gram: np.ndarray) -> np.ndarray:
        seen.append(halves)
        return regression(halves, gram)

    monkeypatch.setattr("onnx_utilrank.refit.fit.regression", spy)
    proto = two_layers()
    levels = np.array([1.0, 5.0, 2.0, 7.0])
    x = levels[:, None, None] + 0.01 * noise(1, 4, 6, D)
    for runs in ([{"x": x.astype(np.float32)}], [{"x": v[None].astype(np.float32)} for v in x]):
        seen.clear()
        refitted(proto, layers(proto, runs, {"V": 3}), runs)
        ((even, odd),) = seen
        assert even.rows == odd.rows == 12
        u = np.tensordot(x, FIRST, (2, 1))
        gap = u[::2].mean((0, 1)) - u[1::2].mean((0, 1))
        made = (even.targets - odd.targets) / 12
        np.testing.assert_allclose(made * np.sign(made[0] * gap[0]), gap, atol=1e-4)


def test_one_sample_says_nothing(monkeypatch):
    """Nobody could tell whether what is learnt from it holds for another one."""
    maps = []

    def spy(halves: tuple[CrossMoment, CrossMoment], gram: np.ndarray) -> np.ndarray:
        maps.append(regression(halves, gram))
        return maps[-1]

    monkeypatch.setattr("onnx_utilrank.refit.fit.regression", spy)
    proto = two_layers()
    runs = [{"x": activations(1, 1, 200, D).astype(np.float32)}]
    refitted(proto, layers(proto, runs, {"W": 2, "V": 2}), runs)
    assert len(maps) == 2
    for found in maps:
        np.testing.assert_array_equal(found, np.eye(len(found)))


def deep() -> tuple[onnx.ModelProto, list[Feed]]:
    """Four layers of values, with a curve between them."""
    width, body, weights = 16, "t0 = Identity(x)", {}
    for k in range(4):
        body += f" h{k} = MatMul(t{k}, W{k}) s{k} = Add(h{k}, b{k}) t{k + 1} = Tanh(s{k})"
        weights[f"W{k}"] = (noise(k, width, width) / math.sqrt(width)).astype(np.float32)
        weights[f"b{k}"] = (0.3 * noise(k + 10, width)).astype(np.float32)
    proto = model(f"(float[n,{width}] x) => (float[n,{width}] y)", body + " y = Neg(t4)", **weights)
    return proto, [{"x": noise(k + 20, 16, width).astype(np.float32)} for k in range(40)]


@pytest.mark.parametrize("ratio", [0.8, 0.6, 0.4])
def test_refit_lowers_the_loss_of_a_deep_model(ratio: float):
    proto, runs = deep()
    config = CompressConfig(param_ratio=ratio, moves=("low-rank",), force=True)
    new, old = (compress(proto, runs, c) for c in (config, replace(config, refit=False)))
    assert new.plan.refit
    assert not old.plan.refit
    assert [e.rank for e in new.plan.entries] == [e.rank for e in old.plan.entries]
    assert new.quality.divergence.mean < old.quality.divergence.mean
