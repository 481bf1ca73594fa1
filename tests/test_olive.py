"""The pass for Microsoft Olive, in a workflow of the Olive that is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, noise

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("olive") is None, reason="Olive is not installed (extra `olive`)"
)

# It would report to its makers.
QUIET = os.environ | {"OLIVE_DISABLE_TELEMETRY": "1", "CI": "1"}


def workflow(folder: Path, **options: object) -> None:
    weights = {
        name: (noise(seed, 64, 64) / 8 * 0.9 ** np.arange(64)).astype(np.float32)
        for seed, name in enumerate("AB")
    }
    body = "h = MatMul(x, A) t = Tanh(h) y = MatMul(t, B)"
    onnx.save(model("(float[n,64] x) => (float[n,64] y)", body, **weights), folder / "m.onnx")
    np.savez(folder / "d.npz", x=noise(5, 200, 64).astype(np.float32))
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    config = {
        "input_model": {"type": "ONNXModel", "model_path": "m.onnx"},
        "systems": {"here": {"type": "LocalSystem", "accelerators": [accelerator]}},
        "target": "here",
        "passes": {"rank": {"type": "UtilizedRank", "data": "d.npz", **options}},
        "output_dir": "out",
        "cache_dir": "cache",
    }
    (folder / "workflow.json").write_text(json.dumps(config), encoding="utf8")


@pytest.fixture(scope="module")
def passes(tmp_path_factory) -> Path:
    """Olive's passes and this one, as a user lists them."""
    words = [sys.executable, "-m", "onnx_utilrank.olive"]
    listed = subprocess.run(words, env=QUIET, capture_output=True, text=True, check=True)
    path = tmp_path_factory.mktemp("olive") / "passes.json"
    path.write_text(listed.stdout, encoding="utf8")
    return path


def olive(folder: Path, passes: Path) -> subprocess.CompletedProcess[str]:
    """As a user types it; in a process of its own, whose warnings are not ours."""
    words = ["run", "--config", "workflow.json", "--package-config", str(passes)]
    return subprocess.run(
        [sys.executable, "-m", "olive", *words],
        cwd=folder,
        env=QUIET,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_workflow_makes_a_smaller_model(tmp_path: Path, passes: Path):
    workflow(tmp_path, param_ratio=0.6, options={"method": "one-sided", "rank_multiple": 4})
    done = olive(tmp_path, passes)
    assert done.returncode == 0, done.stderr
    small = onnx.load(tmp_path / "out" / "model.onnx")
    assert sum(int(np.prod(t.dims)) for t in small.graph.initializer) <= 0.6 * 2 * 64 * 64
    ranks = [t.dims[1] for t in small.graph.initializer if t.name.endswith("/right")]
    assert ranks
    assert all(r % 4 == 0 for r in ranks)
    said = json.loads((tmp_path / "out" / "model_config.json").read_text(encoding="utf8"))
    figures = said["config"]["model_attributes"]["onnx_utilrank"]
    assert figures["candidate"]["parameters"] <= 0.6 * figures["reference"]["parameters"]


def test_what_cannot_be_reached_fails_with_the_line_of_the_command(tmp_path: Path, passes: Path):
    workflow(tmp_path, param_ratio=0.001)
    done = olive(tmp_path, passes)
    assert "a ratio of 0.001 of its parameters cannot be reached" in done.stdout + done.stderr
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_options_that_there_are_not(tmp_path: Path, passes: Path):
    workflow(tmp_path, param_ratio=0.5, options={"colour": "red"})
    done = olive(tmp_path, passes)
    assert "options: there is no colour" in done.stdout + done.stderr
