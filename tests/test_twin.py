"""Models in torch against the ones that are written, and refits that have to prove themselves."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
import test_hidden
from builders import Feed, activations, model, noise, run
from test_units import EPS, NO_BIAS, SHRINK, STYLES, WIDE, D, few_directions, whole

from onnx_utilrank import CompressConfig, compress
from onnx_utilrank.compression import is_better
from onnx_utilrank.refit.layer import Refitted
from onnx_utilrank.refit.propagate import propagate
from onnx_utilrank.refit.twin import Twin

# --- the twin -----------------------------------------------------------------------------------


def units_case(name: str) -> tuple[onnx.ModelProto, Feed]:
    return STYLES[name].proto(), STYLES[name].feed(120)


def heads_case(body: str) -> tuple[onnx.ModelProto, Feed]:
    return test_hidden.Style(body=body).proto(), test_hidden.data()


def read_twice() -> tuple[onnx.ModelProto, Feed]:
    """Something else reads the weight, behind the node."""
    proto = model(
        "(float[n,24] x) => (float[n,24] y)",
        "h = MatMul(x, W) s = Add(h, b) t = Tanh(s) q = Transpose(W) u = MatMul(t, q)"
        " y = MatMul(u, V)",
        W=(noise(1, 24, 24) / 5).astype(np.float32),
        b=noise(2, 24).astype(np.float32),
        V=(noise(4, 24, 24) / 5).astype(np.float32),
    )
    return proto, {"x": noise(3, 200, 24).astype(np.float32)}


def scaled() -> tuple[onnx.ModelProto, Feed]:
    """Gemm with a factor, and inputs with a mean that its bias has to make up for."""
    proto = model(
        "(float[n,24] x) => (float[n,24] y)",
        "h = Gemm<alpha=0.3, beta=2.0>(x, W, b) y = Tanh(h)",
        W=(noise(1, 24, 24) / 5).astype(np.float32),
        b=noise(2, 24).astype(np.float32),
    )
    return proto, {"x": activations(3, 200, 24).astype(np.float32)}


TWIN_UNITS = (
    "relu",
    "gemm of turned weights, scaled bias",
    "gelu with its bias",
    "constants of their own",
    "gate with biases",
    "gate, packed",
    "turned about",
    "conv of one tap",
    "conv of nine taps",
    "conv without bias",
    "conv, constants of their own",
    "pooled all",
    "max pooling",
    "two convs that are added",
)
TWIN_HEADS = ("matmul", "gemm", "stacked, split", "no bias", "biases behind a Reshape")
SMALL = replace(SHRINK, param_ratio=0.75, force=True)
TWINS = {each: (partial(units_case, each), SMALL) for each in TWIN_UNITS}
for each in TWIN_HEADS:
    TWINS[f"heads, {each}"] = partial(heads_case, test_hidden.STYLES[each].body), SMALL
for each, body in test_hidden.SCALED_VALUES.items():
    TWINS[f"heads, scaled {each}"] = partial(heads_case, body), SMALL
for each in ("relu", "gate", "conv"):
    for moves in (("low-rank",), ("low-rank", "shrink"), ("channels",)):
        if moves != ("channels",) or each == "conv":
            config = CompressConfig(param_ratio=0.45, moves=moves)
            TWINS[f"{each} by {' and '.join(moves)}"] = partial(whole, each), config

for ratio in (0.4, 0.3):
    BOTH = CompressConfig(param_ratio=ratio, moves=("low-rank", "shrink"))
    TWINS[f"both, heads, {ratio}"] = partial(heads_case, test_hidden.STYLES["gemm"].body), BOTH
TWINS["both, taps"] = partial(units_case, "conv of nine taps"), replace(BOTH, param_ratio=0.5)
TWINS["both, units"] = few_directions, replace(BOTH, param_ratio=0.1)
TWINS["both, units without biases"] = (
    lambda: few_directions(NO_BIAS),
    replace(BOTH, param_ratio=0.12),
)
TWINS["both, heads without biases"] = (
    partial(heads_case, test_hidden.STYLES["no bias"].body),
    replace(BOTH, param_ratio=0.3),
)

ONE_OF_TWO = CompressConfig(param_ratio=0.95, moves=("low-rank",), include=("h", "y"), force=True)
TWINS["gemm with a factor"] = scaled, CompressConfig(param_ratio=0.7)
TWINS["weight that another reads"] = read_twice, ONE_OF_TWO


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("name", TWINS)
def test_twin_gives_what_the_rewritten_model_gives(name: str, fitted: bool, monkeypatch):
    """Whether a refit is better is judged on models that are never written."""
    seen, refits = [], []

    def spy(graph, layers, plain, refitted, losses, feeds) -> bool:
        is_better(graph, layers, plain, refitted, losses, feeds)
        seen.append((graph, layers, plain))
        return fitted

    def refit(*given) -> dict[str, Refitted]:
        refits.append(propagate(*given))
        return refits[-1]

    monkeypatch.setattr("onnx_utilrank.compression.is_better", spy)
    monkeypatch.setattr("onnx_utilrank.compression.propagate", refit)
    make, config = TWINS[name]
    proto, data = make()
    result = compress(proto, data, config)
    assert result.plan.refit == fitted
    if name.startswith("both"):
        assert any(e.site in result.plan.shrinking for e in result.plan.factored)
    ((graph, layers, plain),) = seen
    # Once it has proved itself it is made again, of the samples that judged it too.
    assert len(refits) == 1 + fitted
    twin = Twin(graph, layers, refits[-1] if fitted else plain)
    feed = {"x": data["x"][:7]}
    made, expected = twin.run(feed, ["y"])["y"], run(result.model, feed)["y"]
    before = run(proto, feed)["y"]
    # A sum over taps and features, another over units; scores of heads pass an exponential.
    atol = 16 * EPS * math.sqrt(9 * (D + WIDE)) * (1 + float(np.abs(before).max()))
    np.testing.assert_allclose(made, expected, rtol=0, atol=atol)
    assert np.abs(expected - before).max() > 100 * atol


def test_matrices_of_replaced_layers_do_not_wait_in_memory(monkeypatch):
    """In float64 those of all layers are twice a model that may be larger than memory."""
    seen = []

    def spy(graph, layers, plain, refitted, losses, feeds) -> bool:
        del refitted, losses, feeds
        seen.append((graph, layers, plain))
        return False

    monkeypatch.setattr("onnx_utilrank.compression.is_better", spy)
    make, config = TWINS["relu by low-rank"]
    proto, data = make()
    compress(proto, data, config)
    ((graph, layers, plain),) = seen
    formed = []
    whole_of = Refitted.whole
    monkeypatch.setattr(
        Refitted, "whole", lambda new, layer: formed.append(layer) or whole_of(new, layer)
    )
    twin = Twin(graph, layers, plain)
    assert not formed
    for _ in range(2):
        twin.run({"x": data["x"][:7]}, ["y"])
    assert len(formed) == len(layers)


# --- the refit's gate ---------------------------------------------------------------------------


def test_refit_has_to_be_better_on_samples_apart():
    """With few samples some refits are not: then the model is the one without."""
    body, made = "t0 = Identity(x)", {}
    for k in range(3):
        body += f" h{k} = MatMul(t{k}, w{k}) s{k} = Add(h{k}, b{k}) t{k + 1} = Tanh(s{k})"
        made[f"w{k}"] = (noise(k, 16, 16) / 4).astype(np.float32)
        made[f"b{k}"] = (0.3 * noise(k + 10, 16)).astype(np.float32)
    proto = model("(float[n,16] x) => (float[n,16] y)", body + " y = Neg(t3)", **made)
    data = {"x": noise(80, 300, 16).astype(np.float32)}
    config = CompressConfig(param_ratio=0.6, moves=("low-rank",), force=True)
    words = "No layer was refitted"
    taken = set()
    for seed, count in itertools.product(range(3), (20, 300)):
        some_of = replace(config, seed=seed, samples=count)
        result = compress(proto, data, some_of)
        taken.add(result.plan.refit)
        assert result.plan.refit != any(words in note for note in result.notes)
        if not result.plan.refit:
            plain = compress(proto, data, replace(some_of, refit=False))
            assert result.model.SerializeToString() == plain.model.SerializeToString()
            assert not any(words in note for note in plain.notes)
    assert taken == {False, True}


def test_refit_of_noise_is_not_better_and_the_right_one_is(monkeypatch):
    judged_on = []

    def spy(graph, layers, plain, refitted, losses, feeds) -> bool:
        judged_on.append((graph, layers, plain, losses, feeds))
        return is_better(graph, layers, plain, refitted, losses, feeds)

    monkeypatch.setattr("onnx_utilrank.compression.is_better", spy)
    proto, data = whole("relu")
    compress(proto, data, CompressConfig(param_ratio=0.6, moves=("low-rank",)))
    ((graph, layers, plain, losses, feeds),) = judged_on
    assert not is_better(graph, layers, plain, plain, losses, feeds)
    by_key = {layer.measured.site.key: layer for layer in layers}
    exact = {
        k: replace(r, weight=by_key[k].weight, turn=None, lost_mean=None) for k, r in plain.items()
    }
    assert is_better(graph, layers, plain, exact, losses, feeds)
    assert not is_better(graph, layers, exact, plain, losses, feeds)
    worse = {k: replace(r, lost_mean=noise(90, len(by_key[k].weight))) for k, r in plain.items()}
    assert not is_better(graph, layers, plain, worse, losses, feeds)
