"""Outputs that hold values in units of their own: none is lost for being small."""

import math

import numpy as np
import onnx
import pytest
from builders import model, noise, run

from onnx_utilrank import CompressConfig, compress
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.statistics.divergence import FEW, LEAST_ROWS, divergence, unlike
from onnx_utilrank.validation.divergence import find_losses

D, H, N = 24, 96, 320
UNITS = np.array([100.0, 0.5, 5.0])


def regression(units: np.ndarray = UNITS) -> onnx.ModelProto:
    """Targets that hang on different directions of what is hidden, in units of their own."""
    held = {"U": noise(1, D, H) / math.sqrt(D), "V": noise(2, H, H) / math.sqrt(H)}
    held |= {"Z": noise(3, H, len(units)) / math.sqrt(H) * units, "b": 7 * units}
    body = "h = MatMul(x, U) a = Tanh(h) v = MatMul(a, V) t = Tanh(v) y = Gemm(t, Z, b)"
    cast = {name: values.astype(np.float32) for name, values in held.items()}
    return model(f"(float[n,{D}] x) => (float[n,{len(units)}] y)", body, **cast)


def data() -> dict[str, np.ndarray]:
    return {"x": (noise(9, N, D) * 0.85 ** np.arange(D)).astype(np.float32)}


def test_a_target_in_small_units_is_kept_as_well_as_the_others():
    proto, feed = regression(), data()
    result = compress(proto, feed, CompressConfig(param_ratio=0.4))
    y, z = run(proto, feed)["y"], run(result.model, feed)["y"]
    lost = np.square(y - z).sum(0) / np.square(y - y.mean(0)).sum(0)
    assert lost.max() < 10 * lost.min()
    assert any("each of the 3 relative to its own deviation" in note for note in result.notes)
    assert 0.4 < result.quality.divergence.mean / result.plan.predicted_divergence < 2.5
    # Half of the mean over targets, and SNR is of the same.
    assert result.quality.divergence.mean == pytest.approx(lost.mean() / 2, rel=0.5)
    expected = -10 * math.log10(2 * result.quality.divergence.mean)
    assert result.quality.divergence.snr_db == pytest.approx(expected)


def test_units_do_not_matter_and_values_count_as_they_are_where_the_user_says_so():
    feed, config = data(), CompressConfig(param_ratio=0.4, refit=False)
    plans = [compress(regression(u), feed, config).plan for u in (UNITS, np.ones(3), 16 * UNITS)]
    ranks = [[e.rank for e in plan.entries] for plan in plans]
    assert ranks[0] == ranks[2]
    assert plans[0].predicted_divergence == pytest.approx(plans[2].predicted_divergence, rel=1e-3)
    assert plans[0].predicted_divergence == pytest.approx(plans[1].predicted_divergence, rel=0.5)
    told = CompressConfig(param_ratio=0.4, refit=False, weighting="values")
    assert any("'y' as values." in note for note in compress(regression(), feed, told).notes)


def test_divergence_is_of_deviations():
    store, feed = ModelStore.load(regression()), data()
    (loss,) = find_losses(store, open_session(store, CPU), [feed])
    y = run(regression(), feed)["y"].astype(np.float64)
    assert loss.scales == pytest.approx(tuple(y.std(0)), rel=1e-5)
    assert loss.variance == pytest.approx(3, rel=1e-5)
    z = y + noise(4, *y.shape) * UNITS
    rows = [loss.rows(v, N) for v in (y, z)]
    expected = np.square((z - y) / y.std(0)).sum(1) / 6
    np.testing.assert_allclose(divergence(loss, *rows), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "scaled"),
    [("n,6", True), ("n,k", False), ("", False), ("n,1,6", True), ("n,1,2,3", False)],
)
def test_sides_of_images_and_axes_of_any_length_are_no_targets(shape: str, scaled: bool):
    target = {"n,1,6": [-1, 1, 6], "n,1,2,3": [-1, 1, 2, 3]}.get(shape, [-1, 6])
    units = np.array([100.0, 1, 1, 1, 1, 0.5])
    feed = {"x": noise(1, 40, 6).astype(np.float32) * units.astype(np.float32)}
    signature = f"(float[n,6] x) => (float[{shape}] y)"
    proto = model(signature, "y = Reshape(x, s)", s=np.array(target))
    store = ModelStore.load(proto)
    (loss,) = find_losses(store, open_session(store, CPU), [feed])
    assert (loss.scales is not None) == scaled


def test_deviations_of_a_few_rows_are_chance():
    assert unlike(noise(1, LEAST_ROWS - 1, 3) * UNITS) == (None, 0)
    assert unlike(noise(1, LEAST_ROWS, 3) * UNITS)[0] is not None


@pytest.mark.parametrize(
    ("deviations", "scales", "faint"),
    [
        ([1, 1], None, 0),
        ([1, 0.2], None, 0),
        ([1, 0.05], [1, 0.05], 0),
        ([20, 1, 0], [20, 1, 20], 0),  # what never varies is not to be kept to the last bit
        ([5, 0, 0], None, 0),
        ([1, 1e-5], [1, 1e-3], 0),
        ([0, 0], None, 0),
        ([1.0] * FEW + [1e-3], None, 1),
        ([1.0] * FEW + [0.05, 0], None, 0),
    ],
)
def test_few_values_that_vary_otherwise_are_unlike(deviations, scales, faint):
    signs = np.where(np.arange(40) % 2, 1.0, -1.0)
    found, hardly = unlike(3 + signs[:, None] * np.array(deviations, dtype=float))
    assert hardly == faint
    assert found == (None if scales is None else pytest.approx(scales))


def test_many_that_hardly_count_are_told():
    units = np.array([100.0] * 4 + [0.01] * FEW)
    result = compress(regression(units), data(), CompressConfig(param_ratio=0.6))
    assert any(f"of which {FEW} hardly count" in note for note in result.notes)
