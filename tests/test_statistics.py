"""The laws of moments and factors, on rows few enough to sum by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnx_utilrank.statistics.factorize import (
    Decomposition,
    Metric,
    Utilization,
    balanced,
    eigenbasis,
    energy_rank,
    feature_scale,
    optimal,
    output_error,
    plain_svd,
    utilized,
)
from onnx_utilrank.statistics.moments import SecondMoment, shrinkage

# A shared machine may stall for longer than any deadline.
law = settings(deadline=None, max_examples=60)

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 7)
SIDES = ("inputs", "outputs")
each_variant = pytest.mark.parametrize(
    ("side", "centred"), list(itertools.product(SIDES, (True, False)))
)


def gamma(terms: int, dtype: type = np.float64) -> float:
    """Bound on the relative rounding of a sum of products (Higham 2002, lemma 3.1)."""
    unit = terms * float(np.finfo(dtype).eps) / 2
    return unit / (1 - unit)


def draw_rows(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Correlated rows of a decaying spectrum around a mean that is not 0."""
    decay = 2.0 ** -rng.uniform(0, 3, size=d)
    return (rng.normal(size=(n, d)) * decay) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def draw_layer(seed: int, m: int, d: int, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A weight and rows x, so many that no side is shrunk unless told otherwise."""
    rng = np.random.default_rng(seed)
    n = 4 * max(m, d) + int(rng.integers(5)) if rows is None else rows
    return rng.normal(size=(m, d)), draw_rows(rng, n, d)


def rotation(seed: int, n: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def draw_scale(seed: int, m: int) -> np.ndarray:
    """The diagonal of D, half of the time just ones."""
    rng = np.random.default_rng(seed)
    return 2.0 ** rng.uniform(-2, 2, size=m) if rng.random() < 0.5 else np.ones(m)


def decompose(
    weight: np.ndarray,
    rows: np.ndarray,
    side: str,
    centred: bool,
    scale: np.ndarray | None = None,
) -> Decomposition:
    values = rows if side == "inputs" else rows @ weight.T
    metric = Metric.diagonal(np.ones(len(weight)) if scale is None else scale)
    return optimal(weight, metric, **{side: SecondMoment.of(values)}, centred=centred)


def measured(
    weight: np.ndarray,
    other: np.ndarray,
    rows: np.ndarray,
    centred: bool = False,
    scale: np.ndarray | float = 1.0,
) -> float:
    """E‖D^{-1} (W − Ŵ) x‖² over the rows themselves, with or without their mean."""
    x = rows - rows.mean(0) if centred else rows
    return float(np.mean(np.sum((x @ (weight - other).T / scale) ** 2, axis=1)))


def rounding(weight: np.ndarray, rows: np.ndarray) -> float:
    """What float64 may add to an expected squared output.

    A moment is a sum over n rows, and W M W^T one over d and d more; the eigensolvers are backward
    stable with a modest constant. Centring cancels, so that the size is that of the uncentred
    outputs; for outputs divided by a scale, the weight has to be divided too.
    """
    terms = len(rows) + sum(weight.shape)
    size = np.sum(weight**2) * np.mean(np.sum(rows**2, axis=1))
    return 16 * gamma(terms) * float(size)


# --- moments ------------------------------------------------------------------------------------


def same_moments(a: SecondMoment, b: SecondMoment, magnitude: np.ndarray) -> None:
    """Equal but for the rounding of sums over rows of at most the given magnitudes [n, d]."""
    slack = 2 * gamma(len(magnitude) + 8)
    assert a.rows == b.rows
    assert (np.abs(a.total - b.total) <= slack * magnitude.sum(0)).all()
    assert (np.abs(a.outer - b.outer) <= slack * (magnitude.T @ magnitude)).all()


def split(rng: np.random.Generator, rows: np.ndarray) -> list[np.ndarray]:
    cuts = np.sort(rng.integers(0, len(rows) + 1, size=rng.integers(0, 6)))
    return np.split(rows, cuts)


@law
@given(seed=SEEDS, n=st.integers(1, 30), d=SIZES)
def test_moments_do_not_depend_on_the_split_into_batches(seed, n, d):
    rng = np.random.default_rng(seed)
    rows = draw_rows(rng, n, d)
    moment = SecondMoment.zero(d)
    for batch in split(rng, rows):
        moment.add(total=batch.sum(0), outer=batch.T @ batch, rows=len(batch))
    same_moments(moment, SecondMoment.of(rows), np.abs(rows))


@law
@given(seed=SEEDS, n=st.integers(1, 30), d=SIZES)
def test_moments_do_not_depend_on_the_order_of_merges(seed, n, d):
    rng = np.random.default_rng(seed)
    rows = draw_rows(rng, n, d)
    pieces = [SecondMoment.of(batch) for batch in split(rng, rows)]
    while len(pieces) > 1:
        one, other = rng.permutation(len(pieces))[:2]
        pieces[one].merge(pieces[other])
        del pieces[other]
    same_moments(pieces[0], SecondMoment.of(rows), np.abs(rows))


@law
@given(seed=SEEDS, n=st.integers(1, 30), d=SIZES)
def test_mean_and_covariance_are_those_of_the_rows(seed, n, d):
    rows = draw_rows(np.random.default_rng(seed), n, d)
    moment = SecondMoment.of(rows)
    slack = 8 * gamma(n + 8)
    spread = np.sqrt(np.mean(rows**2, axis=0))
    assert (np.abs(moment.mean - rows.mean(0)) <= slack * np.abs(rows).mean(0)).all()
    exact = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / n
    assert (np.abs(moment.covariance - exact) <= slack * np.outer(spread, spread)).all()
    assert (moment.outer == moment.outer.T).all()


def test_no_rows_have_a_moment_of_zero():
    moment = SecondMoment.zero(3)
    assert not moment.mean.any()
    assert not moment.covariance.any()
    assert not moment.enough_rows


@law
@given(seed=SEEDS, n=st.integers(1, 30), d=SIZES)
def test_a_shifted_moment_is_that_of_shifted_rows(seed, n, d):
    rng = np.random.default_rng(seed)
    rows, offset = draw_rows(rng, n, d), rng.normal(size=d) * 3
    moment = SecondMoment.of(rows)
    before = moment.outer.copy()
    shifted = moment.shifted(offset)
    same_moments(shifted, SecondMoment.of(rows + offset), np.abs(rows) + np.abs(offset))
    assert (moment.outer == before).all()


def far_rows(seed: int, n: int, d: int) -> np.ndarray:
    """float32 rows of variance 1 around means near 30,000."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(2e4, 4e4, size=d) + rng.normal(size=(n, d))).astype(np.float32)


def covariance_of_float32_sums(rows: np.ndarray, shift: np.ndarray | None) -> np.ndarray:
    z = rows if shift is None else rows - shift.astype(np.float32)
    moment = SecondMoment.zero(rows.shape[1])
    moment.add(total=z.sum(0), outer=z.T @ z, rows=len(z), shift=shift)
    return moment.covariance


def two_pass_covariance(rows: np.ndarray) -> np.ndarray:
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(0)
    return centred.T @ centred / len(rows)


@law
@given(seed=SEEDS, n=st.integers(2, 60), d=SIZES, kind=st.sampled_from([np.float32, np.float64]))
def test_a_shift_recovers_the_covariance_from_float32_sums(seed, n, d, kind):
    rows = far_rows(seed, n, d)
    found = covariance_of_float32_sums(rows, rows[0].astype(kind))
    near = np.sqrt(np.mean((rows - rows[0]) ** 2, axis=0, dtype=np.float64))
    far = near + np.abs(rows[0].astype(np.float64))
    slack = 4 * gamma(n + 2, np.float32) * np.outer(near, near)
    slack += 8 * gamma(n + 8) * np.outer(far, far)
    assert (np.abs(found - two_pass_covariance(rows)) <= slack).all()


def test_without_a_shift_float32_sums_lose_the_covariance():
    rows = far_rows(0, 60, 4)
    lost = covariance_of_float32_sums(rows, None) - two_pass_covariance(rows)
    assert np.abs(np.diag(lost)).max() > 10  # the variance is 1


# --- too few rows -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("diagonal", "rows", "weight"),
    [
        # p = 2: ρ = tr² S / ((n + 0) (tr S² − tr² S / 2)) = 16 / (15 · 2)
        ([3, 1], 15, 16 / 30),
        # p = 4: ρ = (½ tr S² + tr² S) / ((n + ½) (tr S² − tr² S / 4)) = 1.5 / (3.5 · 0.75)
        ([1, 0, 0, 0], 3, 1.5 / 2.625),
        ([3, 1], 5, 1.0),
        ([2, 2, 2], 5, 1.0),
        ([7], 5, 1.0),
        ([0, 0], 5, 1.0),
    ],
)
def test_shrinkage_by_hand(diagonal, rows, weight):
    assert shrinkage(np.diag(np.array(diagonal, float)), rows) == pytest.approx(weight, rel=1e-15)


@law
@given(seed=SEEDS, p=SIZES, n=st.integers(1, 40))
def test_shrinkage_lies_between_0_and_1(seed, p, n):
    moment = SecondMoment.of(draw_rows(np.random.default_rng(seed), n, p))
    assert 0 <= shrinkage(moment.covariance, n) <= 1
    assert 0 <= shrinkage(moment.uncentred, n) <= 1


@law
@given(seed=SEEDS, p=st.integers(2, 7), n=st.integers(1, 40))
def test_shrinkage_goes_to_0_as_rows_grow(seed, p, n):
    rng = np.random.default_rng(seed)
    covariance = SecondMoment.of(draw_rows(rng, 3 * p, p)).covariance
    few, more = shrinkage(covariance, n), shrinkage(covariance, 2 * n)
    assert more <= few
    if few < 1:  # (n + 1 − 2/p) / (2n + 1 − 2/p) is at most 2/3 from n = 1 on
        assert more <= few * 2 / 3 * (1 + gamma(8))
    assert shrinkage(covariance, 10**30) < 1e-12


def cancellation(second: np.ndarray) -> float:
    """By how much the spread that a shrinkage divides by is smaller than what it is formed of."""
    square = float(np.trace(second)) ** 2
    spread = float(np.sum(second**2)) - square / len(second)
    return square / max(spread, square * float(np.finfo(float).eps))


@law
@given(seed=SEEDS, p=SIZES, angle=SEEDS)
def test_shrinkage_does_not_depend_on_the_basis(seed, p, angle):
    covariance = SecondMoment.of(draw_rows(np.random.default_rng(seed), p + 3, p)).covariance
    q = rotation(angle, p)
    turned = shrinkage(q @ covariance @ q.T, p + 3)
    slack = 16 * gamma(4 * p) * cancellation(covariance)
    assert turned == pytest.approx(shrinkage(covariance, p + 3), abs=slack)


@pytest.mark.parametrize("side", SIDES)
@law
@given(seed=SEEDS, m=st.integers(2, 7), d=st.integers(2, 7), n=st.integers(2, 6))
def test_the_shrunk_curve_keeps_the_isotropic_share_beyond_the_rank_of_the_sample(
    side, seed, m, d, n
):
    weight, rows = draw_layer(seed, m, d, rows=n)
    values = rows if side == "inputs" else rows @ weight.T
    moment = SecondMoment.of(values)
    mixed = shrinkage(moment.covariance, n)
    plain = plain_svd(weight)
    # S = (1 − ρ) S_sample + ρ α W W^T, and no eigenvalue of S lies below one of its last term.
    level = np.trace(moment.covariance) / (d if side == "inputs" else plain.energy)
    found, slack = decompose(weight, rows, side, True), rounding(weight, rows)
    assert mixed > 0
    assert (found.errors >= mixed * level * plain.errors - slack).all()
    sample = measured(weight, np.zeros_like(weight), rows, True)
    energy = (1 - mixed) * sample + mixed * level * plain.energy
    assert found.energy == pytest.approx(energy, abs=slack)


@pytest.mark.parametrize("side", SIDES)
def test_on_few_rows_shrinking_does_not_raise_the_error_on_others(side):
    m, d, n = (24, 16, 8) if side == "inputs" else (12, 24, 8)
    shrunk, raw = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        weight = rng.normal(size=(m, d))
        root = rotation(seed, d) * 0.8 ** np.arange(d)  # x = root z, z ~ N(0, I)
        rows = rng.normal(size=(n, d)) @ root.T
        best = decompose(weight, rows, side, True)
        _, sample = eigenbasis(weight @ SecondMoment.of(rows).covariance @ weight.T)
        for rank in (2, 4, 8, 10):
            for basis, held_out in ((best.expand, shrunk), (sample, raw)):
                u = basis[:, :rank]
                held_out.append(output_error(weight, u @ u.T @ weight, root @ root.T))
    assert np.mean(shrunk) < np.mean(raw)


@law
@given(seed=SEEDS, d=SIZES)
def test_rows_are_enough_from_four_a_feature_on(seed, d):
    rows = draw_rows(np.random.default_rng(seed), 4 * d, d)
    assert SecondMoment.of(rows).enough_rows
    assert not SecondMoment.of(rows[1:]).enough_rows


# --- the optimal factors ------------------------------------------------------------------------


@each_variant
@law
@given(seed=SEEDS, m=SIZES, d=SIZES, few=st.booleans())
def test_errors_fall_with_the_rank_from_all_to_nothing(side, centred, seed, m, d, few):
    weight, rows = draw_layer(seed, m, d, rows=3 if few else None)
    scale = draw_scale(seed, m)
    found = decompose(weight, rows, side, centred, scale)
    assert found.errors.shape == (min(m, d) + 1,)
    assert (np.diff(found.errors) <= 0).all()
    assert found.errors[-1] == 0
    assert found.errors[0] == pytest.approx(found.energy, rel=gamma(2 * min(m, d)))
    directions = found.expand / scale[:, None]
    for gram in (directions.T @ directions, found.reduce @ found.expand):
        assert np.abs(gram - np.eye(min(m, d))).max() <= 16 * gamma(m + d)


@each_variant
@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_full_rank_gives_the_weight_back(side, centred, seed, m, d):
    weight, rows = draw_layer(seed, m, d)
    scale = draw_scale(seed, m)
    factors = decompose(weight, rows, side, centred, scale).factors(weight, min(m, d))
    lost = measured(weight, factors.product, rows, centred, scale)
    assert lost <= rounding(weight / scale[:, None], rows)


@each_variant
@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_the_predicted_error_is_the_measured_one(side, centred, seed, m, d):
    weight, rows = draw_layer(seed, m, d)
    scale = draw_scale(seed, m)
    found = decompose(weight, rows, side, centred, scale)
    slack = rounding(weight / scale[:, None], rows)
    all_of_it = measured(weight, np.zeros_like(weight), rows, centred, scale)
    assert found.energy == pytest.approx(all_of_it, abs=slack)
    for rank, predicted in enumerate(found.errors):
        factors = found.factors(weight, rank)
        assert factors.rank == rank
        lost = measured(weight, factors.product, rows, centred, scale)
        assert predicted == pytest.approx(lost, abs=slack)


@each_variant
@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_what_a_rank_loses_of_an_output_is_what_its_factors_lose(side, centred, seed, m, d):
    weight, rows = draw_layer(seed, m, d)
    scale = draw_scale(seed, m)
    found = decompose(weight, rows, side, centred, scale)
    reach = np.linalg.norm(weight / scale[:, None]) * np.linalg.norm(rows[0]) * scale.max()
    for rank in range(min(m, d) + 1):
        exact = (weight - found.factors(weight, rank).product) @ rows[0]
        lost = found.lost(weight @ rows[0], rank)
        assert np.abs(lost - exact).max() <= 16 * gamma(m + d) * reach


@each_variant
@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_both_factors_take_an_even_share(side, centred, seed, m, d):
    weight, rows = draw_layer(seed, m, d)
    found = decompose(weight, rows, side, centred, draw_scale(seed, m))
    for rank in range(1, min(m, d) + 1):
        factors = found.factors(weight, rank)
        left, right = np.sum(factors.left**2, axis=0), np.sum(factors.right**2, axis=1)
        assert np.abs(left - right).max() <= 16 * gamma(m + d) * right.sum()


@pytest.mark.parametrize("centred", [True, False])
@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_both_sides_find_the_same_factors(centred, seed, m, d):
    weight, rows = draw_layer(seed, m, d)
    scale = draw_scale(seed, m)
    one, other = (decompose(weight, rows, side, centred, scale) for side in SIDES)
    slack = rounding(weight / scale[:, None], rows)
    assert one.errors == pytest.approx(other.errors, abs=slack)
    spectrum = np.append(-np.diff(one.errors), 0.0)
    for rank in range(1, min(m, d) + 1):
        # Davis and Kahan: a subspace turns by the disturbance over the gap that sets it off.
        gap = spectrum[rank - 1] - spectrum[rank]
        turned = 4 * slack / max(gap, np.finfo(float).tiny)
        difference = one.factors(weight, rank).product - other.factors(weight, rank).product
        size = np.linalg.norm(weight / scale[:, None])
        assert np.linalg.norm(difference / scale[:, None]) <= turned * size


@each_variant
@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_plain_svd_is_never_better(side, centred, seed, m, d):
    weight, rows = draw_layer(seed, m, d)
    scale = draw_scale(seed, m)
    best, plain = decompose(weight, rows, side, centred, scale), plain_svd(weight)
    for rank in range(min(m, d) + 1):
        product = plain.factors(weight, rank).product
        reached = measured(weight, product, rows, centred, scale)
        assert best.errors[rank] <= reached + rounding(weight / scale[:, None], rows)


@each_variant
@law
@given(seed=SEEDS, m=SIZES, d=SIZES, data=st.data())
def test_utilized_factors_are_never_better(side, centred, seed, m, d, data):
    weight, rows = draw_layer(seed, m, d)
    k_s, k_t = data.draw(st.integers(1, d)), data.draw(st.integers(1, m))
    product = utilized(weight, SecondMoment.of(rows)).factors(weight, k_s, k_t).product
    scale = draw_scale(seed, m)
    best = decompose(weight, rows, side, centred, scale).errors[min(k_s, k_t)]
    reached = measured(weight, product, rows, centred, scale)
    assert best <= reached + rounding(weight / scale[:, None], rows)


@each_variant
@law
@given(seed=SEEDS, m=SIZES, d=SIZES, step=st.floats(1e-3, 1.0))
def test_no_step_away_from_the_factors_is_better(side, centred, seed, m, d, step):
    weight, rows = draw_layer(seed, m, d)
    rng, scale = np.random.default_rng(seed), draw_scale(seed, m)
    best = decompose(weight, rows, side, centred, scale)
    for rank in range(1, min(m, d) + 1):
        factors = best.factors(weight, rank)
        left = factors.left + step * rng.normal(size=factors.left.shape)
        right = factors.right + step * rng.normal(size=factors.right.shape)
        reached = measured(weight, left @ right, rows, centred, scale)
        assert best.errors[rank] <= reached + rounding(weight / scale[:, None], rows)


@each_variant
@law
@given(seed=SEEDS, angle=SEEDS, m=SIZES, d=SIZES, few=st.booleans())
def test_an_orthogonal_change_of_input_basis_leaves_the_spectrum(
    side, centred, seed, angle, m, d, few
):
    weight, rows = draw_layer(seed, m, d, rows=2 * max(m, d) if few else None)
    q = rotation(angle, d)
    errors = decompose(weight, rows, side, centred).errors
    turned = decompose(weight @ q.T, rows @ q.T, side, centred).errors
    moment = SecondMoment.of(rows if side == "inputs" else rows @ weight.T)
    slack = 2 * rounding(weight, rows)
    if not moment.enough_rows:
        slack *= 1 + cancellation(moment.covariance if centred else moment.uncentred)
    assert turned == pytest.approx(errors, abs=slack)


def plain_rows(seed: int, n: int, d: int) -> np.ndarray:
    return draw_rows(np.random.default_rng(seed), n, d)


SINGULAR = {
    "inputs in a plane": (np.ones((4, 5)), plain_rows(0, 40, 2) @ np.ones((2, 5))),
    "a dead input": (plain_rows(1, 6, 4), plain_rows(2, 40, 4) * [1, 0, 1, 1]),
    "one input": (plain_rows(3, 5, 1), plain_rows(4, 40, 1)),
    "one output": (plain_rows(5, 1, 6), plain_rows(6, 40, 6)),
    "one of each": (np.ones((1, 1)), plain_rows(7, 40, 1)),
    "constant inputs": (plain_rows(8, 4, 5), np.full((40, 5), 1 / 3)),
    "no signal": (plain_rows(9, 4, 5), np.zeros((40, 5))),
    "zero weight": (np.zeros((5, 3)), plain_rows(10, 40, 3)),
    "no signal and zero weight": (np.zeros((3, 5)), np.zeros((40, 5))),
    "weight of rank one": (np.outer([1.0, 2, 3], [1.0, -1]), plain_rows(11, 40, 2)),
    "a single row": (plain_rows(12, 4, 5), plain_rows(13, 1, 5)),
    "a single row, one input": (plain_rows(14, 4, 1), plain_rows(15, 1, 1)),
    "two rows": (plain_rows(16, 6, 5), plain_rows(17, 2, 5)),
    "no rows": (plain_rows(18, 4, 5), np.zeros((0, 5))),
}


@each_variant
@pytest.mark.parametrize("case", SINGULAR)
def test_singular_covariances_are_fine(side, centred, case):
    weight, rows = SINGULAR[case]
    found = decompose(weight, rows, side, centred)
    assert np.isfinite(found.errors).all()
    assert (found.errors >= 0).all()
    assert np.isfinite(found.energy)
    for rank in range(min(weight.shape) + 1):
        factors = found.factors(weight, rank)
        assert np.isfinite(factors.left).all()
        assert np.isfinite(factors.right).all()
        if len(rows) >= 4 * max(weight.shape):
            lost = measured(weight, factors.product, rows, centred)
            assert found.errors[rank] == pytest.approx(lost, abs=rounding(weight, rows))


@pytest.mark.parametrize("centred", [True, False])
@law
@given(seed=SEEDS, m=SIZES, d=SIZES, n=st.integers(1, 30))
def test_a_decomposition_leaves_what_it_was_given_alone(centred, seed, m, d, n):
    weight, rows = draw_layer(seed, m, d, rows=n)
    for side, values in (("inputs", rows), ("outputs", rows @ weight.T)):
        moment, metric = SecondMoment.of(values), Metric.diagonal(draw_scale(seed, m))
        given_ones = (weight, metric.root_t, moment.outer, moment.total)
        before = [array.copy() for array in given_ones]
        optimal(weight, metric, **{side: moment}, centred=centred)
        assert all((a == b).all() for a, b in zip(given_ones, before, strict=True))


@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_plain_svd_has_the_least_error_of_the_weight(seed, m, d):
    weight, _ = draw_layer(seed, m, d)
    found = plain_svd(weight)
    slack = 16 * gamma(m + d) * np.sum(weight**2)
    assert (np.diff(found.errors) <= 0).all()
    assert found.energy == pytest.approx(np.sum(weight**2), abs=slack)
    for rank, predicted in enumerate(found.errors):
        lost = np.sum((weight - found.factors(weight, rank).product) ** 2)
        assert predicted == pytest.approx(lost, abs=slack)


@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_the_output_error_is_the_mean_over_the_rows(seed, m, d):
    weight, rows = draw_layer(seed, m, d)
    other = np.random.default_rng(seed + 1).normal(size=(m, d))
    exact = measured(weight, other, rows)
    found = output_error(weight, other, SecondMoment.of(rows).uncentred)
    assert found == pytest.approx(exact, abs=rounding(np.abs(weight) + np.abs(other), rows))


@law
@given(seed=SEEDS, m=SIZES, d=SIZES, data=st.data())
def test_balancing_keeps_the_product_and_evens_the_norms(seed, m, d, data):
    rank = data.draw(st.integers(1, min(m, d)))
    left, right = rotation(seed, m)[:, :rank], draw_layer(seed, rank, d)[0]
    factors = balanced(left, right)
    size = np.linalg.norm(right)
    slack = 16 * gamma(m + d)
    assert np.linalg.norm(factors.product - left @ right) <= slack * size
    columns, rows = np.sum(factors.left**2, axis=0), np.sum(factors.right**2, axis=1)
    assert np.abs(columns - rows).max() <= slack * size


@law
@given(seed=SEEDS, n=SIZES, rank=SIZES)
def test_eigenvalues_descend_and_are_not_negative(seed, n, rank):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, rank))
    matrix = root @ root.T
    values, vectors = eigenbasis(matrix)
    slack = 16 * gamma(n + rank) * np.trace(matrix)
    assert (values >= 0).all()
    assert (np.diff(values) <= 0).all()
    assert np.abs((vectors * values) @ vectors.T - matrix).max() <= slack


def test_an_eigenvalue_that_rounding_made_negative_is_0():
    values, _ = eigenbasis(np.diag([1.0, -1e-17]))
    assert values.tolist() == [1.0, 0.0]


# --- the scale of features ----------------------------------------------------------------------


@law
@given(
    variances=st.lists(st.just(0.0) | st.floats(1e-9, 1e9), min_size=1, max_size=8).map(np.array)
)
def test_outputs_are_scaled_by_a_root_of_their_deviation_with_a_floor(variances):
    scale = feature_scale(variances)
    assume(variances.any())
    floored = np.maximum(variances, 1e-6 * np.mean(variances))
    assert scale**8 == pytest.approx(floored, rel=8 * gamma(8))


@pytest.mark.parametrize("variances", [[0.0, 0.0], [1e-20, -1e-18], [-1e-18], [5e-324, 0.0]])
def test_outputs_without_variance_are_not_scaled(variances):
    assert feature_scale(np.array(variances)).tolist() == [1.0] * len(variances)


# --- the subspaces that a layer uses ------------------------------------------------------------


ENERGIES = st.floats(0.0, 1.0)
SPECTRA = st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=1, max_size=8).map(
    lambda values: np.array(sorted(values, reverse=True))
)


@law
@given(values=SPECTRA, energies=st.tuples(ENERGIES, ENERGIES))
def test_the_energy_rank_grows_with_the_energy_up_to_full(values, energies):
    low, high = sorted(energies)
    assert 1 <= energy_rank(values, low) <= energy_rank(values, high)
    assert energy_rank(values, high) <= energy_rank(values, 1.0) == len(values)


@law
@given(values=SPECTRA, energy=st.floats(1e-6, 1.0, exclude_max=True))
def test_the_energy_rank_is_the_least_that_holds_the_energy(values, energy):
    assume(values.any())
    k = energy_rank(values, energy)
    slack = 4 * gamma(len(values))
    assert values[:k].sum() >= values.sum() * (energy - slack)
    assert values[: k - 1].sum() < values.sum() * (energy + slack)


def find_subspaces(
    seed: int, m: int, d: int, n: int | None = None
) -> tuple[np.ndarray, np.ndarray, Utilization]:
    weight, rows = draw_layer(seed, m, d, n)
    return weight, rows, utilized(weight, SecondMoment.of(rows))


def mean_energy(rows: np.ndarray) -> float:
    return float(np.mean(np.sum(rows**2, axis=1)))


@law
@given(seed=SEEDS, m=SIZES, d=SIZES, energy=ENERGIES)
def test_the_subspaces_hold_the_energy_of_the_rows(seed, m, d, energy):
    weight, rows, found = find_subspaces(seed, m, d)
    k_s, k_t = found.ranks(energy)
    for values, basis, k in (
        (rows, found.input_basis, k_s),
        (rows @ weight.T, found.output_basis, k_t),
    ):
        total = mean_energy(values)
        slack = rounding(np.eye(d), rows) + rounding(weight, rows)
        assert mean_energy(values @ basis[:, :k]) >= energy * total - slack
        if energy < 1:
            assert mean_energy(values @ basis[:, : k - 1]) <= energy * total + slack


@law
@given(seed=SEEDS, m=SIZES, d=SIZES, n=st.none() | SIZES, data=st.data())
def test_utilized_factors_are_the_weight_between_both_projectors(seed, m, d, n, data):
    weight, _, found = find_subspaces(seed, m, d, n)
    k_s, k_t = data.draw(st.integers(1, d)), data.draw(st.integers(1, m))
    factors = found.factors(weight, k_s, k_t)
    s, t = found.input_basis[:, :k_s], found.output_basis[:, :k_t]
    if k_t >= min(m, d):  # all outputs that W has, whatever the data leave at zero
        t = np.eye(m)
    slack = 16 * gamma(m + d) * np.linalg.norm(weight)
    assert factors.rank == min(k_s, k_t)
    assert np.linalg.norm(factors.product - t @ t.T @ weight @ s @ s.T) <= slack
    columns, rows = np.sum(factors.left**2, axis=0), np.sum(factors.right**2, axis=1)
    assert np.abs(columns - rows).max() <= slack


@law
@given(seed=SEEDS, m=SIZES, d=SIZES, n=st.none() | SIZES)
def test_full_subspaces_give_the_weight_back(seed, m, d, n):
    weight, _, found = find_subspaces(seed, m, d, n)
    assert found.ranks(1.0) == (d, m)
    lost = np.linalg.norm(found.factors(weight, d, m).product - weight)
    assert lost <= 16 * gamma(m + d) * np.linalg.norm(weight)


@law
@given(seed=SEEDS, m=st.integers(2, 7), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_metric_of_a_matrix_that_rounding_made_indefinite(seed: int, m: int, scale: float):
    """Gradients at the inputs of a weight that ignores some lie in a subspace, but for rounding."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((3 * m, m - 1)) @ rng.standard_normal((m - 1, m))
    rounding = float(np.finfo(np.float32).eps) * float(np.linalg.norm(g.T @ g, 2)) * scale / 4
    held = scale * (g.T @ g) - rounding * np.eye(m)
    assert np.linalg.eigvalsh(held)[0] < 0
    metric = Metric.of(held)
    assert np.array_equal(metric.root_t, np.triu(metric.root_t))
    np.testing.assert_allclose(metric.root_t.T @ metric.root_t, held, rtol=0, atol=8 * rounding)
    identity = metric.root_t @ metric.undone(np.eye(m))
    np.testing.assert_allclose(identity, np.eye(m), rtol=0, atol=1e-9)
