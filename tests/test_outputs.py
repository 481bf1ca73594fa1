"""Files to write: none is one that a command reads, and each can be written, before any work."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, noise

from onnx_utilrank.cli.main import main
from onnx_utilrank.cli.output import check_outputs
from onnx_utilrank.errors import ConfigError

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
