"""Which hidden units to keep: laws of the choice, and the loss that is predicted for it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from builders import model, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hidden import hidden_of, shrinking
from test_sensitivity import judged
from test_units import IN, OUT, D, M, N, T, held

from onnx_utilrank.moves.shrink import Basis
from onnx_utilrank.ranking.inner import Units
from onnx_utilrank.ranking.two_sided import reading, two_sided_site
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sites.find import site_matrix
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.selection import RIDGE, select, select_together
from onnx_utilrank.statistics.sensitivity import Sensitivity
from onnx_utilrank.surgery.rewrite import rewrite

# A shared machine may stall for longer than any deadline.
law = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**32 - 1)


# --- the choice ---------------------------------------------------------------------------------


def spread(rng: np.random.Generator, n: int, rank: int) -> np.ndarray:
    """A second moment of this rank, features of other sizes each."""
    rows = rng.normal(size=(rank, n)) * np.exp(rng.normal(size=n))
    return rows.T @ rows / max(rank, 1)


def lost(root: np.ndarray, second: np.ndarray, turn: np.ndarray) -> float:
    rest = root @ (np.eye(len(second)) - turn)
    return float(np.sum((rest @ second) * rest))


def ridge(second: np.ndarray) -> np.ndarray:
    variances = np.diagonal(second)
    return RIDGE * (variances + variances.mean()) if variances.any() else np.ones(len(second))


CASES = {"n": st.integers(1, 8), "q": st.integers(1, 6), "rank": st.integers(0, 12)}


@law
@given(seed=SEEDS, **CASES)
def test_errors_are_those_of_what_is_kept(seed, n, q, rank):
    rng = np.random.default_rng(seed)
    root, second = rng.normal(size=(q, n)), spread(rng, n, rank)
    found = select(root, second).found
    assert found.errors.shape == (n + 1,)
    assert (np.diff(found.errors) <= 0).all()
    assert found.errors[-1] == 0
    assert found.energy == pytest.approx(lost(root, second, np.zeros((n, n))))
    assert found.errors[0] == pytest.approx(found.energy)
    level = ridge(second).max()
    for kept in range(n + 1):
        turn = found.kept(kept)
        # The ridge that the choice was made with counts on both sides of the equation.
        slack = level * (np.sum(root**2) + np.sum((root @ (np.eye(n) - turn)) ** 2))
        slack *= float(np.trace(second) > 0)
        expected = lost(root, second, turn)
        # Sums of squares are told apart from 0 up to the rounding of all that is subtracted.
        atol = slack + 1e-12 * n * n * (1 + found.energy)
        assert found.errors[kept] == pytest.approx(expected, rel=1e-9, abs=atol)


@law
@given(seed=SEEDS, **CASES)
def test_what_is_kept_is_kept_as_it_is(seed, n, q, rank):
    rng = np.random.default_rng(seed)
    root, second = rng.normal(size=(q, n)), spread(rng, n, rank)
    chosen = select(root, second)
    assert sorted(chosen.order) == list(range(n))
    # What is left of a feature may come down to the ridge alone.
    atol = 1e-14 * n * n / RIDGE
    for kept in range(1, n + 1):
        expand, choice = chosen.basis(kept)
        assert expand.shape == (n, kept)
        picks = np.sort(chosen.order[:kept])
        np.testing.assert_array_equal(choice, picks)
        np.testing.assert_allclose(
            expand @ np.eye(n)[choice], chosen.found.kept(kept), rtol=0, atol=atol
        )
        np.testing.assert_allclose(expand[picks], np.eye(kept), rtol=0, atol=atol)
    np.testing.assert_allclose(chosen.found.kept(n), np.eye(n), rtol=0, atol=atol)
    mean = rng.normal(size=n)
    np.testing.assert_allclose(chosen.found.lost(mean, n), 0, rtol=0, atol=n * atol)


@law
@given(seed=SEEDS, n=st.integers(2, 7), q=st.integers(1, 6))
def test_every_pick_is_the_best_next_one(seed, n, q):
    """By brute force: the others are regressed on each set that the next pick could make."""
    rng = np.random.default_rng(seed)
    root, second = rng.normal(size=(q, n)), spread(rng, n, 3 * n)
    chosen = select(root, second)
    eased = second + np.diag(ridge(second))

    def left(picks: Sequence[int]) -> float:
        turn = np.zeros((n, n))
        turn[:, picks] = np.linalg.solve(eased[np.ix_(picks, picks)], eased[picks]).T
        return lost(root, eased, turn)

    for k in range(n):
        before = [int(j) for j in chosen.order[:k]]
        best = min(left([*before, j]) for j in range(n) if j not in before)
        made = left([*before, int(chosen.order[k])])
        assert made == pytest.approx(best, rel=1e-8, abs=1e-10 * lost(root, eased, 0 * second))
        # Nothing linear makes up better for the others than their regression does.
        bent = chosen.found.kept(k + 1)
        assert lost(root, eased, bent) == pytest.approx(
            made, rel=1e-6, abs=1e-9 * chosen.found.energy
        )


def views(seed: int, n: int, count: int, rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same features as several see them, of other sizes each."""
    rng = np.random.default_rng(seed)
    return [
        (np.exp(rng.normal()) * rng.normal(size=(1 + k, n)), spread(rng, n, rank))
        for k in range(count)
    ]


@law
@given(seed=SEEDS, n=st.integers(1, 8), rank=st.integers(0, 12), count=st.integers(1, 3))
def test_several_keep_the_same_and_each_makes_up_for_the_others(seed, n, rank, count):
    seen = views(seed, n, count, rank)
    chosen = select_together(seen)
    for (root, second), own in zip(seen, chosen, strict=True):
        np.testing.assert_array_equal(own.order, chosen[0].order)
        level = ridge(second).max() * float(np.trace(second) > 0)
        for kept in range(n + 1):
            turn = own.found.kept(kept)
            slack = level * (np.sum(root**2) + np.sum((root @ (np.eye(n) - turn)) ** 2))
            atol = slack + 1e-12 * n * n * (1 + own.energy)
            assert own.errors[kept] == pytest.approx(lost(root, second, turn), rel=1e-9, abs=atol)


@law
@given(seed=SEEDS, n=st.integers(2, 6), count=st.integers(2, 3))
def test_every_pick_is_the_best_next_one_for_all_together(seed, n, count):
    seen = views(seed, n, count, 3 * n)
    order = select_together(seen)[0].order
    eased = [(root, second + np.diag(ridge(second))) for root, second in seen]

    def left(picks: Sequence[int]) -> float:
        total = 0.0
        for root, second in eased:
            turn = np.zeros((n, n))
            turn[:, picks] = np.linalg.solve(second[np.ix_(picks, picks)], second[picks]).T
            total += lost(root, second, turn)
        return total

    energy = sum(lost(root, second, 0 * second) for root, second in eased)
    for k in range(n):
        before = [int(j) for j in order[:k]]
        best = min(left([*before, j]) for j in range(n) if j not in before)
        assert left([*before, int(order[k])]) == pytest.approx(best, rel=1e-8, abs=1e-10 * energy)


@law
@given(seed=SEEDS, n=st.integers(100, 160))
def test_first_pick_among_many_is_the_best_one(seed, n):
    """Where several are chosen between two looks at all."""
    rng = np.random.default_rng(seed)
    root, second = rng.normal(size=(8, n)), spread(rng, n, 2 * n)
    chosen = select(root, second)
    eased = second + np.diag(ridge(second))
    scores = np.sum((root @ eased) ** 2, 0) / np.diag(eased)
    assert scores[chosen.order[0]] == pytest.approx(scores.max(), rel=1e-9)
    assert sorted(chosen.order) == list(range(n))
    errors = chosen.found.errors
    for kept in (1, 7, n // 2, n - 1):
        expected = lost(root, eased, chosen.found.kept(kept))
        slack = ridge(second).max() * np.sum(root**2)
        assert errors[kept] == pytest.approx(expected - slack, rel=1e-6, abs=2 * slack)


@law
@given(seed=SEEDS, n=st.integers(1, 6), copies=st.integers(1, 6))
def test_one_of_two_equal_features_is_enough(seed, n, copies):
    rng = np.random.default_rng(seed)
    copies = min(copies, n)
    rows = rng.normal(size=(20 * n, n))
    rows = np.concatenate([rows, rows[:, :copies] * rng.uniform(0.5, 2, copies)], 1)
    second = rows.T @ rows / len(rows)
    root = rng.normal(size=(4, n + copies))
    chosen = select(root, second)
    kept = {int(j) for j in chosen.order[:n]}
    for j in range(copies):
        assert (j in kept) != (n + j in kept)
    # No more than the ridge does to each of those that were left out.
    slack = ridge(second).max() * np.sum(root**2) * 10
    assert lost(root, second, chosen.found.kept(n)) <= slack
    assert chosen.found.errors[n] <= slack


@law
@given(seed=SEEDS, n=st.integers(1, 20), copies=st.integers(1, 60))
def test_features_that_repeat_others_are_told_apart_from_rounding(seed, n, copies):
    """Their second moment, from sums of float32 products, has negative eigenvalues."""
    rng = np.random.default_rng(seed)
    rows = np.maximum(rng.normal(size=(200, n)), 0).astype(np.float32)
    scale = np.exp(rng.normal(size=copies)).astype(np.float32)
    rows = np.concatenate([rows, rows[:, rng.integers(0, n, copies)] * scale], 1)
    second = (rows.T @ rows).astype(np.float64) / len(rows)
    mean = rows.mean(0, dtype=np.float64)
    root = rng.normal(size=(5, n + copies))
    chosen = select(root, second - np.outer(mean, mean))
    assert sorted(chosen.order) == list(range(n + copies))
    assert np.isfinite(chosen.found.expand).all()
    assert np.isfinite(chosen.found.reduce).all()
    # All that is left is rounding and the ridge that it asked for.
    assert chosen.found.errors[n] <= 1e-4 * chosen.found.energy
    exact = rows.astype(np.float64) - mean
    gone = exact @ (np.eye(n + copies) - chosen.found.kept(n)).T @ root.T
    assert np.sum(gone**2) <= 1e-4 * np.sum((exact @ root.T) ** 2)


@law
@given(seed=SEEDS, n=st.integers(1, 6), still=st.integers(1, 4))
def test_features_that_never_vary_go_first(seed, n, still):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(20 * n, n))
    places = rng.permutation(n + still)
    second = np.zeros((n + still, n + still))
    second[np.ix_(places[:n], places[:n])] = rows.T @ rows / len(rows)
    chosen = select(rng.normal(size=(n + 2, n + still)), second)
    assert {int(j) for j in chosen.order[:n]} == {int(j) for j in places[:n]}
    assert (chosen.found.errors[n:] <= 1e-5 * chosen.found.energy).all()


@pytest.mark.parametrize("n", [1, 5])
def test_nothing_that_varies_costs_nothing(n: int):
    chosen = select(np.ones((2, n)), np.zeros((n, n)))
    assert sorted(chosen.order) == list(range(n))
    np.testing.assert_array_equal(chosen.found.errors, 0)
    np.testing.assert_allclose(chosen.found.kept(n), np.eye(n), atol=1e-12)


# --- prediction ---------------------------------------------------------------------------------


LINEAR = {
    "wide": ("a = Identity(h)", M),
    "tall": ("a = Identity(h)", N + 3),
    "square": ("a = Mul(h, gain)", N),
    "always positive": ("a = Relu(h)", M),
}


@pytest.mark.parametrize("name", LINEAR)
def test_predicted_loss_of_a_linear_model_is_the_measured_one(name: str):
    between, outputs = LINEAR[name]
    known = held()
    weights = {"w1": np.abs(known["w1"]), "b1": known["b1"], "gain": known["gain"]}
    weights["b1"] = np.abs(weights["b1"])
    weights |= {"w2": noise(60, N, outputs), "b2": noise(61, outputs)}
    if "gain" not in between:
        del weights["gain"]
    cast = {key: value.astype(np.float32) for key, value in weights.items()}
    signature = f"(float[n,{T},{D}] x) => (float[n,{T},{outputs}] y)"
    proto = model(signature, IN + between + OUT, **cast)
    runs = [{"x": np.abs(noise(k, 4, T, D)).astype(np.float32)} for k in range(6)]
    loss, recorder = judged(proto, runs)
    graph, sites, (units,) = hidden_of(proto, {"x": runs[0]["x"][:1]})
    reader = sites[units.readers[0]]
    weight = site_matrix(graph, reader)
    x = np.concatenate([f["x"] for f in runs]).reshape(-1, D).astype(np.float64)
    rows = (x @ cast["w1"] + cast["b1"]) * cast.get("gain", 1.0)
    gamma = np.eye(outputs) / loss.variance
    seen = Sensitivity(
        moment=SecondMoment.of(rows @ weight.T if reader.wide else rows),
        gamma=gamma if reader.wide else weight.T @ gamma @ weight,
        samples=1,
        decisions=10**9,
    )
    assert reader.wide == (name != "tall")
    site = two_sided_site(reader, weight, seen, 0)
    (ranked,) = Units.of([reading(site, weight, seen, SecondMoment.of(rows), None)])
    site = replace(site, units=ranked)
    for kept in range(1, N):
        expand, choice = site.units.selection.basis(kept)
        bases = [Basis(expand=expand, reduce=np.eye(len(expand))[choice])]
        what = shrinking(graph, sites, units, bases)
        what = replace(what, lost={reader.key: site.units.lost(weight, kept)})
        made = recorder.compare(open_session(rewrite(graph, [], [what]), CPU)).mean
        predicted = site.shrunk_error(units, kept)
        assert made == pytest.approx(predicted, rel=1e-4, abs=1e-6 * site.units.errors[0])
    assert predicted > 1e-5
