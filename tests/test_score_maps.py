"""Maps of scores, [samples, classes, height, width], as of segmentation without an ArgMax."""

import numpy as np
import onnx
import pytest
from builders import activations, model, noise, run

from onnx_utilrank import (
    CompressConfig,
    DataError,
    FinetuneConfig,
    QualityTarget,
    ValidateConfig,
    compress,
    finetune,
    validate,
)
from onnx_utilrank.calibration.labels import IGNORED, Labels
from onnx_utilrank.model.heads import channel_axis
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.validation.divergence import find_losses, open_judged

D, H, C, TALL, WIDE = 8, 24, 5, 6, 7
BODY = "h = Conv(x, W) t = Tanh(h) s = Conv<pads = [1, 1, 1, 1]>(t, O) "
# How the output is made of the scores, its type, and the axis of the classes.
ENDINGS = {
    "scores": ("y = Identity(s)", "float[n,c,h,w]", 1),
    "enlarged": ('y = Resize<mode = "linear">(s, none, none, sizes)', "float[n,c,h,w]", 1),
    "rectified": ("y = Relu(s)", "float[n,c,h,w]", 1),
    "gated": ("g = Sigmoid(s) y = Mul(g, s)", "float[n,c,h,w]", 1),
    "biased": ("y = Add(bias, s)", "float[n,c,h,w]", 1),
    "normalized": ("y = BatchNormalization(s, one, one, one, one)", "float[n,c,h,w]", 1),
    "last": ("y = Transpose<perm = [0, 2, 3, 1]>(s)", "float[n,h,w,c]", 3),
    "turned twice": (
        "u = Transpose<perm = [0, 2, 3, 1]>(s) y = Transpose<perm = [0, 2, 3, 1]>(u)",
        "float[n,w,c,h]",
        2,
    ),
}


def mapper(how: str = "scores") -> onnx.ModelProto:
    ending, kind, _ = ENDINGS[how]
    held = {"W": 0.4 * noise(1, H, D, 1, 1), "O": 0.5 * noise(2, C, H, 3, 3) * 0.8 ** np.arange(3)}
    return model(
        f"(float[n,{D},h,w] x) => ({kind} y)",
        BODY + ending,
        none=np.zeros(0, np.float32),
        sizes=np.array([16, C, TALL, WIDE]),
        bias=0.1 * noise(3, C, 1, 1).astype(np.float32),
        one=np.ones(C, np.float32),
        **{name: value.astype(np.float32) for name, value in held.items()},
    )


def samples(count: int = 64) -> dict[str, np.ndarray]:
    x = activations(7, count, D, TALL, WIDE).astype(np.float32)
    return {"x": x}


def labelled(count: int = 64) -> dict[str, np.ndarray]:
    """What the model itself decides for, so that it is always right."""
    data = samples(count)
    return data | {"label": run(mapper(), data)["y"].argmax(1)}


@pytest.mark.parametrize("how", ENDINGS)
def test_who_says_that_they_are_classes_means_the_channels(how: str):
    store, data = ModelStore.load(mapper(how)), samples(16)
    assert channel_axis(store, "y") == ENDINGS[how][2]
    session = open_judged(store, CPU)
    (said,) = find_losses(store, session, [data], "softmax")
    assert (said.weighting, said.axis % 4) == ("softmax", ENDINGS[how][2])
    (unsaid,) = find_losses(store, session, [data])
    assert (unsaid.weighting, unsaid.axis) == ("values", -1)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("y = MatMul(x, M)", "float[n,d,h,w]"),
        ("f = Reshape(x, flat) y = MatMul(f, N)", "float[n,k]"),
        ("y = Identity(x)", "float[n,d,h,w]"),
    ],
)
def test_no_convolution_no_channels(body: str, kind: str):
    sides = {"M": noise(1, WIDE, WIDE), "N": noise(2, D * TALL * WIDE, 3)}
    proto = model(
        f"(float[n,{D},{TALL},{WIDE}] x) => ({kind} y)",
        body,
        flat=np.array([0, -1]),
        **{name: value.astype(np.float32) for name, value in sides.items()},
    )
    assert channel_axis(ModelStore.load(proto), "y") is None


def test_labels_of_pixels_are_classes_of_channels():
    held = labelled(16)
    result = validate(mapper(), mapper(), held, ValidateConfig(labels="label"))
    found = result.providers[0].accuracy
    assert found is not None
    assert (found.count, found.reference) == (16 * TALL * WIDE, 100.0)
    off = held | {"label": np.roll(held["label"], 1, axis=-1)}
    expected = 100 * float((off["label"] == held["label"]).mean())
    result = validate(mapper(), mapper(), off, ValidateConfig(labels="label"))
    assert result.providers[0].accuracy is not None
    assert result.providers[0].accuracy.reference == pytest.approx(expected)


def test_as_many_classes_as_columns_are_told_apart():
    """Where labels fit both ways, the channels of the convolution are the classes."""
    data = {"x": activations(7, 16, D, C, C).astype(np.float32)}
    held = data | {"label": run(mapper(), data)["y"].argmax(1)}
    result = validate(mapper(), mapper(), held, ValidateConfig(labels="label"))
    assert result.providers[0].accuracy is not None
    assert result.providers[0].accuracy.reference == 100.0


def test_channels_of_signals_are_classes_where_labels_say_so():
    length = 9
    weights = {"W": noise(1, H, D, 3), "O": noise(2, length, H, 1)}
    proto = model(
        f"(float[n,{D},t] x) => (float[n,{length},t] y)",
        "h = Conv<pads = [1, 1]>(x, W) r = Relu(h) y = Conv(r, O)",
        **{name: value.astype(np.float32) for name, value in weights.items()},
    )
    data = {"x": noise(3, 20, D, length).astype(np.float32)}
    session = open_judged(ModelStore.load(proto), CPU)
    (loss,) = find_losses(ModelStore.load(proto), session, [data])
    assert (loss.weighting, loss.channels) == ("values", -2)  # no softmax over time
    held = data | {"label": run(proto, data)["y"].argmax(1)}
    result = validate(proto, proto, held, ValidateConfig(labels="label"))
    assert result.providers[0].accuracy is not None
    assert result.providers[0].accuracy.reference == 100.0


def test_labels_of_other_maps_are_told():
    held = labelled(16)
    turned = held | {"label": held["label"].transpose(0, 2, 1)}
    with pytest.raises(DataError, match="fit no output"):
        validate(mapper(), mapper(), turned, ValidateConfig(labels="label"))


def test_a_drop_in_pixels_is_a_target():
    config = CompressConfig(quality=QualityTarget(key="max_drop", limit=15.0), labels="label")
    result = compress(mapper(), labelled(300), config)
    assert result.plan.param_ratio < 1
    assert result.quality.metric == pytest.approx(100 - result.quality.drop)
    held = labelled(300)
    right = run(result.model, {"x": held["x"]})["y"].argmax(1) == held["label"]
    assert 100 * right.mean() > 80


def test_agreement_of_pixels_is_a_target():
    goal = QualityTarget(key="min_agreement", limit=0.9)
    config = CompressConfig(quality=goal, weighting="softmax")
    result = compress(mapper(), samples(300), config)
    assert result.plan.param_ratio < 1
    small, own = (run(proto, samples(300))["y"].argmax(1) for proto in (result.model, mapper()))
    assert (small == own).mean() > 0.85


def test_fine_tuning_learns_the_labels_of_pixels():
    config = CompressConfig(param_ratio=0.6, method="svd", force=True)
    held = labelled(120)
    small = compress(mapper(), held, config).model
    tuning = FinetuneConfig(labels="label", steps=60, learning_rate=5e-3)
    result = finetune(mapper(), small, held, tuning)
    assert result.accuracy is not None
    assert result.accuracy_before is not None
    assert result.accuracy > result.accuracy_before + 5
    right = run(result.model, {"x": held["x"]})["y"].argmax(1) == held["label"]
    assert result.accuracy == pytest.approx(100 * right.mean(), abs=10)


def test_pixels_are_numbered_by_their_sample_over_all_runs():
    held = labelled(5)
    held["label"][0, 0, :3] = IGNORED
    runs = [{name: value[part] for name, value in held.items()} for part in (slice(3), slice(3, 5))]
    store = ModelStore.load(mapper())
    session = open_judged(store, CPU)
    labels = Labels("label")
    classes = labels.find_output(session, find_losses(store, session, runs), runs, "data")
    found = labels.answers(session, classes, runs)
    expected = np.arange(5).repeat(TALL * WIDE)[3:]
    assert found.samples.tolist() == expected.tolist()
    assert found.right.all()
