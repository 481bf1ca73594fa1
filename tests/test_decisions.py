"""Models whose outputs are decisions: the scores that they are made from are what counts."""

import numpy as np
import onnx
import pytest
from builders import activations, model, noise, run

from onnx_utilrank import (
    CompressConfig,
    FinetuneConfig,
    ModelError,
    QualityTarget,
    TrainConfig,
    compress,
    finetune,
    train,
)
from onnx_utilrank.model.heads import decided_outputs
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.validation.divergence import find_losses, open_judged

D, H, C = 20, 40, 6
LAYERS = "h = MatMul(x, W) t = Tanh(h) u = MatMul(t, V) r = Relu(u) s = MatMul(r, O) "
PIXELS = "h = Conv(x, W) t = Tanh(h) s = Conv(t, O) "

# How the output `y` is made of the scores, its type, and the axis of the classes.
DECIDED = {
    "classes": ("y = ArgMax<axis=-1, keepdims=0>(s)", "int64[n]", -1),
    "kept axis": ("y = ArgMax<axis=1>(s)", "int64[n,one]", -1),
    "squeezed": ("a = ArgMax<axis=1>(s) y = Squeeze(a, axes)", "int64[n]", -1),
    "numbers": ("a = ArgMax<axis=-1, keepdims=0>(s) y = Cast<to=1>(a)", "float[n]", -1),
    "of a softmax": ("p = Softmax(s) y = ArgMax<axis=-1, keepdims=0>(p)", "int64[n]", -1),
    "pixels": ("y = ArgMax<axis=1, keepdims=0>(s)", "int64[n,h,w]", -3),
}


def decider(how: str = "classes", more: str = "", out: str = "") -> onnx.ModelProto:
    body, kind, axis = DECIDED[how]
    if axis == -1:
        shapes, dims = {"W": (D, H), "V": (H, H), "O": (H, C)}, f"n,{D}"
    else:
        shapes, dims = {"W": (H, D, 3, 3), "O": (C, H, 1, 1)}, f"n,{D},8,8"
    scales = {"W": 0.5, "V": 0.3, "O": 1.0}
    held = {
        name: (scales[name] * 0.9 ** np.arange(shape[-1]) * noise(k, *shape)).astype(np.float32)
        for k, (name, shape) in enumerate(shapes.items())
    }
    return model(
        f"(float[{dims}] x) => ({kind} y{out})",
        (LAYERS if axis == -1 else PIXELS) + body + more,
        axes=np.array([1]),
        **held,
    )


def samples(how: str = "classes", count: int = 300) -> dict[str, np.ndarray]:
    shape = (D, 8, 8) if how == "pixels" else (D,)
    return {"x": activations(7, count, *shape).astype(np.float32)}


@pytest.mark.parametrize("how", DECIDED)
def test_scores_behind_decisions_are_what_counts(how: str):
    store, data = ModelStore.load(decider(how)), samples(how, 16)
    session = open_judged(store, CPU)
    (loss,) = find_losses(store, session, [data])
    assert loss.output == ("p" if how == "of a softmax" else "s")
    assert loss.axis == DECIDED[how][2]
    assert loss.weighting in ("softmax", "logits")
    assert loss.probabilities == (how == "of a softmax")
    assert decided_outputs(store).keys() == {"y"}


@pytest.mark.parametrize("how", DECIDED)
def test_deciders_are_compressed_by_what_they_decide_by(how: str):
    proto, data = decider(how), samples(how, 120)
    result = compress(proto, data, CompressConfig(param_ratio=0.5, method="two-sided"))
    assert result.plan.factored or result.plan.shrunk
    assert [o.name for o in result.model.graph.output] == ["y"]
    agreed = np.mean(run(proto, data)["y"] == run(result.model, data)["y"])
    found = result.quality.divergence
    assert found.agreement is not None
    assert abs(found.agreement - agreed) < 0.15
    assert result.plan.predicted_divergence is not None


@pytest.mark.parametrize(
    ("more", "out"),
    [
        ("", f", float[n,{C}] s"),
        (" q = Identity(s)", f", float[n,{C}] q"),
        (" q = Cast<to=10>(s)", f", float16[n,{C}] q"),
        (" q = Softmax(s)", f", float[n,{C}] q"),
        (" q = LogSoftmax(s)", f", float[n,{C}] q"),
    ],
)
def test_scores_that_are_told_anyway_count_once(more: str, out: str):
    store = ModelStore.load(decider(more=more, out=out))
    losses = find_losses(store, open_judged(store, CPU), [samples(count=16)])
    assert [loss.output for loss in losses] == [out.split()[-1]]


def test_scores_are_told_whatever_is_decided_by():
    store = ModelStore.load(decider("of a softmax", out=f", float[n,{C}] s"))
    (loss,) = find_losses(store, open_judged(store, CPU), [samples(count=16)])
    assert loss.output == "s"


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_level_of_scores_that_are_decided_by_says_nothing(level: float):
    proto = decider()
    (head,) = (t for t in proto.graph.initializer if t.name == "O")
    values = onnx.numpy_helper.to_array(head)
    values = 3 * (values + level * values[:, :1])
    head.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), "O"))
    store = ModelStore.load(proto)
    (loss,) = find_losses(store, open_judged(store, CPU), [samples(count=64)])
    assert loss.weighting == "softmax"


@pytest.mark.parametrize(
    "body",
    [
        "y = ArgMax<axis=0>(s)",  # of samples, not of classes
        "t_ = Transpose(s) y = ArgMax<axis=0>(t_)",
        "y = ArgMax<axis=1>(x)",
        "y = ArgMax<axis=1>(O)",
        "k = Constant<value_floats=[1.0, 2.0]>() y = ArgMax<axis=0>(k)",
    ],
)
def test_what_decides_on_nothing_is_not_followed(body: str):
    proto = model(
        f"(float[n,{D}] x) => (int64[a,b] y, float[n,{C}] z)",
        LAYERS + body + " z = Neg(s)",
        W=noise(0, D, H).astype(np.float32),
        V=noise(1, H, H).astype(np.float32),
        O=noise(2, H, C).astype(np.float32),
    )
    store = ModelStore.load(proto)
    losses = find_losses(store, open_judged(store, CPU), [samples(count=16)])
    assert [loss.output for loss in losses] == ["z"]


def test_decisions_within_functions_are_compressed_by_other_means():
    proto = model(
        f"(float[n,{D}] x) => (int64[n] y)",
        "y = own.whole(x, W, V, O)",
        domains=', "own" : 1',
        functions='<opset_import: ["" : 17], domain: "own"> whole (x, W, V, O) => (y) { '
        + LAYERS
        + "y = ArgMax<axis=-1, keepdims=0>(s) }",
        W=noise(0, D, H).astype(np.float32),
        V=noise(1, H, H).astype(np.float32),
        O=noise(2, H, C).astype(np.float32),
    )
    result = compress(proto, samples(), CompressConfig(param_ratio=0.7))
    assert result.plan.method == "one-sided"
    assert result.quality.divergence is None


def test_candidate_with_other_names_is_told():
    proto, data = decider(), samples(count=400)
    other = compress(proto, data, CompressConfig(param_ratio=0.5)).model
    for node in other.graph.node:
        for names in (node.input, node.output):
            names[:] = ["renamed" if name == "s" else name for name in names]
    with pytest.raises(ModelError, match="makes no value 's', the scores that the original dec"):
        finetune(proto, other, data, FinetuneConfig(steps=5))


def test_other_outputs_count_beside_decisions():
    store = ModelStore.load(decider(more=" z = Neg(r)", out=f", float[n,{H}] z"))
    losses = find_losses(store, open_judged(store, CPU), [samples(count=16)])
    assert [(loss.output, loss.weighting == "values") for loss in losses] == [
        *(("z", True), ("s", False))
    ]


def test_agreement_of_decisions_is_a_target():
    proto, data = decider(), samples()
    config = CompressConfig(quality=QualityTarget(key="min_agreement", limit=0.9))
    result = compress(proto, data, config)
    assert result.plan.param_ratio < 1
    assert result.quality.divergence.agreement >= 0.8
    other = {"x": activations(8, 500, D).astype(np.float32)}
    assert np.mean(run(proto, other)["y"] == run(result.model, other)["y"]) > 0.8


@pytest.mark.parametrize("labels", ["label", "label=y"])
def test_labels_are_classes_of_the_scores(labels: str):
    proto, data = decider(), samples(count=400)
    right = run(proto, data)["y"]
    goal = QualityTarget(key="max_drop", limit=20.0)
    config = CompressConfig(quality=goal, labels=labels)
    result = compress(proto, data | {"label": right}, config)
    assert result.quality.metric == pytest.approx(100 - result.quality.drop)
    assert result.plan.param_ratio < 1


def test_labels_name_scores_that_are_an_output_beside_their_decision():
    proto, data = decider(out=f", float[n,{C}] s"), samples(count=200)
    config = CompressConfig(quality=QualityTarget(key="max_drop", limit=20.0), labels="label=s")
    right = run(proto, data)["y"]
    assert compress(proto, data | {"label": right}, config).quality.metric is not None


@pytest.mark.parametrize("scheme", ["int8", "fp16"])
def test_deciders_are_quantized(scheme: str):
    proto, data = decider(), samples()
    result = compress(proto, data, CompressConfig(param_ratio=0.7, then=scheme))
    assert result.quality.divergence.agreement > 0.7
    assert [o.name for o in result.model.graph.output] == ["y"]


def test_deciders_are_trained():
    proto, data = decider(), samples(count=400)
    small = compress(proto, data, CompressConfig(param_ratio=0.2)).model
    tuned = finetune(proto, small, data, FinetuneConfig(steps=60, augment=False))
    assert tuned.after.mean <= tuned.before.mean
    labels = {"label": run(proto, data)["y"]}
    config = TrainConfig(labels="label", steps=20, method="dense", augment=False)
    trained = train(proto, data | labels, config)
    assert trained.accuracy_before == pytest.approx(100)
