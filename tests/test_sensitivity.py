"""Gradients against closed forms, and the predicted loss against the one that is measured."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from builders import Feed, activations, index, model, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_utilrank import CompressConfig, compress
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.inner import Heads, Reading, Units
from onnx_utilrank.ranking.two_sided import TRUSTED, TwoSidedSite, two_sided_site
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sensitivity.collect import Collector, collect_sensitivity
from onnx_utilrank.sensitivity.effort import Effort, choose_effort
from onnx_utilrank.sensitivity.gradients import GradientPass
from onnx_utilrank.sensitivity.measure import measure_sensitivity
from onnx_utilrank.sensitivity.quadratic import Probe, Quadratics
from onnx_utilrank.sensitivity.side import SmallerSide
from onnx_utilrank.sensitivity.sums import RowSums
from onnx_utilrank.sites.find import find_sites, site_matrix
from onnx_utilrank.statistics.divergence import OutputLoss, divergence
from onnx_utilrank.statistics.factorize import Metric
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.padding import Padding
from onnx_utilrank.statistics.sensitivity import Sensitivity
from onnx_utilrank.surgery.rewrite import Replacement, rewrite
from onnx_utilrank.torch_graph.footprint import Footprint
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.validation.divergence import OutputRecorder, find_losses

# A shared machine may stall for longer than any deadline.
law = settings(deadline=None, max_examples=60)

D, H, C, P = 5, 4, 3, 6  # inputs, hidden values, outputs, positions
FIRST, SECOND = noise(1, H, D) / math.sqrt(D), noise(2, C, H) / math.sqrt(H)
BODY = "h = MatMul(x, W) z = MatMul(h, V) {}"
HEADS = {
    "softmax": ("y = Identity(z)", {"weighting": "softmax", "sharpness": 0.4}),
    "probabilities": (
        "flat = Reshape(z, rows) y = Softmax(flat)",
        {"weighting": "softmax", "sharpness": 0.4, "probabilities": True},
    ),
    "logits": ("y = Identity(z)", {"weighting": "logits", "variance": 0.7}),
    "values": ("y = Identity(z)", {"weighting": "values", "variance": 2.5}),
    "unlike": (
        "y = Identity(z)",
        {"weighting": "values", "variance": 2.5, "scales": (0.5, 4.0, 1.0)},
    ),
}


def quiet(*progress: object) -> None:
    del progress


def two_layers(tail: str = "y = Identity(z)", inputs: str = "") -> onnx.ModelProto:
    rows = "Reshape" in tail
    signature = f"(float[n,p,{D}] x{inputs}) => (float[{'k' if rows else 'n,p'},{C}] y)"
    weights = {"W": FIRST.T.astype(np.float32), "V": SECOND.T.astype(np.float32)}
    if rows:
        weights["rows"] = np.array([-1, C])
    return model(signature, BODY.format(tail), **weights)


def feeds(count: int, samples: int = 3) -> list[Feed]:
    return [{"x": activations(k, samples, P, D).astype(np.float32)} for k in range(count)]


def collected(
    proto: onnx.ModelProto,
    losses: list[OutputLoss],
    runs: list[Feed],
    *,
    draws: int = 1,
    smooth: bool = False,
) -> dict[str, Sensitivity]:
    """What is known of each site, by the name of its weight."""
    graph = index(proto)
    sites, _ = find_sites(graph)
    biases = {use.node: np.zeros(site.m) for site in sites for use in site.uses}
    collectors = {
        site.key: Collector(site, SmallerSide(site, site_matrix(graph, site), biases), 10**6)
        for site in sites
    }
    uses = [use for site in sites for use in site.uses]
    torch_graph = TorchGraph.build(graph.store)
    backward = GradientPass(torch_graph, uses, losses, draws=draws, smooth=smooth, seed=3)
    for _ in collect_sensitivity(backward, collectors, runs):
        pass
    return {site.weight: collectors[site.key].seen.side for site in sites}


# --- gradients ----------------------------------------------------------------------------------


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def curvature(loss: OutputLoss, z: np.ndarray, *, smooth: bool) -> np.ndarray:
    """The Hessian [C, C] of the loss of one position at its logits z."""
    centring = np.eye(C) - 1 / C
    if loss.weighting == "values":
        return np.diag(np.array(loss.scales or (1.0,) * C) ** -2.0) / loss.variance
    if loss.weighting == "logits":
        return centring / loss.variance
    p = softmax(z)
    fisher = np.diag(p) - np.outer(p, p)
    return (fisher + loss.sharpness / (C - 1) * centring) / 2 if smooth else fisher


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_gamma_is_the_curvature_pulled_back_through_the_layers(head: str, smooth: bool):
    tail, options = HEADS[head]
    loss = OutputLoss(output="y", **options)
    proto, runs, draws = two_layers(tail), feeds(4), 400
    found = collected(proto, [loss], runs, draws=draws, smooth=smooth)
    x = np.concatenate([f["x"] for f in runs]).astype(np.float64)
    logits = x @ FIRST.T @ SECOND.T
    each = np.array([[curvature(loss, z, smooth=smooth) for z in sample] for sample in logits])
    for name, back in (("V", np.eye(C)), ("W", SECOND)):
        # The loss of a sample is the mean over its positions.
        here = np.einsum("ci,npcd,dj->npij", back, each, back) / P
        expected = here.sum(1).mean(0)
        made = found[name]
        assert made.samples == len(x) * draws
        assert made.decisions == len(x) * P
        # g is normal: Var(g_i g_j) = Γ_ii Γ_jj + Γ_ij², and positions are independent.
        diagonal = np.einsum("npii->npi", here)
        variances = diagonal[..., :, None] * diagonal[..., None, :] + here**2
        error = np.sqrt(variances.sum(1).mean(0) / made.samples)
        assert (np.abs(made.gamma / made.samples - expected) < 5 * error).all()
        assert (5 * error < 0.2 * np.abs(np.diag(expected)).max()).all()


def test_moments_are_those_of_the_rows():
    runs = feeds(4)
    found = collected(two_layers(), [OutputLoss(output="y", weighting="values")], runs)
    x = np.concatenate([f["x"] for f in runs]).reshape(-1, D).astype(np.float64)
    # Wide weights are known by their outputs.
    for name, rows in (("W", x @ FIRST.T), ("V", x @ FIRST.T @ SECOND.T)):
        moment, expected = found[name].moment, SecondMoment.of(rows)
        assert moment.rows == len(rows)
        atol = 8 * math.sqrt(D + H) * float(np.finfo(np.float32).eps) * np.abs(rows).max() ** 2
        np.testing.assert_allclose(moment.mean, expected.mean, rtol=0, atol=atol)
        np.testing.assert_allclose(moment.uncentred, expected.uncentred, rtol=0, atol=atol)


def test_gain_of_a_gemm_counts():
    """Γ is of W x: an alpha in front of it takes its square."""
    body = "y = Gemm<alpha={}>(x, W)"
    weight = FIRST.T.astype(np.float32)
    runs = [{"x": activations(1, 12, D).astype(np.float32)}]
    loss = OutputLoss(output="y", weighting="values")
    found = [
        collected(
            model(f"(float[n,{D}] x) => (float[n,{H}] y)", body.format(a), W=weight), [loss], runs
        )
        for a in ("1.0", "3.0")
    ]
    np.testing.assert_allclose(found[1]["W"].gamma, 9 * found[0]["W"].gamma, rtol=1e-5)


IDLE = {
    "a result that nothing reads": "lost = MatMul(x, U) y = MatMul(x, W)",
    "a shape": "t = MatMul(x, U) s = Shape(t) h = MatMul(x, W) k = Cast<to=1>(s) "
    "e = ReduceSum<keepdims=0>(k) y = Add(h, e)",
    "a decision": "t = MatMul(x, U) a = ArgMax<axis=1>(t) f = Cast<to=1>(a) h = MatMul(x, W) "
    "y = Add(h, f)",
    "a factor of zero": "t = MatMul(x, U) f = Mul(t, zero) h = MatMul(x, W) y = Add(h, f)",
}


@pytest.mark.parametrize("what", IDLE)
def test_weights_without_influence_have_no_gradient(what: str):
    weight = noise(4, 6, 6).astype(np.float32)
    zero = {"zero": np.float32(0)} if "zero" in IDLE[what] else {}
    proto = model("(float[n,6] x) => (float[n,6] y)", IDLE[what], U=weight, W=weight.T, **zero)
    runs = [{"x": activations(k, 8, 6).astype(np.float32)} for k in range(20)]
    found = collected(proto, [OutputLoss(output="y", weighting="values")], runs)
    assert not found["U"].gamma.any()
    assert found["U"].moment.rows == 0
    assert found["W"].gamma.any()
    config = CompressConfig(param_ratio=1.0, method="two-sided")
    plan = compress(proto, runs, config, dry_run=True).plan
    assert [e.site for e in plan.entries] == ["W"]
    (skipped,) = plan.skipped
    assert "its gradient is zero" in skipped.reason


def test_padded_positions_do_not_count():
    proto = two_layers(inputs=", int64[n,p] attention_mask")
    mask = (np.arange(P) < np.array([[6], [3], [1]])).astype(np.int64)
    (feed,) = feeds(1)
    feed["attention_mask"] = mask
    (loss,) = find_losses(ModelStore.load(proto), open_session(ModelStore.load(proto), CPU), [feed])
    assert loss.padding == Padding("attention_mask")
    other = feed | {"x": np.where(mask[..., None] == 1, feed["x"], np.float32(7))}
    first, second = (collected(proto, [loss], [f]) for f in (feed, other))
    bare = collected(proto, [replace(loss, padding=None)], [feed])
    for name in ("W", "V"):
        assert first[name].moment.rows == first[name].decisions == mask.sum()
        assert bare[name].moment.rows == bare[name].decisions == mask.size
        np.testing.assert_array_equal(first[name].gamma, second[name].gamma)
        np.testing.assert_array_equal(first[name].moment.outer, second[name].moment.outer)
    y = OutputLoss(output="y", weighting="values").rows(noise(1, 3, P, C), 3)
    z = y + noise(2, 3, P, C)
    each = divergence(loss, y, z, mask.astype(np.float64))
    for k, kept in enumerate(mask.sum(1)):
        expected = divergence(loss, y[k : k + 1, :kept], z[k : k + 1, :kept])
        np.testing.assert_allclose(each[k], expected[0], rtol=1e-12)


def test_padded_positions_are_no_part_of_variance_and_agreement():
    """Rows that differ at padded positions only, and are huge there."""
    inputs = ", int64[n,p] attention_mask"
    mask = (np.arange(P) < np.array([[6], [3], [1]])).astype(np.int64)
    (feed,) = feeds(1)
    feed["attention_mask"] = mask
    padded = feed | {"x": np.where(mask[..., None] == 1, feed["x"], np.float32(50))}
    proto = two_layers(inputs=inputs)
    turned = two_layers(
        "m = Cast<to=1>(attention_mask) mu = Unsqueeze(m, last) mt = Mul(mu, two) "
        "ms = Sub(mt, one) y = Mul(z, ms)",
        inputs,
    )
    for name, value in (("last", np.array([2])), ("two", np.float32(2)), ("one", np.float32(1))):
        turned.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    store = ModelStore.load(proto)
    session = open_session(store, CPU)
    for weighting in ("softmax", "logits", "values"):
        (loss,) = find_losses(store, session, [padded], weighting)
        (small,) = find_losses(store, session, [feed], weighting)
        assert loss.variance == pytest.approx(small.variance, rel=1e-6)
        assert loss.sharpness == pytest.approx(small.sharpness, rel=1e-6)
        recorder = OutputRecorder(session, [loss], [padded])
        found = recorder.compare(open_session(ModelStore.load(turned), CPU))
        assert found.mean == 0
        assert found.agreement == (None if weighting == "values" else 1.0)


def test_classes_may_lie_along_any_axis():
    """A softmax over the channels of [n, C, p] counts as one over the last axis of [n, p, C]."""
    proto = {
        "last": two_layers("y = Softmax<axis=-1>(z)"),
        "first": two_layers("t = Transpose<perm=[0,2,1]>(z) y = Softmax<axis=1>(t)"),
    }
    proto["first"].graph.output[0].type.tensor_type.shape.dim[1].dim_value = C
    proto["first"].graph.output[0].type.tensor_type.shape.dim[2].dim_param = "p"
    runs, made = feeds(3), {}
    for name, each in proto.items():
        store = ModelStore.load(each)
        session = open_session(store, CPU)
        (loss,) = find_losses(store, session, runs)
        assert loss.axis == {"last": -1, "first": -2}[name]
        assert (loss.weighting, loss.probabilities) == ("softmax", True)
        other = onnx.ModelProto()
        other.CopyFrom(each)
        (weight,) = (t for t in other.graph.initializer if t.name == "V")
        changed = onnx.numpy_helper.to_array(weight) + noise(40, H, C).astype(np.float32)
        weight.CopyFrom(onnx.numpy_helper.from_array(changed, "V"))
        candidate = open_session(ModelStore.load(other), CPU)
        found = OutputRecorder(session, [loss], runs).compare(candidate)
        gamma = collected(each, [loss], runs, draws=4)["W"].gamma
        made[name] = (loss.sharpness, found.mean, found.agreement, gamma)
    for one, same in zip(made["last"], made["first"], strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-4, atol=1e-6)
    assert made["last"][1] > 1e-2


@pytest.mark.parametrize("dtype", ["float16", "float"])
def test_gradients_of_half_precision_stay_in_range(dtype: str):
    """Squares of these values, and of their gradients, lie beyond float16."""
    kind = {"float16": np.float16, "float": np.float32}[dtype]
    first = noise(1, 24, 24) * 0.8 ** np.arange(24)
    proto = model(
        f"({dtype}[n,24] x) => ({dtype}[n,8] y)",
        "h = MatMul(x, W) t = Tanh(h) y = MatMul(t, V)",
        W=(0.01 * first).astype(kind),
        V=(300 * noise(2, 24, 8)).astype(kind),
    )
    data = {"x": (100 * noise(3, 200, 24)).astype(kind)}
    config = CompressConfig(param_ratio=0.7, method="two-sided", weighting="values")
    result = compress(proto, data, config)
    assert 0 < result.plan.predicted_divergence < 1
    assert result.quality.divergence.mean == pytest.approx(
        result.plan.predicted_divergence, rel=1.0
    )


def test_padded_positions_are_told_by_zeros_and_ones_only():
    proto = two_layers(inputs=", int64[n,p] attention_mask")
    (feed,) = feeds(1)
    store = ModelStore.load(proto)
    feed["attention_mask"] = np.full((3, P), 2)
    (loss,) = find_losses(store, open_session(store, CPU), [feed])
    assert loss.padding is None


def test_gamma_of_few_decisions_is_shrunk_towards_its_mean():
    g = noise(1, 3, 8)
    few = Sensitivity(moment=SecondMoment.zero(8), gamma=g.T @ g, samples=3, decisions=3)
    many = replace(few, decisions=10**9)
    found = few.gamma / 3
    assert np.linalg.matrix_rank(found) == 3
    for made in (few, many):
        assert np.trace(made.fisher()) == pytest.approx(np.trace(found))
        assert np.linalg.eigvalsh(made.fisher())[0] > 0
    lowest, sure = (np.linalg.eigvalsh(made.fisher())[0] for made in (few, many))
    assert lowest > 10 * sure
    none = replace(few, gamma=np.zeros((8, 8)))
    np.testing.assert_array_equal(none.fisher(), np.eye(8))


# --- the predicted loss -------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [True, False])
def test_what_was_seen_is_told_beside_what_is_made_of_it(wide: bool):
    out, width, rows = (6, 20, 15) if wide else (20, 6, 9)
    weight = noise(1, out, width)
    body = {"W": weight.astype(np.float32)}
    proto = model(f"(float[n,{width}] x) => (float[n,m] y)", "y = Gemm<transB=1>(x, W)", **body)
    (site,) = find_sites(index(proto))[0]
    weight = site_matrix(index(proto), site)
    z = noise(2, rows, 6) @ noise(3, 6, 6) + 1.0
    g = noise(4, rows, 6)
    few = Sensitivity(moment=SecondMoment.of(z), gamma=g.T @ g, samples=rows, decisions=rows)
    found = two_sided_site(site, weight, few, 0)
    assert found.centred
    for rank in range(7):
        gone = np.eye(6) - found.found.kept(rank)
        lost = np.square((g @ gone) @ (z - z.mean(0)).T).sum() / rows**2 / 2
        assert found.seen[rank] == pytest.approx(lost, rel=1e-9, abs=1e-12 * found.seen[0])
    assert found.errors[4] > 1.1 * found.seen[4]  # as few rows are made out to be worse


def test_units_and_heads_tell_what_was_seen_too():
    rows, n = 12, 6
    x, g = noise(1, rows, n) + 0.5, noise(2, rows, n)
    observed, moment = g.T @ g / rows, SecondMoment.of(x)
    unsure = observed + np.eye(n)  # as it is where few gradients were seen
    reading = Reading(root=Metric.of(unsure).root_t, observed=observed, moment=moment, centred=True)
    (units,) = Units.of([reading])
    halves = [slice(0, 3), slice(3, 6)]
    blocks = [[gamma[half, half] for half in halves] for gamma in (unsure, observed)]
    groups = [(half, False) for half in halves]
    heads = Heads.of(groups, *blocks, moment.mean, moment.covariance, np.zeros(n))
    apart = np.zeros((n, n))
    for half in halves:
        apart[half, half] = observed[half, half]
    for found, seen, gamma, second in (
        (units.selection.found, units.seen, observed, moment.covariance),
        (heads.found, heads.seen, apart, moment.uncentred),
    ):
        for rank in range(n + 1):
            gone = np.eye(n) - found.kept(rank)
            lost = np.trace(gamma @ gone @ second @ gone.T) / 2
            assert seen[rank] == pytest.approx(lost, rel=1e-5, abs=1e-6 * seen[0])


def test_losses_of_layers_that_see_one_row_a_sample_are_about_the_measured_ones():
    # 160 of 200 rows are calibrated with, 80 in each half: fewer than four a feature of 48.
    rows, d = 200, 48
    x = noise(1, rows, d) * np.geomspace(1, 1e-3, d) @ np.linalg.qr(noise(2, d, d))[0]
    held = {"U": noise(3, d, 64) / np.sqrt(d), "V": noise(4, 64, d) / 8.0}
    proto = model(
        f"(float[n,{d}] x) => (float[n,k] y)",
        "a = MatMul(x, U) t = Tanh(a) y = MatMul(t, V)",
        **{name: values.astype(np.float32) for name, values in held.items()},
    )
    config = CompressConfig(param_ratio=0.6, moves=("low-rank",), refit=False, augment=False)
    result = compress(proto, {"x": x.astype(np.float32)}, config)
    measured = result.quality.divergence
    assert measured.mean > 1e-8
    assert 0.4 < result.plan.predicted_divergence / measured.mean < 2.5


def measured_site(proto: onnx.ModelProto, runs: list[Feed], pulled: np.ndarray) -> TwoSidedSite:
    """The first site, decomposed for an exact Γ."""
    graph = index(proto)
    site = find_sites(graph)[0][0]
    weight = site_matrix(graph, site)
    x = np.concatenate([f["x"] for f in runs]).reshape(-1, site.d).astype(np.float64)
    moment = SecondMoment.of(x @ weight.T if site.wide else x)
    gamma = pulled if site.wide else weight.T @ pulled @ weight
    known = Sensitivity(moment=moment, gamma=gamma, samples=1, decisions=10**9)
    return two_sided_site(site, weight, known, 0)


def cut(graph: GraphIndex, found: TwoSidedSite, rank: int) -> ModelStore:
    weight = site_matrix(graph, found.site)
    factors = found.factors_of(weight, rank)
    lost = found.lost_of(weight, rank) if found.centred else None
    return rewrite(graph, [Replacement(site=found.site, factors=factors, lost_mean=lost)])


def judged(proto: onnx.ModelProto, runs: list[Feed]) -> tuple[OutputLoss, OutputRecorder]:
    store = ModelStore.load(proto)
    session = open_session(store, CPU)
    losses = find_losses(store, session, runs, "values")
    return losses[0], OutputRecorder(session, losses, runs)


ONE = {
    "inputs": ("[n,p,4] x) => (float[n,p,7] y)", "y = MatMul(x, W)", (4, 7)),
    "outputs": ("[n,p,7] x) => (float[n,p,4] y)", "y = MatMul(x, W)", (7, 4)),
    "no bias": ("[n,7,6] x) => (float[n,5,6] y)", "y = MatMul(W, x)", (5, 7)),
}


@pytest.mark.parametrize("what", ONE)
def test_predicted_loss_of_a_linear_model_is_the_measured_one(what: str):
    signature, body, shape = ONE[what]
    proto = model(f"(float{signature}", body, W=noise(5, *shape).astype(np.float32))
    left = what == "no bias"
    x_shape = (4, 7, 6) if left else (4, P, shape[0])
    runs = [{"x": activations(k, *x_shape).astype(np.float32)} for k in range(6)]
    loss, recorder = judged(proto, runs)
    graph = index(proto)
    if left:
        # The loss is the mean over 5 rows of 6 values; the site has 6 rows of 5, which add up.
        rows = [{"x": np.moveaxis(f["x"], -2, -1)} for f in runs]
        found = measured_site(proto, rows, np.eye(5) * (6 / 5) / loss.variance)
        assert not found.centred
    else:
        found = measured_site(proto, runs, np.eye(shape[1]) / loss.variance)
    rounding = 1e3 * float(np.finfo(np.float32).eps) ** 2
    for rank in range(1, found.site.full_rank + 1):
        session = open_session(cut(graph, found, rank), CPU)
        lost = recorder.compare(session).mean
        assert lost == pytest.approx(found.errors[rank], rel=1e-4, abs=rounding)
    assert found.errors[1] > 1e-3


def pooled(spread: float) -> tuple[onnx.ModelProto, list[Feed]]:
    """y is the mean over positions of W x, whose x differ by `spread` within a sample."""
    body = "h = MatMul(x, W) y = ReduceMean<axes=[1], keepdims=0>(h)"
    weight = noise(6, 8, 6).astype(np.float32)
    proto = model("(float[n,p,8] x) => (float[n,6] y)", body, W=weight)
    runs = []
    for k in range(25):
        x = noise(k, 8, 1, 8) + spread * noise(k + 100, 8, P, 8)
        runs.append({"x": x.astype(np.float32)})
    return proto, runs


def predictions(
    proto: onnx.ModelProto, runs: list[Feed], loss: OutputLoss, found: TwoSidedSite, draws: int
) -> np.ndarray:
    graph = TorchGraph.build(ModelStore.load(proto))
    uses = found.site.uses
    backward = GradientPass(graph, uses, [loss], draws=draws, smooth=False, seed=11)
    weight = site_matrix(index(proto), found.site)
    key = found.site.key
    biases = {use.node: np.zeros(found.site.m) for use in uses}
    probe = Probe(found=found.found, rows="smaller", mean=found.moment.mean)
    quadratics = Quadratics({key: [probe]})
    sides = {key: SmallerSide(found.site, weight, biases)}
    assert list(quadratics.add(backward, sides, runs)) == [k + 1 for k in range(len(runs))]
    return quadratics.of(found.site)[0]


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_errors_that_agree_over_positions_are_seen(spread: float):
    proto, runs = pooled(spread)
    loss, recorder = judged(proto, runs)
    draws, samples = 40, 200
    found = measured_site(proto, runs, np.eye(6) / (P * loss.variance))
    quadratic = predictions(proto, runs, loss, found, draws)
    assert quadratic[-1] == 0
    for rank in range(1, 6):
        lost = recorder.compare(open_session(cut(index(proto), found, rank), CPU))
        # A square of a normal coefficient has twice its square for a variance; the loss of the
        # very samples is what is predicted, so that their spread does not count.
        size = lost.mean**2 + samples * lost.standard_error**2
        error = math.sqrt(2 * size / (draws * samples))
        assert abs(quadratic[rank] - lost.mean) < 5 * error
        assert 5 * error < lost.mean / 2
        corrected = found.corrected([quadratic], apart=False).errors[rank]
        assert corrected >= lost.mean - 5 * error
        # Blind to it, the product alone would see a part only: 1 / P where all rows agree.
        share = (1 + spread**2) / (P * (1 + spread**2 / P))
        assert found.errors[rank] / lost.mean == pytest.approx(share, rel=0.35)


def test_whole_measurement_predicts_the_loss_of_each_layer():
    """Through a nonlinear model, one layer cut at a time, small losses."""
    body = "h = MatMul(x, W) t = Tanh(h) z = MatMul(t, V) y = Identity(z)"
    first, second = noise(7, 12, 8) / 6, noise(8, 8, 10)
    proto = model(
        "(float[n,12] x) => (float[n,10] y)",
        body,
        W=first.astype(np.float32),
        V=second.astype(np.float32),
    )
    # Each half of them predicts for the other, and directions of equal weight would be arbitrary.
    x = (activations(1, 1024, 12) * 0.8 ** np.arange(12)).astype(np.float32)
    runs = [{"x": rows} for rows in np.split(x, 16)]
    graph = index(proto)
    sites, _ = find_sites(graph)
    loss, recorder = judged(proto, runs)
    data = open_data(runs, graph.store.inputs)
    effort = Effort(
        draws=8,
        gradients=len(data),
        quadratics=len(data),
        refit=len(data),
        again=False,
        batch=1,
        run=1,
        statistics_bytes=1,
    )
    made, passes = measure_sensitivity(
        TorchGraph.build(graph.store),
        graph,
        sites,
        (),
        [loss],
        data,
        range(len(data)),
        effort,
        moves=(),
        seed=0,
        progress=quiet,
    )
    assert [m.site.key for m in made] == [s.key for s in sites]
    assert passes == len(sites)  # there is room for the sums of none
    for found in made:
        assert (np.diff(found.errors) <= 0).all()
        assert found.errors[-1] == pytest.approx(0, abs=1e-6 * found.errors[0])
        full = found.site.full_rank
        for rank in range(full // 2, full):
            lost = recorder.compare(open_session(cut(graph, found, rank), CPU)).mean
            assert found.errors[rank] == pytest.approx(lost, rel=0.35)


@law
@given(
    errors=st.lists(st.floats(0, 10), min_size=1, max_size=9),
    seed=st.integers(0, 2**32 - 1),
)
def test_larger_prediction_counts_and_never_rises_with_rank(errors, seed):
    proto, _ = pooled(1.0)
    falling = np.sort(errors)[::-1]
    quadratic = np.random.default_rng(seed).random(len(falling)) * 10
    site = TwoSidedSite(
        site=find_sites(index(proto))[0][0],
        moment=SecondMoment.zero(1),
        found=None,  # type: ignore[arg-type]
        gamma=np.eye(1),
        errors=falling,
        seen=falling / 3,
        bias_cost=0,
    )
    apart = site.corrected([quadratic], apart=True).errors
    alone = replace(site, errors=falling / 3).corrected([quadratic], apart=False).errors
    np.testing.assert_array_equal(apart, alone)  # what was seen, and nothing that was added
    made = site.corrected([quadratic], apart=False).errors
    assert (np.diff(made) <= 0).all()
    larger = np.maximum(falling, quadratic)
    assert (made >= larger).all()
    # Small losses are what second order says; large ones are taken for worse.
    most = max(falling.max(), quadratic.max())
    assert made.max() == pytest.approx(most * (1 + most / TRUSTED))


# --- running sums -------------------------------------------------------------------------------


def summed(sums: RowSums, runs: Sequence[np.ndarray], first: int = 0) -> RowSums:
    """Sums after runs, of which the number of the first one is given; every row counts."""
    for k, rows in enumerate(runs, start=first):
        x = torch.from_numpy(rows)[None]
        sums.add(x, (x,), torch.ones(x.shape[:2], dtype=torch.bool), share=1.0, phase=k)
    return sums


@law
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    width=st.integers(1, 48),
    cut=st.integers(0, 8),
)
def test_rows_that_wait_are_counted_however_they_come(sizes: list[int], width: int, cut: int):
    rows = (noise(sum(sizes), sum(sizes), width) + 3).astype(np.float32)
    runs = np.split(rows, np.cumsum(sizes)[:-1])
    sums = summed(RowSums(width, 10**6), runs)
    state = summed(RowSums(width, 10**6), runs[:cut]).state  # as rows still wait
    resumed = RowSums(width, 10**6)
    resumed.restore({name: array.copy() for name, array in state.items()})
    summed(resumed, runs[cut:], cut)
    for name, array in sums.state.items():
        np.testing.assert_array_equal(resumed.state[name], array)  # the clock decides on the cut
    wide = rows.astype(np.float64)
    # Products of float32, and squares of values up to about 8.
    near = {"rtol": 0, "atol": 64 * 2**-22 * max(len(rows), 1)}
    np.testing.assert_allclose(sums.moment.outer, wide.T @ wide, **near)
    np.testing.assert_allclose(sums.gamma, wide.T @ wide, **near)
    assert sums.moment.rows == len(rows)


@pytest.mark.parametrize("gradients", [False, True])
def test_sums_take_what_they_say(gradients: bool):
    width = 64
    sums = RowSums(width, 10**6, gradients=gradients)
    for k in range(9):
        x = torch.from_numpy(noise(k, 1, 5, width).astype(np.float32))
        sums.add(x, (x,) * gradients, torch.ones(1, 5, dtype=torch.bool), share=1.0, phase=k)
        held = sum(array.nbytes for name, array in sums.state.items() if array.ndim == 2)
        assert held <= RowSums.bytes(width, gradients=gradients)


# --- effort -------------------------------------------------------------------------------------

SMALL = Footprint(live=10**6, kept=10**6)


@pytest.mark.parametrize(
    ("samples", "flops", "decisions", "expected"),
    [
        (100, 10**9, 1, (4, 100, 100)),  # cheap: all there is
        (1000, 10**9 + 1, 1, (1, 500, 62)),
        (1000, 10**11, 1, (1, 166, 62)),
        (1000, 10**11, 1024, (1, 16, 16)),
        (4, 10**13, 1024, (1, 1, 1)),
        (1, 10**13, 1, (1, 1, 1)),
    ],
)
def test_dear_models_get_less_effort(samples, flops, decisions, expected):
    made = choose_effort(
        samples=samples,
        flops=flops,
        decisions=decisions,
        footprint=SMALL,
        batch=32,
        budget=2**32,
    )
    assert (made.draws, made.gradients, made.quadratics) == expected
    assert made.batch == 16
    tight = choose_effort(
        samples=samples,
        flops=flops,
        decisions=decisions,
        footprint=SMALL,
        batch=32,
        budget=12 * 10**6,
    )
    assert tight.batch == 3


@pytest.mark.parametrize("run", [1, 3, 8, 24])
@pytest.mark.parametrize(("flops", "decisions"), [(1, 1), (10**12, 1), (10**12, 4096)])
def test_effort_is_of_whole_runs(run: int, flops: int, decisions: int):
    made = choose_effort(
        samples=240,
        flops=flops,
        decisions=decisions,
        footprint=SMALL,
        batch=32,
        budget=2**32,
        run=run,
    )
    for count in (made.gradients, made.quadratics, made.refit):
        assert count % run == 0
        assert 0 < count <= 240


@law
@given(kept=st.integers(1, 10**10), budget=st.integers(10**6, 10**11), batch=st.integers(1, 64))
def test_sums_and_activations_share_the_budget(kept: int, budget: int, batch: int):
    taken = Footprint(live=kept, kept=kept)
    made = choose_effort(
        samples=100, flops=1, decisions=1, footprint=taken, batch=batch, budget=budget
    )
    assert made.statistics_bytes >= budget // 2
    if kept <= budget // 4:
        assert made.statistics_bytes + made.batch * kept <= budget * 3 // 4


# --- gradients that are not finite --------------------------------------------------------------


def rooted() -> onnx.ModelProto:
    """|W x| as a root of squares, whose gradient at zero is not finite."""
    return model(
        "(float[n,p,12] x) => (float[n,p,40] y)",
        "h = MatMul(x, W) q = Mul(h, h) r = Sqrt(q) y = MatMul(r, V)",
        W=(noise(1, 12, 40) * 0.7 ** np.arange(40)).astype(np.float32),
        V=noise(2, 40, 40).astype(np.float32),
    )


def test_samples_whose_gradient_is_not_finite_do_not_count():
    loss = OutputLoss(output="y", weighting="values", variance=2.0)
    good = [{"x": activations(k, 3, P, 12).astype(np.float32)} for k in range(3)]
    # One position of the first sample is zero: that sample is left out, its neighbours are not.
    bad = {"x": activations(9, 2, P, 12).astype(np.float32)}
    bad["x"][0, 0] = 0.0
    without, with_bad = (collected(rooted(), [loss], runs) for runs in (good, [*good, bad]))
    for found in with_bad.values():
        assert np.isfinite(found.gamma).all()
    assert with_bad["W"].moment.rows == without["W"].moment.rows + P
    assert with_bad["V"].moment.rows == without["V"].moment.rows + 2 * P  # behind the root


def test_predictions_are_finite_where_gradients_are_not(caplog):
    x = activations(5, 80, P, 12).astype(np.float32)
    x[::4, 1] = 0.0
    result = compress(rooted(), {"x": x}, CompressConfig(param_ratio=0.7))
    assert result.plan.predicted_divergence is not None
    assert math.isfinite(result.plan.predicted_divergence)
    assert result.quality is not None
    assert result.quality.divergence is not None
    assert math.isfinite(result.quality.divergence.mean)
    assert any("are not finite" in r.getMessage() for r in caplog.records)


# --- what outputs are ---------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(6, 7), (6, 2), (1, 10)])
def test_images_that_a_conv_makes_are_values(sizes: tuple[int, int]):
    proto = model(
        "(float[n,3,h,w] x) => (float[n,5,h,w] y)",
        "y = Conv<pads=[1,1,1,1]>(x, W)",
        W=(3 * noise(1, 5, 3, 3, 3)).astype(np.float32),
    )
    store = ModelStore.load(proto)
    seen = [{"x": 5 * activations(k, 4, 3, *sizes).astype(np.float32)} for k in range(3)]
    (loss,) = find_losses(store, open_session(store, CPU), seen)
    assert loss.weighting == "values"
