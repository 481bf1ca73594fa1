"""The torture run of `tools/`: what it says of good and bad models, and a slice of a real one."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, noise
from onnx import numpy_helper

from onnx_utilrank import ModelError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.sites.find import find_sites

ROOT = Path(__file__).resolve().parent.parent
ZOO = Path(os.environ.get("ONNX_UTILRANK_ZOO") or ROOT.parent / "shared" / "zoo")
# So many models of the folder with something to factor and so many without, evenly spaced.
SLICE, LARGEST = 5, 2**16


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("torture_model")


@pytest.fixture
def torture(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("torture")


def two_layers(scale: float = 1.0) -> onnx.ModelProto:
    first, second = (noise(k, 16, 16).astype(np.float32) / 4 for k in (1, 2))
    return model(
        "(float[n,16] x) => (float[n,16] y)",
        "h = MatMul(x, W) r = Relu(h) y = MatMul(r, V)",
        W=first,
        V=np.float32(scale) * second,
    )


@pytest.fixture
def folder(tmp_path):
    """A model that can be factored, one that cannot, and a file that is none."""
    onnx.save(two_layers(), tmp_path / "good.onnx")
    onnx.save(model("(float[n,4] x) => (float[n,4] y)", "y = Relu(x)"), tmp_path / "relu.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    return tmp_path


def test_outcomes_and_tables(torture, folder, capfd):
    status = torture.main([str(folder), "--samples", "4", "--seconds", "100"])
    out, err = capfd.readouterr()
    assert status == 0
    assert out.startswith("3 models")
    name = folder.name
    assert f"{name}/good.onnx: full rank: factored, equal outputs: 2 of 2 weights" in err
    assert f"{name}/relu.onnx: half: refused" in err
    assert f"{name}/text.onnx: analyze: refused: {name}/text.onnx: not an ONNX model" in err
    assert "| refused | MODEL: not an ONNX model | 1 |" in out
    assert "fault" not in out


def test_a_process_that_hangs_or_ends_is_an_outcome(torture, folder):
    short = torture.Limits(seconds=0.1)
    for name, limits, word in (
        ("good.onnx", short, "TIMEOUT"),
        ("gone.onnx", torture.Limits(), "CRASH"),  # the process ends when it reads the file
    ):
        found = torture.examine_apart("m", folder / name, None, limits)
        assert [(o.step, o.word) for o in found] == [(s, word) for s in torture.STEPS]
        assert f"| {word} | m | half |" in torture.tables(found)
    assert "FileNotFoundError" in found[0].detail


def test_wrong_outputs_are_told_from_rounding(steps):
    source = ModelStore.load(two_layers())
    feeds = [{"x": noise(k, 5, 16).astype(np.float32)} for k in range(3)]
    eps = float(np.finfo(np.float32).eps)
    rounded = ModelStore.load(two_layers(1 + 2 * eps))
    wrong = ModelStore.load(two_layers(1 + 1000 * eps))
    assert steps.differences(source, rounded, feeds, terms=32) == []
    assert len(steps.differences(source, wrong, feeds, terms=32)) == len(feeds)


def test_not_a_number_in_the_same_places(steps):
    one = np.array([1.0, np.nan, np.inf])
    assert steps.distance(one, one + np.array([0.25, 0, 0])) == 0.25
    assert steps.distance(one, np.array([1.0, np.nan, -np.inf])) == np.inf
    assert steps.distance(one, np.array([1.0, np.inf, np.nan])) == np.inf


@pytest.mark.parametrize(
    ("raised", "word"),
    [
        (ModelError("model 'm': no"), "refused"),
        (ModelError(""), "UNCLEAR REFUSAL"),
        (KeyError("y"), "TRACEBACK"),
    ],
)
def test_faults_of_the_library_are_told_from_reasons(steps, raised, word):
    def action() -> tuple[str, str]:
        raise raised

    assert steps.guarded(action)[0] == word


def test_data_sets_beside_a_model_are_its_inputs(steps, folder):
    sets = folder / "test_data_set_0"
    sets.mkdir()
    x = noise(9, 3, 16).astype(np.float32)
    (sets / "input_0.pb").write_bytes(numpy_helper.from_array(x).SerializeToString())
    found = steps.inputs_of(folder / "good.onnx", None, 4, folder / "unused.npz")
    assert len(found) == 2  # one to calibrate with, one held back
    for feed in found:
        np.testing.assert_array_equal(feed["x"], x)


@pytest.mark.zoo
@pytest.mark.skipif(not (ZOO / "torture").is_dir(), reason="there is no zoo with a torture folder")
def test_slice_of_a_torture_folder(torture):
    zoo = ZOO.resolve()
    small = [p for p in sorted((zoo / "torture").rglob("*.onnx")) if p.stat().st_size <= LARGEST]
    with_sites = [p for p in small if has_site(p)]
    without = [p for p in small if p not in with_sites]
    found = [
        outcome
        for path in (*spaced(with_sites), *spaced(without))
        for outcome in torture.examine_apart(path.stem, path, zoo, torture.Limits(samples=4))
    ]
    assert [o for o in found if o.word in torture.BAD] == []
    assert len(found) == 2 * SLICE * len(torture.STEPS)


def has_site(path: Path) -> bool:
    try:
        return bool(find_sites(GraphIndex.build(ModelStore.load(path)))[0])
    except ModelError:
        return False


def spaced(paths: Sequence[Path]) -> list[Path]:
    return [paths[k * len(paths) // SLICE] for k in range(SLICE)]
