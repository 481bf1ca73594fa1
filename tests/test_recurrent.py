"""Recurrent layers: their input weight is a product before them, and part of them again."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import pytest
import torch
from builders import Feed, constants, index, model, noise, ops, run

from onnx_utilrank import (
    CompressConfig,
    FinetuneConfig,
    RankPlan,
    TargetMissedError,
    ValidateConfig,
    compress,
    finetune,
    inspect,
    validate,
)
from onnx_utilrank.calibration.survey import linear_flops, survey
from onnx_utilrank.model.plain import plain_model
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.sensitivity.rows import as_rows
from onnx_utilrank.sites.find import find_sites, site_matrix
from onnx_utilrank.sites.left import STEPS, WHOLE
from onnx_utilrank.sites.order import with_order
from onnx_utilrank.sites.site import RowView
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.statistics.factorize import Factors
from onnx_utilrank.surgery.rewrite import Replacement, check_contract, rewrite
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.training.objective import output_divergence
from onnx_utilrank.training.weights import trainable_names

D, H, T = 9, 4, 5  # inputs, units, steps
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, kw_only=True)
class Style:
    """One way to write a recurrent layer.

    Attributes:
        op: Its operator.
        directions: How many it has.
        attributes: As they are written.
        inputs: Behind the recurrent weight: B, lengths of samples, initial states, peepholes.
        outputs: Y and the last states, as far as they are asked for.
        batch_first: Whether samples come first.
        before: What puts W and R together.
    """

    op: str = "LSTM"
    directions: int = 1
    attributes: str = ""
    inputs: str = ", B"
    outputs: str = "y"
    batch_first: bool = False
    before: str = ""
    opset: int = 17
    held: dict[str, np.ndarray] = field(default_factory=dict)

    def proto(self) -> onnx.ModelProto:
        width = GATES[self.op] * H
        made = {"W": noise(1, self.directions, width, D) / math.sqrt(D)}
        made |= {"R": noise(2, self.directions, width, H) / math.sqrt(H)}
        made |= {"B": noise(3, self.directions, 2 * width)}
        made |= {"I": 0.3 * noise(4, self.directions, 2, H), "C": 0.3 * noise(5, 1, 2, H)}
        made |= {"P": noise(6, self.directions, 3 * H)}
        made |= {"U": noise(1, 1, width, D) / math.sqrt(D)}
        text = f"{self.before} {self.inputs}, R, W"
        words = set(text.translate(str.maketrans(",()", "   ")).split())
        cast = {k: v.astype(np.float32) for k, v in made.items() if k in words}
        cast |= self.held | ({"L": np.array([T, 3], np.int32)} if "L" in words else {})
        if self.before:
            del cast["W"]
        first = f"{self.op}<hidden_size={H}{self.attributes}>"
        names = {"y": "a,b,c,d" if "layout" not in self.attributes else "a,c,b,d"}
        names |= {"h": "b,k,d", "c": "b,k,d"}
        made_of = ", ".join(
            f"float[{names[n]}] {n}" for n in self.outputs.replace(",", " ").split() if n in names
        )
        shape = f"2,{T},{D}" if self.batch_first else f"{T},2,{D}"
        return model(
            f"(float[{shape}] x) => ({made_of})",
            f"{self.before} {self.outputs} = {first}(x, W, R{self.inputs})",
            opset=self.opset,
            **cast,
        )

    def feed(self, seed: int = 0) -> Feed:
        shape = (2, T, D) if self.batch_first else (T, 2, D)
        return {"x": noise(20 + seed, *shape).astype(np.float32)}


TWO = ', direction="bidirectional"'
CUTS = {f"p{k}": np.array([k * H]) for k in range(5)} | {"zero": np.array([0])}
STYLES = {
    "lstm": Style(),
    "without biases": Style(inputs=""),
    "in reverse": Style(attributes=', direction="reverse"'),
    "both directions": Style(attributes=TWO, directions=2),
    "both directions of a gru": Style(op="GRU", attributes=TWO, directions=2),
    "gru": Style(op="GRU"),
    "gru, reset behind the product": Style(op="GRU", attributes=", linear_before_reset=1"),
    "rnn": Style(op="RNN", inputs=", B"),
    "lengths": Style(inputs=", B, L"),
    "states": Style(attributes=TWO, directions=2, inputs=", B, , I"),
    "states of both kinds and peepholes": Style(inputs=", , , I, C, P"),
    "all outputs": Style(outputs="y, h, c"),
    "the last state alone": Style(outputs="n, h"),
    "opset 9": Style(opset=9),
    "gates put in order, split": Style(
        before="k0, k1, k2, k3 = Split<axis=1>(U) W = Concat<axis=1>(k2, k0, k1, k3)",
    ),
    "gates put in order": Style(
        before="k0 = Slice(U, p0, p1, one) k1 = Slice(U, p1, p2, one) k2 = Slice(U, p2, p4, one) "
        "W = Concat<axis=1>(k1, k0, k2)",
        held={**{k: v for k, v in CUTS.items() if k in ("p0", "p1", "p2", "p4")}},
    ),
}
STYLES["gates put in order"].held["one"] = np.array([1])


def close(made: Feed, expected: Feed) -> None:
    """Sums of D and H products, T times after each other through functions of slope 1 at most."""
    assert made.keys() == expected.keys()
    for name, values in expected.items():
        atol = 16 * EPS * T * math.sqrt(D + H) * (1 + float(np.abs(values).max()))
        np.testing.assert_allclose(made[name], values, rtol=0, atol=atol)


def factored(proto: onnx.ModelProto, rank: int, lost: np.ndarray | None = None):
    """The model with the first `rank` singular directions of W, and what W then is."""
    graph = index(proto)
    ((site,), _) = find_sites(graph)
    u, s, vt = np.linalg.svd(site_matrix(graph, site), full_matrices=False)
    factors = Factors(left=u[:, :rank] * s[:rank], right=vt[:rank])
    made = rewrite(graph, [Replacement(site=site, factors=factors, lost_mean=lost)])
    return graph, made, factors.product


@pytest.mark.parametrize("name", STYLES)
def test_the_plain_form_is_the_same(name: str):
    style = STYLES[name]
    proto = style.proto()
    onnx.checker.check_model(proto, full_check=True)
    plain = index(proto).store
    assert ops(plain_model(plain).proto).count("MatMul") == 1  # it is taken apart once
    assert {"MatMul", "Add", style.op} <= set(ops(plain.proto))
    close(run(plain, style.feed()), run(proto, style.feed()))
    names = [o.name for o in proto.graph.output]
    graph = TorchGraph.build(plain, dtype=torch.float64)
    made = {k: v.numpy() for k, v in graph.run(style.feed(), names).items()}
    close(made, run(proto, style.feed()))


@pytest.mark.parametrize("name", STYLES)
def test_a_layer_that_is_left_alone_is_the_one_that_it_was(name: str):
    proto = STYLES[name].proto()
    made = rewrite(index(proto), []).proto
    assert made.SerializeToString() == proto.SerializeToString()


@pytest.mark.parametrize("name", STYLES)
def test_full_rank_is_exact(name: str):
    style = STYLES[name]
    proto = style.proto()
    graph, made, _ = factored(proto, min(D, GATES[style.op] * H * style.directions))
    check_contract(graph.source, made)
    assert ops(made.proto).count("MatMul") == 1
    close(run(made, style.feed()), run(proto, style.feed()))


def test_a_layer_may_give_its_last_state_alone():
    style = STYLES["the last state alone"]
    proto = style.proto()
    proto.graph.node[-1].output[0] = ""
    onnx.checker.check_model(proto, full_check=True)
    graph, made, _ = factored(proto, D)
    close(run(graph.store, style.feed()), run(proto, style.feed()))
    close(run(made, style.feed()), run(proto, style.feed()))
    assert list(made.proto.graph.node[-1].output) == ["", "h"]


@pytest.mark.parametrize("name", STYLES)
def test_factors_are_a_product_before_the_layer_and_its_input_weight(name: str):
    style = STYLES[name]
    proto, rank = style.proto(), 3
    width = GATES[style.op] * H
    lost = noise(30, width * style.directions)
    graph, made, product = factored(proto, rank, lost)
    check_contract(graph.source, made)
    onnx.checker.check_model(made.proto, full_check=True)
    # What it comes to, written into the layer as it was.
    expected = replace(style, before="", held={}).proto()
    if ", B" not in style.inputs:
        inputs = style.inputs.replace(",", ", B", 1) if style.inputs else ", B"
        expected = replace(style, before="", held={}, inputs=inputs).proto()
    held = {t.name: t for t in expected.graph.initializer}
    biases = onnx.numpy_helper.to_array(held["B"]).copy()
    if ", B" not in style.inputs:
        biases[:] = 0
    biases[:, :width] += lost.reshape(style.directions, width)
    for key, values in (("W", product.reshape(style.directions, width, D)), ("B", biases)):
        held[key].CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), key))
    for seed in range(2):
        close(run(made, style.feed(seed)), run(expected, style.feed(seed)))
    (layer,) = (n for n in made.proto.graph.node if n.op_type == style.op)
    shapes = {t.name: tuple(t.dims) for t in made.proto.graph.initializer}
    assert shapes[layer.input[1]] == (style.directions, width, rank)
    assert layer.name == proto.graph.node[-1].name
    without = count_parameters(graph.source) - D * width * style.directions
    grown = 0 if "B" in constants(proto) else 2 * width * style.directions
    cuts = sum(v.size for v in style.held.values())  # which put W together, and go with it
    kept = rank * (D + width * style.directions)
    assert count_parameters(made) == without + grown + kept - cuts


LEFT = {
    "another node reads its weight": "y, h = LSTM<hidden_size=4>(x, W, R) z = Neg(W)",
    "its weight is computed": "V = Tanh(W) y, h = LSTM<hidden_size=4>(x, V, R) z = Neg(y)",
    "its weight is an output": "z = Identity(W) y, h = LSTM<hidden_size=4>(x, z, R)",
    "two share it": "y, h = LSTM<hidden_size=4>(x, W, R) z, k = LSTM<hidden_size=4>(x, W, R)",
    "its bias is computed": "V = Tanh(B) z = Neg(x) y, h = LSTM<hidden_size=4>(x, W, R, V)",
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_taken_apart_is_left_with_the_reason(name: str):
    held = constants(Style().proto())
    arrays = {key: held[key] for key in ("W", "R", "B") if f"{key})" in LEFT[name] or key != "B"}
    outputs = "(float[a,b,c,d] y, float z)"
    proto = model(f"(float[{T},2,{D}] x) => {outputs}", LEFT[name], **arrays)
    sites, skips = find_sites(index(proto))
    assert not sites
    assert {skip.reason for skip in skips} == {WHOLE}


def test_a_weight_that_is_the_recurrent_one_too_stays():
    body = "y, h = LSTM<hidden_size=4>(x, R, R)"
    held = constants(Style().proto())["R"]
    proto = model(f"(float[{T},2,{H}] x) => (float[a,b,c,d] y)", body, R=held)
    sites, (skip,) = find_sites(index(proto))
    assert not sites
    assert skip.reason == WHOLE


@pytest.mark.parametrize("perm", [[1, 0, 2], [0, 1, 2]])
def test_no_product_is_made_of_a_layer_that_onnx_runtime_would_die_of(perm: list[int]):
    held = {k: v.astype(np.float16) for k, v in constants(Style().proto()).items()}
    body = f"t = Transpose<perm={perm}>(x) y, h = LSTM<hidden_size=4>(t, W, R, B)"
    proto = model(f"(float16[{T},{T},{D}] x) => (float16[a,b,c,d] y)", body, **held)
    sites, skips = find_sites(index(proto))
    if perm[0]:
        assert not sites
        assert [skip.reason for skip in skips] == [WHOLE]
    else:
        assert len(sites) == 1
        assert [skip.reason for skip in skips] == [STEPS]


def test_very_large_layers_stay(monkeypatch):
    monkeypatch.setattr("onnx_utilrank.model.plain_recurrent.LARGEST", (4 * H) ** 2)
    assert len(find_sites(index(Style().proto()))[0]) == 1
    sites, (skip,) = find_sites(index(STYLES["both directions"].proto()))
    assert not sites
    assert skip.reason == WHOLE


def test_both_products_of_a_layer_are_operations():
    """Whether or not the layer can be taken apart."""
    held = {key: value for key, value in constants(Style().proto()).items() if key != "B"}
    for before in ("V = Identity(W)", "V = Tanh(W)"):
        body = f"{before} y, h = LSTM<hidden_size=4>(x, V, R)"
        proto = model(f"(float[{T},2,{D}] x) => (float[a,b,c,d] y)", body, **held)
        flops = linear_flops(ModelStore.load(proto), Style().feed(), CPU)
        assert flops == 2 * (T * 2) * 4 * H * (D + H)


def broken(body: str, opset: int = 17) -> onnx.ModelProto:
    held = constants(STYLES["gates put in order"].proto())
    held["ten"] = np.array([10])
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {key: value for key, value in held.items() if key in words}
    return model(f"(float[{T},2,{D}] x) => (float[a,b,c,d] y)", body, opset=opset, **used)


@pytest.mark.parametrize(
    "body",
    [
        "W = Concat<axis=1>(U, R) y, h = LSTM<hidden_size=4>(x, W, R)",
        "W = Slice(U, p0, p1, ten) y, h = LSTM<hidden_size=4>(x, W, R)",
        "W = Slice(U) y, h = LSTM<hidden_size=4>(x, W, R)",
    ],
)
def test_weights_that_cannot_be_put_together_are_none(body: str):
    sites, skips = find_sites(index(broken(body)))
    assert not sites
    assert {skip.reason for skip in skips} == {WHOLE}


def test_layers_are_excluded_by_any_of_their_names():
    style = STYLES["gates put in order"]
    proto = style.proto()
    proto.graph.node[-1].name = "tagger/lstm"
    for pattern in ("tagger/*", "W", "U", "y"):
        sites, skips = find_sites(index(proto), exclude=(pattern,))
        assert not sites
        assert "excluded by a pattern" in {skip.reason for skip in skips}
    (site,), _ = find_sites(index(proto), include=("tagger/lstm",))
    assert site.uses[0].label == "LSTM 'tagger/lstm'"


def test_what_is_in_the_place_of_a_large_weight_is_small():
    wide = {"W": noise(1, 2, 4 * 64, 3), "R": noise(2, 2, 4 * 64, 64)}
    made = {key: value.astype(np.float32) for key, value in wide.items()}
    body = 'y, h = LSTM<hidden_size=64, direction="bidirectional">(x, W, R)'
    proto = model("(float[5,2,3] x) => (float[a,b,c,d] y)", body, **made)
    assert index(proto).store.proto.ByteSize() < 1.2 * proto.ByteSize()
    feed = {"x": noise(3, 5, 2, 3).astype(np.float32)}
    close(run(index(proto).store, feed), run(proto, feed))


def test_what_stays_of_a_layer_has_its_reason():
    report = inspect(Style().proto())
    ((site,), (skip,)) = report.sites, report.skipped
    assert (site.m, site.d) == (4 * H, D)
    assert skip.reason == STEPS
    assert "pivot" not in site.moves


# --- end to end ---------------------------------------------------------------------------------

WIDTH, HIDDEN, STEPS_LONG = 24, 16, 12


def tagger(op: str = "LSTM") -> tuple[onnx.ModelProto, Feed]:
    """Units, a layer of both directions that reads them, and a head; samples first outside."""
    width = GATES[op] * HIDDEN
    falling = 0.7 ** np.arange(WIDTH)
    made = {"E": noise(1, WIDTH, WIDTH) / 4, "e": 0.3 * noise(2, WIDTH)}
    made |= {"W": noise(3, 2, width, WIDTH) * falling @ noise(4, WIDTH, WIDTH) / 4}
    made |= {"R": noise(5, 2, width, HIDDEN) / 6, "B": 0.3 * noise(6, 2, 2 * width)}
    made |= {"O": noise(7, 2 * HIDDEN, 10) / 6, "o": noise(8, 10)}
    cast = {key: values.astype(np.float32) for key, values in made.items()}
    proto = model(
        f"(float[n,{STEPS_LONG},{WIDTH}] x) => (float[n,{STEPS_LONG},10] y)",
        "m = MatMul(x, E) g = Add(m, e) r = Relu(g) t = Transpose<perm=[1,0,2]>(r) "
        f'q, h = {op}<hidden_size={HIDDEN}, direction="bidirectional">(t, W, R, B) '
        "u = Transpose<perm=[2,0,1,3]>(q) v = Reshape(u, both) z = MatMul(v, O) y = Add(z, o)",
        both=np.array([0, 0, 2 * HIDDEN]),
        **cast,
    )
    return proto, {"x": (0.2 + noise(9, 160, STEPS_LONG, WIDTH)).astype(np.float32)}


@pytest.mark.parametrize("op", GATES)
def test_a_model_with_a_layer_is_compressed(op: str, tmp_path):
    proto, data = tagger(op)
    result = compress(proto, data, CompressConfig(param_ratio=0.75))
    plan = result.plan
    (entry,) = (e for e in plan.entries if e.site.startswith("W"))
    assert entry.rank is not None or entry.site in plan.shrinking
    assert plan.parameters_after == sum(v.size for v in constants(result.model).values())
    assert plan.param_ratio <= 0.75
    predicted = plan.predicted_divergence / result.quality.divergence.mean
    assert 0.3 < predicted < 3
    assert result.quality.divergence.mean < 0.02
    # No constant is larger than those that the layer came with.
    assert max(v.size for v in constants(result.model).values()) < 2 * GATES[op] * HIDDEN * WIDTH
    plan.save(tmp_path / "plan.json")
    again = compress(proto, data, CompressConfig(), plan=RankPlan.load(tmp_path / "plan.json"))
    assert again.model.SerializeToString() == result.model.SerializeToString()


@pytest.mark.parametrize("method", ["one-sided", "svd", "utilized-rank"])
def test_other_methods_factor_it_too(method: str):
    proto, data = tagger()
    result = compress(proto, data, CompressConfig(param_ratio=0.8, method=method))
    (entry,) = (e for e in result.plan.factored if e.site.startswith("W"))
    (layer,) = (n for n in result.model.graph.node if n.op_type == "LSTM")
    assert constants(result.model)[layer.input[1]].shape == (2, 4 * HIDDEN, entry.rank)


def test_operations_count_the_product_in_the_layer():
    proto, data = tagger()
    result = compress(proto, data, CompressConfig(flop_ratio=0.8))
    before, after = result.validation.reference, result.validation.candidate
    products = WIDTH * WIDTH + 8 * HIDDEN * (WIDTH + HIDDEN) + 2 * HIDDEN * 10
    assert before.flops == 2 * STEPS_LONG * products
    assert 0.7 * before.flops < after.flops <= 0.8 * before.flops


def test_units_that_a_layer_reads_shrink():
    proto, data = tagger()
    config = CompressConfig(param_ratio=0.8, moves=("shrink",))
    result = compress(proto, data, config)
    (entry,) = result.plan.shrunk
    assert set(entry.sites) == {"E", "W/turned"}
    (layer,) = (n for n in result.model.graph.node if n.op_type == "LSTM")
    assert constants(result.model)[layer.input[1]].shape == (2, 4 * HIDDEN, entry.kept)
    assert ops(result.model) == ops(proto)
    assert 0.3 < result.plan.predicted_divergence / result.quality.divergence.mean < 3


def test_no_more_is_saved_than_there_is():
    proto = Style().proto()
    with pytest.raises(TargetMissedError, match="cannot be reached"):
        compress(proto, [Style().feed(k) for k in range(40)], CompressConfig(param_ratio=0.1))


def test_what_became_of_a_layer_is_trained():
    proto, data = tagger()
    made = compress(proto, data, CompressConfig(param_ratio=0.5, refit=False))
    (layer,) = (n for n in made.model.graph.node if n.op_type == "LSTM")
    config = FinetuneConfig(steps=8)
    result = finetune(proto, made.model, data, config)
    before, after = constants(made.model), constants(result.model)
    assert (before[layer.input[1]] != after[layer.input[1]]).any()
    np.testing.assert_array_equal(before[layer.input[2]], after[layer.input[2]])


@pytest.mark.parametrize("name", ["lstm", "both directions", "both directions of a gru"])
def test_biases_of_layers_are_biases(name: str):
    store = ModelStore.load(STYLES[name].proto())
    graph = TorchGraph.build(store)
    assert trainable_names(graph, "biases") == ["B"]
    assert trainable_names(graph) == ["W", "R", "B"]


# --- positions first ----------------------------------------------------------------------------


def test_rows_are_grouped_by_the_sample_they_are_of():
    values = torch.arange(2 * 3 * 4).reshape(3, 2, 4)  # 3 positions of 2 samples
    view = RowView(tensor="x", axis=-1, width=4)
    turned = replace(view, positions_first=True)
    np.testing.assert_array_equal(as_rows(values, turned, 2), values.transpose(0, 1))
    np.testing.assert_array_equal(as_rows(values, view, 3), values)
    assert as_rows(values, view, 5).shape == (1, 6, 4)  # nothing tells
    windows = torch.zeros(6, 5, 4)  # 3 windows of each sample
    assert as_rows(windows, view, 2).shape == (2, 15, 4)


ORDERS = {
    "samples first": ("m = MatMul(x, W) y = Identity(m)", (1, 5, 6), False),
    "positions first": (
        "t = Transpose<perm=[1,0,2]>(x) m = MatMul(t, W) y = Identity(m)",
        (1, 5, 6),
        True,
    ),
    "windows": ("t = Reshape(x, windows) m = MatMul(t, W) y = Identity(m)", (1, 12, 6), False),
    "one position": ("t = Reshape(x, flat) m = MatMul(t, W) y = Identity(m)", (1, 5, 6), False),
    "another rank behind": (
        "t = Transpose<perm=[1,0,2]>(x) m = MatMul(t, V) y = Identity(m)",
        (1, 5, 6),
        False,
    ),
    "a column each": (
        "t = Transpose<perm=[1,2,0]>(x) m = MatMul(L, t) y = Identity(m)",
        (1, 5, 6),
        True,
    ),
    "planes": ("t = Unsqueeze(x, last) m = Conv(t, C) y = Identity(m)", (1, 5, 1), False),
}


@pytest.mark.parametrize("name", ORDERS)
def test_one_sample_tells_where_samples_are_counted(name: str):
    body, shape, first = ORDERS[name]
    held = {"W": noise(1, 6, 3), "V": noise(1, 1, 1, 6, 3), "L": noise(2, 3, 6)}
    held |= {"C": noise(3, 2, 5, 1, 1)}
    cast = {k: v.astype(np.float32) for k, v in held.items()}
    cast |= {"windows": np.array([-1, 4, 6]), "flat": np.array([-1, 6]), "last": np.array([3])}
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {key: value for key, value in cast.items() if key in words}
    rank = {"planes": "a,b,c,d", "another rank behind": "a,b,c,d", "one position": "a,b"}
    graph = index(
        model(f"(float[n,p,{shape[2]}] x) => (float[{rank.get(name, 'a,b,c')}] y)", body, **used)
    )
    feed = {"x": noise(4, *shape).astype(np.float32)}
    sites, _ = find_sites(graph)
    names = ["x", *graph.producers]
    ((site,), values) = (sites, survey(graph.store, names, feed, CPU))
    (found,) = with_order([site], values, 1)
    assert [v.positions_first for v in (found.uses[0].inputs, found.uses[0].result)] == [first] * 2


def test_layers_are_measured_alike_whatever_comes_first():
    """Also where there are as many positions as samples in a run, 16."""
    weights = {"A": noise(1, 8, 24) / 3, "V": noise(2, 24, 6) / 5}
    cast = {key: values.astype(np.float32) for key, values in weights.items()}
    signature = "(float[n,16,8] x) => (float[n,6] y)"
    end = "a = ReduceMean<axes=[1], keepdims=0>(z) y = Softmax(a)"
    data = {"x": noise(3, 96, 16, 8).astype(np.float32)}
    bodies = {
        "samples": f"m = MatMul(x, A) r = Tanh(m) z = MatMul(r, V) {end}",
        "positions": "t = Transpose<perm=[1,0,2]>(x) m = MatMul(t, A) r = Tanh(m) "
        f"w = MatMul(r, V) z = Transpose<perm=[1,0,2]>(w) {end}",
    }
    config = CompressConfig(param_ratio=0.6, augment=False)
    plans = [
        compress(model(signature, body, **cast), data, config, dry_run=True).plan
        for body in bodies.values()
    ]
    one, other = ([(e.rank, e.predicted_error) for e in plan.entries] for plan in plans)
    assert [rank for rank, _ in one] == [rank for rank, _ in other]
    np.testing.assert_allclose([e for _, e in one], [e for _, e in other], rtol=1e-3)


ENDS = {
    "values": ("y = Identity(z)", "values"),
    "classes": ("y = Softmax<axis=-1>(z)", "softmax"),
}


@pytest.mark.parametrize("end", ENDS)
def test_outputs_are_compared_alike_whatever_comes_first(end: str):
    """What counts, what is predicted and what is measured, where samples are counted behind."""
    weights = {"A": noise(1, 8, 24) / 3, "V": noise(2, 24, 6) / 2}
    cast = {key: values.astype(np.float32) for key, values in weights.items()}
    layers = "m = MatMul(x, A) r = Tanh(m) w = MatMul(r, V)"
    data = {"x": noise(3, 96, 16, 8).astype(np.float32)}
    last, weighting = ENDS[end]
    found = []
    for before in ("z = Identity(w)", "z = Transpose<perm=[1,0,2]>(w)"):
        signature = "(float[n,16,8] x) => (float[a,b,6] y)"
        proto = model(signature, f"{layers} {before} {last}", **cast)
        config = CompressConfig(param_ratio=0.6, augment=False, refit=False, weighting=weighting)
        found.append(compress(proto, data, config))
    one, other = found
    assert [e.rank for e in one.plan.entries] == [e.rank for e in other.plan.entries]
    for figure in ("mean", "standard_error"):
        ours, theirs = (getattr(each.quality.divergence, figure) for each in found)
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert one.plan.predicted_divergence == pytest.approx(other.plan.predicted_divergence, rel=0.3)
    assert 0.3 < other.plan.predicted_divergence / other.quality.divergence.mean < 3


def test_labels_are_of_samples_and_positions_whatever_comes_first():
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(8, 6)).astype(np.float32)
    proto = model(
        "(float[n,16,8] x) => (float[p,n,6] y)",
        "m = MatMul(x, A) y = Transpose<perm=[1,0,2]>(m)",
        A=weight,
    )
    x = rng.normal(size=(64, 16, 8)).astype(np.float32)
    labels = (x @ weight).argmax(-1)
    labels[:, :4] = (labels[:, :4] + 1) % 6
    config = ValidateConfig(labels="label")
    (result,) = validate(proto, proto, {"x": x, "label": labels}, config).providers
    assert result.accuracy is not None
    assert result.accuracy.count == labels.size
    assert result.accuracy.reference == pytest.approx(75)


def test_training_compares_alike_whatever_comes_first():
    """Also where positions of padding, told by sample, do not count."""
    y, z = (torch.from_numpy(noise(k, 3, 5, 4)) for k in (1, 2))
    kept = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=bool)
    for weighting in ("softmax", "logits", "values"):
        loss = OutputLoss(output="y", weighting=weighting)
        expected = output_divergence(loss, y, z, 3, kept)
        turned = replace(loss, positions_first=True)
        made = output_divergence(turned, y.transpose(0, 1), z.transpose(0, 1), 3, kept)
        assert float(made) == pytest.approx(float(expected), rel=1e-12)


def test_tokens_are_counted_alike_whatever_comes_first():
    """Of the first positions alone, which are all that the output depends on."""
    held = {"S": noise(1, 40, 8).astype(np.float32), "V": noise(2, 8, 5).astype(np.float32)}
    held |= {"zero": np.array([0]), "three": np.array([3]), "one": np.array([1])}
    ids = np.random.default_rng(3).integers(0, 40, (96, 7))
    ids[:, 3:] = 39  # which never counts
    rest = "s = Slice(e, zero, three, one) m = MatMul(s, V) y = ReduceMean<axes=[1], keepdims=0>(m)"
    found = []
    for before in (
        "e = Gather(S, ids)",
        "t = Transpose<perm=[1,0]>(ids) g = Gather(S, t) e = Transpose<perm=[1,0,2]>(g)",
    ):
        proto = model("(int64[n,7] ids) => (float[n,5] y)", f"{before} {rest}", **held)
        config = CompressConfig(param_ratio=0.6, augment=False)
        plan = compress(proto, {"ids": ids}, config, dry_run=True).plan
        found.append([(e.site, e.rank, e.rows, e.predicted_error) for e in plan.entries])
    for one, other in zip(*found, strict=True):
        assert one[:3] == other[:3]
        assert one[3] == pytest.approx(other[3], rel=1e-4)
