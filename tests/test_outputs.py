"""Files to write: none is one that a command reads, and each can be written, before any work."""

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from builders import model, noise

from onnx_utilrank.cli.main import main
from onnx_utilrank.cli.output import check_outputs
from onnx_utilrank.errors import ConfigError, ModelError
from onnx_utilrank.model.store import ModelStore

OVERWRITES = "would overwrite another file of this command"


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    proto = model(
        "(float[n,12] x) => (float[n,5] y)",
        "a = MatMul(x, v) y = MatMul(a, w)",
        v=noise(1, 12, 12).astype(np.float32),
        w=noise(2, 12, 5).astype(np.float32),
    )
    for name in ("m.onnx", "c.onnx"):
        onnx.save(proto, name)
    np.savez("d.npz", x=noise(3, 20, 12).astype(np.float32), label=np.zeros(20, np.int64))
    Path("folder").mkdir()
    np.save("folder/x.npy", noise(3, 20, 12).astype(np.float32))
    return tmp_path


VERBS = {
    "analyze": ["analyze", "m.onnx", "--data", "d.npz", "--report"],
    "benchmark": ["benchmark", "m.onnx", "c.onnx", "--data", "d.npz", "--report"],
    "compress": ["compress", "m.onnx", "--data", "d.npz", "--param-ratio", "0.8", "-o"],
    "finetune": ["finetune", "m.onnx", "c.onnx", "--data", "d.npz", "-o"],
    "quantize": ["quantize", "m.onnx", "--data", "d.npz", "--to", "int8", "-o"],
    "repair": ["repair", "m.onnx", "c.onnx", "--data", "d.npz", "--rank", "1", "-o"],
    "sweep": ["sweep", "m.onnx", "--data", "d.npz", "--report"],
    "train": [
        "train",
        "m.onnx",
        "--data",
        "d.npz",
        "--labels",
        "label",
        "-o",
        "o.onnx",
        "--report",
    ],
    "validate": ["validate", "m.onnx", "c.onnx", "--data", "d.npz", "--report"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_overwrites_the_data(verb: str, here: Path, capsys):
    held = {path: path.read_bytes() for path in here.rglob("*.np*")}
    names = sorted(here.iterdir())
    for target in ("d.npz", "./folder/../d.npz"):
        assert main([*VERBS[verb], target]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line == f"onnx-utilrank: error: {target}: {OVERWRITES}"
    assert held == {path: path.read_bytes() for path in here.rglob("*.np*")}
    assert sorted(here.iterdir()) == names


@pytest.mark.usefixtures("here")
def test_files_of_a_folder_of_data_are_data():
    with pytest.raises(ConfigError, match=OVERWRITES):
        check_outputs(["folder"], ["folder/x.npy"])
    check_outputs(["folder"], ["folder/result.onnx", "folder/report.json"])


@pytest.mark.usefixtures("here")
def test_what_cannot_be_written_is_told_first():
    with pytest.raises(ConfigError, match="its folder does not exist"):
        check_outputs([], ["nowhere/o.onnx"])
    with pytest.raises(ConfigError, match="is a folder"):
        check_outputs([], ["folder"])
    with pytest.raises(ConfigError, match=OVERWRITES):
        check_outputs([], ["o.onnx", "o.onnx"])
    Path("folder").chmod(0o500)
    if os.access("folder", os.W_OK):
        pytest.skip("this user may write to any folder")
    with pytest.raises(ConfigError, match="its folder cannot be written to"):
        check_outputs([], ["folder/o.onnx"])


class TestWeightsBesideModels:
    """Files that hold the weights of a model are its own, whatever they are called."""

    W = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch) -> Path:
        monkeypatch.chdir(tmp_path)
        proto = model("(float[n,40] x) => (float[n,40] y)", "y = MatMul(x, w)", w=self.W)
        onnx.save(proto, "inline.onnx")
        np.savez("d.npz", x=np.random.default_rng(1).standard_normal((20, 40)).astype(np.float32))
        outside = {"save_as_external_data": True, "size_threshold": 0}
        onnx.save(proto, "exported.onnx", location="exported.onnx.data", **outside)
        return tmp_path

    def reads(self, name: str) -> bool:
        x = np.load("d.npz")["x"]
        made = ort.InferenceSession(name, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        return np.allclose(made[0], x @ self.W, atol=1e-4)

    def compress(self, source: str, target: str, *words: str) -> int:
        options = ["--data", "d.npz", "--param-ratio", "0.5", "--method", "svd"]
        return main(["compress", source, "-o", target, *options, *words])

    @pytest.mark.parametrize("words", [(), ("--save-as-external-data",)])
    def test_a_model_that_was_renamed_keeps_its_own(self, folder, words):
        (folder / "exported.onnx").rename(folder / "renamed.onnx")
        assert self.compress("renamed.onnx", "exported.onnx", *words) == 0
        assert self.reads("renamed.onnx")
        assert ModelStore.load("exported.onnx").file_bytes < 40 * 40 * 4

    def test_a_copy_that_reads_the_same_file_keeps_it(self, folder):
        shutil.copy("exported.onnx", "copy.onnx")
        assert self.compress("copy.onnx", "exported.onnx", "--save-as-external-data") == 0
        assert self.reads("copy.onnx")
        assert (folder / "exported.onnx.1.data").exists()

    def test_a_file_of_weights_is_no_target(self, folder, capsys):
        before = (folder / "exported.onnx.data").read_bytes()
        assert self.compress("exported.onnx", "exported.onnx.data") == 2
        assert "would overwrite the weights" in capsys.readouterr().err
        with pytest.raises(ModelError, match="holds weights"):
            ModelStore.load("exported.onnx").save("exported.onnx.data")
        assert (folder / "exported.onnx.data").read_bytes() == before

    @pytest.mark.usefixtures("folder")
    def test_a_stray_file_of_that_name_stays(self):
        Path("small.onnx.data").write_bytes(b"mine")
        assert self.compress("inline.onnx", "small.onnx", "--save-as-external-data") == 0
        assert Path("small.onnx.data").read_bytes() == b"mine"
        assert ort.InferenceSession("small.onnx", providers=["CPUExecutionProvider"])
