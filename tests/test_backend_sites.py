"""The node tests of the onnx package in which something can be factored pass at full rank."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest

from onnx_utilrank import CompressConfig, compress
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sites.find import SITE_KINDS

TOOLS = Path(__file__).resolve().parent.parent / "tools"
# What ONNX Runtime knows of (docs/Versioning.md); it refuses models of opsets to come.
NEWEST = 26
EXACT = CompressConfig(energy=1.0, force=True)


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("backend_cases")


def test_full_rank_is_what_the_backend_tests_expect(backend):
    tried = set()
    for case in backend.site_cases():
        store = ModelStore.load(case.model)
        if store.opset > NEWEST:
            continue
        own = open_session(store, CPU, optimize=False, threads=1).run(case.feed)
        # One feed to calibrate with, one held back.
        result = compress(case.model, [case.feed, case.feed], EXACT)
        (entry,) = result.plan.factored
        assert entry.rank == min(entry.m, entry.d), case
        assert case.model.graph.output == result.model.graph.output
        made = open_session(result.store, CPU, optimize=False, threads=1).run(case.feed)
        for wanted, (name, reference) in zip(case.expected, own.items(), strict=True):
            assert made[name].dtype == wanted.dtype == reference.dtype, case
            # Two sums of independent errors take the place of one; single values may be 4
            # deviations off.
            eps = float(np.finfo(wanted.dtype).eps)
            atol = 4 * eps * math.sqrt(entry.d + entry.rank) * float(np.abs(wanted).max())
            for expected in (wanted, reference):
                np.testing.assert_allclose(
                    made[name], expected, rtol=case.case.rtol, atol=atol, err_msg=str(case)
                )
        tried.add(entry.op_type)
    assert tried >= {kind.op_type for kind in SITE_KINDS}
