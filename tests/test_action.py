"""The action for GitHub: its steps as the runner would run them, but for the installation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, noise

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra `dev`)")

ACTION = Path(__file__).resolve().parent.parent / ".github" / "actions" / "compress" / "action.yml"

pytestmark = pytest.mark.skipif(
    not ACTION.is_file() or shutil.which("bash") is None,
    reason="the action runs from a checkout, and in bash",
)


def run_step(folder: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    action = yaml.safe_load(ACTION.read_text(encoding="utf8"))
    given = {name: str(i.get("default", "")) for name, i in action["inputs"].items()} | inputs
    step = next(s for s in action["runs"]["steps"] if s.get("id") == "compress")
    environment = dict(os.environ)
    for name, value in step["env"].items():
        environment[name] = given[value.removeprefix("${{ inputs.").removesuffix(" }}")]
    environment |= {name: str(folder / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # As the runner calls bash: it stops at the first command that fails, in a pipe too.
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = {
        name: (noise(seed, 64, 64) / 8 * 0.9 ** np.arange(64)).astype(np.float32)
        for seed, name in enumerate("AB")
    }
    body = "h = MatMul(x, A) t = Tanh(h) y = MatMul(t, B)"
    onnx.save(model("(float[n,64] x) => (float[n,64] y)", body, **weights), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=noise(5, 200, 64).astype(np.float32))
    return tmp_path


def test_a_smaller_model_and_its_report(folder: Path):
    done = run_step(
        folder, model="m.onnx", data="d.npz", output="s.onnx", options="--param-ratio 0.6"
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "s.onnx").stat().st_size < (folder / "m.onnx").stat().st_size
    name = (folder / "GITHUB_OUTPUT").read_text(encoding="utf8").strip()
    assert name == "report=s.onnx.json"
    assert json.loads((folder / "s.onnx.json").read_text(encoding="utf8"))["verdict"]
    assert (folder / "GITHUB_STEP_SUMMARY").read_text(encoding="utf8")


def test_a_target_that_is_missed_fails_the_step(folder: Path):
    done = run_step(
        folder, model="m.onnx", data="d.npz", output="s.onnx", options="--param-ratio 0.001"
    )
    assert done.returncode == 3
    assert not (folder / "s.onnx").exists()


def test_what_inputs_hold_is_never_run(folder: Path):
    run_step(folder, model="$(touch a)`touch b`; touch c", data="d.npz", output="s.onnx")
    assert not any((folder / name).exists() for name in "abc")
