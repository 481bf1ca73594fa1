"""Taps against numpy on the very rows, strides, and values that are not finite."""

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from builders import FORMS, Feed, Form, activations, conv, index, model, noise, right

from onnx_utilrank import AnalyzeConfig, CompressConfig, ModelError, analyze, compress
from onnx_utilrank.calibration.collect import Collected, collect, usable_batch
from onnx_utilrank.calibration.data import Dataset, open_data
from onnx_utilrank.calibration.survey import expose, linear_flops, survey
from onnx_utilrank.calibration.taps import insert_taps, row_stride, view_rows
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.method import site_moment
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sites.find import find_sites
from onnx_utilrank.sites.site import Patches, RowView, Use
from onnx_utilrank.statistics.moments import SecondMoment


def gather(index: GraphIndex, views: Sequence[RowView], feeds: list[Feed]) -> Collected:
    data = open_data(feeds, index.store.inputs)
    return collect(
        index, views, data, range(len(data)), CPU, batch=32, progress=lambda *_: None
    )


def tapped(
    proto: onnx.ModelProto, view: RowView, feeds: list[Feed], stride: int
) -> tuple[SecondMoment, list[int], int]:
    """The moment with a chosen stride, the rows of each run, and the stride that was stated."""
    store = ModelStore.load(proto)
    observed = survey(store, [view.tensor], feeds[0], CPU)
    made = insert_taps(store, [view], observed, {view: stride})
    (tap,) = made.taps
    session = open_session(made.store, CPU)
    moment, counts = SecondMoment.zero(view.width), []
    for k, feed in enumerate(feeds):
        values = session.run(feed | {n: np.array([k % s]) for s, n in made.phases.items()})
        counts.append(int(values[tap.matrix][tap.row_axis]))
        outer, total = values[tap.outer], values[tap.total]
        moment.add(outer=outer, total=total, rows=counts[-1], shift=tap.shift)
    return moment, counts, tap.stride


def assert_moments_of(rows: np.ndarray, moment: SecondMoment, dtype: np.dtype) -> None:
    """Equal up to the rounding of a float32 sum over the rows, where they are not float64."""
    assert moment.rows == len(rows)
    eps = np.finfo(np.float64 if dtype == np.float64 else np.float32).eps
    if dtype == np.float16:
        eps = np.finfo(np.float16).eps
    squares = float(np.square(rows).sum(0).max())
    sums = float(np.abs(rows).sum(0).max())
    bound = 4 * eps * np.sqrt(len(rows))
    np.testing.assert_allclose(moment.outer, rows.T @ rows, rtol=0, atol=bound * squares)
    np.testing.assert_allclose(moment.total, rows.sum(0), rtol=0, atol=bound * sums)


# --- the very rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_taps_give_the_moments_of_the_rows(form: Form):
    graph, feeds = index(form.proto), form.data()
    (site,), _ = find_sites(graph)
    (use,) = site.uses
    views = [use.inputs, *([use.outputs] if use.outputs else [])]
    collected = gather(graph, views, feeds)
    assert collected.samples == len(feeds)
    assert set(collected.strides.values()) == {1}
    x = form.all_rows(feeds)
    assert_moments_of(x, collected.moments[use.inputs], form.dtype)
    if use.outputs:
        own = use.bias.values(graph, site.m) if use.bias.kind == "input" else np.zeros(site.m)
        moment = site_moment(site, "outputs", collected.moments, {use.node: own})
        assert_moments_of(x @ form.weight.T, moment, form.dtype)
