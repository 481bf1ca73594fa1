"""The check of a GPU, as far as the CPU allows."""

import argparse
import importlib
from pathlib import Path

import numpy as np
import pytest

import synthetic_vit

TOOLS = Path(__file__).resolve().parent.parent / "tools"
TINY = synthetic_vit.VitShape(width=32, layers=1, heads=2, patch=8, image=16, classes=7)


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("gpu_check")


def test_a_table_of_both_float_types_and_every_batch(check):
    images = np.random.default_rng(0).standard_normal((20, 3, 16, 16), dtype=np.float32)
    model, data = synthetic_vit.build(TINY), {synthetic_vit.INPUT_NAME: images}
    options = argparse.Namespace(provider="cpu", param_ratio=0.7, batch=[1, 3], seconds=0.01)
    rows = list(check.rows_of("tiny", model, data, check.PRECISIONS, options))
    assert [row[:3] for row in rows] == [
        ["tiny", precision, batch] for precision in ("fp32", "fp16") for batch in ("1", "3")
    ]
    assert all(len(row) == len(check.COLUMNS) for row in rows)
    for row in rows:
        assert 0 < float(row[3]) < 1
        assert float(row[4]) > 0
    assert check.seconds_of_calibration(model, data, "cpu") > 0


def test_without_a_gpu_it_says_what_is_missing(check, capsys):
    if check.doctor("cuda").providers[0].fault is None:
        pytest.skip("there is a GPU")
    assert check.main(["--provider", "cuda", "--no-tests"]) == 4
    assert "provider cuda" in capsys.readouterr().err
