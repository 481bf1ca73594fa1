"""The scripts of `tools/`, and the recipe that they time, on the smallest inputs that show them."""

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import synthetic_vit
from onnx_utilrank.calibration.collect import collect
from onnx_utilrank.calibration.taps import row_stride
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.sites.find import find_sites

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
TINY = synthetic_vit.VitShape(width=32, layers=2, heads=2, patch=4, image=16, classes=7)
ZOO = Path(os.environ.get("ONNX_UTILRANK_ZOO") or ROOT.parent / "shared" / "zoo")


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("calibration_overhead")


@pytest.fixture
def zoo_table(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("zoo_table")


def cells(text):
    """The rows of a Markdown table, without the rule below its head."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    split = [[c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert len({len(row) for row in split}) == 1, "the rows differ in length"
    assert all(re.fullmatch(r"---:?", cell) for cell in split[1])
    return [split[0], *split[2:]]


# models/synthetic_vit.py


def logits(model, images):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (values,) = session.run([synthetic_vit.OUTPUT_NAME], {synthetic_vit.INPUT_NAME: images})
    return values


def test_synthetic_vit_runs_for_any_batch_and_stays_sane():
    model = synthetic_vit.build(TINY)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (10, 17)
    images = np.random.default_rng(0).standard_normal((5, 3, 16, 16), dtype=np.float32)
    values = logits(model, images)
    assert values.shape == (5, 7)
    assert 0.3 < values.std() < 3
    np.testing.assert_allclose(logits(model, images[2:3])[0], values[2], rtol=1e-4, atol=1e-5)


def test_synthetic_vit_is_seeded():
    one, same, other = (synthetic_vit.build(TINY, seed) for seed in (0, 0, 1))
    assert one.SerializeToString() == same.SerializeToString() != other.SerializeToString()


def test_synthetic_vit_has_the_layers_of_its_shape():
    sites, skips = find_sites(GraphIndex.build(ModelStore.load(synthetic_vit.build(TINY))))
    # Per block: query, key, value, projection and two of the MLP; the patches; the head.
    assert [site.op_type for site in sites] == ["Conv", *["MatMul"] * 12, "Gemm"]
    assert [use.bias.kind for site in sites for use in site.uses] == [
        "input",
        *["add"] * 12,
        "input",
    ]
    # The two products of attention.
    assert [skip.reason for skip in skips] == ["no operand is a constant weight"] * 4
    widths = {(site.d, site.m) for site in sites if site.op_type == "MatMul"}
    assert widths == {(32, 32), (32, 128), (128, 32)}


def test_synthetic_vit_standard_shapes():
    assert {key: shape.tokens for key, shape in synthetic_vit.SHAPES.items()} == {
        "vit-s": 197,
        "vit-b": 197,
        "vit-l": 197,
    }
    with pytest.raises(ValueError, match="heads have to divide"):
        synthetic_vit.build(synthetic_vit.VitShape(width=10, layers=1, heads=3))


# tools/calibration_overhead.py


@pytest.fixture
def tiny_files(tmp_path):
    onnx.save(synthetic_vit.build(TINY), tmp_path / "tiny.onnx")
    images = np.random.default_rng(0).standard_normal((2500, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "images.npz", image=images)
    return tmp_path / "tiny.onnx", tmp_path / "images.npz"


def job(overhead, files, most, samples=2500):
    model, data = files
    return overhead.Job.open(
        model, str(data), label="tiny", samples=samples, provider=CPU, most=most
    )


def test_overhead_times_every_feed_of_the_real_calibration(overhead, tiny_files):
    small = job(overhead, tiny_files, most=None, samples=100)
    cost = overhead.measure_taps(small, "one-sided")
    assert (cost.samples, cost.runs) == (80, 3)  # a fifth is held back; 32 rows a run
    assert len(cost.plain) == len(cost.calibrating) == 3
    assert len(cost.pairs) == 2  # the first is a warm-up
    assert min(*cost.plain, *cost.calibrating, cost.plain_start, cost.calibrating_start) > 0


def test_overhead_strides_are_those_of_all_samples(overhead, tiny_files):
    whole = job(overhead, tiny_files, most=2)
    cost = overhead.measure_taps(whole, "one-sided")
    assert len(cost.plain) == 2
    assert cost.runs == 71  # 256 are held back
    real = collect(
        whole.index,
        whole.views("one-sided"),
        whole.data,
        whole.samples,
        CPU,
        batch=32,
        progress=lambda *_: None,
    )
    assert cost.strides == (min(real.strides.values()), max(real.strides.values()))
    # 2244 images of 17 tokens; two feeds of them alone would give 1.
    assert cost.strides == (1, row_stride(2244 * 17, 31 * 17, 32)) == (1, 4)


def test_overhead_ratios(overhead):
    cost = overhead.Cost(
        model="m",
        way="w",
        samples=160,
        runs=5,
        strides=(1, 4),
        plain=[10.0, 1.0, 2.0, 1.0],
        calibrating=[50.0, 2.0, 3.0, 3.0],
        plain_start=4.0,
        calibrating_start=9.0,
    )
    assert cost.ratio == pytest.approx(8 / 4)
    assert cost.median_ratio == pytest.approx(2.0)
    # One run was not timed; it is taken to last 4/3 s and 8/3 s.
    assert cost.whole_ratio == pytest.approx((9 + 58 + 8 / 3) / (4 + 14 + 4 / 3))
    head, row = cells(overhead.table([cost]))
    assert dict(zip(head, row, strict=True))["row strides"] == "1 to 4"


def test_overhead_prints_a_table_for_a_model(overhead, tmp_path, capsys):
    digits = pytest.importorskip("digits", reason="needs scikit-learn, the extra `demo`")
    calibration, *_ = digits.write_npz(tmp_path)
    model = ROOT / "models" / "digits_vit.onnx"
    words = ["--model", str(model), "--data", str(calibration), "--samples", "100", "--expose"]
    assert overhead.main(words) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("    python tools/calibration_overhead.py --model ")
    head, *rows = cells(printed.out)
    assert head[0] == "model"
    assert [row[:2] for row in rows] == [
        ["digits_vit", "taps, one-sided"],
        ["digits_vit", "exposed, numpy"],
    ]


def test_overhead_says_what_is_wrong(overhead, tiny_files, capsys):
    model, data = map(str, tiny_files)
    assert overhead.main(["--model", model, "--data", data, "--method", "svd"]) == 2
    assert "needs no moments" in capsys.readouterr().err
    assert overhead.main(["--model", f"{model}.missing", "--data", data]) == 5
    with pytest.raises(SystemExit, match="2"):
        overhead.main(["--model", model])


# tools/zoo_table.py


def entry(zoo_table, **changes):
    fields = {
        **{"model": "kwt1", "ratio": 0.7, "method": "one-sided", "status": 0, "failed": False},
        **{"outcome": "smaller", "mlu": 0.5, "seconds": 12.34, "kept": 0.69949},
        **{"metric": "accuracy %", "samples": 450, "before": 98.0, "after": 96.5, "drop": 1.5},
        **{"error": 0.0123, "latency": 0.871},
    }
    return zoo_table.Entry(**fields | changes)


def test_zoo_table_rows(zoo_table):
    missed = dict.fromkeys(("kept", "metric", "before", "after", "drop", "error", "latency"))
    reason = "not reached: a|b\nc"
    head, made, not_reached, broken = cells(
        zoo_table.table(
            [
                entry(zoo_table),
                entry(zoo_table, status=3, outcome=reason, **missed),
                entry(zoo_table, after=None, drop=None, error=float("inf")),
            ]
        )
    )
    assert made == [
        *("kwt1", "70 %", "69.9 %", "one-sided", "accuracy %", "98.00", "96.50", "1.50"),
        *("0.0123", "50.0 %", "12.3", "0.87", "smaller"),
    ]
    row = dict(zip(head, not_reached, strict=True))
    assert (row["kept"], row["after"], row["outcome"]) == ("–", "–", "not reached: a\\|b c")
    row = dict(zip(head, broken, strict=True))
    assert (row["after"], row["output error"]) == ("not finite", "inf")


def test_zoo_table_keeps_rows_and_takes_failed_ones_again(zoo_table, tmp_path):
    file = tmp_path / "rows.json"
    settings = {"samples": 256, "limit": None}
    results = zoo_table.Results(settings, file)
    good = entry(zoo_table, error=float("inf"))
    results.add(good)
    results.add(entry(zoo_table, method="svd", failed=True))
    assert zoo_table.Results(settings, file).entries == {good.key: good}
    with pytest.raises(zoo_table.StepError, match="name another file"):
        zoo_table.Results(settings | {"limit": 5}, file)
    file.write_text("[]")
    with pytest.raises(zoo_table.StepError, match="not results of this script"):
        zoo_table.Results(settings, file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which zoo"),
        (["--zoo", "missing"], "not a zoo"),
        (["--zoo", "missing", "--ratios", "1.5"], r"not in \(0, 1\]"),
        (["--zoo", "missing", "--out", "table.txt"], "neither .json nor .md"),
    ],
)
def test_zoo_table_usage(zoo_table, words, message, monkeypatch, capsys):
    monkeypatch.delenv("ONNX_UTILRANK_ZOO", raising=False)
    with pytest.raises(SystemExit, match="2"):
        zoo_table.main(words)
    assert re.search(message, capsys.readouterr().err)


FAKE_ZOO = """
import json, sys
import numpy as np
verb, name = sys.argv[1:3]
if name == "absent":
    sys.exit("no entry 'absent'")
if verb == "calib":
    n = int(sys.argv[sys.argv.index("--samples") + 1])
    images = np.random.default_rng(0).standard_normal((n, 3, 16, 16), dtype=np.float32)
    np.savez(sys.argv[4], image=images)
else:
    row = {"metric": "score", "value": 2.0, "n": 9, "baseline": 3.0, "drop": 1.0}
    print(json.dumps(row))
"""


@pytest.fixture
def fake_zoo(tmp_path):
    """A zoo of one tiny transformer, with a metric that is always the same."""
    folder = tmp_path / "zoo"
    (folder / "tiny").mkdir(parents=True)
    (folder / "zoo.py").write_text(FAKE_ZOO)
    onnx.save(synthetic_vit.build(TINY), folder / "tiny" / "model.onnx")
    return folder


def test_zoo_table_runs_the_whole_chain(zoo_table, fake_zoo, tmp_path, capsys):
    files = [tmp_path / "rows.json", tmp_path / "table.md"]
    words = ["--zoo", str(fake_zoo), "--models", "absent", "tiny", "--ratios", "0.7", "0.00001"]
    words += ["--methods", "two-sided", "--samples", "40", "--limit", "9"]
    words += [f"--out={file}" for file in files]
    assert zoo_table.main(words) == 1  # for the model that is absent
    printed = capsys.readouterr()
    verbs = re.findall(
        r"^\$ (?:python\S* )?(?:\S*zoo\.py|onnx-utilrank|-c) (\S+)", printed.err, re.M
    )
    expected = ["--version", "calib", "calib", "analyze", "compress"]
    assert [v for v in verbs if "import" not in v] == [*expected, "eval", "validate", "compress"]
    assert "absent: zoo.py calib failed with exit status 1: no entry 'absent'" in printed.err
    assert str(tmp_path) not in printed.out
    head, made, missed = (dict(enumerate(row)) for row in cells(printed.out))
    assert head[2] == "kept"
    assert 60 < float(made[2].removesuffix(" %")) <= 70
    assert [made[k] for k in (4, 5, 6, 7)] == ["score", "3.00", "2.00", "1.00"]
    assert missed[12].startswith("not reached: ZOO/tiny/model.onnx: ")
    assert files[1].read_text() == printed.out
    assert [row["status"] for row in json.loads(files[0].read_text())["rows"]] == [0, 3]

    assert zoo_table.main([word for word in words if word != "absent"]) == 0
    again = capsys.readouterr()
    assert again.err.splitlines() == ["$ onnx-utilrank --version"]  # nothing is measured twice
    assert cells(again.out) == cells(printed.out)


def test_zoo_table_tells_what_failed(zoo_table, fake_zoo, capsys):
    (fake_zoo / "tiny" / "model.onnx").write_bytes(b"no model")
    words = ["--zoo", str(fake_zoo), "--models", "tiny", "--samples", "9"]
    assert zoo_table.main(words) == 1
    assert "tiny: analyze failed with exit status 5: " in capsys.readouterr().err


@pytest.mark.zoo
@pytest.mark.skipif(not (ZOO / "zoo.py").is_file(), reason="no folder of trained models")
def test_zoo_table_on_a_real_model(tmp_path):
    pytest.importorskip("PIL", reason="needs Pillow, the extra `dev`")
    words = ["--models", "mnist8_cntk", "--ratios", "0.8", "--limit", "50", "--out", "rows.json"]
    done = subprocess.run(
        [sys.executable, TOOLS / "zoo_table.py", "--zoo", ZOO, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    head, *rows = cells(done.stdout)
    named = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["method"] for row in named] == ["two-sided", "one-sided", "utilized-rank", "svd"]
    for row in named:
        assert float(row["kept"].removesuffix(" %")) <= 80
        assert float(row["after"]) > 80
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4


def test_recovery_table_runs_the_whole_chain(monkeypatch, fake_zoo, tmp_path, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    recovery_table = importlib.import_module("recovery_table")
    words = ["--zoo", str(fake_zoo), "--models", "tiny", "--ratios", "0.7"]
    more = tmp_path / "more.npz"
    np.savez(more, image=np.random.default_rng(1).random((60, 3, 16, 16), dtype=np.float32))
    words += ["--train", f"tiny={more}"]
    assert recovery_table.main([*words, "--samples", "40", "--minutes", "0.01"]) == 0
    printed = capsys.readouterr()
    assert str(fake_zoo) not in printed.out
    assert str(tmp_path) not in printed.out
    assert "--models tiny --ratios" in printed.out
    assert "--train tiny=more.npz" in printed.out
    head, *rows = cells(printed.out)
    assert head == list(recovery_table.COLUMNS)
    assert [tuple(row[2:4]) for row in rows] == list(recovery_table.WAYS)
    for row in rows:
        assert 50 < float(row[4]) <= 70
        assert row[6] == "1.00"
    assert recovery_table.main(["--zoo", str(fake_zoo), "--models", "absent"]) == 1
    with pytest.raises(SystemExit):
        recovery_table.main(["--zoo", str(fake_zoo), "--models", "tiny", "--labels", "label"])
    assert "absent" in capsys.readouterr().err


def test_quantization_table_runs_the_whole_chain(monkeypatch, fake_zoo, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    quantization_table = importlib.import_module("quantization_table")
    words = ["--zoo", str(fake_zoo), "--models", "tiny", "--ratio", "0.7", "--samples", "30"]
    assert quantization_table.main([*words, "--schemes", "int4", "int8"]) == 0
    printed = capsys.readouterr()
    assert str(fake_zoo) not in printed.out
    head, *rows = cells(printed.out)
    assert head == list(quantization_table.COLUMNS)
    assert [row[1] for row in rows] == [
        *("original", "low-rank (70 %)", "int4", "low-rank + int4 (70 %)"),
        *("int8", "low-rank + int8 (70 %)", "low-rank + int8 (bytes of int4)"),
    ]
    sizes = {row[1]: int(row[2].replace(",", "")) for row in rows}
    assert sizes["low-rank + int4 (70 %)"] < min(sizes[key] for key in list(sizes)[:3])
    assert sizes["low-rank + int8 (bytes of int4)"] <= sizes["int4"]
    assert [row[1] for row in rows if row[5] != "–"] == [key for key in sizes if " + " in key]
    assert all(row[7] == "score" for row in rows)
    assert quantization_table.main(["--zoo", str(fake_zoo), "--models", "absent"]) == 1
    assert "absent" in capsys.readouterr().err


# tools/engine_cost.py and tools/move_costs.py


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="tells memory on Linux alone")
def test_engine_cost_prints_every_stage(monkeypatch, tiny_files, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    engine_cost = importlib.import_module("engine_cost")
    model, data = map(str, tiny_files)
    words = ["--model", model, "--data", data, "--samples", "40", "--memory-budget", "0.5"]
    assert engine_cost.main(words) == 0
    head, row = cells(capsys.readouterr().out)
    figures = dict(zip(head, row, strict=True))
    assert figures["samples"] == "32"
    seconds = [float(figures[f"{stage}, s"]) for stage in engine_cost.PASSES]
    assert float(figures["ratio"]) > 0
    assert all(s >= 0 for s in seconds)
    assert figures["memory budget, GiB"] == "0.5"
    assert engine_cost.main(["--model", f"{model}.missing", "--data", data]) == 5


def test_engine_stages_add_up(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    engine_cost = importlib.import_module("engine_cost")
    clock = iter([0.5, 1.0, 3.0, 4.0, 9.0])
    monkeypatch.setattr(engine_cost.time, "perf_counter", lambda: next(clock))
    held = iter([5, 30, 20, 10])
    peak = engine_cost.Peak()
    monkeypatch.setattr(peak, "look", lambda: setattr(peak, "bytes", next(held)))
    stages = engine_cost.Stages(peak)
    for stage in ("calibrating", "decomposing", "calibrating", ""):
        stages(stage, 0, 0)
    assert stages.seconds == {"opening": 0.5, "calibrating": 7.0, "decomposing": 1.0}
    assert stages.bytes == {"opening": 5, "calibrating": 30, "decomposing": 20}
    assert stages.memory() == (30, 5)


def test_move_costs_prints_a_row_for_each_shape(monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    move_costs = importlib.import_module("move_costs")
    assert move_costs.main(["--pairs", "2"]) == 0
    text = capsys.readouterr().out
    orders, convs = text.split("\n\n| outer")
    head, *rows = cells(orders)
    assert len(rows) == len(move_costs.MATRICES) + len(move_costs.MAPS)
    head_of_convs, *others = cells(f"| outer{convs}")
    assert len(others) == len(move_costs.CONVS)
    for row in others:
        ratios = dict(zip(head_of_convs, row, strict=True))
        assert all(float(ratios[f"−{n}"]) > 0 for n in move_costs.LEFT_OUT[1:])
    assert {dict(zip(head, row, strict=True))["on"] for row in rows} == {"the last axis", "axis 1"}


# --- tools/large_model.py -----------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="tells memory on Linux alone")
def test_large_model_is_made_and_compressed_beside_its_data(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(TOOLS)
    large = importlib.import_module("large_model")
    weights = large.build_large(tmp_path / "m.onnx", size=400_000, width=64)
    store = ModelStore.load(tmp_path / "m.onnx")
    assert store.has_external_data
    assert 400_000 <= store.file_bytes < 600_000
    assert sum(list(t.dims) in ([64, 256], [256, 64]) for t in store.tensors()) == weights
    words = ["--gib", "0.0004", "--width", "64", "--samples", "20", "--memory-budget", "0.01"]
    assert large.main(words) == 0
    head, values = cells(capsys.readouterr().out)
    row = dict(zip(head, values, strict=True))
    assert row["weights"] == str(weights)
    assert row["samples"] == "16"
    assert float(row["anonymous memory, GiB"]) > 0
    assert large.main([*words, "--param-ratio", "0.0001"]) == 1
    assert "ended with status 3" in capsys.readouterr().err


def test_repair_table_runs_the_whole_chain(monkeypatch, fake_zoo, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    repair_table = importlib.import_module("repair_table")
    words = ["--zoo", str(fake_zoo), "--models", "tiny", "--ways", "dynamic", "--shares", "0.3"]
    assert repair_table.main([*words, "--samples", "40"]) == 0
    printed = capsys.readouterr()
    assert str(fake_zoo) not in printed.out
    assert "--models tiny --ways dynamic" in printed.out
    head, plain, repaired = cells(printed.out)
    assert head == list(repair_table.COLUMNS)
    assert plain[:3] == ["tiny", "dynamic", repair_table.NOTHING]
    assert repaired[2].startswith("30 %")
    if "not kept" not in repaired[2]:
        assert 0 < float(repaired[4]) <= 30
    assert repair_table.main(["--zoo", str(fake_zoo), "--models", "absent"]) == 1


# tools/large_model_cost.py and tools/scaling_table.py


def test_formulas_tell_what_the_method_takes(monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    tool = importlib.import_module("large_model_cost")
    assert tool.main(["--check", "--quick"]) == 0
    head, *rows = cells(capsys.readouterr().out)
    assert len(rows) == 2
    for row in rows:
        of_formula = [float(row[k]) for k, name in enumerate(head) if name == "of the formula"]
        assert of_formula == [pytest.approx(1, abs=0.02), 1, 1]


def test_arithmetic_of_a_large_model(monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    tool = importlib.import_module("large_model_cost")
    assert tool.main(["--shape", "70b"]) == 0
    found = {row[0]: row[1] for row in cells(capsys.readouterr().out)}
    assert found["numbers of weights"] == "70.6 × 10⁹"
    assert found["weights that are measured"] == str(80 * 7 + 1)
    # 16 p² of every weight.
    sums = 80 * (5 * 8192**2 + 2 * 1024**2) + 8192**2
    assert found["sums of all weights"] == f"{16 * sums / 2**30:,.1f} GiB"
    assert tool.main(["--shape", "70b", "--memory-budget", "1G"]) == 2
    assert "the values of one sample take" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_scaling_table_has_a_row_for_each_number_of_workers(monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    tool = importlib.import_module("scaling_table")
    given = ["--workers", "1", "--width", "16", "--layers", "1", "--samples", "6"]
    assert tool.main(given) == 0
    head, local, one = cells(capsys.readouterr().out)
    assert (local[0], one[0]) == ("none: one process", "1")
    assert one[head.index("of the ideal")] == "1.00"
