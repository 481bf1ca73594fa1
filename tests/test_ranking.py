"""What methods offer, and how a budget is spent on it."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import ConfigError
from onnx_utilrank.moves.low_rank import LOW_RANK
from onnx_utilrank.ranking.budget import allocate, spend
from onnx_utilrank.ranking.method import (
    Choice,
    Measured,
    Move,
    candidate_ranks,
    fast_multiple,
    site_moment,
)
from onnx_utilrank.ranking.methods import METHODS, find_method
from onnx_utilrank.ranking.one_sided import ONE_SIDED, OneSidedSite
from onnx_utilrank.ranking.plain_svd import PLAIN_SVD
from onnx_utilrank.ranking.two_sided import TWO_SIDED
from onnx_utilrank.ranking.utilized_rank import UTILIZED_RANK, UtilizedSite, at_energy
from onnx_utilrank.sites.site import BiasSlot, RowView, Site, Use
from onnx_utilrank.statistics.factorize import Metric, feature_scale, optimal
from onnx_utilrank.statistics.moments import SecondMoment

# A shared machine may stall for longer than any deadline.
law = settings(deadline=None, max_examples=60)

EPS = float(np.finfo(np.float64).eps)
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 7)
BIASES = ("input", "add", "new", "none")


def use(m: int, d: int, bias: str = "input", *, node: int = 0, outputs: bool = True) -> Use:
    return Use(
        node=node,
        label=f"node {node}",
        op_type="Gemm",
        weight="w",
        layout="transB",
        m=m,
        d=d,
        inputs=RowView(tensor=f"x{node}", axis=-1, width=d),
        result=RowView(tensor=f"y{node}", axis=-1, width=m),
        affine=outputs,
        bias=BiasSlot(kind=bias),
    )


def site(m: int, d: int, *uses: Use, freed: bool = True) -> Site:
    return Site(
        key="w",
        op_type="Gemm",
        weight="w",
        uses=uses or (use(m, d),),
        m=m,
        d=d,
        dtype=np.dtype(np.float32),
        stored=np.dtype(np.float32),
        freed=freed,
    )


def draw_layer(seed: int, m: int, d: int, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A weight and rows around a mean, so many that no side is shrunk unless told otherwise."""
    rng = np.random.default_rng(seed)
    n = 4 * max(m, d) if rows is None else rows
    decay = 2.0 ** -rng.uniform(0, 3, size=d)
    x = (rng.normal(size=(n, d)) * decay) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    return rng.normal(size=(m, d)), x


def mean_energy(rows: np.ndarray) -> float:
    return float(np.mean(np.sum(rows**2, axis=1)))


def rounding(weight: np.ndarray, rows: np.ndarray) -> float:
    """What float64 may add to an expected squared output: sums over n rows, d inputs, m outputs."""
    terms = len(rows) + sum(weight.shape)
    return 16 * terms * EPS * float(np.sum(weight**2)) * mean_energy(rows)


# --- one budget over all sites ------------------------------------------------------------------


def choice(*moves: tuple[int, float]) -> Choice:
    """Moves of the given costs and errors, on a site that does not matter."""
    found = PLAIN_SVD.measure(site(2, 2), np.eye(2), None, 0)
    return Choice(
        measured=found,
        moves=tuple(
            Move(rank=k + 1, bias=False, parameters=1000 - k, error=error, cost=cost)
            for k, (cost, error) in enumerate(moves)
        ),
    )


def offered(found: Measured, multiple: int, *, force: bool) -> list[Move]:
    """The low-rank moves of a site as a budget of parameters sees them."""
    top = LOW_RANK.top_rank(found.site)
    ranks = candidate_ranks(found.site, top, multiple, force=force)
    return [dataclasses.replace(m, cost=m.parameters) for m in found.moves(ranks)]


def spent(moves: list[Move]) -> float:
    return sum(m.cost for m in moves)


def total_error(moves: list[Move]) -> float:
    return sum(m.error for m in moves)


def draw_choices(seed: int, sites: int) -> list[Choice]:
    """Sites with moves of any shape, half of the time from so few values that there are ties."""
    rng = np.random.default_rng(seed)
    ties = rng.random() < 0.5
    choices = []
    for _ in range(sites):
        n = int(rng.integers(1, 7))
        costs = rng.integers(0, 13, size=n).tolist()
        errors = rng.integers(0, 5, size=n) / 4 if ties else rng.uniform(0, 3, size=n)
        choices.append(choice(*zip(costs, errors.tolist(), strict=True)))
    return choices


def draw_convex(seed: int, sites: int) -> list[Choice]:
    """Sites whose errors fall by less and less a parameter down to 0, in whole numbers."""
    rng = np.random.default_rng(seed)
    choices = []
    for _ in range(sites):
        n = int(rng.integers(0, 5))
        slopes, steps = np.sort(rng.integers(0, 6, size=n))[::-1], rng.integers(1, 6, size=n)
        costs = np.cumsum([rng.integers(0, 6), *steps]).tolist()
        gains = slopes * steps
        errors = [float(gains[k:].sum()) for k in range(n + 1)]
        moves = list(zip(costs, errors, strict=True))
        choices.append(choice(*(moves[k] for k in rng.permutation(n + 1))))
    return choices


CHOICES = st.builds(draw_choices, SEEDS, st.integers(0, 5))
CONVEX = st.builds(draw_convex, SEEDS, st.integers(1, 4))


@st.composite
def budgets(draw: st.DrawFn, sites: st.SearchStrategy[list[Choice]]) -> tuple[list[Choice], int]:
    """Sites, and a budget between the least and the most that they can take."""
    choices = draw(sites)
    least = sum(min(m.cost for m in c.moves) for c in choices)
    most = sum(max(m.cost for m in c.moves) for c in choices)
    return choices, draw(st.integers(least, most))


def least_error(choices: list[Choice], budget: int) -> float:
    """By trying everything."""
    taken = itertools.product(*(c.moves for c in choices))
    return min(total_error(moves) for moves in taken if spent(moves) <= budget)


@law
@given(choices=CHOICES, budget=st.integers(-5, 70))
def test_a_budget_is_never_exceeded_and_refused_only_where_nothing_fits(choices, budget):
    least = sum(min(m.cost for m in c.moves) for c in choices)
    taken = allocate(choices, budget)
    assert (taken is None) == (least > budget)
    if taken is not None:
        assert len(taken) == len(choices)
        assert all(move in c.moves for move, c in zip(taken, choices, strict=True))
        assert spent(taken) <= budget


@law
@given(case=budgets(CHOICES))
def test_no_site_could_still_be_improved_within_the_budget(case):
    choices, budget = case
    taken = allocate(choices, budget)
    assert taken is not None
    left = budget - spent(taken)
    for move, c in zip(taken, choices, strict=True):
        affordable = [m for m in c.moves if m.cost - move.cost <= left]
        assert min(m.error for m in affordable) == move.error


@law
@given(case=budgets(CHOICES), rest=st.integers(0, 20))
def test_what_is_left_buys_better_moves_and_is_not_exceeded(case, rest):
    choices, budget = case
    before = allocate(choices, budget)
    after = spend(choices, before, rest)
    assert spent(after) <= spent(before) + rest
    assert total_error(after) <= total_error(before)
    left = spent(before) + rest - spent(after)
    for each, taken in zip(choices, after, strict=True):
        better = [m for m in each.moves if m.error < taken.error]
        assert all(m.cost - taken.cost > left for m in better)


@law
@given(choices=CHOICES)
def test_with_room_for_everything_each_site_takes_its_cheapest_best_move(choices):
    budget = sum(max(m.cost for m in c.moves) for c in choices)
    taken = allocate(choices, budget)
    assert taken is not None
    for move, c in zip(taken, choices, strict=True):
        best = min((m.error, m.cost) for m in c.moves)
        assert (move.error, move.cost) == best


@law
@given(choices=CHOICES)
def test_with_no_room_to_choose_each_site_takes_its_least(choices):
    least = [min((m.cost, m.error) for m in c.moves) for c in choices]
    taken = allocate(choices, sum(cost for cost, _ in least))
    assert taken is not None
    assert [(m.cost, m.error) for m in taken] == least


@law
@given(case=budgets(CONVEX))
def test_on_convex_curves_the_best_is_at_most_one_step_of_one_site_away(case):
    choices, budget = case
    taken = allocate(choices, budget)
    assert taken is not None
    curves = [sorted((m.cost, m.error) for m in c.moves) for c in choices]
    steps = [a[1] - b[1] for curve in curves for a, b in itertools.pairwise(curve)]
    assert total_error(taken) - least_error(choices, budget) <= max(steps, default=0.0)


@law
@given(choices=CONVEX, price=st.integers(0, 5))
def test_where_a_price_spends_the_budget_exactly_the_result_is_the_best(choices, price):
    # Slopes are whole numbers: at a price between two of them nothing is on the edge.
    picked = [min(c.moves, key=lambda m: m.error + (price + 0.5) * m.cost) for c in choices]
    taken = allocate(choices, spent(picked))
    assert taken is not None
    assert total_error(taken) == total_error(picked) == least_error(choices, spent(picked))


@law
@given(case=budgets(CHOICES), price=st.integers(0, 800))
def test_no_price_that_fits_the_budget_buys_more(case, price):
    choices, budget = case
    price *= math.e / 1000  # on the edge between no two moves
    picked = [min(c.moves, key=lambda m: (m.error + price * m.cost, m.cost)) for c in choices]
    assume(spent(picked) <= budget)
    taken = allocate(choices, budget)
    assert taken is not None
    assert total_error(taken) <= total_error(picked) * (1 + 2 * EPS * len(choices))


@pytest.mark.parametrize("place", range(4))
def test_equals_share_what_is_left_by_the_error_they_save_a_parameter(place):
    # No price parts the three equals, and all of them are too much; one alone saves less than the
    # fourth site, but more a parameter.
    curves = [choice((1, 10.0), (3, 4.0))] * 3
    curves.insert(place, choice((1, 10.0), (5, 3.0)))
    taken = allocate(curves, 9)
    assert taken is not None
    assert total_error(taken) == least_error(curves, 9) == 28


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_scale_of_errors_does_not_matter(scale):
    curve = choice(*((k, scale * (8 - k) ** 2) for k in range(9)))
    taken = allocate([curve, curve], 8)
    assert taken is not None
    assert [m.cost for m in taken] == [4, 4]


@law
@given(seed=SEEDS, m=st.integers(2, 7), d=st.integers(2, 7))
def test_dense_is_what_a_full_budget_buys(seed, m, d):
    weight, _ = draw_layer(seed, m, d)
    where = site(m, d)
    found = PLAIN_SVD.measure(where, weight, None, 0)
    dense = Move(rank=None, bias=False, parameters=m * d, error=0.0, cost=m * d)
    moves = (dense, *offered(found, 1, force=False))
    assert allocate([Choice(measured=found, moves=moves)], m * d) == [dense]


# --- ranks worth offering -----------------------------------------------------------------------


@law
@given(m=st.integers(1, 40), d=st.integers(1, 40), multiple=st.integers(1, 9))
def test_offered_ranks_are_the_multiples_that_save_parameters(m, d, multiple):
    expected = [r for r in range(1, min(m, d) + 1) if r % multiple == 0 and r * (m + d) < m * d]
    where = site(m, d)
    assert candidate_ranks(where, LOW_RANK.top_rank(where), multiple, force=False) == expected


def test_ranks_between_convs_are_small_or_fast():
    where = site(64, 64)
    assert candidate_ranks(where, 25, 1, force=False, fast=8) == [*range(1, 9), 16, 24]
    assert candidate_ranks(where, 25, 12, force=False, fast=24) == [12, 24]


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        (TWO_SIDED, {}, 8),
        (ONE_SIDED, {}, 1),
        (TWO_SIDED, {"rank_multiple": 12}, 12),
        (TWO_SIDED, {"moves": ("low-rank",)}, 1),
        (TWO_SIDED, {"force": True}, 1),
        (UTILIZED_RANK, {}, 1),
        (PLAIN_SVD, {}, 1),
    ],
)
def test_ranks_between_convs_are_fast_unless_told_or_published(method, options, expected):
    config = CompressConfig(param_ratio=0.5, **options)
    gemm = site(64, 64)
    conv = dataclasses.replace(gemm, op_type="Conv")
    assert fast_multiple(conv, method, config) == expected
    assert fast_multiple(gemm, method, config) == config.multiple


@law
@given(m=st.integers(1, 40), d=st.integers(1, 40), multiple=st.integers(1, 9))
def test_forced_ranks_are_all_multiples_and_the_full_rank(m, d, multiple):
    full = min(m, d)
    expected = sorted({r for r in range(1, full + 1) if r % multiple == 0} | {full})
    where = site(m, d)
    assert candidate_ranks(where, LOW_RANK.top_rank(where), multiple, force=True) == expected


# --- the default method -------------------------------------------------------------------------


def one_sided_site(
    weight: np.ndarray, rows: np.ndarray, bias: str = "input", outputs: bool = True
) -> OneSidedSite:
    """The way of the pipeline, with the side that the method asks for."""
    m, d = weight.shape
    where = site(m, d, use(m, d, bias, outputs=outputs))
    values = rows if ONE_SIDED.side(where) == "inputs" else rows @ weight.T
    cost = m if bias == "new" else 0
    return ONE_SIDED.measure(where, weight, SecondMoment.of(values), cost)


@pytest.mark.parametrize(
    ("m", "d", "outputs", "side"),
    [
        (3, 5, True, "outputs"),
        (3, 5, False, "inputs"),
        (4, 4, True, "inputs"),
        (5, 3, True, "inputs"),
    ],
)
def test_the_smaller_side_is_measured_where_it_can_be(m, d, outputs, side):
    where = site(m, d, use(m, d), use(m, d, node=1, outputs=outputs))
    assert ONE_SIDED.side(where) == side


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize(
    ("bias", "variants"),
    [("input", [True]), ("add", [True]), ("new", [True, False]), ("none", [False])],
)
@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_the_bias_decides_which_variants_are_offered(bias, variants, outputs, seed, m, d):
    weight, rows = draw_layer(seed, m, d)
    found = one_sided_site(weight, rows, bias, outputs)
    ranks = list(range(1, min(m, d) + 1))
    moves = found.moves(ranks)
    assert [(m.bias, m.rank) for m in moves] == list(itertools.product(variants, ranks))
    moment = {found.side: found.moment}
    metric = Metric.diagonal(found.scale)
    curves = {kind: optimal(weight, metric, **moment, centred=kind) for kind in (True, False)}
    for move in moves:
        extra = m if bias == "new" and move.bias else 0
        assert move.parameters == move.rank * (m + d) + extra
        assert move.error == curves[move.bias].errors[move.rank] / found.variance
        product = found.factors(weight, move).product
        assert (product == curves[move.bias].factors(weight, move.rank).product).all()
        assert found.error(weight, move) == move.error
    assert found.variance == curves[bias != "none"].energy


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("outputs", [True, False])
@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_the_error_is_the_one_on_the_rows_with_the_lost_mean_put_back(bias, outputs, seed, m, d):
    weight, rows = draw_layer(seed, m, d)
    found = one_sided_site(weight, rows, bias, outputs)
    for move in found.moves(range(1, min(m, d) + 1)):
        factors = found.factors(weight, move)
        error = rows @ (weight - factors.product).T
        if move.bias:
            error -= found.lost_mean(weight, factors, move)
        lost = mean_energy(error / found.scale) / found.variance
        slack = rounding(weight / found.scale[:, None], rows) / found.variance
        assert move.error == pytest.approx(lost, abs=slack)


@pytest.mark.parametrize("bias", ["input", "add", "new"])
@pytest.mark.parametrize("outputs", [True, False])
@law
@given(seed=SEEDS, m=SIZES, d=SIZES, n=st.integers(1, 30))
def test_the_lost_mean_is_what_the_factors_lose_of_the_mean(bias, outputs, seed, m, d, n):
    weight, rows = draw_layer(seed, m, d, n)
    found = one_sided_site(weight, rows, bias, outputs)
    for move in (move for move in found.moves(range(1, min(m, d) + 1)) if move.bias):
        factors = found.factors(weight, move)
        exact = (weight - factors.product) @ rows.mean(0)
        size = np.linalg.norm(weight / found.scale[:, None]) * math.sqrt(mean_energy(rows))
        lost = (found.lost_mean(weight, factors, move) - exact) / found.scale
        assert np.abs(lost).max() <= 16 * (n + m + d) * EPS * size


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("outputs", [True, False])
@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_outputs_count_by_the_scale_of_their_variance(bias, outputs, seed, m, d):
    weight, rows = draw_layer(seed, m, d)
    found = one_sided_site(weight, rows, bias, outputs)
    variances = np.var(rows @ weight.T, axis=0)
    # A variance near the floor is known no better than to the rounding of the whole energy.
    slack = rounding(weight, rows) / (1e-6 * variances.mean())
    assert found.scale == pytest.approx(feature_scale(variances), rel=slack)


def plain_rows(seed: int, n: int, d: int) -> np.ndarray:
    return draw_layer(seed, 1, d, n)[1]


SINGULAR = {
    "constant inputs": (plain_rows(0, 4, 5), np.full((40, 5), 1 / 3)),
    "constant inputs, outputs measured": (plain_rows(1, 5, 4), np.full((40, 4), 1e3 / 3)),
    "a single row": (plain_rows(2, 4, 5), plain_rows(3, 1, 5)),
    "no rows": (plain_rows(4, 5, 4), np.zeros((0, 4))),
    "no signal": (plain_rows(5, 5, 4), np.zeros((40, 4))),
    "zero weight": (np.zeros((5, 4)), plain_rows(6, 40, 4)),
    "zero weight, outputs measured": (np.zeros((4, 5)), plain_rows(7, 40, 5)),
    "one of each": (np.ones((1, 1)), plain_rows(8, 40, 1)),
    "an infinitesimal weight": (1e-160 * plain_rows(9, 4, 5), plain_rows(10, 40, 5)),
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("case", SINGULAR)
def test_no_error_is_relative_to_nothing(case, bias):
    weight, rows = SINGULAR[case]
    found = one_sided_site(weight, rows, bias)
    assert found.variance > 0
    for move in found.moves(range(1, min(weight.shape) + 1)):
        assert math.isfinite(move.error)
        assert move.error >= 0
        factors = found.factors(weight, move)
        assert np.isfinite(factors.product).all()
        assert not move.bias or np.isfinite(found.lost_mean(weight, factors, move)).all()


@pytest.mark.parametrize("bias", ["input", "add", "new"])
@pytest.mark.parametrize("outputs", [True, False])
@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_a_constant_output_goes_into_the_bias_whatever_the_rank(bias, outputs, seed, m, d):
    weight, row = draw_layer(seed, m, d, 1)
    rows = np.tile(row, (4 * max(m, d), 1))
    found = one_sided_site(weight, rows, bias, outputs)
    scaled = weight / found.scale[:, None]
    allowed = rounding(scaled, rows) / mean_energy(rows @ scaled.T)
    assume(allowed < 1e-3)
    for move in (move for move in found.moves(range(1, min(m, d) + 1)) if move.bias):
        assert move.error <= allowed


@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_an_edited_move_may_leave_alone_a_bias_that_is_free_to_correct(seed, m, d):
    weight, rows = draw_layer(seed, m, d)
    found = one_sided_site(weight, rows, "input")
    best = one_sided_site(weight, rows, "none")
    for move in found.moves(range(1, min(m, d) + 1)):
        edited = dataclasses.replace(move, bias=False)
        product = found.factors(weight, edited).product
        assert (product == best.factors(weight, edited).product).all()


# --- moments of a site --------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_the_moment_of_a_site_is_that_of_all_its_rows_without_the_biases(side, seed, m, d):
    weight, rows = draw_layer(seed, m, d)
    rng = np.random.default_rng(seed)
    where = site(m, d, use(m, d, node=3), use(m, d, node=5))
    biases = {3: rng.normal(size=m), 5: rng.normal(size=m)}
    batches = dict(zip(where.uses, np.split(rows, [d]), strict=True))
    moments = {u.inputs: SecondMoment.of(x) for u, x in batches.items()}
    for u, x in batches.items():
        moments[u.outputs] = SecondMoment.of(x @ weight.T + biases[u.node])
    found = site_moment(where, side, moments, biases)
    exact = SecondMoment.of(rows if side == "inputs" else rows @ weight.T)
    size = mean_energy(rows) * (1 + np.sum(weight**2)) + sum(b @ b for b in biases.values())
    slack = 16 * (len(rows) + d) * EPS * len(rows) * (1 + size)
    assert found.rows == exact.rows
    assert np.abs(found.outer - exact.outer).max() <= slack
    assert np.abs(found.total - exact.total).max() <= slack


# --- the paper's rule ---------------------------------------------------------------------------


def utilized_site(seed: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray, UtilizedSite]:
    weight, rows = draw_layer(seed, m, d)
    return weight, rows, UTILIZED_RANK.measure(site(m, d), weight, SecondMoment.of(rows), 0)


@st.composite
def utilized_choices(draw: st.DrawFn) -> list[Choice]:
    """Sites as the pipeline offers them: the weight as it is, unless forced, and some ranks."""
    multiple, force = draw(st.integers(1, 3)), draw(st.booleans())
    choices = []
    for _ in range(draw(st.integers(1, 4))):
        m, d = draw(SIZES), draw(SIZES)
        _, _, found = utilized_site(draw(SEEDS), m, d)
        moves = offered(found, multiple, force=force)
        if not force:
            moves.append(Move(rank=None, bias=False, parameters=m * d, error=0.0, cost=m * d))
        choices.append(Choice(measured=found, moves=tuple(moves)))
    return choices


ENERGIES = st.floats(0.0, 1.0)


@law
@given(choices=utilized_choices(), energy=ENERGIES)
def test_an_energy_takes_the_least_rank_that_holds_it(choices, energy):
    for c, move in zip(choices, at_energy(choices, energy), strict=True):
        k_s, k_t = UTILIZED_RANK.ranks(c.measured, energy)
        offered = [m.rank for m in c.moves if m.rank is not None and m.rank >= min(k_s, k_t)]
        assert move.rank == min(offered, default=None)
        assert not move.bias
        if move.rank is not None:
            assert move.subspaces == (max(k_s, move.rank), max(k_t, move.rank))
            assert move.parameters == move.rank * (c.measured.site.m + c.measured.site.d)


@law
@given(seed=SEEDS, m=st.integers(4, 7), d=st.integers(4, 7), energy=ENERGIES)
def test_a_weight_that_would_stay_anyway_stays_dense(seed, m, d, energy):
    _, _, found = utilized_site(seed, m, d)
    found = dataclasses.replace(found, site=site(m, d, freed=False))
    dense = Move(rank=None, bias=False, parameters=0, error=0.0)
    moves = (dense, *offered(found, 1, force=False))
    assert at_energy([Choice(measured=found, moves=moves)], energy) == [dense]


def thresholds(choices: list[Choice]) -> list[float]:
    """The energies that the first k directions of a site hold: where a rank changes."""
    held = [
        np.cumsum(values) / values.sum()
        for c in choices
        for values in (c.measured.found.input_values, c.measured.found.output_values)
    ]
    return [0.0, 1.0, *np.minimum(np.concatenate(held), 1.0).tolist()]


def decided(moves: list[Move]) -> list[tuple[int | None, tuple[int, int] | None]]:
    return [(m.rank, m.subspaces) for m in moves]


@law
@given(choices=utilized_choices(), share=ENERGIES)
def test_the_paper_allocates_the_largest_common_energy(choices, share):
    full, least = (spent(at_energy(choices, energy)) for energy in (1.0, 0.0))
    budget = least - 1 + math.floor(share * (full + 2 - least))
    taken = UTILIZED_RANK.allocate(choices, budget)
    assert (taken is None) == (least > budget)
    assume(taken is not None)
    assert spent(taken) <= budget
    # The loss is bisected down to 1e-15, and an energy is known to eps.
    for energy in (e for e in thresholds(choices) if e <= 1 - 1e-15 - EPS or e == 1):
        moves = at_energy(choices, energy - 2 * EPS if 0 < energy < 1 else energy)
        assert spent(moves) > budget or spent(moves) <= spent(taken)


@law
@given(choices=utilized_choices(), energy=st.floats(0.0, 0.999))
def test_what_an_energy_takes_is_a_budget_that_buys_it(choices, energy):
    wanted = at_energy(choices, energy)
    taken = UTILIZED_RANK.allocate(choices, spent(wanted))
    assert taken is not None
    assert spent(taken) == spent(wanted)


def test_a_budget_for_everything_buys_also_the_directions_without_energy():
    weight, rows = draw_layer(0, 6, 5, rows=2)
    found = UTILIZED_RANK.measure(site(6, 5), weight, SecondMoment.of(rows), 0)
    moves = tuple(offered(found, 1, force=True))
    taken = UTILIZED_RANK.allocate([Choice(measured=found, moves=moves)], 5 * (6 + 5))
    assert taken is not None
    assert decided(taken) == [(5, (5, 6))]


@law
@given(choices=utilized_choices(), share=ENERGIES)
def test_the_paper_s_allocation_is_one_energy_for_all(choices, share):
    full, least = (spent(at_energy(choices, energy)) for energy in (1.0, 0.0))
    taken = UTILIZED_RANK.allocate(choices, least + math.floor(share * (full - least)))
    near = (max(e - slack, 0.0) for e in thresholds(choices) for slack in (0.0, 4 * EPS))
    assert decided(taken) in [decided(at_energy(choices, energy)) for energy in near]


@law
@given(seed=SEEDS, m=SIZES, d=SIZES, energy=ENERGIES)
def test_the_paper_s_error_is_the_one_on_the_rows(seed, m, d, energy):
    weight, rows, found = utilized_site(seed, m, d)
    move = found.at(energy, {m.rank: m for m in found.moves(range(1, min(m, d) + 1))})
    product = found.factors(weight, move).product
    lost, all_of_it = mean_energy(rows @ (weight - product).T), mean_energy(rows @ weight.T)
    slack = 2 * rounding(weight, rows) / all_of_it
    assert found.error(weight, move) == pytest.approx(lost / all_of_it, abs=slack)
    dense = Move(rank=None, bias=False, parameters=m * d, error=0.0)
    assert found.error(weight, dense) == 0


@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_an_edited_move_may_name_a_rank_alone(seed, m, d):
    weight, _, found = utilized_site(seed, m, d)
    for move in found.moves(range(1, min(m, d) + 1)):
        assert move.subspaces == (move.rank, move.rank)
        edited = dataclasses.replace(move, subspaces=None)
        product = found.factors(weight, edited).product
        assert (product == found.factors(weight, move).product).all()


@pytest.mark.parametrize("weight", [np.zeros((4, 3)), np.ones((4, 3))], ids=["zero", "ones"])
@pytest.mark.parametrize("rows", [np.zeros((12, 3)), np.ones((12, 3)), np.ones((1, 3))])
def test_the_paper_s_rule_knows_no_nan(weight, rows):
    found = UTILIZED_RANK.measure(site(4, 3), weight, SecondMoment.of(rows), 0)
    for move in found.moves([1, 2, 3]):
        factors = found.factors(weight, move)
        assert math.isfinite(found.error(weight, move))
        assert np.isfinite(factors.left).all()
        assert np.isfinite(factors.right).all()


# --- the baseline -------------------------------------------------------------------------------


@law
@given(seed=SEEDS, m=SIZES, d=SIZES)
def test_plain_svd_offers_the_relative_error_of_the_weight(seed, m, d):
    weight, _ = draw_layer(seed, m, d)
    found = PLAIN_SVD.measure(site(m, d), weight, None, 0)
    for move in found.moves(range(1, min(m, d) + 1)):
        lost = np.sum((weight - found.factors(weight, move).product) ** 2) / np.sum(weight**2)
        assert move.error == pytest.approx(lost, abs=16 * (m + d) * EPS)
        assert found.error(weight, move) == move.error
        assert move.parameters == move.rank * (m + d)
        assert not move.bias


def test_plain_svd_of_a_zero_weight_has_no_error():
    found = PLAIN_SVD.measure(site(3, 4), np.zeros((3, 4)), None, 0)
    assert [m.error for m in found.moves([1, 2, 3])] == [0, 0, 0]


# --- the methods --------------------------------------------------------------------------------


def test_methods_are_found_by_their_keys():
    assert [find_method(m.key) for m in METHODS] == list(METHODS)
    assert len({m.key for m in METHODS}) == len(METHODS)


@pytest.mark.parametrize("key", ["svdd", "sv", "SVD", ""])
def test_an_unknown_method_is_refused_with_the_known_ones(key):
    with pytest.raises(
        ConfigError, match=f"'{key}' is not known; choose one of: two-sided, one-sided,"
    ):
        find_method(key)


def test_only_the_baseline_needs_no_data():
    sides = {m.key: m.side(site(3, 5)) for m in METHODS}
    assert sides == {
        "two-sided": "outputs",
        "one-sided": "outputs",
        "utilized-rank": "inputs",
        "svd": None,
    }
