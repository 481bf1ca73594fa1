"""Statistics that are kept: used where they fit, refused where they do not."""

import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import activations, model, noise
from onnx import numpy_helper

from onnx_utilrank import (
    AnalyzeConfig,
    CompressConfig,
    CompressResult,
    ConfigError,
    analyze,
    compress,
)
from onnx_utilrank.calibration.cache import Cache
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.cli.main import main
from onnx_utilrank.model.store import ModelStore

WIDTH = 24
CONFIGS = {
    "two-sided": CompressConfig(param_ratio=0.6, memory_budget=2**20),
    "in several passes": CompressConfig(param_ratio=0.6, memory_budget=2**20, moves=("low-rank",)),
    "one-sided": CompressConfig(param_ratio=0.6, method="one-sided"),
}


def proto() -> onnx.ModelProto:
    """An MLP between two more layers: units, a Conv of several taps, a MatMul without bias."""
    body = """
        up = MatMul(x, w1) b = Add(up, b1) h = Relu(b) down = MatMul(h, w2) r = Add(down, b2)
        s = Unsqueeze(r, axis) c = Conv<pads = [1, 1]>(s, w3) t = Flatten(c) y = MatMul(t, w4)
    """
    weights = {
        "w1": noise(1, WIDTH, 40) @ np.diag(0.8 ** np.arange(40)),
        "b1": noise(2, 40),
        "w2": noise(3, 40, WIDTH) / 6,
        "b2": noise(4, WIDTH),
        "w3": noise(5, 4, 1, 3),
        "w4": noise(6, 4 * WIDTH, 10) / 9,
    }
    cast = {name: value.astype(np.float32) for name, value in weights.items()}
    signature = f"(float[n,{WIDTH}] x) => (float[n,10] y)"
    return model(signature, body, **cast, axis=np.array([1], np.int64))


def data() -> dict[str, np.ndarray]:
    return {"x": activations(7, 200, WIDTH).astype(np.float32)}


class Watch:
    """A progress callback that counts, and stops a run where it is told to."""

    def __init__(self, stage: str, stop: int | None = None) -> None:
        self.stage, self.stop, self.count = stage, stop, 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        del done, total
        self.count += stage == self.stage
        if self.stop is not None and self.count > self.stop:
            raise KeyboardInterrupt


def made(result: CompressResult) -> tuple[str, bytes]:
    return result.plan.to_json(), result.model.SerializeToString()


def config(name: str, folder: Path) -> CompressConfig:
    return replace(CONFIGS[name], cache=folder)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.mark.parametrize("name", CONFIGS)
def test_second_run_collects_nothing_and_makes_the_same(tmp_path: Path, name: str):
    expected = compress(proto(), data(), CONFIGS[name])
    first, second = Watch("calibrating"), Watch("calibrating")
    once = compress(proto(), data(), config(name, tmp_path / "c"), progress=first)
    kept = {path: path.read_bytes() for path in entries(tmp_path / "c")}
    again = compress(proto(), data(), config(name, tmp_path / "c"), progress=second)
    assert first.count > 0
    assert second.count == 0
    assert made(once) == made(again) == made(expected)
    assert {path: path.read_bytes() for path in entries(tmp_path / "c")} == kept


@pytest.mark.parametrize("name", CONFIGS)
def test_run_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    for module in ("calibration.collect", "sensitivity.measure"):
        monkeypatch.setattr(f"onnx_utilrank.{module}.CHECKPOINT_SECONDS", 0.0)
    whole = Watch("calibrating")
    expected = compress(proto(), data(), CONFIGS[name], progress=whole)
    assert whole.count >= 4
    for stop in (0, whole.count // 2, whole.count - 1):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        with pytest.raises(KeyboardInterrupt):
            compress(
                proto(), data(), config(name, tmp_path / "c"), progress=Watch("calibrating", stop)
            )
        rest = Watch("calibrating")
        result = compress(proto(), data(), config(name, tmp_path / "c"), progress=rest)
        assert rest.count == whole.count - stop - 1  # the one that it stopped at was kept
        assert made(result) == made(expected)


@pytest.mark.parametrize("method", [None, "one-sided"])
def test_counts_of_tokens_are_kept_too(
    tmp_path: Path, method: str | None, monkeypatch: pytest.MonkeyPatch
):
    for module in ("calibration.collect", "sensitivity.measure"):
        monkeypatch.setattr(f"onnx_utilrank.{module}.CHECKPOINT_SECONDS", 0.0)
    table = (noise(1, 60, 4) @ noise(2, 4, 16) + 0.1 * noise(3, 60, 16)).astype(np.float32)
    lookup = model(
        "(int64[n,5] ids) => (float[n,7] y)",
        "e = Gather(T, ids) s = ReduceMean<axes = [1], keepdims = 0>(e) y = MatMul(s, W)",
        T=table,
        W=noise(4, 16, 7).astype(np.float32),
    )
    ids = {"ids": np.random.default_rng(5).integers(0, 30, (200, 5))}
    options = CompressConfig(param_ratio=0.7, method=method, include=("T",))
    cached = replace(options, cache=tmp_path / "c")
    expected = compress(lookup, ids, options)
    assert [entry.site for entry in expected.plan.factored] == ["T"]
    whole, rest = Watch("calibrating"), Watch("calibrating")
    compress(lookup, ids, options, progress=whole)
    with pytest.raises(KeyboardInterrupt):
        compress(lookup, ids, cached, progress=Watch("calibrating", whole.count // 2))
    result = compress(lookup, ids, cached, progress=rest)
    assert rest.count == whole.count - whole.count // 2 - 1
    assert made(result) == made(expected)


def other_model() -> onnx.ModelProto:
    changed = proto()
    tensor = next(t for t in changed.graph.initializer if t.name == "w2")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] += 1e-3
    tensor.CopyFrom(numpy_helper.from_array(values, "w2"))
    return changed


def other_data() -> dict[str, np.ndarray]:
    values = data()["x"]
    values[:, 3] += np.float32(1e-3)
    return {"x": values}


@pytest.mark.parametrize("name", ["two-sided", "one-sided"])
@pytest.mark.parametrize("changed", ["model", "data", "seed", "samples"])
def test_statistics_of_another_model_or_data_are_never_used(
    tmp_path: Path, name: str, changed: str
):
    folder = tmp_path / "c"
    compress(proto(), data(), config(name, folder))
    before = len(entries(folder))
    more = {"seed": {"seed": 1}, "samples": {"samples": 150}}.get(changed, {})
    watch = Watch("calibrating")
    compress(
        other_model() if changed == "model" else proto(),
        other_data() if changed == "data" else data(),
        replace(config(name, folder), **more),
        progress=watch,
    )
    assert watch.count > 0
    assert len(entries(folder)) > before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def altered(path: Path) -> None:
    """A valid archive with other numbers in it."""
    with np.load(path) as held:
        arrays = {name: held[name] for name in held.files}
    name = max(arrays, key=lambda n: arrays[n].size)
    arrays[name] = arrays[name] * 2
    np.savez(path, **arrays)


def test_an_entry_that_is_altered_anywhere_is_read_as_it_was_or_not_at_all(tmp_path: Path):
    cache, arrays = Cache(folder=tmp_path, key="k"), {"a": np.arange(3.0)}
    cache.save(arrays, "of")
    (path,) = entries(tmp_path)
    raw = path.read_bytes()
    refused = 0
    for k in range(len(raw)):
        for bit in (1, 8, 128):  # among them flags of encryption and of other compressions
            path.write_bytes(raw[:k] + bytes([raw[k] ^ bit]) + raw[k + 1 :])
            found = cache.load("of")
            refused += found is None
            assert found is None or np.array_equal(found["a"], arrays["a"])
    assert refused > len(raw)


@pytest.mark.parametrize("harm", [cut, emptied, flipped, altered], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["two-sided", "one-sided"])
def test_harmed_entries_are_refused_and_replaced(
    tmp_path: Path, name: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / "c"
    expected = compress(proto(), data(), config(name, folder))
    whole = {path: path.read_bytes() for path in entries(folder)}
    for path in whole:
        harm(path)
    result = compress(proto(), data(), config(name, folder))
    assert made(result) == made(expected)
    refused = [r.getMessage() for r in caplog.records if "not whole" in r.getMessage()]
    assert len(refused) == len(whole)
    assert all("\n" not in line for line in refused)
    assert {path: path.read_bytes() for path in entries(folder)} == whole


def test_analysis_has_a_cache_too(tmp_path: Path):
    options = AnalyzeConfig(cache=tmp_path / "c", memory_budget=2**20)
    first, second = Watch("calibrating"), Watch("calibrating")
    once = analyze(proto(), data(), options, progress=first)
    again = analyze(proto(), data(), options, progress=second)
    assert (first.count > 0, second.count) == (True, 0)
    assert once.as_dict() == again.as_dict() == analyze(proto(), data()).as_dict()


def test_a_cache_that_cannot_be_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be a cache"):
        compress(proto(), data(), config("one-sided", tmp_path / "file"))
    onnx.save(proto(), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", **data())
    words = ["compress", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx")]
    words += ["--data", str(tmp_path / "x.npz"), "--param-ratio", "0.6", "--cache"]
    assert main([*words, str(tmp_path / "file")]) == 2
    assert main([*words, str(tmp_path / "c")]) == 0
    assert entries(tmp_path / "c")
    capsys.readouterr()


def test_one_weight_used_in_fewer_places_has_statistics_of_its_own(tmp_path: Path):
    # Patterns leave two uses, then one; the weight and the first use are the same.
    body = """
        a = MatMul(x, w) b = MatMul(x, w) c = MatMul(z, w) d = Add(a, b) e = Add(c, d)
        y = MatMul(e, v)
    """
    weight = (noise(1, WIDTH, 3) @ noise(2, 3, WIDTH)).astype(np.float32)
    signature = f"(float[n,{WIDTH}] x, float[n,{WIDTH}] z) => (float[n,m] y)"
    shared = model(signature, body, w=weight, v=weight.T)
    feed = {"x": data()["x"], "z": 10 * data()["x"][::-1]}
    counts = []
    for exclude in (("a",), ("a", "c")):
        watch = Watch("calibrating")
        options = CompressConfig(param_ratio=0.9, exclude=exclude, moves=("low-rank",))
        compress(shared, feed, replace(options, cache=tmp_path / "c"), progress=watch)
        counts.append(watch.count)
    assert min(counts) > 0


@pytest.mark.parametrize("name", ["w" * 70_000, "a\0b", "a/../b", "\\", "file"])
def test_names_of_the_model_are_none_of_the_files(tmp_path: Path, name: str):
    odd = proto()
    next(t for t in odd.graph.initializer if t.name == "w1").name = name
    odd.graph.node[0].input[1] = name
    first, second = Watch("calibrating"), Watch("calibrating")
    options = replace(
        config("two-sided", tmp_path / "c"), force=True
    )  # a long name may stand twice
    once = compress(odd, data(), options, progress=first)
    again = compress(odd, data(), options, progress=second)
    assert (first.count > 0, second.count) == (True, 0)
    assert made(once) == made(again)


def test_sequences_are_told_apart(tmp_path: Path):
    weight = (noise(1, WIDTH, 3) @ noise(2, 3, WIDTH)).astype(np.float32)
    body = "x = ConcatFromSequence<axis = 0>(s) y = MatMul(x, w)"
    source = model(f"(seq(float[n,{WIDTH}]) s) => (float[m,{WIDTH}] y)", body, w=weight)
    rows = data()["x"]

    def feeds() -> list[dict[str, list[np.ndarray]]]:
        return [{"s": [rows[k : k + 3], rows[k + 3 : k + 8]]} for k in range(0, 160, 8)]

    options = CompressConfig(param_ratio=0.6, cache=tmp_path / "c")
    counts = []
    for _ in range(3):
        watch = Watch("calibrating")
        compress(source, feeds(), options, progress=watch)  # type: ignore[arg-type]
        counts.append(watch.count)
        if len(counts) == 2:
            rows[:, 5] += np.float32(1e-3)  # far inside, where a printed array has dots
    assert [count > 0 for count in counts] == [True, False, True]


def test_operators_of_the_user_count(tmp_path: Path):
    store, library = ModelStore.load(proto()), tmp_path / "ops.so"
    samples = open_data(data(), store.inputs)
    keys = []
    for content in (b"one", b"two", b"one"):
        library.write_bytes(content)
        held = Cache.open(tmp_path / "c", store, samples, [0, 1], libraries=[str(library)])
        keys.append(held.key)
    assert keys[0] == keys[2] != keys[1]
    assert keys[0] != Cache.open(tmp_path / "c", store, samples, [0, 1]).key


def test_statistics_of_another_version_are_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another version may collect something else."""
    first, second = Watch("calibrating"), Watch("calibrating")
    options = config("one-sided", tmp_path / "c")
    compress(proto(), data(), options, progress=first)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99.0")
    compress(proto(), data(), options, progress=second)
    assert second.count == first.count > 0


def test_arrays_of_another_shape_or_type_are_altered(tmp_path: Path):
    cache = Cache(folder=tmp_path, key="k")
    held = {"a": np.arange(6, dtype=np.int64), "b": np.ones(2)}
    cache.save(held, "x")
    (path,) = entries(tmp_path)
    with np.load(path) as entry:
        digest = entry["sha256"]
    assert cache.load("x").keys() == held.keys()
    for other in (held["a"].reshape(2, 3), held["a"].view(np.uint64)):
        np.savez(path, **held | {"a": other, "sha256": digest})
        assert cache.load("x") is None


def test_samples_of_text_have_entries_of_their_own(tmp_path: Path):
    store = ModelStore.load(model("(string[n] x) => (string[n] y)", "y = Identity(x)"))
    keys = set()
    for texts in (["a", "b"], ["a", "c"], ["ab", ""]):
        feeds = open_data({"x": np.array(texts, dtype=object)}, store.inputs)
        keys.add(Cache.open(tmp_path, store, feeds, range(2)).key)
    assert len(keys) == 3
