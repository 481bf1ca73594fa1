"""The examination of the installation: what works is run, what is broken is said."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from packaging.requirements import Requirement

from onnx_utilrank import doctor
from onnx_utilrank.cli.main import main
from onnx_utilrank.installation import packages
from onnx_utilrank.installation.packages import optional_extras, required_packages
from onnx_utilrank.runtime.machine import look_at_machine
from onnx_utilrank.runtime.trial import run_python, try_providers, try_runtime

ROOT = Path(__file__).resolve().parent.parent


def test_what_works_is_said(capsys, tmp_path):
    file = tmp_path / "report.json"
    assert main(["doctor", "--report", str(file)]) == 0
    out = capsys.readouterr().out
    report = json.loads(file.read_text())
    versions = {state["name"]: state["version"] for state in report["packages"]}
    assert versions["numpy"] == np.__version__
    assert ort.__version__ in versions.values()
    assert report["works"]
    assert report["providers"][0] == {"provider": "cpu", "fault": None}
    keys = {
        name.lower().removesuffix("executionprovider") for name in ort.get_available_providers()
    }
    assert {trial["provider"] for trial in report["providers"]} == keys
    assert len(report["runtime_packages"]) == 1
    assert report["faults"] == []
    for text in (np.__version__, "Nothing is wrong", "cpu", report["machine"]["processor"]):
        assert text in out


@pytest.mark.parametrize("key", ["cuda", "CANNExecutionProvider"])
def test_a_provider_that_does_not_work_is_status_4(key, capsys):
    status = main(["doctor", "--provider", key, "--json"])
    streams = capsys.readouterr()
    report = json.loads(streams.out)
    if status == 0:
        assert report["works"]
        pytest.skip(f"{key} works on this machine")
    assert status == 4
    assert not report["works"]
    asked = key.lower().removesuffix("executionprovider")
    assert report["asked"] == asked
    (line,) = streams.err.splitlines()
    assert line.startswith(f"onnx-utilrank: error: provider {asked}: ")
    assert report["providers"][0]["fault"] in line
    assert len(report["faults"]) == 1


def test_an_unknown_provider_is_usage(capsys):
    assert main(["doctor", "--provider", "abacus"]) == 2
    assert "'abacus'" in capsys.readouterr().err


def test_versions_out_of_range_and_absent_packages(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.26.4" if name == "numpy" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    states = {state.name: state for state in required_packages()}
    assert states["numpy"].fault == '1.26.4 is not >=2.0; pip install "numpy>=2.0"'
    assert states["rich"].fault.startswith("is not installed; pip install")
    assert states["onnx"].fault is None
    report = doctor()
    assert any(fault.startswith("numpy: 1.26.4") for fault in report.faults)
    assert report.fault is None  # the provider works all the same


def test_extras_say_what_they_lack(monkeypatch):
    asked = [
        Requirement(text)
        for text in (
            "numpy>=2",
            "abacus>=3; extra == 'count'",
            "numpy>=2; extra == 'count'",
            "onnx-utilrank[count]; extra == 'all'",
        )
    ]
    monkeypatch.setattr(packages, "_requirements", lambda: asked)
    assert list(packages._missing("count")) == ["abacus>=3"]
    assert list(packages._missing("all")) == ["abacus>=3"]


def test_extras_are_those_of_the_project():
    names = {extra.name for extra in optional_extras()}
    assert "completion" in names
    assert "dev" not in names


def broken(tmp_path: Path, module: str, words: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run the command line where importing a module fails."""
    folder = tmp_path / module
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('libthing.so.1: cannot open')\n")
    paths = (str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", ""))
    return subprocess.run(
        [sys.executable, "-m", "onnx_utilrank", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_broken_runtime_is_said(tmp_path):
    done = broken(tmp_path, "onnxruntime", ["doctor", "--json"])
    assert done.returncode == 4, done.stderr
    report = json.loads(done.stdout)
    assert not report["works"]
    assert "libthing.so.1" in report["providers"][0]["fault"]
    (line,) = done.stderr.splitlines()
    assert "ONNX Runtime cannot be loaded" in line


def test_broken_torch_is_said_and_providers_are_tried_all_the_same(tmp_path):
    done = broken(tmp_path, "torch", ["doctor", "--json"])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["works"]
    (fault,) = report["faults"]
    assert fault.startswith("torch: cannot be imported: ImportError: libthing.so.1")


def test_other_verbs_point_to_the_doctor(tmp_path):
    done = broken(tmp_path, "onnxruntime", ["validate", "--help"])
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "libthing.so.1" in line
    assert "onnx-utilrank doctor" in line


def test_processes_that_end_badly():
    crash, status, hangs, good = run_python(
        [
            ["-c", "import os; os.kill(os.getpid(), 11)"],
            ["-c", "raise SystemExit(3)"],
            ["-c", "raise ValueError('no luck')"],
            ["-c", "print('noise'); print('{\"a\": 1}')"],
        ]
    )
    assert crash == "its process was ended by signal 11"
    assert status == "its process ended with status 3"
    assert hangs == "ValueError: no luck"
    assert good == {"a": 1}


def test_a_runtime_names_its_providers_and_runs_them():
    found = try_runtime()
    assert found.version == ort.__version__
    assert found.built == tuple(ort.get_available_providers())
    (cpu,) = try_providers(["CPUExecutionProvider"])
    assert cpu.fault is None


def test_the_machine():
    machine = look_at_machine()
    assert 1 <= machine.usable_cores <= machine.cores
    if sys.platform == "linux":
        flags = Path("/proc/cpuinfo").read_text().split()
        assert machine.features
        assert all((name in flags) == there for name, there in machine.features.items())
        assert 0 < machine.free_memory <= machine.memory
