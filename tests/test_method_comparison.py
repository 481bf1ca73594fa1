"""`tools/method_comparison.py`, and the methods of others that it compares with."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import synthetic_vit
from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import ModelError, TargetMissedError
from onnx_utilrank.job import Job
from onnx_utilrank.planning import make_offers
from onnx_utilrank.quality import Judge
from onnx_utilrank.statistics.factorize import plain_svd
from onnx_utilrank.statistics.moments import SecondMoment

TOOLS = Path(__file__).resolve().parent.parent / "tools"
TINY = synthetic_vit.VitShape(width=32, layers=1, heads=2, patch=4, image=16, classes=7)
LOW = CompressConfig(moves=("low-rank",), refit=False)

# A shared machine may stall for longer than any deadline.
law = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**32 - 1)

# Its metric is the size of the file, so that it tells models apart; it notes each evaluation.
FAKE_ZOO = """
import json, os, sys
import numpy as np
verb, name = sys.argv[1:3]
if verb == "calib":
    n = int(sys.argv[sys.argv.index("--samples") + 1])
    images = np.random.default_rng(0).standard_normal((n, 3, 16, 16), dtype=np.float32)
    np.savez(sys.argv[4], image=images)
elif name == "unrated":
    sys.exit("no labels")
else:
    with open(os.path.join(os.path.dirname(__file__), "evaluated"), "a") as f:
        print(name, *sys.argv[4:], file=f)
    size = os.path.getsize(sys.argv[3]) / 1000
    print(json.dumps({"metric": "kB", "value": size, "n": 9, "baseline": 0.0, "drop": size}))
"""


@pytest.fixture(scope="module")
def tools():
    """Both modules, as they are where the script runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        yield [importlib.import_module(name) for name in ("method_comparison", "rival_methods")]


@pytest.fixture(scope="module")
def comparison(tools):
    return tools[0]


@pytest.fixture(scope="module")
def rivals(tools):
    return tools[1]


@pytest.fixture
def zoo(tmp_path):
    """A zoo of one tiny transformer under three names, one of them no model."""
    folder = tmp_path / "zoo"
    for name in ("tiny", "unrated", "broken"):
        (folder / name).mkdir(parents=True)
        onnx.save(synthetic_vit.build(TINY), folder / name / "model.onnx")
    (folder / "broken" / "model.onnx").write_bytes(b"no model")
    (folder / "zoo.py").write_text(FAKE_ZOO)
    return folder


def sections(text):
    """The Markdown tables of a text: [rows of cells], the rule below the head left out."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        rows = [[c.strip() for c in line.split("|")[1:-1]] for line in block.splitlines()]
        assert len({len(row) for row in rows}) == 1, "the rows differ in length"
        assert all(re.fullmatch(r"---:?", cell) for cell in rows[1])
        found.append([rows[0], *rows[2:]])
    return found


def evaluations(zoo):
    file = zoo / "evaluated"
    return file.read_text().splitlines() if file.exists() else []


def words(zoo, *more, models=("tiny",), ratios=("0.7", "0.00001"), samples=40):
    fixed = ["--zoo", str(zoo), "--samples", str(samples), "--limit", "9"]
    return [*fixed, "--models", *models, "--ratios", *ratios, *more]


# --- the chain ----------------------------------------------------------------------------------


def test_the_whole_chain_runs_and_is_resumed(comparison, zoo, tmp_path, capsys):
    out = tmp_path / "rows.json"
    given_words = words(zoo, f"--out={out}")
    assert comparison.main(given_words) == 0
    printed = capsys.readouterr()
    assert str(tmp_path) not in printed.out
    assert printed.out.startswith(
        "    ONNX_UTILRANK_ZOO=ZOO python tools/method_comparison.py --samples 40 --limit 9 "
    )
    (head, *rows), (health_head, *health) = sections(printed.out)
    assert head == ["method", "70 %", "0.001 %", "seconds"]
    assert [row[0] for row in rows] == list(comparison.CONTENDERS)
    assert all(re.fullmatch(r"\d+\.\d\d \(\S+\)", row[1]) for row in rows)
    assert {row[2] for row in rows} == {"–"}
    assert all(re.fullmatch(r"[\d.e-]+ \+ [\d.e-]+", row[3]) for row in rows)
    assert "tiny: drop of kB (divergence)" in printed.out
    assert evaluations(zoo) == ["tiny --limit 9"] * 11

    held = json.loads(out.read_text())
    assert held["settings"] == {"samples": 40, "limit": 9}
    made = {row["method"]: row for row in held["rows"] if row["ratio"] == 0.7}
    before = onnx.load(zoo / "tiny" / "model.onnx").ByteSize()
    for row in made.values():
        assert 0.6 < row["kept"] <= 0.7
        assert row["metric"]["drop"] < before / 1000
        assert 0 < row["divergence"] < 10
        assert row["error"] > 0
        assert min(row["measuring"], row["seconds"]) > 0
        assert (row["predicted"] is not None) == (row["method"] in list(comparison.CONTENDERS)[6:])
    missed = [row for row in held["rows"] if row["ratio"] == 1e-5]
    assert len(missed) == 11
    assert all(re.search("cannot be\\s+reached", row["reason"]) for row in missed)
    assert not any(row["failed"] for row in missed)
    # One measurement for the five that share it.
    assert len({row["measuring"] for row in made.values()}) == 7
    # Moves do something; a refit only where it is better.
    plain, _, moves, _ = (
        made[method]["divergence"] for method in list(comparison.CONTENDERS)[6:10]
    )
    assert plain != moves

    row = dict(zip(health_head, health[0], strict=True))
    divergences = {method: made[method]["divergence"] for method in comparison.BASELINES}
    best = min(divergences, key=lambda method: divergences[method])
    own = made["default"]["divergence"]
    assert (row["model"], row["asked"], row["best baseline"]) == ("tiny", "70 %", best)
    assert row["to best baseline"] == f"{own / divergences[best]:.2f}"
    assert row["to utilized-rank"] == f"{own / divergences['utilized-rank']:.2f}"
    assert health[1][1:] == ["–", "0.001 %", "–", "–", "–", "–"]

    assert comparison.main(given_words) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (printed.out, "")  # nothing is measured twice
    with pytest.raises(SystemExit, match="2"):
        comparison.main(words(zoo, f"--out={out}", samples=41))
    assert "name another file" in capsys.readouterr().err


def test_metrics_of_some_methods_only_and_more_of_them_later(comparison, zoo, tmp_path, capsys):
    common = [f"--out={tmp_path / 'rows.json'}", "--methods", "svd", "utilized-rank"]
    few = words(zoo, *common, ratios=["0.7"])
    assert comparison.main([*few, "--metric-methods", "svd"]) == 0
    ((_, svd, utilized),) = sections(capsys.readouterr().out)
    assert re.fullmatch(r"\d+\.\d\d \(\S+\)", svd[1])
    assert re.fullmatch(r"\(\S+\)", utilized[1])
    assert len(evaluations(zoo)) == 1
    assert comparison.main(few) == 0  # the one that has none is made again
    assert len(evaluations(zoo)) == 2
    ((_, _, utilized),) = sections(capsys.readouterr().out)
    assert re.fullmatch(r"\d+\.\d\d \(\S+\)", utilized[1])
    plot = tmp_path / "curves.svg"
    one = words(zoo, *common[:1], f"--plot={plot}", "--methods", "svd", ratios=["0.7"])
    assert comparison.main(one) == 0
    drawn = plot.read_text()  # of all rows that were ever made
    assert all(f"<!-- {method} -->" in drawn for method in ("svd", "utilized-rank"))


def test_what_fails_is_told_and_taken_again(comparison, zoo, tmp_path, capsys):
    out = tmp_path / "rows.json"
    common = words(zoo, f"--out={out}", "--methods", "svd", models=["broken", "unrated"])
    assert comparison.main(common) == 1
    printed = capsys.readouterr()
    assert re.search(r"^broken: ZOO/broken/model\.onnx: ", printed.err, re.M)
    reason = "zoo.py eval failed with exit status 1: no labels"
    assert f"unrated at 0.7 by svd: {reason}\n" in printed.err
    ((_, row),) = sections(printed.out)
    assert row[:3] == ["svd", "failed", "–"]
    assert [r["reason"] for r in json.loads(out.read_text())["rows"] if r["failed"]] == [reason]
    kept = comparison.Results({"samples": 40, "limit": 9}, out).entries
    assert [entry.ratio for entry in kept.values()] == [1e-5]
    out.write_text("[]")
    with pytest.raises(SystemExit, match="2"):
        comparison.main(common)
    assert "not results of this script" in capsys.readouterr().err


def test_without_gradients_only_the_default_goes_on(comparison, zoo, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise ModelError("an operator is not known")

    monkeypatch.setattr(Job, "gradients", refuse)
    out = tmp_path / "rows.json"
    methods = ["--methods", "one-sided", "two-sided", "two-sided + moves", "default"]
    assert comparison.main(words(zoo, f"--out={out}", *methods, ratios=["0.7"])) == 0
    (_, *rows), _ = sections(capsys.readouterr().out)
    assert [row[1] == "–" for row in rows] == [False, True, True, False]
    by_method = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert "an operator is not known" in by_method["two-sided"]["reason"]
    assert by_method["default"]["divergence"] > 0


def entry(comparison, method, divergence, **changes):
    fields = {"model": "m", "ratio": 0.5, "measuring": 1.0, "kept": 0.5} | changes
    return comparison.Entry(method=method, divergence=divergence, **fields)


def test_tables_of_numbers_that_are_hard_to_show(comparison):
    entries = [
        entry(comparison, "svd", float("inf"), metric={"metric": "PSNR", "drop": None}),
        entry(comparison, "asvd", 1234.5),
        entry(comparison, "default", 0.0127, predicted=0.01, error=0.003, seconds=12.0),
        entry(comparison, "svd", 0.5, ratio=0.25, metric={"metric": "PSNR", "drop": 0.217}),
        entry(comparison, "default", 0.1, ratio=0.25, seconds=3.0, measuring=1.0),
    ]
    (head, svd, asvd, default), (_, health, _) = sections(comparison.tables(entries))
    assert head == ["method", "50 %", "25 %", "seconds"]
    assert svd == ["svd", "not finite (inf)", "0.22 (0.5)", "1 + –"]
    assert asvd == ["asvd", "(1234)", "", "1 + –"]
    assert default == ["default", "(0.013)", "(0.1)", "1 + 7.5"]
    assert health == ["m", "asvd", "50 %", "0.01", "0.013 ± 0.003", "–", "0.00"]


def test_plot_has_a_panel_a_model(comparison, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra `plot`")
    file = tmp_path / "curves.svg"
    entries = [
        entry(comparison, method, divergence, model=model)
        for model in ("first", "second")
        for method, divergence in (("svd", float("inf")), ("asvd", None), ("default", 0.1))
    ]
    comparison.draw(entries, file)
    drawn = file.read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("first", "second", "default"))
    assert not any(f"<!-- {text} -->" in drawn for text in ("svd", "asvd"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "which zoo"),
        (["--zoo", "missing"], "not a zoo"),
        (["--zoo", "{zoo}", "--ratios", "1.5"], r"not in \(0, 1\]"),
        (["--zoo", "{zoo}", "--samples", "0"], "no samples"),
        (["--zoo", "{zoo}", "--limit", "0"], "no samples"),
        (["--zoo", "{zoo}", "--out", "missing/rows.json"], "folder does not exist"),
        (["--zoo", "{zoo}", "--plot", "curves.txt"], "a plot is one of"),
        (["--zoo", "{zoo}", "--methods", "pruning"], "invalid choice"),
    ],
)
def test_usage(comparison, zoo, more, message, monkeypatch, capsys):
    monkeypatch.delenv("ONNX_UTILRANK_ZOO", raising=False)
    with pytest.raises(SystemExit, match="2"):
        comparison.main([word.format(zoo=zoo) for word in more])
    assert re.search(message, capsys.readouterr().err)


# --- the rivals ---------------------------------------------------------------------------------


def lost(weight, product, moment):
    """E‖(W − Ŵ) x‖²."""
    gap = weight - product
    return float(np.trace(gap @ moment.uncentred @ gap.T))


@law
@given(seed=SEEDS, m=st.integers(2, 9), d=st.integers(2, 9), rows=st.integers(1, 40))
def test_whitened_svd_attains_the_least_error(rivals, seed, m, d, rows):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(m, d))
    moment = SecondMoment.of(rng.normal(size=(rows, d)) * 4.0 ** -np.arange(d) + 0.1)
    found = rivals.whitened_svd(weight, moment)
    values, vectors = np.linalg.eigh(moment.uncentred)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    spectrum = np.linalg.svd(weight @ root, compute_uv=False) ** 2
    for rank in range(1, min(m, d) + 1):
        least = spectrum[rank:].sum()
        room = 1e-9 * spectrum.sum()
        product = found.factors(weight, rank).product
        assert np.linalg.matrix_rank(product) <= rank
        assert lost(weight, product, moment) == pytest.approx(least, rel=1e-6, abs=room)
        assert found.errors[rank] == pytest.approx(least, rel=1e-6, abs=room)


def test_whitened_svd_is_not_plain_svd(rivals):
    rng = np.random.default_rng(0)
    weight, moment = (
        rng.normal(size=(6, 6)),
        SecondMoment.of(rng.normal(size=(50, 6)) * 3.0 ** np.arange(6)),
    )
    errors = [
        lost(weight, found.factors(weight, 2).product, moment)
        for found in (rivals.whitened_svd(weight, moment), plain_svd(weight))
    ]
    assert errors[0] < 0.5 * errors[1]


@law
@given(seed=SEEDS, m=st.integers(2, 9), d=st.integers(2, 9))
def test_activation_svd_scales_by_the_root_of_magnitudes(rivals, seed, m, d):
    rng = np.random.default_rng(seed)
    weight, x = rng.normal(size=(m, d)), rng.normal(size=(30, d)) + 1.0
    alike = SecondMoment.of(x * 3.0 / np.sqrt((x * x).mean(0)))  # correlated, all as large
    other = SecondMoment.of(x * 4.0 ** -np.arange(d))
    scale = np.sqrt(np.sqrt(np.diag(other.uncentred)))
    for rank in range(1, min(m, d) + 1):
        product = rivals.activation_svd(weight, alike).factors(weight, rank).product
        plain = plain_svd(weight).factors(weight, rank).product
        np.testing.assert_allclose(product, plain, rtol=1e-6, atol=1e-6)
        u, s, vt = np.linalg.svd(weight * scale, full_matrices=False)
        expected = (u[:, :rank] * s[:rank]) @ vt[:rank] / scale
        product = rivals.activation_svd(weight, other).factors(weight, rank).product
        np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)


CURVES = st.lists(st.floats(1e-9, 10), min_size=6, max_size=6).map(
    lambda values: np.array(sorted(values, reverse=True))
)


@law
@given(curve=CURVES, allowed=st.tuples(st.floats(0, 12), st.floats(0, 12)))
def test_ratio_at_falls_with_what_is_allowed(rivals, curve, allowed):
    less, more = sorted(allowed)
    at_less, at_more = rivals.ratio_at(curve, less), rivals.ratio_at(curve, more)
    assert rivals.CANDIDATES[0] <= at_more <= at_less <= 1


def test_ratio_at_the_candidates_and_between_them(rivals):
    curve = np.array([6.0, 5.0, 3.0, 2.0, 1.0, 0.5])
    assert len(curve) == len(rivals.CANDIDATES)
    assert tuple(rivals.ratio_at(curve, value) for value in curve) == rivals.CANDIDATES
    assert rivals.ratio_at(curve, 4.0) == pytest.approx(np.mean(rivals.CANDIDATES[1:3]))
    assert rivals.ratio_at(curve, 7.0) == rivals.CANDIDATES[0]
    # More than the last candidate costs is no matter of interpolation: the weight stays as it is.
    assert rivals.ratio_at(curve, 0.49) == 1.0


@pytest.fixture(scope="module")
def job():
    images = np.random.default_rng(0).standard_normal((40, 3, 16, 16), dtype=np.float32)
    return Job.open(synthetic_vit.build(TINY), {"image": images}, LOW, lambda *_: None)


def spent(moves):
    return sum(move.cost for move in moves)


@pytest.mark.parametrize("which", ["WHITENED_SVD", "ACTIVATION_SVD"])
def test_uniform_ratio_spends_the_budget_and_no_more(rivals, job, which):
    rival = getattr(rivals, which)
    found = rivals.measure_rival(job, rival, range(32))
    choices = make_offers(job, found, range(32), LOW).choices
    dense = [next(m for m in choice.moves if m.rank is None) for choice in choices]
    assert rival.allocate(choices, spent(dense)) == dense
    assert len(choices) == 8
    sites = [choice.measured.site for choice in choices]
    least = sum(min(s.m + s.d, s.m * s.d) for s in sites)
    assert rival.allocate(choices, least - 1) is None
    for budget in np.random.default_rng(0).uniform(least, spent(dense), size=50):
        moves = rival.allocate(choices, budget)
        assert budget - sum(s.m + s.d for s in sites) < spent(moves) <= budget
        # The same share of each weight, but for what a rank more would take; none has less than 1.
        pairs = list(zip(moves, sites, strict=True))
        highest = max((m.cost / (s.m * s.d) for m, s in pairs if m.rank != 1), default=0)
        assert all(m.cost + s.m + s.d >= highest * s.m * s.d for m, s in pairs)


def test_greedy_svd_spends_where_it_costs_least(rivals, job):
    losses = Judge(job, range(8), LOW).losses
    found = rivals.measure_greedy(job, losses, range(32))
    assert all(np.all(np.diff(site.lost) <= 0) and site.lost[0] > 0 for site in found.sites)
    precious = found.sites[3].site.key
    curves = {
        s.site.key: np.full(6, 9.0) if s.site.key == precious else s.lost for s in found.sites
    }
    sites = [dataclasses.replace(s, lost=curves[s.site.key]) for s in found.sites]
    choices = make_offers(job, dataclasses.replace(found, sites=sites), range(32), LOW).choices
    total = spent(next(m for m in c.moves if m.rank is None) for c in choices)
    for share in (0.3, 0.5, 0.7, 0.9):
        moves = rivals.GREEDY_SVD.allocate(choices, share * total)
        assert spent(moves) <= share * total
        ranks = {c.measured.site.key: m.rank for c, m in zip(choices, moves, strict=True)}
        assert ranks[precious] is None
        assert any(rank is not None for rank in ranks.values())
    with pytest.raises(TargetMissedError, match="least ratio"):
        rivals.GREEDY_SVD.allocate(choices, 0.01 * total)
