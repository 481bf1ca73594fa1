"""Plans by time: layers by themselves, what is timed of them, and the promise about the whole."""

from pathlib import Path

import numpy as np
import pytest
from builders import FORMS, activations, constants, index, model, noise, run
from hypothesis import given
from hypothesis import strategies as st

from onnx_utilrank import (
    CompressConfig,
    ConfigError,
    QualityTarget,
    TargetMissedError,
    compress,
    sweep,
)
from onnx_utilrank.calibration.survey import survey
from onnx_utilrank.cli.main import main
from onnx_utilrank.config import FAST_MULTIPLE
from onnx_utilrank.job import Job
from onnx_utilrank.latency.costs import Curve, LatencyCosts, SiteTimes
from onnx_utilrank.latency.excerpt import excerpt, values_read
from onnx_utilrank.latency.measure import measure_latency
from onnx_utilrank.moves.low_rank import LOW_RANK
from onnx_utilrank.moves.two_convs import CHANNELS
from onnx_utilrank.planning import check_latency, make_offers
from onnx_utilrank.ranking.cost import Ledger
from onnx_utilrank.ranking.decide import Offers
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.sites.find import find_sites
from onnx_utilrank.validation.bench import LatencyComparison
from onnx_utilrank.validation.report import ModelFigures, ProviderResult, ValidationReport

WIDTH = 512


def quiet(*_: object) -> None:
    pass


def two_layers(width: int = WIDTH):
    """Two products whose inputs use an eighth of their space."""
    body = "h = MatMul(x, A) a = Add(h, b) t = Tanh(a) y = MatMul(t, B)"
    narrow = noise(1, width, width // 8) @ noise(2, width // 8, width) / width
    weights = {"A": narrow, "b": noise(3, width), "B": noise(4, width, width) / width**0.5}
    cast = {name: value.astype(np.float32) for name, value in weights.items()}
    return model(f"(float[n,8,{width}] x) => (float[n,8,{width}] y)", body, **cast)


DATA = {"x": noise(5, 60, 8, WIDTH).astype(np.float32)}


# --- curves -------------------------------------------------------------------------------------

SIZES = st.dictionaries(st.integers(1, 500), st.floats(1.0, 1e9), min_size=1, max_size=6)


@given(SIZES, st.integers(1, 600), st.integers(1, 600))
def test_more_is_never_faster(measured: dict[int, float], one: int, other: int):
    curve = Curve.of(measured)
    low, high = sorted((one, other))
    assert curve.at(low) <= curve.at(high) * (1 + 1e-9)


@given(SIZES)
def test_a_curve_goes_through_what_was_measured_where_that_rises(measured: dict[int, float]):
    rising = dict(zip(sorted(measured), sorted(measured.values()), strict=True))
    curve = Curve.of(rising)
    for size, time in rising.items():
        assert curve.at(size) == pytest.approx(time, rel=1e-9)


# --- excerpts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_node_by_itself_computes_what_it_computes_in_its_model(form):
    """With its own weight in the place of the random one."""
    if form.dtype.name == "bfloat16":
        pytest.skip("ONNX Runtime has no bfloat16 kernels on the CPU")
    whole = index(form.proto)
    (site,) = find_sites(whole)[0]
    feed = form.data()[0]
    (use, *_) = site.uses
    last = use.bias.node if use.bias.kind == "add" else use.node
    (made,) = whole.node(last).output
    values = survey(whole.store, {made, *values_read(whole, site)}, feed, CPU)
    shown = values.pop(made)
    part = excerpt(whole, use, values)
    assert part is not None
    proto = part.index.store.proto
    (held,) = [t for t in proto.graph.initializer if t.name == part.site.weight]
    held.raw_data = whole.constant(use.weight).tobytes()
    (alone,) = run(proto, part.feed).values()
    assert alone.shape == shown.shape
    scale = np.abs(shown.astype(np.float64)).max()
    bound = 8 * site.d * float(np.finfo(form.dtype).eps) * scale
    np.testing.assert_allclose(alone.astype(np.float64), shown.astype(np.float64), atol=bound)


def test_nodes_that_differ_in_names_and_values_are_timed_once():
    whole = index(two_layers())
    first, second = find_sites(whole)[0]
    values = {"x": DATA["x"][:4], "t": DATA["x"][:4]}
    keys = [excerpt(whole, use, values).key for site in (first, second) for use in site.uses]
    assert keys[0] != keys[1], "the first has a bias"
    more = {"x": DATA["x"][:5], "t": DATA["x"][:4]}
    assert excerpt(whole, first.uses[0], more).key != keys[0], "other rows take other time"
    body = "h = MatMul(x, A) t = Tanh(h) y = MatMul(t, B)"
    square = {"A": noise(1, 16, 16), "B": noise(2, 16, 16)}
    plain = index(model("(double[n,16] x) => (double[n,16] y)", body, **square))
    same = {"x": noise(3, 4, 16), "t": noise(4, 4, 16)}
    one, other = (excerpt(plain, s.uses[0], same) for s in find_sites(plain)[0])
    assert one.key == other.key


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_fewer_features(side: str):
    body = "y = Conv<pads=[1, 1, 1, 1]>(x, K, k)"
    conv = index(
        model(
            "(float[n,6,5,5] x) => (float[n,8,5,5] y)",
            body,
            K=noise(1, 8, 6, 3, 3).astype(np.float32),
            k=noise(2, 8).astype(np.float32),
        )
    )
    (site,) = find_sites(conv)[0]
    kept = 3 if side == "rows" else 4 * 9
    part = excerpt(
        conv, site.uses[0], {"x": noise(3, 2, 6, 5, 5).astype(np.float32)}, **{side: kept}
    )
    (y,) = run(part.index.store, part.feed).values()
    assert y.shape == (2, 3 if side == "rows" else 8, 5, 5)
    held = constants(part.index.store.proto)
    assert sorted(t.shape for t in held.values()) == sorted(
        [(3, 6, 3, 3), (3,)] if side == "rows" else [(8, 4, 3, 3), (8,)]
    )


# --- what is timed ------------------------------------------------------------------------------


def measured(cache: Path | None = None) -> LatencyCosts:
    whole = index(two_layers())
    sites = find_sites(whole)[0]
    return measure_latency(
        whole,
        sites,
        (),
        {s.key: [LOW_RANK] for s in sites},
        {"x": DATA["x"][:4]},
        CPU,
        multiple=FAST_MULTIPLE,
        cache=cache,
        progress=quiet,
    )


def test_layers_share_the_time_of_the_model():
    costs = measured()
    assert costs.sites.keys() == {"A", "B"}
    assert 0 < sum(s.dense for s in costs.sites.values()) <= costs.total * (1 + 1e-9)
    for times in costs.sites.values():
        ranks = times.moves[LOW_RANK.key].sizes
        assert all(r % FAST_MULTIPLE == 0 and r <= WIDTH // 2 for r in ranks)


def test_times_are_kept_for_the_device(tmp_path: Path):
    first = measured(tmp_path)
    entries = sorted(tmp_path.iterdir())
    assert len(entries) == 2, "the two layers differ by a bias"
    again = measured(tmp_path)
    assert sorted(tmp_path.iterdir()) == entries
    ratio = {key: times.dense / first.sites["A"].dense for key, times in first.sites.items()}
    for key, times in again.sites.items():
        assert times.dense / again.sites["A"].dense == pytest.approx(ratio[key], rel=1e-9)


# --- plans --------------------------------------------------------------------------------------


def planned(config: CompressConfig, times: dict[str, SiteTimes], unit: str = "latency") -> Offers:
    """Offers from stated times, where a test must not depend on a clock."""
    job = Job.open(two_layers(), DATA, config, quiet)
    found = job.measure("svd", job.sites, range(48), config)
    costs = LatencyCosts(total=1000.0, sites=times, provider="CPUExecutionProvider")
    ledger = Ledger(
        unit=unit,
        total=1000.0 if unit == "latency" else float(2 * WIDTH**2 + WIDTH),
        rows=dict.fromkeys("AB", 8.0),
        latency=costs,
    )
    return Offers.of(job.index, found.sites, (), job.skips, found.method, config, ledger)


def times(dense: float, *, at_8: float, at_256: float) -> SiteTimes:
    curve = Curve(sizes=(8, 256), times=(at_8, at_256))
    return SiteTimes(dense=dense, moves={LOW_RANK.key: curve})


FAST = {"A": times(450.0, at_8=20.0, at_256=400.0), "B": times(450.0, at_8=20.0, at_256=400.0)}


@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.3])
def test_the_time_that_is_planned_is_within_what_was_asked_for(ratio: float):
    offers = planned(CompressConfig(latency_ratio=ratio, method="svd"), FAST)
    plan = offers.plan(ratio)
    taken = 100.0
    for entry in plan.entries:
        curve = FAST[entry.site].moves[LOW_RANK.key]
        taken += FAST[entry.site].dense if entry.rank is None else curve.at(entry.rank)
        assert entry.rank is None or entry.rank % FAST_MULTIPLE == 0
    assert taken <= 1000 * ratio
    assert taken > 1000 * ratio - 2 * 400 / 31, "a step of the rank is left at most"


def test_what_is_slower_is_refused_with_the_measured_reason():
    slow = FAST | {"A": times(450.0, at_8=460.0, at_256=900.0)}
    for unit, target in (("latency", {"latency_ratio": 0.7}), ("parameters", {"param_ratio": 0.7})):
        config = CompressConfig(method="svd", optimize_for="latency", **target)
        plan = planned(config, slow, unit).plan(0.7)
        by_site = {e.site: e for e in plan.entries}
        assert by_site["B"].rank is not None
        assert by_site["A"].rank is None
        assert by_site["A"].reason == (
            "no move is faster on CPUExecutionProvider: 450 ns as it is, 460 ns at rank 8 "
            "(low-rank)"
        )


def test_moves_asked_for_by_name_have_to_be_faster_too():
    slow = {key: times(450.0, at_8=460.0, at_256=900.0) for key in FAST}
    config = CompressConfig(latency_ratio=0.7, method="svd", moves=("low-rank",))
    with pytest.raises(TargetMissedError, match=r"0\.7 of its latency cannot be reached"):
        planned(config, slow).plan(0.7)


def test_shrunk_features_take_less_time():
    costs = LatencyCosts(
        total=100.0,
        sites={
            "A": SiteTimes(dense=50.0, moves={}, rows=Curve(sizes=(128, WIDTH), times=(10.0, 40.0)))
        },
        provider="p",
    )
    site = next(s for s in find_sites(index(two_layers()))[0] if s.key == "A")
    assert costs.shrunk(site, 128, WIDTH) == pytest.approx(12.5)
    assert costs.shrunk(site, WIDTH, WIDTH) == 50.0


def test_asked_for_in_time():
    """What is handed out was measured to be as fast as was asked for: a miss is an error."""
    config = CompressConfig(latency_ratio=0.8, latency_batch=2, refit=False)
    try:
        result = compress(two_layers(), DATA, config)
    except TargetMissedError as e:
        pytest.skip(f"the machine is too busy to time models: {e}")
    assert result.plan.target == {"latency_ratio": 0.8}
    assert result.plan.changes
    assert all(e.rank is None or e.rank % FAST_MULTIPLE == 0 for e in result.plan.entries)
    assert not result.validation.providers[0].latency.exceeds(0.8)


def test_a_quality_target_looks_for_the_fastest():
    config = CompressConfig(
        quality=QualityTarget(key="max_divergence", limit=0.02), optimize_for="latency"
    )
    job = Job.open(two_layers(), DATA, config, quiet)
    found = job.measure(config.method_key, job.sites, range(48), config)
    offers = make_offers(job, found, range(48), config)
    assert offers.ledger.unit == "latency"
    assert 0 < offers.least < 1


# --- the promise --------------------------------------------------------------------------------


def report(ratio: float) -> ValidationReport:
    time = LatencyComparison(
        reference_ms=1.0,
        candidate_ms=ratio,
        ratio=ratio,
        ratio_low=0.99 * ratio,
        ratio_high=1.01 * ratio,
        pairs=100,
    )
    figures = ModelFigures(parameters=1, file_bytes=1, flops=1)
    return ValidationReport(
        reference=figures,
        candidate=figures,
        samples=1,
        feeds=1,
        providers=(ProviderResult(provider=CPU.name, outputs=(), latency=time),),
        failures=(),
    )


@pytest.mark.parametrize(
    ("config", "ratio", "broken"),
    [
        (CompressConfig(latency_ratio=0.7), 0.69, False),
        (CompressConfig(latency_ratio=0.7), 0.75, True),
        (CompressConfig(param_ratio=0.7, optimize_for="latency"), 0.99, False),
        (CompressConfig(param_ratio=0.7, optimize_for="latency"), 1.1, True),
        (CompressConfig(param_ratio=0.7), 1.1, False),
    ],
)
def test_slower_than_promised_is_no_success(config: CompressConfig, ratio: float, broken: bool):
    job = Job.open(two_layers(64), {"x": noise(1, 4, 8, 64).astype(np.float32)}, config, quiet)
    if not broken:
        check_latency(job, config, report(ratio))
        return
    with pytest.raises(TargetMissedError, match=f"takes {ratio:.3f} of the original's time"):
        check_latency(job, config, report(ratio))


def test_what_cannot_be_reached_ends_in_3_and_writes_nothing(tmp_path: Path, capsys):
    source, data, out = (tmp_path / name for name in ("m.onnx", "d.npz", "out.onnx"))
    source.write_bytes(two_layers(64).SerializeToString())
    np.savez(data, x=noise(1, 40, 8, 64).astype(np.float32))
    status = main(
        [
            *("compress", str(source), "--data", str(data), "-o", str(out)),
            *("--latency-ratio", "0.001"),
        ]
    )
    assert status == 3
    assert not out.exists()
    said = capsys.readouterr().err
    assert "a latency ratio of 0.001 cannot be reached on CPUExecutionProvider" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "options",
    [
        {"latency_ratio": 0.0},
        {"latency_ratio": 1.5},
        {"latency_ratio": 0.5, "param_ratio": 0.5},
        {"latency_ratio": 0.5, "force": True},
        {"param_ratio": 0.5, "optimize_for": "speed"},
        {"param_ratio": 0.5, "latency_batch": 0},
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict):
    with pytest.raises(ConfigError):
        CompressConfig(**options)


def test_channels_are_timed_at_ranks_they_have():
    body = "y = Conv<pads=[1, 1, 1, 1]>(x, K, k)"
    held = {"K": noise(1, 32, 24, 3, 3), "k": noise(2, 32)}
    cast = {name: value.astype(np.float32) for name, value in held.items()}
    conv = index(model("(float[n,24,9,9] x) => (float[n,32,9,9] y)", body, **cast))
    sites = find_sites(conv)[0]
    costs = measure_latency(
        conv,
        sites,
        (),
        {s.key: [CHANNELS] for s in sites},
        {"x": activations(3, 2, 24, 9, 9).astype(np.float32)},
        CPU,
        multiple=8,
        cache=None,
        progress=quiet,
    )
    (times_of,) = costs.sites.values()
    assert set(times_of.moves[CHANNELS.key].sizes) <= {8, 16}


def test_a_sweep_makes_no_move_that_is_slower():
    """Ranks, and hidden features that are kept, are multiples of 8 at every size."""
    config = CompressConfig(optimize_for="latency", latency_batch=2, refit=False, augment=False)
    found = sweep(two_layers(), DATA, config, ratios=(0.8, 0.5))
    for point in found.points:
        sizes = [e.rank for e in point.plan.entries] + [h.kept for h in point.plan.hidden]
        assert any(sizes)
        assert all(size is None or size % FAST_MULTIPLE == 0 for size in sizes)
