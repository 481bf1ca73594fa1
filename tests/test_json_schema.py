"""What `--json` and `--plan-out` give, held to the schema that is published."""

import importlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, noise
from onnxruntime.quantization import quantize_dynamic

import onnx_utilrank
from onnx_utilrank.cli.main import VERBS, main

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed (extra `dev`)")

TOOLS = Path(__file__).resolve().parent.parent / "tools"
SCHEMA = Path(onnx_utilrank.__file__).parent / "report" / "schema.json"

# What each verb is given, beside `--json`.
CALLS = {
    "inspect": ["m.onnx"],
    "doctor": [],
    "analyze": ["m.onnx", "--data", "d.npz"],
    "compress": ["m.onnx", "--data", "d.npz", "-o", "s.onnx", "--param-ratio", "0.7"],
    "sweep": ["m.onnx", "--data", "d.npz", "--ratios", "0.8,0.6"],
    "finetune": ["m.onnx", "r.onnx", "-o", "f.onnx", "--data", "d.npz", "--steps", "3"],
    "train": [
        *("m.onnx", "-o", "t.onnx", "--data", "d.npz"),
        *("--labels", "label", "--steps", "4", "--delay", "2", "--interval", "1"),
    ],
    "validate": ["m.onnx", "r.onnx", "--data", "d.npz"],
    "benchmark": ["m.onnx", "r.onnx", "--batch", "1", "--seconds", "0.1"],
    "quantize": ["m.onnx", "-o", "i.onnx", "--data", "d.npz", "--to", "int8-dynamic"],
    "repair": ["m.onnx", "q.onnx", "-o", "p.onnx", "--data", "d.npz", "--rank", "4"],
}


def validator(verb: str):
    whole = json.loads(SCHEMA.read_text(encoding="utf8"))
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{verb}", "$defs": whole["$defs"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("schema")
    body = "h = MatMul(x, A) t = Tanh(h) y = MatMul(t, B)"
    weights = {
        "A": (noise(1, 48, 48) / 7 * 0.9 ** np.arange(48)).astype(np.float32),
        "B": (noise(2, 48, 10) / 7).astype(np.float32),
    }
    source = model("(float[n,48] x) => (float[n,10] y)", body, **weights)
    onnx.save(source, folder / "m.onnx")
    near = {**weights, "A": weights["A"] + np.float32(1e-3)}
    onnx.save(model("(float[n,48] x) => (float[n,10] y)", body, **near), folder / "r.onnx")
    quantize_dynamic(folder / "m.onnx", folder / "q.onnx")
    rng = np.random.default_rng(0)
    np.savez(
        folder / "d.npz",
        x=noise(5, 200, 48).astype(np.float32),
        label=rng.integers(0, 10, 200),
    )
    return folder


def test_the_schema_is_one_and_is_what_the_types_say(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    if not TOOLS.is_dir():
        pytest.skip("the program that writes it is in a checkout only")
    made = importlib.import_module("json_schema").schema()
    assert json.loads(SCHEMA.read_text(encoding="utf8")) == made
    jsonschema.Draft202012Validator.check_schema(made)


def test_every_verb_that_prints_json_is_called_here():
    assert set(VERBS) - {"completion", "report"} == set(CALLS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxruntime")
@pytest.mark.parametrize("verb", CALLS)
def test_what_is_printed_has_the_form_that_is_stated(verb: str, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main([verb, *CALLS[verb], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    validator(verb).validate(printed)
    # It is strict: a field more, or one less, is no longer that form.
    assert not validator(verb).is_valid(printed | {"more": 1})
    for field in printed:
        assert not validator(verb).is_valid({k: v for k, v in printed.items() if k != field})


def test_a_plan_has_the_form_that_is_stated(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = ["compress", "m.onnx", "--data", "d.npz", "--param-ratio", "0.7", "--dry-run", "--json"]
    assert main([*words, "--plan-out", "plan.json"]) == 0
    validator("compress").validate(json.loads(capsys.readouterr().out))
    validator("plan").validate(json.loads((folder / "plan.json").read_text(encoding="utf8")))
