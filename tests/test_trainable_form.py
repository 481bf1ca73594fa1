"""Models whose weights hide behind other nodes, and what training makes of them."""

import numpy as np
import onnx
import pytest
from builders import model, noise, ops, run

from onnx_utilrank import (
    CompressConfig,
    ConfigError,
    DataError,
    FinetuneConfig,
    ModelError,
    TrainConfig,
    compress,
    finetune,
    train,
)
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.training.form import trainable_form
from onnx_utilrank.training.weights import trainable_names

N, D, H, C = 240, 12, 24, 5
HEAD = f"(float[n,{D}] x) => (float[n,{C}] y)"
W = {
    "w1": (0.3 * noise(1, D, H)).astype(np.float32),
    "w2": (0.3 * noise(2, H, H)).astype(np.float32),
    "w3": (0.5 * noise(3, H, C)).astype(np.float32),
}
TURNED = {name: value.T.copy() for name, value in W.items()}
LAYERS = "a = MatMul(x, {0}) b = Tanh(a) c = MatMul(b, {1}) d = Relu(c) y = MatMul(d, {2})"
PLAIN = LAYERS.format("w1", "w2", "w3")
TURNS = "".join(f"t{k} = Transpose<perm=[1,0]>(w{k}) " for k in (1, 2, 3))
LINEAR = '<domain: "loc", opset_import: ["" : 17]> lin (x, w) => (y) { y = MatMul(x, w) }'
TRAINING = TrainConfig(
    labels="label", steps=60, learning_rate=1e-2, delay=10, interval=10, share=0.5
)


def data() -> dict[str, np.ndarray]:
    x = noise(9, N, D).astype(np.float32)
    return {"x": x, "label": (x @ noise(10, D, C)).argmax(-1).astype(np.int64)}


def plain() -> onnx.ModelProto:
    return model(HEAD, PLAIN, **W)


def in_constants() -> onnx.ModelProto:
    proto = plain()
    for tensor in proto.graph.initializer:
        node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        proto.graph.node.insert(0, node)
    del proto.graph.initializer[:]
    return proto


def in_functions() -> onnx.ModelProto:
    body = "a = loc.lin(x, w1) b = Tanh(a) c = loc.lin(b, w2) d = Relu(c) y = MatMul(d, w3)"
    return model(HEAD, body, domains=', "loc" : 1', functions=LINEAR, **W)


FORMS = {
    "transposed": lambda: model(HEAD, TURNS + LAYERS.format("t1", "t2", "t3"), **TURNED),
    "constants": in_constants,
    "functions": in_functions,
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_function_trains_to_the_same_model(name: str):
    expected = train(plain(), data(), TRAINING)
    result = train(FORMS[name](), data(), TRAINING)
    assert len(result.ranks) == len(expected.ranks) == 2
    assert list(result.ranks.values()) == list(expected.ranks.values())
    assert (result.trainable, result.accuracy) == (expected.trainable, expected.accuracy)
    feed = {"x": data()["x"]}
    # The same steps in another layout: products of up to H terms, 60 times over.
    np.testing.assert_allclose(
        run(result.model, feed)["y"], run(expected.model, feed)["y"], rtol=0, atol=60 * H * 2**-23
    )


@pytest.mark.parametrize("name", FORMS)
def test_the_form_computes_the_same(name: str):
    proto = FORMS[name]()
    form = trainable_form(ModelStore.load(proto))
    feed = {"x": data()["x"]}
    np.testing.assert_array_equal(run(form, feed)["y"], run(proto, feed)["y"])
    assert ops(form.proto) == ops(plain())
    onnx.checker.check_model(form.proto, full_check=True)


def test_what_needs_no_change_is_the_model_itself():
    store = ModelStore.load(plain())
    assert trainable_form(store) is store


def test_what_others_read_too_stays_tied():
    """Embedding and head of a language model: one array, trained as one."""
    proto = model(
        f"(int64[n,t] ids) => (float[n,t,{D}] y, float[{D},{D}] shown)",
        "e = Gather(w, ids) h = Tanh(e) turned = Transpose<perm=[1,0]>(w) y = MatMul(h, turned) "
        "shown = Identity(k)",
        w=noise(1, D, D).astype(np.float32),
        k=noise(2, D, D).astype(np.float32),
    )
    store = ModelStore.load(proto)
    assert trainable_form(store) is store
    assert trainable_names(TorchGraph.build(store)) == ["w"]


def test_masks_are_not_trained():
    causal = np.tril(np.ones((D, D), np.float32))
    proto = model(
        f"(float[n,{D},{D}] x) => (float[n,{D},{D}] y)",
        "a = MatMul(x, w) b = Mul(a, causal) c = Add(b, far) d = Add(c, places) y = Add(d, zeros)",
        w=np.zeros((D, D), np.float32),
        causal=causal,
        far=-1e3 * (1 - causal),
        places=noise(3, D, D).astype(np.float32),
        zeros=np.zeros((D, D), np.float32),
    )
    names = trainable_names(TorchGraph.build(ModelStore.load(proto)))
    assert names == ["w", "places", "zeros"]


def test_weights_of_an_einsum_are_trained():
    proto = model(
        HEAD, 'a = Einsum<equation="nd,de->ne">(x, w1) b = Tanh(a) y = MatMul(b, w3)', **W
    )
    result = train(proto, data(), TrainConfig(labels="label", method="dense", steps=60))
    moved = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
    assert not np.array_equal(moved["w1"], W["w1"])


def test_a_candidate_with_weights_in_constants_recovers():
    config = CompressConfig(param_ratio=0.5, method="svd", force=True)
    small = compress(in_constants(), data(), config).model
    for tensor in list(small.graph.initializer):
        node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        small.graph.node.insert(0, node)
    del small.graph.initializer[:]
    before = small.SerializeToString()
    result = finetune(plain(), small, data(), FinetuneConfig(steps=60, learning_rate=5e-3))
    assert result.kept
    assert small.SerializeToString() == before


def test_biases_beside_quantized_weights_are_trained():
    body = "a = MatMul(x, w1) b = Add(a, b1) e = Tanh(b) f = MatMul(e, w3) y = Add(f, b3)"
    sides = {"b1": noise(4, H).astype(np.float32), "b3": noise(5, C).astype(np.float32)}
    whole = model(HEAD, body, w1=W["w1"], w3=W["w3"], **sides)
    scale = np.float32(np.abs(W["w1"]).max() / 7)
    rounded = np.round(W["w1"] / scale).astype(np.int8)
    small = model(
        HEAD,
        "w1 = DequantizeLinear(q, s) " + body,
        q=rounded,
        s=np.array(scale),
        w3=W["w3"],
        **sides,
    )
    result = finetune(
        whole, small, data(), FinetuneConfig(method="biases", steps=60, learning_rate=5e-3)
    )
    assert result.history


@pytest.mark.parametrize(
    ("proto", "error", "reason"),
    [
        (
            lambda: model(
                f"(float[n,{D}] x) => (float[n,{D}] y)",
                "a = Relu(x) y = Sub(a, w)",
                w=np.ones(D, np.float32),
            ),
            *(ModelError, "reads a floating weight that could be trained"),
        ),
        (
            lambda: model(
                f"(float[n,{D}] x) => (int64[n,{C}] y)",
                "a = MatMul(x, w3x) y = Cast<to=7>(a)",
                w3x=noise(1, D, C).astype(np.float32),
            ),
            *(ConfigError, "no output of the model holds finite scores"),
        ),
        (
            lambda: model(
                HEAD,
                "a = MatMul(x, w1) b = MatMul(a, w3) y = Add(b, m)",
                w1=W["w1"],
                w3=W["w3"],
                m=np.array([0, 0, 0, 0, -np.inf], np.float32),
            ),
            *(ModelError, "output 'y' holds NaN or infinity"),
        ),
        (
            lambda: model(HEAD, "y = MatMul(x, w)", w=noise(1, D, C).astype(np.float32)),
            *(ModelError, r"no weight goes into bases. Not in bases \(the last layer\): 'w'"),
        ),
    ],
)
def test_what_cannot_be_trained_is_told_before_the_work(proto, error, reason):
    with pytest.raises(error, match=reason):
        train(proto(), data(), TRAINING)


def test_options_that_leave_nothing_to_do():
    with pytest.raises(ConfigError, match="delay 60 leaves none of 60 steps"):
        train(plain(), data(), TrainConfig(labels="label", steps=60, delay=60))
    with pytest.raises(ConfigError, match="share and delay: of method oialr alone"):
        FinetuneConfig(share=0.1, delay=3)
    with pytest.raises(ConfigError, match="share: of method oialr alone"):
        TrainConfig(labels="label", method="dense", share=0.1)
    with pytest.raises(ConfigError, match=r"learning rate 1e\+20 is not in"):
        TrainConfig(labels="label", learning_rate=1e20)
    few = {name: value[:2] for name, value in data().items()}
    with pytest.raises(DataError, match="holds 2 samples; 3 are needed, to train on"):
        train(plain(), few, TRAINING)


def test_an_original_that_is_not_finite_is_told_before_the_work():
    broken = model(HEAD, PLAIN.replace("y = MatMul(d, w3)", "z = MatMul(d, w3) y = Log(z)"), **W)
    begun: list[object] = []
    with pytest.raises(ModelError, match="it begins at"):
        finetune(
            broken, broken, data(), FinetuneConfig(steps=5), progress=lambda *s: begun.append(s[0])
        )
    assert "training" not in begun
