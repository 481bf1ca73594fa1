"""The command line as a user types it: outputs, streams and exit statuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.parser import parse_model

from digits import write_npz
from onnx_utilrank.cli.main import main

MODELS = Path(__file__).resolve().parent.parent / "models"
VIT, CNN = str(MODELS / "digits_vit.onnx"), str(MODELS / "digits_cnn.onnx")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    calibration, *_ = write_npz(tmp_path_factory.mktemp("digits"))
    with np.load(calibration) as arrays:
        held = {name: arrays[name][:120] for name in arrays.files}
    small = calibration.with_name("small.npz")
    np.savez(small, **held)
    return str(small)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as e:  # argparse
            status = e.code
        streams = capsys.readouterr()
        return status, streams.out, streams.err

    return call


def errors(text):
    return [line for line in text.splitlines() if "error:" in line]


def test_analyze_prints_the_measurement(run, data):
    status, out, _ = run("analyze", CNN, "--data", data)
    assert status == 0
    assert "Mean layer utilization (MLU)" in out


def test_analyze_json_is_all_of_stdout(run, data):
    status, out, _ = run("analyze", CNN, "--data", data, "--json", "--report", "r.json")
    assert status == 0
    report = json.loads(out)
    assert report == json.loads(Path("r.json").read_text())
    layers = report["layers"]
    for layer in layers:
        assert layer["rank"] == min(layer["input_rank"], layer["output_rank"])
        assert layer["utilization"] == layer["rank"] / min(layer["m"], layer["d"])
    mean = sum(layer["utilization"] for layer in layers) / len(layers)
    assert report["mean_layer_utilization"] == pytest.approx(mean)


def test_utilization_falls_with_the_energy(run, data):
    figures = []
    for energy in ("0.9", "0.999", "1"):
        _, out, _ = run("analyze", CNN, "--data", data, "--energy", energy, "--json")
        figures.append(json.loads(out)["mean_layer_utilization"])
    assert figures == sorted(figures)
    assert figures[-1] == 1.0


def test_compress_writes_model_plan_and_report(run, data):
    status, out, _ = run(
        *("compress", VIT, "-o", "out.onnx", "--data", data, "--param-ratio", 0.5),
        *("--plan-out", "plan.json", "--report", "report.json"),
    )
    assert status == 0
    assert "Written to out.onnx" in out
    model = onnx.load("out.onnx")
    onnx.checker.check_model(model, full_check=True)
    ort.InferenceSession("out.onnx", providers=["CPUExecutionProvider"])
    report = json.loads(Path("report.json").read_text())
    plan = report["plan"]
    assert plan == json.loads(Path("plan.json").read_text())
    assert plan["parameters_after"] <= 0.5 * plan["parameters_before"]
    figures = report["validation"]
    assert figures["candidate"]["parameters"] == plan["parameters_after"]
    assert figures["candidate"]["file_bytes"] < figures["reference"]["file_bytes"]
    assert figures["relative_error"] < 0.1
    assert figures["samples"] + report["samples"] == 120
    assert sorted(p.name for p in Path().iterdir()) == ["out.onnx", "plan.json", "report.json"]


def test_a_plan_replays_byte_for_byte_and_only_once(run, data):
    given = ("--data", data)
    run("compress", CNN, "-o", "a.onnx", *given, "--param-ratio", 0.6, "--plan-out", "p.json")
    status, _, _ = run("compress", CNN, "-o", "b.onnx", *given, "--plan", "p.json")
    assert status == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    status, out, _ = run("compress", "a.onnx", "-o", "c.onnx", *given, "--plan", "p.json")
    assert status == 0
    assert "Unchanged" in out
    assert Path("a.onnx").read_bytes() == Path("c.onnx").read_bytes()


def test_full_rank_is_the_same_function(run, data):
    status, _, _ = run(
        *("compress", CNN, "-o", "full.onnx", "--data", data),
        *("--energy", 1.0, "--force", "--report", "r.json"),
    )
    assert status == 0
    # Two products of at most a few hundred terms in float32 take the place of one.
    assert json.loads(Path("r.json").read_text())["validation"]["relative_error"] < 1e-5


@pytest.mark.parametrize("method", ["two-sided", "one-sided", "utilized-rank", "svd"])
def test_every_method_keeps_the_budget(run, data, method):
    status, out, _ = run(
        *("compress", CNN, "--dry-run", "--data", data, "--json"),
        *("--param-ratio", 0.7, "--method", method),
    )
    plan = json.loads(out)["plan"]
    assert status == 0
    assert plan["method"] == method
    assert plan["parameters_after"] <= 0.7 * plan["parameters_before"]
    assert any(entry["rank"] for entry in plan["entries"])


def test_ranks_are_multiples(run, data):
    _, out, _ = run(
        *("compress", CNN, "--dry-run", "--data", data, "--json"),
        *("--param-ratio", 0.6, "--rank-multiple", 8),
    )
    ranks = [e["rank"] for e in json.loads(out)["plan"]["entries"] if e["rank"]]
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)


def test_patterns_and_op_types_choose_nodes(run, data):
    given = ("compress", CNN, "--dry-run", "--data", data, "--json", "--param-ratio", 0.9)
    _, out, _ = run(*given, "--op-types", "Gemm")
    assert {e["op_type"] for e in json.loads(out)["plan"]["entries"]} == {"Gemm"}
    everything = json.loads(run(*given)[1])["plan"]["entries"]
    name = everything[-1]["site"]
    _, out, _ = run(*given, "--exclude", name)
    assert name not in {e["site"] for e in json.loads(out)["plan"]["entries"]}
    assert json.loads(out)["left_alone"]["excluded by a pattern"] == 1


def test_dry_run_writes_nothing(run, data):
    status, out, _ = run("compress", CNN, "--dry-run", "--data", data, "--param-ratio", 0.7)
    assert status == 0
    assert "Planned only" in out
    assert not list(Path().iterdir())


def test_a_missed_target_says_what_is_reachable(run, data):
    status, out, err = run("compress", CNN, "-o", "o.onnx", "--data", data, "--param-ratio", 1e-4)
    assert status == 3
    assert not out
    assert "is kept" in errors(err)[0]
    assert not list(Path().iterdir())


def test_a_model_that_uses_its_space_is_left(run, data):
    status, _, err = run("compress", CNN, "-o", "o.onnx", "--data", data, "--energy", 1.0)
    assert status == 3
    assert "uses its space" in errors(err)[0]
    assert not list(Path().iterdir())


def test_validate_passes_and_fails_by_its_tolerances(run, data):
    run("compress", CNN, "-o", "o.onnx", "--data", data, "--param-ratio", 0.5)
    assert run("validate", CNN, "o.onnx", "--data", data)[0] == 0
    assert run("validate", CNN, CNN, "--data", data, "--max-error", 0, "--min-agreement", 1)[0] == 0
    status, out, err = run("validate", CNN, "o.onnx", "--data", data, "--max-error", 1e-9)
    assert status == 3
    assert "FAILED" in out
    assert "relative error" in errors(err)[0]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("compress", CNN, "-o", "o.onnx", "--param-ratio", 0.5),
        ("compress", CNN, "-o", "o.onnx", "--data", "d"),
        ("compress", CNN, "-o", "o.onnx", "--data", "d", "--param-ratio", 0.5, "--energy", 0.9),
        ("compress", CNN, "-o", "o.onnx", "--data", "d", "--param-ratio", 1.5),
        ("compress", CNN, "-o", "o.onnx", "--data", "d", "--param-ratio", "nan"),
        ("compress", CNN, "--data", "d", "--param-ratio", 0.5),
        ("compress", CNN, "-o", CNN, "--data", "d", "--param-ratio", 0.5),
        ("compress", CNN, "-o", "no/o.onnx", "--data", "d", "--param-ratio", 0.5),
        ("compress", CNN, "-o", ".", "--data", "d", "--param-ratio", 0.5),
        ("compress", CNN, "-o", "o", "--plan-out", "o", "--data", "d", "--param-ratio", 0.5),
        ("compress", CNN, "-o", "o", "--data", "d", "--energy", 0.9, "--method", "svd"),
        ("compress", CNN, "-o", "o", "--data", "d", "--plan", "p", "--force"),
        ("compress", CNN, "-o", "o", "--data", "d", "--plan", "p", "--no-refit"),
        ("compress", CNN, "-o", "o", "--data", "d", "--plan", "p", "--no-augment"),
        ("compress", CNN, "-o", "o", "--data", "d", "--plan", "p", "--rank-multiple", 8),
        ("compress", CNN, "-o", "o", "--data", "d", "--energy", 0.9, "--memory-budget", "inf"),
        ("compress", CNN, "-o", "o", "--data", "d", "--energy", 0.9, "--memory-budget", "nan"),
        ("compress", CNN, "-o", "o", "--data", "d", "--param-ratio", 0.5, "--seed", -1),
        ("compress", CNN, "-o", "o", "--data", "d", "--param-ratio", 0.5, "--op-types", "LSTM"),
        ("analyze", CNN, "--data", "d", "--provider", "abacus"),
        ("validate", CNN, CNN, "--data", "d", "--samples", 0),
    ],
)
def test_wrong_usage(run, words):
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert err
    assert not list(Path().iterdir())


@pytest.fixture
def broken(tmp_path):
    """Files that cannot be used, by name."""
    (tmp_path / "text.onnx").write_text("not a model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    cut = Path(CNN).read_bytes()
    (tmp_path / "cut.onnx").write_bytes(cut[: len(cut) // 2])
    np.savez(tmp_path / "double.npz", image=np.zeros((8, 1, 8, 8)))
    np.savez(tmp_path / "named.npz", picture=np.zeros((8, 1, 8, 8), np.float32))
    np.savez(tmp_path / "nan.npz", image=np.full((8, 1, 8, 8), np.nan, np.float32))
    np.savez(tmp_path / "one.npz", image=np.zeros((1, 1, 8, 8), np.float32))
    (tmp_path / "plan.json").write_text('{"schema": 1}')


@pytest.mark.parametrize(
    ("model", "source", "named"),
    [
        ("missing.onnx", None, "missing.onnx"),
        ("text.onnx", None, "text.onnx"),
        ("empty.onnx", None, "empty.onnx"),
        ("cut.onnx", None, "cut.onnx"),
        (CNN, "missing.npz", "missing.npz"),
        (CNN, "double.npz", "float64"),
        (CNN, "named.npz", "picture"),
        (CNN, "nan.npz", "image"),
        (CNN, "one.npz", "one.npz"),
        (CNN, "no_such_module:feeds", "no_such_module"),
    ],
)
@pytest.mark.usefixtures("broken")
def test_bad_models_and_data_end_in_one_line(run, data, model, source, named):
    status, out, err = run(
        *("compress", model, "-o", "o.onnx", "--data", source or data, "--param-ratio", 0.5)
    )
    assert (status, out) == (5, "")
    (line,) = errors(err)
    assert named in line
    assert not Path("o.onnx").exists()


def test_metrics_that_do_not_exist_fail_before_anything_runs(run, data, monkeypatch):
    def opened(*given, **options):
        raise AssertionError(f"the model was opened with {given} {options}")

    monkeypatch.setattr("onnx_utilrank.pipeline.Job.open", opened)
    target = ("--max-drop", 1, "--evaluate", "nomod:fn")
    status, out, err = run("compress", CNN, "-o", "o.onnx", "--data", data, *target)
    assert (status, out) == (5, "")
    (line,) = errors(err)
    assert "nomod" in line
    assert not list(Path().iterdir())


@pytest.mark.usefixtures("broken")
def test_bad_plans_end_in_one_line(run, data):
    status, _, err = run("compress", CNN, "-o", "o.onnx", "--data", data, "--plan", "plan.json")
    assert status == 5
    assert "plan.json" in errors(err)[0]
    run("compress", VIT, "--dry-run", "--data", data, "--param-ratio", 0.9, "--plan-out", "v.json")
    status, _, err = run("compress", CNN, "-o", "o.onnx", "--data", data, "--plan", "v.json")
    assert status == 5
    assert "another model" in errors(err)[0]
    assert not Path("o.onnx").exists()


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_got_is_an_error(run, data, provider):
    status, out, err = run("analyze", CNN, "--data", data, "--provider", provider)
    if status == 0:
        pytest.skip(f"{provider} works on this machine")
    assert (status, out) == (4, "")
    assert provider in errors(err)[0]


def test_an_interrupted_output_leaves_the_old_file(run, data, monkeypatch):
    Path("o.onnx").write_bytes(b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    status, out, err = run("compress", CNN, "-o", "o.onnx", "--data", data, "--param-ratio", 0.6)
    assert (status, out) == (5, "")
    assert "o.onnx" in errors(err)[0]
    assert [p.name for p in Path().iterdir()] == ["o.onnx"]
    assert Path("o.onnx").read_bytes() == b"old"


def test_data_may_come_from_a_function(run):
    Path("feeds.py").write_text(
        "import numpy as np\n"
        "def samples():\n"
        "    rng = np.random.default_rng(0)\n"
        "    for _ in range(12):\n"
        "        yield {'image': rng.random((4, 1, 8, 8), dtype=np.float32)}\n"
    )
    status, out, _ = run("analyze", CNN, "--data", "feeds:samples", "--json")
    assert status == 0
    assert json.loads(out)["samples"] == 12


def test_model_names_are_not_markup(run):
    text = """<ir_version: 10, opset_import: ["" : 17]>
    g (float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }"""
    model = parse_model(text)
    name = "[link=x]w\x1b[31m"
    values = np.random.default_rng(1).random((4, 4), dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    model.graph.node[0].name = "[bold red]/[/]"
    model.graph.node[0].input[1] = name
    onnx.save(model, "odd.onnx")
    rows = np.random.default_rng(0).random((20, 4), dtype=np.float32)
    np.savez("d.npz", x=rows)
    status, out, _ = run("analyze", "odd.onnx", "--data", "d.npz")
    assert status == 0
    assert "[link=x]w" in out
    assert "\x1b" not in out


def test_the_module_runs_as_a_program(tmp_path, data):
    command = [sys.executable, "-m", "onnx_utilrank", "analyze", CNN, "--data", data, "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["layers"]


def test_terminals_may_lack_letters_that_names_have(tmp_path, data):
    model = onnx.load(CNN)
    model.graph.node[0].name = "卷积"
    onnx.save(model, tmp_path / "named.onnx")
    command = [sys.executable, "-m", "onnx_utilrank", "compress", "named.onnx", "-o", "out.onnx"]
    command += ["--data", data, "--param-ratio", "0.7", "--moves", "low-rank"]
    ascii_alone = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    done = subprocess.run(
        command, cwd=tmp_path, env=ascii_alone, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\xb1" in done.stdout
    assert (tmp_path / "out.onnx").exists()


def test_interruption_is_one_line_and_leaves_nothing(run, data, monkeypatch):
    def stopped(*_given, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("onnx_utilrank.pipeline.Job.measure", stopped)
    status, out, err = run("compress", CNN, "-o", "o.onnx", "--data", data, "--param-ratio", 0.5)
    assert (status, out) == (130, "")
    assert [line for line in err.splitlines() if line] == ["onnx-utilrank: interrupted"]
    assert not Path("o.onnx").exists()
