"""Repair of quantized models, through ONNX Runtime, on the forms that its quantizers write."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import activations, model, noise, ops, run
from quantizers import nbits, quantized

from onnx_utilrank import (
    CompressConfig,
    ConfigError,
    ModelError,
    QualityTarget,
    RepairConfig,
    RepairResult,
    TargetMissedError,
    compress,
    repair,
)
from onnx_utilrank.calibration.collect import silent
from onnx_utilrank.calibration.split import hold_back
from onnx_utilrank.cli.main import main
from onnx_utilrank.job import Job
from onnx_utilrank.model.plain import index_model
from onnx_utilrank.model.quantized import index_quantized
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.repairing.match import match_layers
from onnx_utilrank.repairing.readers import read_layers
from onnx_utilrank.repairing.repairs import repaired
from onnx_utilrank.sites.find import find_sites

ROOT = Path(__file__).resolve().parent.parent
ZOO = Path(os.environ.get("ONNX_UTILRANK_ZOO") or ROOT.parent / "shared" / "zoo")

SAMPLES = 80
WIDTH = 48


def rough(seed: int, m: int, d: int) -> np.ndarray:
    """A weight [d, m] with outliers, that few bits do badly."""
    weight = noise(seed, d, m) / math.sqrt(d)
    weight[:, ::7] *= 4
    return weight.astype(np.float32)


def perceptron() -> onnx.ModelProto:
    """Two products with a bias, and a Gemm that makes the scores of classes."""
    body = """
        h = MatMul(x, A)
        i = Add(h, a)
        j = Tanh(i)
        k = MatMul(j, B)
        l = Tanh(k)
        y = Gemm(l, C, c)
    """
    return model(
        f"(float[n,{WIDTH}] x) => (float[n,10] y)",
        body,
        A=rough(1, 64, WIDTH),
        a=noise(2, 64).astype(np.float32),
        B=rough(3, 40, 64),
        C=2 * rough(4, 10, 40),
        c=noise(5, 10).astype(np.float32),
    )


def correlated(seed: int, n: int, width: int) -> np.ndarray:
    """Rows that lie near a subspace, as those of layers do, with a mean."""
    basis = noise(99, 6, width)
    values = activations(seed, n, 6) @ basis / 2 + noise(seed + 1, n, width) / 10
    return np.asarray(values, dtype=np.float32)


ROWS = {"x": correlated(7, SAMPLES, WIDTH)}


def pictures() -> onnx.ModelProto:
    """Convs of several taps, strides and a ReLU, which quantizers leave to the rounding."""
    body = """
        a = Conv<pads=[1, 1, 1, 1]>(x, K, k)
        b = Relu(a)
        c = Conv<strides=[2, 2], pads=[1, 1, 1, 1]>(b, L, l)
        d = Relu(c)
        e = Conv(d, M)
        f = GlobalAveragePool(e)
        y = Flatten(f)
    """
    return model(
        "(float[n,3,8,8] x) => (float[n,6] y)",
        body,
        K=(noise(1, 16, 3, 3, 3) / 3).astype(np.float32),
        k=noise(2, 16).astype(np.float32),
        L=(noise(3, 12, 16, 3, 3) / 8).astype(np.float32),
        l=noise(4, 12).astype(np.float32),
        M=noise(5, 6, 12, 1, 1).astype(np.float32),
    )


IMAGES = {"x": activations(8, SAMPLES, 3, 8, 8).astype(np.float32)}


def checked(
    reference: onnx.ModelProto, small: onnx.ModelProto, data: dict, result: RepairResult
) -> onnx.ModelProto:
    """What holds for every repair; the model that came out."""
    made = result.model
    before = {t.name: t.SerializeToString() for t in small.graph.initializer}
    after = {t.name: t.SerializeToString() for t in made.graph.initializer}
    shared = before.keys() & after.keys()
    assert all(before[name] == after[name] for name in shared)
    assert [i.SerializeToString() for i in made.graph.input] == [
        i.SerializeToString() for i in small.graph.input
    ]
    assert made.opset_import == small.opset_import
    expected, now, then = (run(m, data)["y"] for m in (reference, made, small))
    if result.kept:
        assert result.after.divergence.mean < result.before.divergence.mean
        assert np.linalg.norm(now - expected) < np.linalg.norm(then - expected)
    return made


# Operators whose node may not be in the result that has a branch: they are written out.
FORMS = {
    "static": ("QDQ", {}),
    "static, per channel": ("QDQ", {"per_channel": True}),
    "operators": ("QOperator", {}),
    "operators, per channel": ("QOperator", {"per_channel": True}),
    "dynamic": ("dynamic", {}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("source", "data", "weights"), [(perceptron, ROWS, 3), (pictures, IMAGES, 3)]
)
def test_forms_of_eight_bits_are_read_and_repaired(form, source, data, weights, tmp_path: Path):
    kind, options = FORMS[form]
    reference = source()
    small = quantized(reference, kind, tmp_path, data, **options)
    result = repair(reference, small, data, RepairConfig(rank=4, seed=1))
    assert len(result.layers) == weights
    assert not result.skipped
    assert all(0 < layer.distance < 0.05 for layer in result.layers)
    checked(reference, small, data, result)


@pytest.mark.parametrize("qdq", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_of_four_bits_are_repaired(qdq: bool, symmetric: bool):
    reference = perceptron()
    if qdq:
        reference.opset_import[0].version = 21
    small = nbits(reference, symmetric=symmetric, qdq=qdq)
    assert ("DequantizeLinear" if qdq else "MatMulNBits") in ops(small)
    result = repair(reference, small, ROWS, RepairConfig(extra_bytes=0.5))
    made = checked(reference, small, ROWS, result)
    assert result.kept
    assert result.recovered > 0.8
    assert made.ByteSize() <= 1.5 * small.ByteSize()
    assert result.latency is not None


def test_nothing_is_touched_but_what_gets_a_branch():
    reference = perceptron()
    small = nbits(reference)
    small.graph.node[0].doc_string = "kept"
    small.graph.node[2].metadata_props.add(key="k", value="v")
    made = repair(reference, small, ROWS, RepairConfig(rank=3)).model
    old = [n.SerializeToString() for n in small.graph.node]
    new = [n.SerializeToString() for n in made.graph.node]
    # Of the two nodes with branches the output is called otherwise; of one reader the bias.
    assert len(set(old) - set(new)) <= 3
    by_op = [n for n in made.graph.node if n.op_type == "MatMulNBits"]
    assert by_op[0].doc_string == "kept"
    assert [t.name for t in made.graph.initializer][: len(small.graph.initializer) - 1]


def test_rank_0_gives_the_file_to_the_byte(tmp_path: Path, capsys):
    reference, small, data, out = (tmp_path / n for n in ("r.onnx", "q.onnx", "d.npz", "o.onnx"))
    reference.write_bytes(perceptron().SerializeToString())
    small.write_bytes(nbits(perceptron()).SerializeToString())
    np.savez(data, **ROWS)
    given = ["repair", str(reference), str(small), "-o", str(out), "--data", str(data)]
    assert main([*given, "--rank", "0"]) == 0
    assert "UNCHANGED" in capsys.readouterr().out
    assert out.read_bytes() == small.read_bytes()
    report = tmp_path / "report.json"
    assert main([*given, "--rank", "4", "--json", "--report", str(report)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(report.read_text())
    assert shown["verdict"] in ("repaired", "slower")
    assert {layer["rank"] for layer in shown["layers"]} == {4}
    assert out.read_bytes() != small.read_bytes()
    # A target that no branch reaches writes nothing.
    out.unlink()
    assert main([*given, "--max-divergence", "1e-15"]) == 3
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert "max divergence 1e-15 cannot be reached" in line
    assert not out.exists()


@pytest.mark.parametrize("letters", [0, 400])
def test_bytes_that_are_added_stay_below_what_may_be(letters: int):
    """Also where names take more than factors, which no plan foresees."""
    reference, small = perceptron(), nbits(perceptron())
    for k, node in enumerate(small.graph.node):
        node.name = f"node_{k}" + letters * "n"
    size = small.ByteSize()
    for share in (0.0, 0.05, 0.5, 3.0):
        result = repair(reference, small, ROWS, RepairConfig(extra_bytes=share))
        assert result.model.ByteSize() <= (1 + share) * size
        assert result.kept or share < 0.5


def test_more_rank_brings_more_back():
    reference, small = perceptron(), nbits(perceptron())
    left = [
        repair(reference, small, ROWS, RepairConfig(rank=r)).after.divergence.mean
        for r in (1, 4, 16)
    ]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.05 * left[0]


def test_a_quality_is_met_with_fewer_bytes_than_there_could_be():
    reference, small = perceptron(), nbits(perceptron())
    most = repair(reference, small, ROWS, RepairConfig(rank=16))
    start = most.before.divergence.mean
    target = QualityTarget(key="max_divergence", limit=start / 4)
    result = repair(reference, small, ROWS, RepairConfig(quality=target))
    assert result.kept
    assert result.searched.divergence.mean <= start / 4
    assert 0 < result.extra_bytes < most.extra_bytes
    met = QualityTarget(key="max_divergence", limit=10 * start)
    same = repair(reference, small, ROWS, RepairConfig(quality=met))
    assert not same.kept
    assert any("as good as was asked for" in note for note in same.notes)
    with pytest.raises(TargetMissedError, match="cannot be reached"):
        repair(
            reference,
            small,
            ROWS,
            RepairConfig(quality=QualityTarget(key="max_divergence", limit=1e-14)),
        )


def test_labels_are_judged():
    reference, small = perceptron(), nbits(perceptron(), block=64)
    scores = run(reference, ROWS)["y"]
    data = {**ROWS, "label": scores.argmax(-1).astype(np.int64)}
    target = QualityTarget(key="max_drop", limit=0.0)
    result = repair(reference, small, data, RepairConfig(quality=target, labels="label"))
    assert result.after.drop <= 0.0 + 2 * result.after.drop_error


def on_the_grid(proto: onnx.ModelProto) -> None:
    """Give A and B weights that 4 bits in blocks of 32 hold exactly."""
    for tensor in proto.graph.initializer:
        if tensor.name in ("A", "B"):
            steps = np.random.default_rng(1).integers(-8, 8, tuple(tensor.dims)) / 8
            steps[::32] = -1.0  # the end of the range, which sets the scale of each block
            tensor.CopyFrom(onnx.numpy_helper.from_array(steps.astype(np.float32), tensor.name))


def test_a_model_that_lost_nothing_stays_as_it_is():
    reference = perceptron()
    on_the_grid(reference)
    small = nbits(reference)
    result = repair(reference, small, ROWS, RepairConfig(rank=4))
    assert not result.layers
    assert result.left_alone == {"it holds the reference's weight without an error": 2}
    assert result.verdict == "unchanged"
    assert result.store.proto is small


def test_an_error_that_the_data_never_meet_gets_no_branch():
    """The last input is always 0: what is wrong with its weights is no loss."""
    reference = perceptron()
    on_the_grid(reference)
    for tensor in reference.graph.initializer:
        if tensor.name == "A":
            weight = onnx.numpy_helper.to_array(tensor).copy()
            weight[-1] = noise(1, 64) / 9
            tensor.CopyFrom(onnx.numpy_helper.from_array(weight, "A"))
    rows = correlated(3, 800, WIDTH)
    rows[:, -1] = 0
    small = nbits(reference)
    result = repair(reference, small, {"x": rows}, RepairConfig(rank=4, augment=False))
    (layer,) = result.layers
    assert layer.distance > 1e-3
    assert layer.predicted_before < 1e-6
    assert layer.rank is None
    assert result.store.proto is small
    assert any("none is kept" in note or "No branch" in note for note in result.notes)


@pytest.mark.parametrize("fused", ["DynamicQuantizeMatMul", "MatMulNBits"])
def test_a_bias_within_the_node_takes_the_mean(fused: str):
    """With no room for a branch the mean of what was lost comes back, for the bytes of a name."""
    reference = model(
        f"(float[n,{WIDTH}] x) => (float[n,32] y)",
        "h = MatMul(x, A) y = Add(h, a)",
        A=rough(1, 32, WIDTH),
        a=noise(2, 32).astype(np.float32),
    )
    weight = rough(1, 32, WIDTH)
    if fused == "MatMulNBits":
        small = nbits(reference)
        node, add = small.graph.node
        node.input.extend(["", "", "a"])
        node.output[0] = add.output[0]
        del small.graph.node[1]
    else:
        scale = np.abs(weight).max() / 7
        small = model(
            f"(float[n,{WIDTH}] x) => (float[n,32] y)",
            "y = com.microsoft.DynamicQuantizeMatMul(x, B, s, z, a)",
            domains=', "com.microsoft" : 1',
            B=np.rint(weight / scale).astype(np.int8),
            s=scale.astype(np.float32),
            z=np.int8(0),
            a=noise(2, 32).astype(np.float32),
        )
    result = repair(reference, small, ROWS, RepairConfig(extra_bytes=0.02, augment=False))
    made = checked(reference, small, ROWS, result)
    assert result.kept
    assert [layer.rank for layer in result.layers] == [0]
    assert ops(made) == ops(small)
    expected, now, then = (run(m, ROWS)["y"].mean(0) for m in (reference, made, small))
    assert np.linalg.norm(now - expected) < 0.3 * np.linalg.norm(then - expected)


def test_statistics_of_one_quantization_are_not_those_of_another(tmp_path: Path):
    reference = perceptron()
    config = RepairConfig(rank=3, cache=tmp_path / "cache")
    made = {
        block: [
            repair(reference, nbits(reference, block=block), ROWS, each).model.SerializeToString()
            for each in (config, config, RepairConfig(rank=3))
        ]
        for block in (16, 64)
    }
    assert all(len(set(models)) == 1 for models in made.values())


def test_a_quality_has_to_hold_on_samples_held_back():
    """Those that are searched on hardly differ from each other, and tell little."""
    reference, small = perceptron(), nbits(perceptron())
    _, held = hold_back(SAMPLES, samples=None, seed=0)
    rows = ROWS["x"] / 20
    rows[held] *= 20
    config = RepairConfig(rank=1, augment=False)
    left = repair(reference, small, {"x": rows}, config).after.divergence.mean
    target = QualityTarget(key="max_divergence", limit=left / 8)
    with pytest.raises(TargetMissedError, match="not on samples held back"):
        repair(reference, small, {"x": rows}, RepairConfig(quality=target, augment=False))


# --- what belongs together ----------------------------------------------------------------------


def renamed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same with other names for all inner values and weights."""
    outer = {v.name for v in (*proto.graph.input, *proto.graph.output)} | {""}
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    names: dict[str, str] = {}

    def other(name: str) -> str:
        return name if name in outer else names.setdefault(name, f"v{len(names)}")

    for node in copy.graph.node:
        node.input[:] = [other(n) for n in node.input]
        node.output[:] = [other(n) for n in node.output]
        node.name = ""
    for tensor in copy.graph.initializer:
        tensor.name = other(tensor.name)
    del copy.graph.value_info[:]
    return copy


@pytest.mark.parametrize("form", ["QDQ", "QOperator", "dynamic", "int4"])
def test_names_may_be_anything(form: str, tmp_path: Path):
    reference = perceptron()
    small = nbits(reference) if form == "int4" else quantized(reference, form, tmp_path, ROWS)
    plain = repair(reference, small, ROWS, RepairConfig(rank=2))
    other = repair(reference, renamed(small), ROWS, RepairConfig(rank=2))
    assert [layer.site for layer in other.layers] == [layer.site for layer in plain.layers]
    assert not other.skipped


def test_weights_that_are_others_are_left_with_a_reason():
    reference, small = perceptron(), nbits(perceptron())
    for tensor in reference.graph.initializer:
        if tensor.name == "B":
            tensor.CopyFrom(onnx.numpy_helper.from_array(rough(77, 40, 64), "B"))
    result = repair(reference, small, ROWS, RepairConfig(rank=2))
    assert [layer.site for layer in result.layers] == ["A"]
    (skipped,) = result.skipped
    assert "no weight of the reference is close to it" in skipped.reason
    assert "'B'" in skipped.reason


def test_what_is_no_pair_ends_in_one_line():
    with pytest.raises(ModelError, match="no quantized weight was found"):
        repair(perceptron(), perceptron(), ROWS, RepairConfig(rank=2))
    other = model("(float[n,4] z) => (float[n,4] y)", "y = Tanh(z)")
    with pytest.raises(ModelError, match="inputs are not those of"):
        repair(perceptron(), other, ROWS, RepairConfig(rank=2))
    with pytest.raises(ConfigError, match="one target"):
        RepairConfig()
    with pytest.raises(ConfigError, match="one target"):
        RepairConfig(rank=1, extra_bytes=0.1)
    with pytest.raises(ConfigError, match="negative"):
        RepairConfig(rank=-1)
    with pytest.raises(ConfigError, match="max drop needs a metric"):
        RepairConfig(quality=QualityTarget(key="max_drop", limit=1.0))


def test_one_weight_at_two_nodes_gets_one_branch():
    body = "h = MatMul(x, A) t = Tanh(h) y = MatMul(t, A)"
    reference = model("(float[n,48] x) => (float[n,48] y)", body, A=rough(1, 48, 48))
    small = nbits(reference)
    result = repair(reference, small, ROWS, RepairConfig(rank=5))
    (layer,) = result.layers
    assert len(layer.nodes) == 2
    made = checked(reference, small, ROWS, result)
    assert len(made.graph.initializer) == len(small.graph.initializer) + 2


def test_branch_reads_what_a_relu_in_the_rounding_left(tmp_path: Path):
    """Quantizers drop a ReLU whose output is rounded from 0 on: before it, x is another."""
    reference = pictures()
    small = quantized(reference, "QDQ", tmp_path, IMAGES, per_channel=True)
    assert "Relu" not in ops(small)
    result = repair(reference, small, IMAGES, RepairConfig(rank=12))
    made = result.model
    makers = {name: node for node in made.graph.node for name in node.output}
    read = {
        makers[node.input[0]].op_type if node.input[0] in makers else "input"
        for node in made.graph.node
        if node.op_type == "Conv" and "low_rank" in node.name and "hidden" not in node.input[0]
    }
    assert read == {"input", "DequantizeLinear"}


def halved(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same in half precision."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del copy.graph.value_info[:]
    return copy


def test_half_precision_stays_half():
    reference = perceptron()
    small = nbits(reference)
    reference, small = halved(reference), halved(small)
    data = {"x": ROWS["x"].astype(np.float16)}
    result = repair(reference, small, data, RepairConfig(rank=6))
    made = result.model
    new = [t for t in made.graph.initializer if "branch" in t.name]
    assert {t.data_type for t in new} == {onnx.TensorProto.FLOAT16}
    assert result.kept


def test_without_gradients_errors_count_at_their_own_layer(caplog):
    body = """
        h = MatMul(x, A)
        t = com.microsoft.NGramRepeatBlock<ngram_size=3>(tokens, h)
        y = MatMul(t, B)
    """
    reference = model(
        f"(float[n,{WIDTH}] x, int64[n,4] tokens) => (float[n,32] y)",
        body,
        domains=', "com.microsoft" : 1',
        A=rough(1, WIDTH, WIDTH),
        B=rough(2, 32, WIDTH),
    )
    small = nbits(reference)
    data = {**ROWS, "tokens": np.arange(4 * SAMPLES).reshape(SAMPLES, 4) % WIDTH}
    with caplog.at_level("WARNING"):
        result = repair(reference, small, data, RepairConfig(rank=6))
    assert "gradients cannot be had" in caplog.text
    assert any("at their own layer" in note for note in result.notes)
    assert result.kept
    assert result.recovered > 0.5
    # The share of each layer's output that its error is, which any other number would not be.
    first, _ = result.layers
    assert 0 < first.predicted_after < first.predicted_before < 1


def test_what_was_compressed_is_repaired_behind_its_quantization():
    config = CompressConfig(param_ratio=0.7, samples=60)
    job = Job.open(perceptron(), ROWS, config, silent)
    calibration, _ = job.data.split(samples=60)
    thin = compress(perceptron(), ROWS, config)
    assert thin.plan.changes
    small = ModelStore.load(nbits(thin.model))
    made = repaired(job, thin.store, small, calibration, config, 4)
    expected, now, then = (run(ModelStore.load(m), ROWS)["y"] for m in (thin.store, made, small))
    assert np.linalg.norm(now - expected) < 0.5 * np.linalg.norm(then - expected)
    assert repaired(job, thin.store, small, calibration, config, 0) is small


# --- hostile and odd ----------------------------------------------------------------------------


def test_model_of_which_nothing_is_read_is_given_back_with_reasons():
    reference, small = perceptron(), nbits(perceptron())
    for node in small.graph.node:
        if node.op_type == "MatMulNBits":
            # The order of the columns as it is, but said so.
            d = next(a.i for a in node.attribute if a.name == "K")
            order = np.arange(d, dtype=np.int32) // 32
            small.graph.initializer.append(onnx.numpy_helper.from_array(order, f"order_{d}"))
            node.input.extend(["", f"order_{d}"])
    result = repair(reference, small, ROWS, RepairConfig(rank=2))
    assert not result.layers
    assert result.verdict == "unchanged"
    assert list(result.left_alone.values()) == [2]
    assert "g_idx" in next(iter(result.left_alone))


def test_weights_outside_the_file_stay_outside(tmp_path: Path):
    reference, small = perceptron(), nbits(perceptron())
    path, out = tmp_path / "q.onnx", tmp_path / "o.onnx"
    outside = onnx.ModelProto()
    outside.CopyFrom(small)
    onnx.save_model(outside, path, save_as_external_data=True, location="q.bin", size_threshold=64)
    result = repair(reference, path, ROWS, RepairConfig(rank=3))
    result.save(out)
    assert (tmp_path / "o.onnx.data").exists()
    expected = repair(reference, small, ROWS, RepairConfig(rank=3)).model
    np.testing.assert_array_equal(run(onnx.load(out), ROWS)["y"], run(expected, ROWS)["y"])


def test_patterns_say_what_is_repaired():
    reference, small = perceptron(), nbits(perceptron())
    result = repair(reference, small, ROWS, RepairConfig(rank=3, exclude=("B",)))
    assert [layer.site for layer in result.layers] == ["A"]
    assert len(result.skipped) == 1


def test_a_broken_metric_is_named():
    with pytest.raises(ConfigError, match="evaluate and labels"):
        RepairConfig(rank=1, evaluate="a:b", labels="c")


def test_reference_may_be_finer_than_what_was_quantized():
    """A bias and factors have the type of the layer that they stand beside."""
    reference = perceptron()
    small = halved(nbits(reference))
    small.graph.node.insert(0, onnx.helper.make_node("Cast", ["x"], ["x/half"], to=10))
    small.graph.node.append(onnx.helper.make_node("Cast", ["y/half"], ["y"], to=1))
    for node in small.graph.node[1:-1]:
        node.input[:] = ["x/half" if name == "x" else name for name in node.input]
        node.output[:] = ["y/half" if name == "y" else name for name in node.output]
    for value in (*small.graph.input, *small.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    result = repair(reference, small, ROWS, RepairConfig(rank=6))
    made = checked(reference, small, ROWS, result)
    assert result.kept
    old = {t.name for t in small.graph.initializer}
    new = [t for t in made.graph.initializer if t.name not in old]
    assert {t.data_type for t in new} == {onnx.TensorProto.FLOAT16}


# --- trained models -----------------------------------------------------------------------------

no_zoo = pytest.mark.skipif(not (ZOO / "zoo.py").is_file(), reason="no folder of trained models")


def calibration(name: str, samples: int, folder: Path) -> dict[str, np.ndarray]:
    path = folder / "calibration.npz"
    words = [sys.executable, ZOO / "zoo.py", "calib", name, "-o", path]
    subprocess.run([*words, "--samples", str(samples)], check=True, capture_output=True)
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.mark.zoo
@no_zoo
def test_trained_transformer_gets_back_half_of_what_four_bits_lost(tmp_path: Path):
    pytest.importorskip("PIL", reason="needs Pillow, the extra `dev`")
    reference = onnx.load(ZOO / "vit_cifar10" / "model.onnx")
    data = calibration("vit_cifar10", 80, tmp_path)
    small = nbits(reference, block=128)
    result = repair(reference, small, data, RepairConfig(extra_bytes=0.1, augment=False))
    assert len(result.layers) == 24
    assert not result.skipped
    assert result.extra_bytes <= 0.1
    assert result.recovered > 0.5


@pytest.mark.zoo
@no_zoo
@pytest.mark.parametrize("form", ["QDQ", "QOperator", "dynamic"])
def test_every_weight_of_a_trained_model_is_found(form: str, tmp_path: Path):
    pytest.importorskip("PIL", reason="needs Pillow, the extra `dev`")
    path = ZOO / "mobilenet_v2" / "model.onnx"
    data = calibration("mobilenet_v2", 4, tmp_path)
    small = quantized(onnx.load(path), form, tmp_path, data, per_channel=True, samples=2)
    reference, index = index_model(ModelStore.load(path)), index_quantized(ModelStore.load(small))
    layers, unread = read_layers(index)
    pairs, unmatched = match_layers(reference, find_sites(reference)[0], index, layers)
    assert len(pairs) == 36
    assert not unmatched
    assert {skip.reason.split(" (")[0] for skip in unread} == {"grouped convolution"}
