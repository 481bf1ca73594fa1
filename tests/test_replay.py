"""Plans that are replayed: what they say of losses and sizes is what they do, edited or not."""

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Feed, constants, model, noise

from onnx_utilrank import CompressConfig, ModelError, RankPlan, compress

D, H, K = 24, 64, 20


def network() -> onnx.ModelProto:
    """Units between two weights, a weight without neighbours that could shrink, and a Conv."""
    weights = {
        "U": noise(1, D, H) / math.sqrt(D),
        "V": noise(2, H, K) / math.sqrt(H),
        "b": noise(3, K),
        "C": noise(4, 18, 1, 3, 3),
        "shape": np.array([-1, 1, 4, 5]),
        "flat": np.array([-1, 18 * 6]),
        "E": noise(5, 18 * 6, 30) / 10.0,
    }
    body = """h = MatMul(x, U) a = Relu(h) v = Gemm(a, V, b) t = Tanh(v)
        m = Reshape(t, shape) c = Conv(m, C) s = Softplus(c) f = Reshape(s, flat)
        y = MatMul(f, E)"""
    held = {k: v.astype(np.float32) if v.dtype == float else v for k, v in weights.items()}
    return model(f"(float[n,{D}] x) => (float[n,30] y)", body, **held)


def data() -> Feed:
    x = noise(9, 400, D) * 0.85 ** np.arange(D)
    return {"x": x.astype(np.float32)}


CONFIGS = {
    "two-sided": CompressConfig(param_ratio=0.7),
    "two-sided, no units": CompressConfig(param_ratio=0.75, moves=("low-rank", "pivot")),
    "two Convs": CompressConfig(param_ratio=0.75, moves=("separable", "low-rank")),
    "one-sided": CompressConfig(param_ratio=0.5, method="one-sided"),
    "utilized-rank": CompressConfig(energy=0.95, method="utilized-rank"),
    "svd": CompressConfig(param_ratio=0.5, method="svd"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def plan(request: pytest.FixtureRequest) -> RankPlan:
    found = compress(network(), data(), CONFIGS[request.param]).plan
    assert len(found.factored) + len(found.shrunk) > 1
    return found


def close(one: Any, other: Any) -> bool:
    """Whether two things are the same, numbers up to the order of sums."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == other)


def test_a_plan_that_was_not_edited_says_the_same(plan: RankPlan):
    again = compress(network(), data(), plan=plan).plan
    assert again.fingerprint() == plan.fingerprint()
    assert close(asdict(again), asdict(plan))


def test_a_plan_that_was_edited_says_what_it_does_now(plan: RankPlan):
    entries = tuple(
        replace(e, rank=_less(e.rank), subspaces=e.subspaces and tuple(map(_less, e.subspaces)))
        for e in plan.entries
    )
    hidden = tuple(replace(h, kept=_less(h.kept)) for h in plan.hidden)
    edited = replace(plan, entries=entries, hidden=hidden, refit=False)
    foreseen = compress(network(), data(), plan=edited, dry_run=True).plan
    result = compress(network(), data(), plan=edited)
    made = result.plan
    assert made.fingerprint() == edited.fingerprint() != plan.fingerprint()
    stored = sum(value.size for value in constants(result.model).values())
    assert made.parameters_after == stored < plan.parameters_after
    # Reshapes get targets of their own, and a bias may come on top.
    assert foreseen.parameters_after == pytest.approx(stored, abs=2 * H)
    for before, after in zip(plan.entries, made.entries, strict=True):
        if after.rank != before.rank:
            assert str(after.rank) in after.reason
            assert after.parameters_after < before.parameters_after
            if before.predicted_error is not None:
                assert after.predicted_error > before.predicted_error
    for before, after in zip(plan.hidden, made.hidden, strict=True):
        if after.kept is not None:
            assert after.reason == f"{after.kept} of {after.size} hidden units"
            assert after.predicted_error > before.predicted_error
    if plan.predicted_divergence is None:
        assert made.predicted_divergence is None
        return
    every = [e.predicted_error for e in made.entries] + [h.predicted_error for h in made.hidden]
    assert made.predicted_divergence == pytest.approx(sum(every))
    assert made.predicted_divergence > 2 * plan.predicted_divergence
    assert 0.3 < result.quality.divergence.mean / made.predicted_divergence < 3


def test_what_a_plan_no_longer_changes_is_as_it_was(plan: RankPlan):
    last = plan.factored[-1].site if plan.factored else None
    entries = tuple(replace(e, rank=None, move=None) if e.site == last else e for e in plan.entries)
    hidden = tuple(replace(h, kept=None) for h in plan.hidden)
    edited = replace(plan, entries=entries, hidden=hidden, refit=False)
    foreseen = compress(network(), data(), plan=edited, dry_run=True).plan
    assert foreseen.parameters_after > plan.parameters_after
    if foreseen.changes:
        result = compress(network(), data(), CompressConfig(force=True), plan=edited)
        stored = sum(value.size for value in constants(result.model).values())
        assert foreseen.parameters_after == pytest.approx(stored, abs=2 * H)
    for entry in foreseen.entries:
        if entry.rank is None:
            assert entry.parameters_after == entry.parameters_before
            assert not entry.predicted_error
            assert entry.move is None
    assert not any(h.predicted_error for h in foreseen.hidden)
    (found,) = (e for e in foreseen.entries if e.site == last) if last else [None]
    assert found is None or found.reason == "the plan says so"


def test_a_plan_that_changes_what_no_output_depends_on_is_refused():
    body = "h = MatMul(x, U) z = MatMul(h, V) k = MatMul(x, W) g = Mul(k, zero) y = Add(z, g)"
    held = {"U": noise(1, D, 40), "V": noise(2, 40, 30), "W": noise(3, D, 30), "zero": np.zeros(1)}
    cast = {name: values.astype(np.float32) for name, values in held.items()}
    proto = model(f"(float[n,{D}] x) => (float[n,30] y)", body, **cast)
    plan = compress(proto, data(), CompressConfig(param_ratio=0.6), dry_run=True).plan
    blind = CompressConfig(param_ratio=0.6, method="svd")
    (entry,) = (
        e for e in compress(proto, data(), blind, dry_run=True).plan.entries if e.site == "W"
    )
    entry = replace(entry, rank=3, move="low-rank", bias=False)
    with pytest.raises(ModelError, match="'k': the plan changes 'W', but no output depends on it"):
        compress(proto, data(), plan=replace(plan, entries=(*plan.entries, entry)))


def test_losses_that_were_not_measured_are_not_made_up():
    config = CONFIGS["two-sided, no units"]
    plan = compress(network(), data(), config, dry_run=True).plan
    first = next(e for e in plan.factored if e.bias)
    entries = tuple(replace(e, bias=False) if e is first else e for e in plan.entries)
    made = compress(network(), data(), plan=replace(plan, entries=entries)).plan
    (edited,) = (e for e in made.entries if e.site == first.site)
    assert edited.predicted_error is None
    assert made.predicted_divergence is None
    assert made.to_json()


def _less(number: int | None) -> int | None:
    return None if number is None else max(number - max(number // 5, 1), 1)
