"""Units in models of many layers: plans that are replayed, budgets, constants and odd shapes."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Feed, index, model, noise, run
from test_hidden import hidden_of
from test_units import SHRINK, WIDE, whole

from onnx_utilrank import CompressConfig, RankPlan, compress
from onnx_utilrank.moves.shrink import FAST_CHANNELS
from onnx_utilrank.sensitivity.effort import Effort, choose_effort
from onnx_utilrank.sensitivity.measure import _Measuring

D, W, N, M = 8, 24, 16, 5


def cast(**values: np.ndarray) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float32) for name, value in values.items()}


def chain() -> tuple[onnx.ModelProto, Feed]:
    """Four layers: each but the last makes units, and each but the first reads some."""
    made, body, widths = {}, "t0 = Identity(x)", (D, W, W, W, D)
    for k in range(4):
        made[f"w{k}"] = noise(k, *widths[k : k + 2]) / math.sqrt(widths[k])
        made[f"b{k}"] = 0.3 * noise(10 + k, widths[k + 1])
        body += f" m{k} = MatMul(t{k}, w{k}) h{k} = Add(m{k}, b{k}) t{k + 1} = Tanh(h{k})"
    signature = f"(float[n,{D}] x) => (float[n,{D}] y)"
    proto = model(signature, body + " y = Neg(t4)", **cast(**made))
    return proto, {"x": noise(30, 160, D).astype(np.float32)}


@pytest.fixture(scope="module")
def mixed():
    """A plan in which units of a pair shrink and a weight of the other pair is factored."""
    proto, data = chain()
    config = CompressConfig(moves=("shrink", "low-rank"), param_ratio=0.5)
    plan = compress(proto, data, config, dry_run=True).plan
    first, second = plan.hidden
    assert (first.sites, second.sites) == (("w0", "w1"), ("w2", "w3"))
    entries = tuple(
        replace(e, rank=4 if e.site == "w1" else None, move="low-rank", bias=False)
        if e.site in first.sites
        else replace(e, rank=None, move=None, bias=False)
        for e in plan.entries
    )
    entries = tuple(replace(e, move=None) if e.rank is None else e for e in entries)
    hidden = (replace(first, kept=None), replace(second, kept=12))
    return proto, data, replace(plan, entries=entries, hidden=hidden, refit=False)


def test_units_are_those_of_the_plan_whatever_else_changes(mixed):
    """Among the weights that change alone, others would be paired: w1 with w2."""
    proto, data, plan = mixed
    made = compress(proto, data, CompressConfig(force=True), plan=plan)
    shapes = {t.name: tuple(t.dims) for t in made.model.graph.initializer}
    assert shapes["w0"] == (D, W)
    assert (W, 12) in shapes.values()
    assert (12, D) in shapes.values()
    assert [(h.hidden, h.kept) for h in made.plan.shrunk] == [("w2", 12)]


def test_what_a_plan_shrinks_needs_no_budget(mixed):
    proto, data, plan = mixed
    config = CompressConfig(force=True, memory_budget=2**20)
    made = compress(proto, data, config, plan=plan)
    expected = compress(proto, data, CompressConfig(force=True), plan=plan)
    assert made.model.SerializeToString() == expected.model.SerializeToString()


@pytest.mark.parametrize("ratio", [0.8, 0.6, 0.45])
def test_plans_of_chains_are_replayed(ratio: float, tmp_path):
    proto, data = chain()
    result = compress(proto, data, CompressConfig(param_ratio=ratio))
    result.plan.save(tmp_path / "plan.json")
    again = compress(proto, data, plan=RankPlan.load(tmp_path / "plan.json"))
    assert again.model.SerializeToString() == result.model.SerializeToString()


def test_units_that_do_not_fit_the_budget_stay(caplog):
    made = cast(w1=noise(1, D, 200), w2=noise(2, 200, M))
    body = "h = MatMul(x, w1) a = Relu(h) y = MatMul(a, w2)"
    proto = model(f"(float[n,{D}] x) => (float[n,{M}] y)", body, **made)
    data = {"x": noise(3, 60, D).astype(np.float32)}
    config = CompressConfig(param_ratio=0.9, memory_budget=2**20)
    assert not compress(proto, data, config, dry_run=True).plan.hidden
    assert "no room to look at the hidden units of 1 layers" in caplog.text
    roomy = replace(config, memory_budget=2**22)
    assert compress(proto, data, roomy, dry_run=True).plan.hidden


def test_channels_between_convs_are_kept_in_multiples():
    proto, data = whole("conv")
    for ratio in (0.9, 0.7, 0.45):
        plan = compress(proto, data, CompressConfig(param_ratio=ratio), dry_run=True).plan
        assert all(h.kept % FAST_CHANNELS == 0 for h in plan.shrunk)
    asked = compress(proto, data, replace(SHRINK, param_ratio=0.45), dry_run=True).plan
    assert asked.shrunk[0].kept % FAST_CHANNELS
    assert asked.shrunk[0].kept < WIDE


@pytest.mark.parametrize("split", ["Split<axis=1>(k, halves)", "Split<axis=1>(k)"])
def test_depthwise_conv_of_packed_gates_has_groups_of_both(split: str):
    body = (
        f"h = Conv(x, w1, b1) k = Conv<group={2 * N}, pads=[1,1,1,1]>(h, deep, bd) "
        f"a, g = {split} p = Mul(a, g) y = Conv(p, w2, b2)"
    )
    made = cast(
        w1=noise(1, 2 * N, 6, 1, 1) / 2,
        b1=noise(2, 2 * N),
        deep=noise(3, 2 * N, 1, 3, 3) / 3,
        bd=noise(4, 2 * N),
        w2=noise(5, M, N, 1, 1) / 4,
        b2=noise(6, M),
    )
    if "halves" in split:
        made["halves"] = np.array([N, N])
    opset = 17 if "halves" in split else 12
    proto = model("(float[n,6,5,6] x) => (float[n,5,5,6] y)", body, opset=opset, **made)
    data = {"x": noise(7, 60, 6, 5, 6).astype(np.float32)}
    result = compress(proto, data, replace(SHRINK, param_ratio=0.7))
    (entry,) = result.plan.shrunk
    groups = [a.i for n in result.model.graph.node for a in n.attribute if a.name == "group"]
    assert groups == [2 * entry.kept]
    assert 0.3 < result.plan.predicted_divergence / result.quality.divergence.mean < 3


def test_constants_of_units_may_be_infinite():
    caps = np.where(np.arange(N) % 3 == 0, np.inf, 0.5)
    made = cast(w1=noise(1, D, N), caps=caps, w2=noise(2, N, M))
    body = "h = MatMul(x, w1) a = Min(h, caps) y = MatMul(a, w2)"
    proto = model(f"(float[n,{D}] x) => (float[n,{M}] y)", body, **made)
    data = {"x": noise(3, 120, D).astype(np.float32)}
    result = compress(proto, data, replace(SHRINK, param_ratio=0.6))
    assert result.plan.shrunk
    assert np.isfinite(run(result.store, data)["y"]).all()


ODD = {
    "an empty value": (
        "h = MatMul(x, w1) a = Relu(h) e = Slice(a, zero, zero, one) z = Relu(e) y = MatMul(a, w2)",
        f"(float[n,{D}] x) => (float[n,{M}] y, float[n,p] z)",
        (3, D),
    ),
    "vectors": (
        "h = MatMul(w3, x) a = Relu(h) y = MatMul(w4, a)",
        f"(float[{D}] x) => (float[{M}] y)",
        (D,),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_are_looked_at_without_harm(name: str):
    body, signature, shape = ODD[name]
    held = cast(w1=noise(1, D, N), w2=noise(2, N, M), w3=noise(3, N, D), w4=noise(4, M, N))
    held |= {"zero": np.array([0]), "one": np.array([1])}
    words = body.replace(",", " ").replace("(", " ").replace(")", " ").split()
    proto = model(signature, body, **{k: v for k, v in held.items() if k in words})
    feed = {"x": noise(5, *shape).astype(np.float32)}
    hidden_of(proto, feed)


def test_readers_of_the_same_units_are_measured_together(monkeypatch):
    """However far apart they are, and however many passes there are."""
    made = {"w0": noise(1, D, WIDE), "w1": noise(2, WIDE, 6), "w4": noise(5, WIDE, M)}
    made |= {"w2": noise(3, 6, 6), "w3": noise(4, 6, M)}
    body = (
        "h = MatMul(x, w0) a = Relu(h) q = MatMul(a, w1) b = Softmax(q) r = MatMul(b, w2) "
        "c = Softmax(r) y = MatMul(c, w3) z = MatMul(a, w4)"
    )
    proto = model(f"(float[n,{D}] x) => (float[n,{M}] y, float[n,{M}] z)", body, **cast(**made))
    data = {"x": noise(6, 300, D).astype(np.float32)}
    config = CompressConfig(param_ratio=0.6, moves=("shrink",), refit=False)
    expected = compress(proto, data, config, dry_run=True).plan
    assert [set(h.sites) for h in expected.shrunk] == [{"w0", "w1", "w4"}]
    groups = []
    collect = _Measuring.collect

    def collected(self, sites, parts):
        groups.append([site.key for site in sites])
        return collect(self, sites, parts)

    def tight(**options: Any) -> Effort:
        return replace(choose_effort(**options), statistics_bytes=1)

    monkeypatch.setattr(_Measuring, "collect", collected)
    monkeypatch.setattr("onnx_utilrank.job.choose_effort", tight)
    plan = compress(proto, data, config, dry_run=True).plan
    assert groups == [["w0"], ["w1", "w4"], ["w2"], ["w3"]]
    assert plan.shrunk == expected.shrunk


def test_losses_are_predicted_on_samples_that_are_left_over(monkeypatch):
    """Where gradients are taken of a part, the rest predicts; else each half does for the other."""
    proto, data = chain()
    seen: list[tuple[list[list[int]], list[int]]] = []
    collect, predict = _Measuring.collect, _Measuring.predict

    def collected(self, sites, parts):
        seen.append(([list(p) for p in parts], []))
        return collect(self, sites, parts)

    def predicted(self, found, fitted, samples):
        seen[-1][1].extend(samples)
        return predict(self, found, fitted, samples)

    monkeypatch.setattr(_Measuring, "collect", collected)
    monkeypatch.setattr(_Measuring, "predict", predicted)
    compress(proto, data, CompressConfig(param_ratio=0.7), dry_run=True)
    monkeypatch.setattr("onnx_utilrank.sensitivity.effort.CHEAP_FLOPS", 1)
    compress(proto, data, CompressConfig(param_ratio=0.7), dry_run=True)
    (halves, both), ((chosen,), rest) = seen
    assert len(halves) == 2
    assert set(halves[0]).isdisjoint(halves[1])
    assert both == halves[1] + halves[0]  # each for the decomposition of the other
    assert rest
    assert set(rest).isdisjoint(chosen)
    assert index(proto).store.proto == proto
