"""The benchmark: what models are timed on, in which order, and what is said of it."""

import json
import math
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import index, model

from onnx_utilrank import BenchmarkConfig, benchmark
from onnx_utilrank.benchmarking.cases import MOST_FEEDS, cases_of_data, synthetic_cases
from onnx_utilrank.benchmarking.synthetic import looked_up_rows
from onnx_utilrank.cli.main import main
from onnx_utilrank.errors import ConfigError, DataError, ModelError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.memory import measure_memory
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session

LINEAR = "(float[N, 3] x) => (float[N, 2] y)"
W = np.arange(6, dtype=np.float32).reshape(3, 2)


def linear(signature: str = LINEAR, scale: float = 1.0) -> ModelStore:
    return ModelStore.load(model(signature, "y = MatMul(x, W)", W=W * np.float32(scale)))


IDS = "int64[batch, seq]"
TEXT = f"({IDS} ids, {IDS} kinds, {IDS} mask) => (float[batch, seq, 4] y)"
LOOKUPS = (
    "i = Cast <to = 6> (ids) r = Reshape(i, shape) a = Gather(T, r) b = Gather(K, kinds) "
    "m = Cast <to = 1> (mask) n = Unsqueeze(m, axes) s = Add(a, b) y = Mul(s, n)"
)


def text(rows: int = 9) -> ModelStore:
    arrays = {"T": np.ones((rows, 4), np.float32), "K": np.ones((2, 4), np.float32)}
    arrays |= {"shape": np.asarray([0, -1]), "axes": np.asarray([2])}
    return ModelStore.load(model(TEXT, LOOKUPS, **arrays))


class TestSyntheticInputs:
    def test_indices_stay_within_their_tables(self):
        assert looked_up_rows(index(text().proto)) == {"ids": 9, "kinds": 2}
        (case,), notes = synthetic_cases(text(), BenchmarkConfig(batches=(50,), dims={"seq": [40]}))
        (feed,) = case.feeds
        assert {name: a.shape for name, a in feed.items()} == dict.fromkeys(feed, (50, 40))
        assert np.unique(feed["ids"]).tolist() == list(range(9))
        assert np.unique(feed["kinds"]).tolist() == [0, 1]
        assert np.unique(feed["mask"]).tolist() == [1]
        assert "'ids' is below 9" in notes[-1]

    def test_the_seed_decides(self):
        def drawn(seed: int) -> np.ndarray:
            (case,), _ = synthetic_cases(linear(), BenchmarkConfig(seed=seed))
            return case.feeds[0]["x"]

        np.testing.assert_array_equal(drawn(3), drawn(3))
        assert (drawn(3) != drawn(4)).any()

    @pytest.mark.parametrize("kind", ["string[N]", "seq(float[N])"])
    def test_what_cannot_be_made_up(self, kind):
        store = ModelStore.load(model(f"({kind} x) => ({kind} y)", "y = Identity(x)"))
        with pytest.raises(DataError, match=r"input x: .*data are needed"):
            synthetic_cases(store, BenchmarkConfig())


class TestCases:
    def test_every_batch_with_every_combination_of_lengths(self):
        store = linear("(float[N, A, B, 3] x) => (float[N, A, B, 2] y)")
        config = BenchmarkConfig(batches=(1, 4), dims={"A": [2, 5], "B": [7]})
        cases, _ = synthetic_cases(store, config)
        shapes = [case.feeds[0]["x"].shape for case in cases]
        assert shapes == [(1, 2, 7, 3), (4, 2, 7, 3), (1, 5, 7, 3), (4, 5, 7, 3)]
        assert [dict(case.dims) for case in cases[::2]] == [{"A": 2, "B": 7}, {"A": 5, "B": 7}]
        assert all(case.single["x"].shape[0] == 1 for case in cases)

    def test_a_fixed_batch_is_said_so(self):
        cases, notes = synthetic_cases(
            linear("(float[5, 3] x) => (float[5, 2] y)"), BenchmarkConfig(batches=(1, 5, 16))
        )
        assert [(case.batch, case.feeds[0]["x"].shape) for case in cases] == [(5, (5, 3))]
        assert notes[0] == "The batch is fixed at 5 by the model; not run: 1, 16."

    def test_the_batch_may_come_later_in_other_inputs(self):
        store = ModelStore.load(
            model(
                "(float[N, 3] x, float[1, N, 3] s) => (float[1, N, 3] y)",
                "y = Add(x, s)",
            )
        )
        (case,), _ = synthetic_cases(store, BenchmarkConfig(batches=(6,)))
        assert case.feeds[0]["s"].shape == (1, 6, 3)

    def test_a_first_axis_may_be_no_batch(self):
        (case,), notes = synthetic_cases(linear(), BenchmarkConfig(dims={"N": [11]}))
        assert case.feeds[0]["x"].shape == (11, 3)
        assert dict(case.dims) == {"N": 11}
        assert not any("fixed" in note for note in notes)

    def test_axes_without_a_name(self):
        store = linear("(float[N, ?, 3] x) => (float[N, ?, 2] y)")
        (case,), _ = synthetic_cases(store, BenchmarkConfig(dims={"x.1": [8]}))
        assert case.feeds[0]["x"].shape == (1, 8, 3)

    def test_lengths_that_lack_or_fit_nothing(self):
        store = linear("(float[N, A, B, 3] x) => (float[N, A, B, 2] y)")
        with pytest.raises(ConfigError, match=r"'A', 'B'; give them, as in --dim A=64 --dim B=64"):
            synthetic_cases(store, BenchmarkConfig())
        with pytest.raises(
            ConfigError, match=r"no free axis 'Q'; its free axes are: 'N', 'A', 'B'"
        ):
            synthetic_cases(store, BenchmarkConfig(dims={"Q": [1]}))

    def test_samples_of_data_come_round_again(self):
        data = {"x": np.arange(15, dtype=np.float32).reshape(5, 3)}
        cases, notes = cases_of_data(linear(), data, BenchmarkConfig(batches=(1, 2, 8)))
        assert notes == []
        assert [len(case.feeds) for case in cases] == [5, 3, 1]
        assert all(len(f["x"]) == case.batch for case in cases for f in case.feeds)
        np.testing.assert_array_equal(
            cases[2].feeds[0]["x"], np.concatenate([data["x"], data["x"][:3]])
        )
        (case,), _ = cases_of_data(linear(), {"x": np.ones((99, 3), np.float32)}, BenchmarkConfig())
        assert len(case.feeds) == MOST_FEEDS

    def test_data_that_are_whole_runs(self):
        feeds = [{"x": np.ones((n, 3), np.float32)} for n in (4, 7)]
        (case,), notes = cases_of_data(linear(), feeds, BenchmarkConfig(batches=(16,)))
        assert case.batch is None
        assert [len(f["x"]) for f in case.feeds] == [4, 7]
        assert notes == ["The data hold whole runs: batch sizes are theirs."]

    def test_data_have_their_own_lengths(self):
        with pytest.raises(ConfigError, match="data have their own"):
            cases_of_data(linear(), {"x": W.T}, BenchmarkConfig(dims={"N": [2]}))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"batches": ()},
            {"batches": (0,)},
            {"threads": -1},
            {"seconds": math.nan},
            {"seconds": math.inf},
            {"dims": {"N": []}},
            {"dims": {"N": [0]}},
            {"providers": ()},
            {"provider_options": {"cuda": {}}},
            {"samples": 0},
            {"seed": -1},
        ],
        ids=str,
    )
    def test_options_out_of_range(self, wrong):
        with pytest.raises(ConfigError):
            BenchmarkConfig(**wrong)


class TestMemory:
    def test_weights_count(self, tmp_path):
        large = np.zeros((2048, 2048), np.float32)
        proto = model("(float[N, 2048] x) => (float[N, 2048] y)", "y = MatMul(x, W)", W=large)
        feed = {"x": np.ones((1, 2048), np.float32)}
        onnx.save(proto, tmp_path / "large.onnx")
        for store in (ModelStore.load(proto), ModelStore.load(tmp_path / "large.onnx")):
            found = measure_memory(store, CPU, feed)
            assert found.failure is None
            assert found.device is None
            if found.resident is None:
                pytest.skip("this platform does not tell what a process takes")
            assert found.resident >= large.nbytes
            assert found.resident > 4 * measure_memory(linear(), CPU, {"x": W.T}).resident / 3

    def test_a_run_that_fails_says_why(self):
        found = measure_memory(linear(), CPU, {"x": np.ones((1, 7), np.float32)})
        assert found.resident is None
        assert "InferenceError" in found.failure


class TestBenchmark:
    def test_every_model_in_every_case(self):
        config = BenchmarkConfig(batches=(1, 3), seconds=0.0, threads=1)
        candidates = [linear(scale=2.0), linear(scale=3.0)]
        report = benchmark(linear(), candidates, config=config)
        assert [case.batch for case in report.cases] == [1, 3]
        for case in report.cases:
            assert len(case.latencies) == 2
            assert len(case.memory) == 3
            assert case.flops == (12, 12, 12)
            assert case.flop_ratios == (1.0, 1.0)
            assert len({latency.reference_ms for latency in case.latencies}) == 1
            for latency in case.latencies:
                spread = latency.candidate_spread
                assert 0 < spread.low_ms <= latency.candidate_ms <= spread.high_ms
        assert report.synthetic
        found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
        assert [m["flop_ratio"] for m in found["cases"][0]["models"][1:]] == [1.0, 1.0]
        assert "ratio" not in found["cases"][0]["models"][0]

    def test_a_model_leaves_the_cores_to_the_next(self):
        """Threads that waited for more work by spinning would take them for some 40 ms."""
        wide = np.zeros((512, 512), np.float32)
        proto = model("(float[N, 512] x) => (float[N, 512] y)", "y = MatMul(x, W)", W=wide)
        session = open_session(ModelStore.load(proto), CPU, threads=2)
        spent = []
        for _ in range(5):
            session.run({"x": np.zeros((64, 512), np.float32)})
            before = time.process_time()
            time.sleep(0.05)
            spent.append(time.process_time() - before)
        assert min(spent) < 0.01

    def test_models_that_do_not_match(self):
        other = ModelStore.load(
            model("(float[N, 3] z) => (float[N, 2] y)", "y = MatMul(z, W)", W=W)
        )
        with pytest.raises(ModelError, match=r"lack 'x' of the reference"):
            benchmark(linear(), [other], config=BenchmarkConfig(seconds=0.0))

    def test_nothing_to_compare(self):
        with pytest.raises(ConfigError, match="needs a model to compare"):
            benchmark(linear(), [])

    def test_half_precision_is_cast_before_the_runs(self):
        half = model(LINEAR.replace("float", "float16"), "y = MatMul(x, W)", W=W.astype(np.float16))
        report = benchmark(linear(), [half], {"x": W.T.copy()}, BenchmarkConfig(seconds=0.0))
        assert not report.synthetic
        assert any("is float16 in" in note for note in report.notes)
        assert all(m.failure is None for m in report.cases[0].memory)


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name, scale in (("a.onnx", 1.0), ("b.onnx", 2.0), ("c.onnx", 3.0)):
            onnx.save(linear(scale=scale).proto, name)
        onnx.save(text().proto, "t.onnx")

    def test_tables_json_and_report(self, capsys):
        words = ["benchmark", "a.onnx", "b.onnx", "c.onnx", "--batch", "1", "4", "--seconds", "0"]
        assert main([*words, "--report", "r.json"]) == 0
        out = capsys.readouterr().out
        assert "Inputs are synthetic" in out
        assert out.count("c.onnx") == 2
        report = json.loads(Path("r.json").read_text())
        assert [m["model"] for m in report["models"]] == ["a.onnx", "b.onnx", "c.onnx"]
        assert [case["batch"] for case in report["cases"]] == [1, 4]
        assert main([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out).keys() == report.keys()

    def test_lengths(self, capsys):
        words = ["benchmark", "t.onnx", "t.onnx", "--seconds", "0", "--dim", "seq=2,3", "--json"]
        assert main(words) == 0
        cases = json.loads(capsys.readouterr().out)["cases"]
        assert [case["dims"] for case in cases] == [{"seq": 2}, {"seq": 3}]

    @pytest.mark.parametrize(
        ("words", "status", "named"),
        [
            (("t.onnx", "t.onnx"), 2, "'seq'"),
            (("a.onnx", "b.onnx", "--dim", "seq"), 2, "NAME=N"),
            (("a.onnx", "b.onnx", "--dim", "seq=0"), 2, "0 is not at least 1"),
            (("a.onnx", "b.onnx", "--batch", "0"), 2, "0 is not at least 1"),
            (("a.onnx", "nowhere.onnx"), 5, "nowhere.onnx"),
            (("a.onnx", "b.onnx", "--data", "nowhere.npz"), 5, "nowhere.npz"),
            (("a.onnx", "t.onnx", "--seconds", "0"), 5, "t.onnx"),
            (("a.onnx", "b.onnx", "--report", "b.onnx"), 2, "b.onnx"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
    )
    def test_what_is_wrong_ends_in_one_line(self, words, status, named, capsys):
        try:
            found = main(["benchmark", *words])
        except SystemExit as e:  # argparse
            found = e.code
        out, err = capsys.readouterr()
        assert (found, out) == (status, "")
        (line,) = (line for line in err.splitlines() if "error:" in line)
        assert named in line
