"""The table of latency, and the text encoder that it times, on the smallest inputs of all."""

import importlib
from pathlib import Path

import numpy as np
import onnx
import pytest

import synthetic_bert
from onnx_utilrank import CompressConfig, compress
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sites.find import find_sites

TOOLS = Path(__file__).resolve().parent.parent / "tools"
TINY = synthetic_bert.BertShape(width=32, layers=2, heads=2, vocabulary=60, positions=16)


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("latency_table")


def feed(sentences: int, tokens: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, TINY.vocabulary, (sentences, tokens))
    return {synthetic_bert.IDS_NAME: ids, synthetic_bert.MASK_NAME: np.ones_like(ids)}


def test_the_encoder_takes_any_number_of_tokens_and_does_not_see_those_masked():
    model = synthetic_bert.build(TINY)
    onnx.checker.check_model(model, full_check=True)
    session = open_session(ModelStore.load(model), CPU)
    whole = feed(3, 9)
    (shown,) = session.run(whole).values()
    assert shown.shape == (3, 9, 32)
    masked = {name: value.copy() for name, value in whole.items()}
    masked[synthetic_bert.MASK_NAME][:, 6:] = 0
    short = {name: value[:, :6] for name, value in whole.items()}
    (cut,), (hidden,) = (session.run(f).values() for f in (short, masked))
    np.testing.assert_allclose(hidden[:, :6], cut, atol=1e-5)
    assert np.abs(hidden[:, :6] - shown[:, :6]).max() > 1e-3


def test_the_encoder_has_the_layers_of_its_shape():
    sites, _ = find_sites(GraphIndex.build(ModelStore.load(synthetic_bert.build(TINY))))
    assert [site.op_type for site in sites].count("MatMul") == 2 * 6
    with pytest.raises(ValueError, match="heads have to divide"):
        synthetic_bert.build(synthetic_bert.BertShape(width=10, layers=1, heads=3))


def test_a_row_is_what_was_measured(table):
    model, data = synthetic_bert.build(TINY), feed(20, 8)
    result = compress(model, data, CompressConfig(param_ratio=0.8, method="svd"))
    cells = dict(zip(table.COLUMNS, table.row("tiny", 4, 0.5, result), strict=True))
    figures = result.validation
    time = figures.providers[0].latency
    operations = figures.candidate.flops / figures.reference.flops
    assert cells["batch"] == "4"
    assert float(cells["parameters"]) <= 0.8
    assert cells["operations"] == f"{operations:.3f}"
    shares = {o.op_type: o.ms for o in figures.providers[0].reference_operators}
    products = sum(shares[name] for name in shares.keys() & {"MatMul", "FusedMatMul", "Gemm"})
    assert cells["products"] == f"{100 * products / sum(shares.values()):.0f} %"
    assert cells["realised"] == f"{100 * (1 - time.ratio) / (1 - operations):.0f} %"
    assert cells["slower"] == ("yes" if time.slower else "no")


def test_what_cannot_be_made_has_a_row_too(table):
    cells = table.row("tiny", 1, 0.01, None)
    assert len(cells) == len(table.COLUMNS)
    assert set(cells[3:]) == {"–"}


def test_something_has_to_be_asked_for(table, capsys):
    with pytest.raises(SystemExit) as stopped:
        table.main([])
    assert stopped.value.code == 2
    assert "nothing to measure" in capsys.readouterr().err
