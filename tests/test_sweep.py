"""The trade-off between size and quality: its points, its report, and what is replayed from it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import model, noise

from onnx_utilrank import (
    CompressConfig,
    ConfigError,
    ModelError,
    RankPlan,
    TargetMissedError,
    UtilrankError,
    compress,
    sweep,
)
from onnx_utilrank.cli.main import main
from onnx_utilrank.compression import build
from onnx_utilrank.report.plot import check_plot, plot_sweep

RATIOS = (0.7, 0.3, 0.5)


def write(folder: Path) -> tuple[Path, Path]:
    """A small sure classifier and its data, as files."""
    proto = model(
        "(float[n,40] x) => (float[n,6] y)",
        "h = MatMul(x, W) t = Tanh(h) y = MatMul(t, V)",
        W=(noise(1, 40, 64) * 0.9 ** np.arange(64)).astype(np.float32),
        V=(6 * noise(2, 64, 6)).astype(np.float32),
    )
    path, data = folder / "m.onnx", folder / "d.npz"
    path.write_bytes(proto.SerializeToString())
    np.savez(data, x=(noise(3, 250, 40) * 0.85 ** np.arange(40)).astype(np.float32))
    return path, data


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def result(files):
    return sweep(*files, CompressConfig(), ratios=RATIOS, keep=0.5)


@pytest.fixture(scope="module")
def report(files, tmp_path_factory):
    """The report that the command line writes, with its plot and the model it picked."""
    folder = tmp_path_factory.mktemp("report")
    path, data = map(str, files)
    words = ["sweep", path, "--data", data, "--ratios", "0.7, 0.3,0.5", "--json"]
    words += ["--report", str(folder / "sweep.json"), "--plot", str(folder / "curve.svg")]
    assert main([*words, "--pick", "0.5", "-o", str(folder / "picked.onnx")]) == 0
    return folder / "sweep.json"


def strict(text: str) -> dict:
    def refuse(value: str) -> None:
        raise AssertionError(f"{value} is no JSON")

    return json.loads(text, parse_constant=refuse)


# --- points -------------------------------------------------------------------------------------


def test_points_come_largest_first_and_keep_what_was_asked(result):
    assert [p.ratio for p in result.points] == sorted(RATIOS, reverse=True)
    for point in result.points:
        assert point.plan.param_ratio <= point.ratio
        assert point.plan.target == {"param_ratio": point.ratio}
        assert point.validation.candidate.parameters == point.plan.parameters_after
    sizes = [p.plan.parameters_after for p in result.points]
    assert sizes == sorted(set(sizes), reverse=True)
    lost = [p.quality.divergence.mean for p in result.points]
    assert lost == sorted(lost)
    predicted = [p.plan.predicted_divergence for p in result.points]
    assert predicted == sorted(predicted)
    assert {p.quality.divergence.samples for p in result.points} == {50}


def test_points_are_what_compress_makes(files, result):
    for point in result.points:
        alone = compress(*files, CompressConfig(param_ratio=point.ratio))
        assert alone.plan == point.plan
        assert alone.quality == point.quality
        if point.ratio == 0.5:
            assert alone.model.SerializeToString() == result.store.proto.SerializeToString()


def test_same_ratio_twice_is_one_point(files):
    found = sweep(*files, ratios=(0.5, 0.5))
    assert [p.ratio for p in found.points] == [0.5]
    with pytest.raises(UtilrankError, match="the sweep kept no model"):
        found.save("nowhere.onnx")


def test_points_out_of_reach_are_named(files):
    found = sweep(*files, ratios=(0.5, 0.001))
    assert [p.ratio for p in found.points] == [0.5]
    (note,) = (n for n in found.notes if n.startswith("0.001: "))
    assert "cannot be reached" in note
    for ratios, keep in (((0.001,), None), ((0.5, 0.001), 0.001)):
        with pytest.raises(TargetMissedError, match="cannot be reached"):
            sweep(*files, ratios=ratios, keep=keep)


def test_sweep_goes_on_after_a_candidate_that_cannot_be_made(files, monkeypatch):
    def refusing(job, plan, *more):
        if plan.target == {"param_ratio": 0.7}:
            raise ModelError("a factor does not fit")
        return build(job, plan, *more)

    monkeypatch.setattr("onnx_utilrank.sweeping.build", refusing)
    found = sweep(*files, ratios=(0.8, 0.7, 0.5))
    assert [p.ratio for p in found.points] == [0.8, 0.5]
    assert "0.7: a factor does not fit." in found.notes


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"ratios": ()}, {}, "needs ratios"),
        ({"ratios": (0.5, 1.5)}, {}, "needs ratios"),
        ({"ratios": (0.0,)}, {}, "needs ratios"),
        ({"ratios": (0.5,), "keep": 0.4}, {}, r"ratio 0\.4 is no point"),
        ({}, {"param_ratio": 0.5}, "takes no target"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(files, options, config, message):
    with pytest.raises(ConfigError, match=message):
        sweep(*files, CompressConfig(**config), **options)


# --- report and replay --------------------------------------------------------------------------


def test_report_is_strict_json(report, result):
    text = strict(report.read_text())
    assert set(text) == {"run", "model", "engine", "notes", "layers", "points"}
    assert [p["ratio"] for p in text["points"]] == [p.ratio for p in result.points]
    for made, point in zip(text["points"], result.points, strict=True):
        assert RankPlan.from_json(json.dumps(made["plan"])) == point.plan
        assert made["quality"]["divergence"]["mean"] == point.quality.divergence.mean
        assert made["validation"]["candidate"]["parameters"] == point.plan.parameters_after


def test_infinities_become_null(result):
    point = result.points[0]
    lone = replace(point.quality.divergence, standard_error=float("inf"), samples=1)
    odd = replace(result, points=(replace(point, quality=replace(point.quality, divergence=lone)),))
    (made,) = strict(json.dumps(odd.as_dict()))["points"]
    assert made["quality"]["divergence"]["standard_error"] is None


def test_plans_of_points_are_replayed(files, report, tmp_path):
    plan = RankPlan.load(report, point=0.5)
    assert plan.param_ratio <= 0.5
    path, data = files
    given = ["compress", str(path), "--data", str(data)]
    again, direct = tmp_path / "again.onnx", tmp_path / "direct.onnx"
    assert main([*given, "--plan", str(report), "--point", "0.5", "-o", str(again)]) == 0
    assert main([*given, "--param-ratio", "0.5", "-o", str(direct)]) == 0
    expected = direct.read_bytes()
    assert again.read_bytes() == expected
    assert report.with_name("picked.onnx").read_bytes() == expected


def test_reports_without_the_point_are_refused(report, tmp_path):
    with pytest.raises(ModelError, match=r"has no point at 0\.45"):
        RankPlan.load(report, point=0.45)
    with pytest.raises(ModelError, match=r"report of a sweep; say which point of it \(.*0\.5.*\)"):
        RankPlan.load(report)
    plan = tmp_path / "plan.json"
    RankPlan.load(report, point=0.5).save(plan)
    for text in (plan.read_text(), "{", "[]", "3", '{"points": [{}]}', '{"points": 1}'):
        plan.write_text(text)
        with pytest.raises(ModelError, match="not the report of a sweep"):
            RankPlan.load(plan, point=0.5)
    plan.write_text('{"plan": {}, "samples": 3}')
    with pytest.raises(ModelError, match="is a report; the plan is what --plan-out writes"):
        RankPlan.load(plan)


# --- plot ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")],
)
def test_plot_is_drawn(result, tmp_path, suffix, start):
    target = tmp_path / f"curve{suffix}"
    plot_sweep(result, target)
    assert target.read_bytes().startswith(start)
    plot_sweep(replace(result, points=result.points[:1]), target)
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


def test_plot_of_the_command_line_is_written(report):
    text = report.with_name("curve.svg").read_text()
    assert text.rstrip().endswith("</svg>")


@pytest.mark.parametrize("name", ["curve.jpg", "curve", "curve.svg.txt"])
def test_plots_of_other_formats_are_refused(name):
    with pytest.raises(ConfigError, match=r"a plot is one of \.svg, \.png, \.pdf"):
        check_plot(name)


# --- exit statuses ------------------------------------------------------------------------------

COMPRESS = ("compress", "MODEL", "--data", "DATA")
SWEEP = ("sweep", "MODEL", "--data", "DATA")
BAD = [
    (2, COMPRESS, "-o", "o.onnx"),
    (2, COMPRESS, "--param-ratio", "0.5"),
    (2, COMPRESS, "-o", "o.onnx", "--plan", "REPORT", "--point", "0.5", "--param-ratio", "0.5"),
    (2, COMPRESS, "-o", "o.onnx", "--param-ratio", "0.5", "--flop-ratio", "0.5"),
    (2, COMPRESS, "-o", "o.onnx", "--point", "0.5", "--param-ratio", "0.5"),
    (2, COMPRESS, "-o", "o.onnx", "--plan", "REPORT", "--point", "0.5", "--method", "svd"),
    (2, COMPRESS, "-o", "o.onnx", "--plan", "REPORT", "--point", "0.5", "--moves", "pivot"),
    (2, COMPRESS, "-o", "o.onnx", "--param-ratio", "1.5"),
    (2, COMPRESS, "-o", "o.onnx", "--param-ratio", "0.5", "--moves", "tucker"),
    (2, COMPRESS, "-o", "o.onnx", "--param-ratio", "0.5", "--evaluate", "a:b", "--labels", "c"),
    (2, COMPRESS, "-o", "o.onnx", "--param-ratio", "0.5", "--memory-budget", "12"),
    (2, COMPRESS, "-o", "o.onnx", "--param-ratio", "0.5", "--memory-budget", "much"),
    (5, COMPRESS, "-o", "o.onnx", "--plan", "REPORT", "--point", "0.45"),
    (5, COMPRESS, "-o", "o.onnx", "--plan", "REPORT"),
    (5, COMPRESS, "-o", "o.onnx", "--plan", "MODEL", "--point", "0.5"),
    (3, COMPRESS, "-o", "o.onnx", "--param-ratio", "0.001"),
    (3, COMPRESS, "-o", "o.onnx", "--max-divergence", "0"),
    (2, SWEEP, "--pick", "0.5"),
    (2, SWEEP, "-o", "o.onnx"),
    (2, SWEEP, "--plot", "o.jpg"),
    (2, SWEEP, "--plot", "no/such/folder/o.svg"),
    (2, SWEEP, "--report", "o.json", "--plot", "o.json"),
    (2, SWEEP, "--ratios", "0.5,half"),
    (2, SWEEP, "--ratios", "0.5,,0.3"),
    (2, SWEEP, "--ratios", "0"),
    (2, SWEEP, "--ratios", "2"),
    (3, SWEEP, "--ratios", "0.001"),
    (3, SWEEP, "--ratios", "0.5", "--pick", "0.001", "-o", "o.onnx"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda c: " ".join(c[1][:1] + c[2:]))
def test_bad_command_lines_give_one_line(case, files, report, tmp_path, monkeypatch, capsys):
    status, common, *rest = case
    monkeypatch.chdir(tmp_path)
    known = {"MODEL": str(files[0]), "DATA": str(files[1]), "REPORT": str(report)}
    words = [known.get(word, word) for word in (*common, *rest)]
    try:
        found = main(words)
    except SystemExit as e:  # argparse, which shows its usage too
        found = e.code
    out, err = capsys.readouterr()
    assert found == status
    assert out == ""
    (line,) = (line for line in err.splitlines() if "error:" in line)
    assert line.startswith("onnx-utilrank")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
