"""Rewriting: equal outputs, valid models, and everything else as it was, to the byte."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from builders import FORMS, Form, ops, run

from onnx_utilrank import CompressConfig, compress
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.model.store import ModelStore

EXACT = CompressConfig(energy=1.0, force=True)
# Every factor pair that takes no more room than its weight: truncates each form.
TRUNCATED = CompressConfig(param_ratio=1.0, force=True)


def signature(proto: onnx.ModelProto) -> list[object]:
    inputs = [i for i in proto.graph.input if i.name in {s.name for s in ModelStore(proto=proto).inputs}]
    return [proto.ir_version, list(proto.opset_import), inputs, list(proto.graph.output)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_full_rank_is_exact(form: Form):
    result = compress(form.proto, form.data(), EXACT)
    (entry,) = result.plan.entries
    assert entry.rank == min(form.weight.shape)
    assert ops(result.model) == form.exact
    onnx.checker.check_model(result.model, full_check=True)
    assert signature(result.model) == signature(form.proto)
    feeds = form.data()[:2]
    atol, _ = form.rounding(feeds)
    for feed in feeds:
        before, after = run(form.proto, feed), run(result.model, feed)
        for name, expected in before.items():
            assert after[name].dtype == expected.dtype
            np.testing.assert_allclose(after[name], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_predicted_error_is_the_measured_one(form: Form):
    result = compress(form.proto, form.data(), TRUNCATED)
    (entry,) = result.plan.entries
    assert entry.trusted
    assert entry.bias == bool(form.corrected)
    assert ops(result.model) == (form.corrected or form.exact)
    onnx.checker.check_model(result.model, full_check=True)

    data = form.data()
    chosen, _ = open_data(data, ModelStore.load(form.proto).inputs).split()
    feeds = [data[k] for k in chosen]
    rows = form.all_rows(feeds)
    assert len(rows) == entry.rows
    lost = sum(
        float(np.sum((a.astype(np.float64) - b.astype(np.float64)) ** 2))
        for feed in feeds
        for a, b in zip(run(form.proto, feed).values(), run(result.model, feed).values(), strict=True)
    )
    outputs = form.alpha * rows @ form.weight.T
    if form.corrected:
        outputs = outputs - outputs.mean(0)
    scale = math.sqrt(float(np.sum(outputs**2)))
    _, noise = form.rounding(feeds)
    noise /= scale
    assert math.sqrt(entry.predicted_error) > 5 * noise
    assert math.sqrt(lost) / scale == pytest.approx(math.sqrt(entry.predicted_error), abs=noise)
