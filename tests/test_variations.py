"""Calibration on variations of the samples: what stems from one sample is never told apart."""

import itertools

import numpy as np
import pytest
from builders import model, noise, smooth
from hypothesis import given
from hypothesis import strategies as st

import onnx_utilrank
from onnx_utilrank import compression
from onnx_utilrank.calibration.augment import Augmentation
from onnx_utilrank.calibration.data import Dataset, open_data
from onnx_utilrank.calibration.variations import with_variations
from onnx_utilrank.model.store import TensorSpec
from onnx_utilrank.sensitivity.effort import CHEAP_FLOPS, VARIANTS, choose_variants
from onnx_utilrank.sensitivity.quadratic import Quadratics


def images(count: int) -> np.ndarray:
    """Images that are each about a number of their own: only mixing brings another one near."""
    own = np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1)
    return own + np.linspace(-0.01, 0.01, 256, dtype=np.float32).reshape(1, 1, 16, 16)


def dataset(count: int, batch: int | None) -> Dataset:
    shape = (batch, 1, 16, 16)
    return open_data(
        {"x": images(count)}, [TensorSpec(name="x", dtype=np.dtype(np.float32), shape=shape)]
    )


@given(count=st.integers(2, 40), batch=st.sampled_from([None, 1, 2, 3]), variants=st.integers(2, 5))
def test_a_part_holds_all_that_stems_from_its_samples(count: int, batch: int | None, variants: int):
    run = batch or 1
    count = -(-count // run) * run
    data = dataset(count, batch)
    vary = Augmentation.of(list(data.feeds(range(count))))
    varied, samples = with_variations(data, range(count), vary, variants, seed=1)
    assert (len(varied), varied.variants) == (count * variants, variants)
    parts = varied.apart(samples)
    assert sorted(itertools.chain(*parts)) == list(samples)
    seen: set[float] = set()
    for part in parts:
        assert len(part) % run == 0
        values = np.concatenate([f["x"] for f in varied.feeds(part, batch=1)])
        given = varied.given(part)
        assert given == part[: len(part) // variants]
        own = values[: len(given)].mean((1, 2, 3)).round()
        assert not seen.intersection(own.tolist())  # each sample is in one part
        seen.update(own.tolist())
        # A mean over the noise; mixtures lie between the samples of the part.
        means = values.mean((1, 2, 3))
        slack = 0.02 + 0.1 * images(count).std()
        assert means.min() >= own.min() - slack
        assert means.max() <= own.max() + slack
    assert seen == set(range(count))
    # Without their variations, samples have nothing of each other.
    assert {len(part) for part in varied.apart(varied.given(samples))} == {run}


def test_samples_themselves_stay_and_the_seed_decides_the_rest():
    data = dataset(8, None)
    vary = Augmentation.of(list(data.feeds(range(8))))
    made = []
    for seed in (3, 3, 4):
        varied, samples = with_variations(data, [1, 2, 5, 6, 7], vary, 3, seed)
        made.append(np.concatenate([f["x"] for f in varied.feeds(samples)]))
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    # Of so few samples each is a part of its own, with its variations behind it.
    np.testing.assert_array_equal(made[0][::3], images(8)[[1, 2, 5, 6, 7]])


def test_whole_feeds_and_what_cannot_be_varied_stay_as_they_are():
    spec = TensorSpec(name="x", dtype=np.dtype(np.float32), shape=(1, 1, 16, 16))
    whole = open_data({"x": images(6)[:, None]}, [spec])
    vary = Augmentation.of(list(whole.feeds([0, 1])))
    assert with_variations(whole, [0, 1, 2], vary, 4, seed=0) == (whole, [0, 1, 2])
    table = open_data(
        {"x": noise(1, 60, 30).astype(np.float32)},
        [TensorSpec(name="x", dtype=np.dtype(np.float32), shape=(None, 30))],
    )
    vary = Augmentation.of(list(table.feeds(range(60))))
    assert with_variations(table, [0, 1, 2], vary, 4, seed=0) == (table, [0, 1, 2])
    few = open_data(
        {"x": noise(1, 6, 4) > 0}, [TensorSpec(name="x", dtype=np.dtype(bool), shape=(None, 4))]
    )
    vary = Augmentation.of(list(few.feeds([0, 1])))
    assert with_variations(few, [0, 1, 2], vary, 4, seed=0) == (few, [0, 1, 2])
    texts = open_data(
        {"ids": np.arange(60).reshape(6, 10)},
        [TensorSpec(name="ids", dtype=np.dtype(np.int64), shape=(None, 10))],
    )
    vary = Augmentation.of(list(texts.feeds(range(6))))
    assert vary.tokens
    assert with_variations(texts, [0, 1, 2], vary, 4, seed=0) == (texts, [0, 1, 2])
    data = dataset(6, None)
    vary = Augmentation.of(list(data.feeds([0, 1])))
    assert with_variations(data, [0, 1], vary, 1, seed=0) == (data, [0, 1])


@pytest.mark.parametrize(
    ("samples", "flops", "expected"),
    [
        (100, 10**6, VARIANTS),
        (100, CHEAP_FLOPS // 100, 1),
        (100, CHEAP_FLOPS // 200, 2),
        (100, CHEAP_FLOPS, 1),
        (1, 0, VARIANTS),
    ],
)
def test_dear_models_get_no_variations(samples: int, flops: int, expected: int):
    assert choose_variants(samples, flops) == expected


def network() -> tuple[object, dict[str, np.ndarray]]:
    """A classifier whose last layer sees one row an image: fewer than it is wide."""
    hidden = noise(1, 256, 24) / 16 @ noise(2, 24, 64)
    proto = model(
        "(float[n,1,16,16] x) => (float[n,6] y)",
        "f = Flatten(x) h = MatMul(f, A) g = Relu(h) y = MatMul(g, B)",
        A=hidden.astype(np.float32),
        B=(noise(3, 64, 6) / 8).astype(np.float32),
    )
    return proto, {"x": smooth(4, 40, 1, 16, 16).astype(np.float32)}


def test_variations_count_and_are_told_of():
    proto, data = network()
    config = onnx_utilrank.CompressConfig(param_ratio=0.5)
    varied = onnx_utilrank.compress(proto, data, config)
    assert any(f"{VARIANTS - 1} variations" in note for note in varied.notes)
    assert varied.plan.augment
    rows = [entry.rows for entry in varied.plan.entries]
    assert rows == [VARIANTS * varied.samples] * 2
    plain = onnx_utilrank.compress(
        proto, data, onnx_utilrank.CompressConfig(param_ratio=0.5, augment=False)
    )
    assert not any("variations" in note for note in plain.notes)
    assert not plain.plan.augment
    assert [entry.rows for entry in plain.plan.entries] == [plain.samples] * 2


@pytest.mark.parametrize("augment", [True, False])
def test_a_plan_replays_with_the_variations_it_was_made_with(augment: bool):
    proto, data = network()
    config = onnx_utilrank.CompressConfig(param_ratio=0.5, augment=augment)
    made = onnx_utilrank.compress(proto, data, config)
    again = onnx_utilrank.compress(proto, data, plan=made.plan)
    assert made.store is not None
    assert again.store is not None
    assert made.store.fingerprint() == again.store.fingerprint()


@pytest.mark.parametrize("method", ["one-sided", "utilized-rank", "svd"])
def test_methods_without_gradients_see_the_samples_alone(method: str):
    proto, data = network()
    config = onnx_utilrank.CompressConfig(param_ratio=0.5, method=method)
    made = onnx_utilrank.compress(proto, data, config)
    assert not made.plan.augment
    assert not any("variations" in note for note in made.notes)


def test_losses_are_predicted_and_refits_judged_on_the_samples_themselves(monkeypatch):
    proto, data = network()
    known = {image.tobytes() for image in data["x"]}
    seen: dict[str, list[bool]] = {"predicted": [], "judged": []}

    def watched(what, function, place):
        def call(*given):
            seen[what] += [x.tobytes() in known for feed in given[place] for x in feed["x"]]
            return function(*given)

        return call

    for what, module, name, place in (
        ("predicted", Quadratics, "add", 3),
        ("judged", compression, "is_better", 5),
    ):
        monkeypatch.setattr(module, name, watched(what, getattr(module, name), place))
    onnx_utilrank.compress(proto, data, onnx_utilrank.CompressConfig(param_ratio=0.5))
    assert all(seen.values())
    assert all(map(all, seen.values()))
