"""Ratios of bytes and of operations, and what is done where gradients cannot be had."""

import json
import logging
import math
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import activations, model, noise

from onnx_utilrank import (
    CompressConfig,
    ConfigError,
    ModelError,
    QualityTarget,
    TargetMissedError,
    compress,
)
from onnx_utilrank.calibration.collect import silent
from onnx_utilrank.cli.main import main
from onnx_utilrank.job import Job
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.quality import most_judged
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.torch_graph.graph import UnsupportedOperatorError

METHODS = ("two-sided", "one-sided", "svd")


def classifier() -> onnx.ModelProto:
    """A Conv whose weight is small and busy, and a MatMul that is large and idle."""
    body = """
        h = Conv<pads=[1, 1, 1, 1]>(x, K, k)
        r = Relu(h)
        f = Flatten(r)
        y = MatMul(f, W)
    """
    weights = {
        "K": noise(1, 32, 16, 3, 3) / 12,
        "k": noise(2, 32),
        "W": noise(3, 32 * 36, 40) / 34,
    }
    cast = {name: value.astype(np.float32) for name, value in weights.items()}
    return model("(float[n,16,6,6] x) => (float[n,40] y)", body, **cast)


DATA = {"x": activations(4, 60, 16, 6, 6).astype(np.float32)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "source.onnx"
    path.write_bytes(classifier().SerializeToString())
    return path


def test_a_quality_is_judged_on_more_samples_where_there_are_more():
    data = {"x": activations(4, 1500, 16, 6, 6).astype(np.float32)}
    quality = QualityTarget(key="max_divergence", limit=0.05)
    for config, held in (
        (CompressConfig(quality=quality, refit=False, augment=False), 300),
        (CompressConfig(param_ratio=0.5, refit=False, augment=False), 256),
    ):
        assert compress(classifier(), data, config).quality.divergence.samples == held


def test_no_more_is_judged_than_fits():
    job = Job.open(classifier(), DATA, CompressConfig(), silent)
    quality = QualityTarget(key="min_snr", limit=20.0)
    # Forty numbers a sample, eight bytes each, in an eighth of the budget.
    budgets = {2**30: 1024, 64 * 40 * 700: 700, 2**20: 409, 2**10: 256}
    assert {b: most_judged(job, quality, b) for b in budgets} == budgets
    assert most_judged(job, None, 2**30) == 256


def test_weights_held_in_half_are_counted_as_they_are_held():
    """Factors have the type that the product has: twice the bytes that the weight takes."""
    weights = {
        name: (noise(seed, 64, 64) * 0.9 ** np.arange(64) / 8).astype(np.float16)
        for seed, name in enumerate("AB")
    }
    proto = model(
        "(float[n,64] x) => (float[n,64] y)",
        "U = Cast<to=1>(A) V = Cast<to=1>(B) h = MatMul(x, U) t = Tanh(h) y = MatMul(t, V)",
        **weights,
    )
    data = {"x": noise(9, 200, 64).astype(np.float32)}
    result = compress(proto, data, CompressConfig(size_ratio=0.8, moves=("low-rank",)))
    before, after = (
        f.file_bytes for f in (result.validation.reference, result.validation.candidate)
    )
    assert 0.7 * before < after <= 0.8 * before
    assert all(e.rank is None or 4 * e.rank * 128 < 2 * 64 * 64 for e in result.plan.entries)


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.25])
def test_file_has_at_most_the_bytes_asked_for(saved: Path, method: str, ratio: float):
    result = compress(saved, DATA, CompressConfig(size_ratio=ratio, method=method))
    made = saved.with_name("made.onnx")
    result.save(made)
    before, after = saved.stat().st_size, made.stat().st_size
    assert after <= ratio * before
    # What names and nodes take is known to some hundred bytes, and a rank takes a thousand.
    assert after > ratio * before - 8000
    figures = result.validation
    assert (figures.reference.file_bytes, figures.candidate.file_bytes) == (before, after)
    assert result.plan.target == {"size_ratio": ratio}


def test_few_bytes_are_corrected_for(tmp_path: Path):
    """Names much longer than the plan reckons with: the file has to be seen to be measured."""
    proto = classifier()
    for node in proto.graph.node:
        node.name = f"{node.op_type}_{'x' * 2000}"
    path = tmp_path / "long.onnx"
    path.write_bytes(proto.SerializeToString())
    for ratio in (0.8, 0.4):
        result = compress(path, DATA, CompressConfig(size_ratio=ratio))
        result.save(tmp_path / "made.onnx")
        assert (tmp_path / "made.onnx").stat().st_size <= ratio * path.stat().st_size


def test_external_data_are_bytes_too(tmp_path: Path):
    path = tmp_path / "outside.onnx"
    onnx.save_model(classifier(), path, save_as_external_data=True, location="outside.data")
    total = sum(p.stat().st_size for p in tmp_path.iterdir())
    result = compress(path, DATA, CompressConfig(size_ratio=0.5))
    folder = tmp_path / "made"
    folder.mkdir()
    result.save(folder / "made.onnx")
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 0.5 * total


# --- operations ---------------------------------------------------------------------------------


def operations(proto: onnx.ModelProto) -> int:
    """Multiply-accumulates of its Conv and MatMul on one sample, from their weights alone."""
    held = {t.name: math.prod(t.dims) for t in proto.graph.initializer}
    positions = {"Conv": 36, "MatMul": 1}
    return sum(
        positions[node.op_type] * held[node.input[1]]
        for node in proto.graph.node
        if node.op_type in positions
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.4])
def test_model_does_at_most_the_operations_asked_for(method: str, ratio: float):
    proto = classifier()
    result = compress(proto, DATA, CompressConfig(flop_ratio=ratio, method=method))
    figures = result.validation
    assert figures.reference.flops == 2 * operations(proto)
    assert figures.candidate.flops == 2 * operations(result.model)
    assert figures.candidate.flops <= ratio * figures.reference.flops
    # A rank of the Conv is 36 positions times 32 + 144, and may come in steps of 8.
    step = {"two-sided": 8, "one-sided": 8}.get(method, 1)
    slack = 0.1 + step * 2 * 36 * (32 + 144) / figures.reference.flops
    assert figures.candidate.flops > (ratio - slack) * figures.reference.flops


@pytest.mark.parametrize("ratio", [0.9, 0.5])
@pytest.mark.parametrize("name", ["param_ratio", "size_ratio", "flop_ratio"])
def test_pivots_keep_every_kind_of_ratio(name: str, ratio: float):
    config = CompressConfig(moves=("pivot",), **{name: ratio})
    result = compress(classifier(), DATA, config)
    assert {e.move for e in result.plan.factored} == {"pivot"}
    figures = (result.validation.candidate, result.validation.reference)
    field = {"param_ratio": "parameters", "size_ratio": "file_bytes", "flop_ratio": "flops"}[name]
    after, before = (getattr(f, field) for f in figures)
    assert (ratio - 0.1) * before < after <= ratio * before


def test_operations_and_parameters_are_saved_in_different_places():
    """The Conv does three quarters of the work with a tenth of the weights."""
    kept = {}
    for name in ("param_ratio", "flop_ratio"):
        plan = compress(
            classifier(), DATA, CompressConfig(method="svd", **{name: 0.5}), dry_run=True
        ).plan
        ranks = {e.op_type: (e.rank or min(e.m, e.d)) / min(e.m, e.d) for e in plan.entries}
        kept[name] = ranks["Conv"], ranks["MatMul"]
    assert kept["flop_ratio"][0] < kept["param_ratio"][0]
    assert kept["flop_ratio"][1] > kept["param_ratio"][1]


@pytest.mark.parametrize("name", ["size_ratio", "flop_ratio"])
def test_ratios_out_of_reach_are_refused(name: str):
    what = {"size_ratio": "bytes", "flop_ratio": "operations"}[name]
    with pytest.raises(TargetMissedError, match=f"ratio of 0.001 of its {what} cannot be reached"):
        compress(classifier(), DATA, CompressConfig(**{name: 0.001}))
    for ratio in (0.0, 1.1):
        with pytest.raises(ConfigError, match=r"is not in \(0, 1\]"):
            CompressConfig(**{name: ratio})
    with pytest.raises(ConfigError, match="exclude each other"):
        CompressConfig(param_ratio=0.5, **{name: 0.5})


@pytest.mark.parametrize("seed", range(3))
def test_parameters_are_met_where_a_plan_counts_on_too_few(seed: int):
    """A bias that two Convs share is one parameter less to the plan than to what is made of it."""
    weights = {"K": noise(seed, 32, 8, 3, 3) / 8, "L": noise(seed + 9, 32, 32, 3, 3) / 16}
    weights["b"] = noise(2, 32)
    proto = model(
        "(float[n,16,h,w] x) => (float[n,32,h,w] y)",
        "a = Conv<group=2, pads=[1, 1, 1, 1]>(x, K, b) r = Relu(a) "
        "y = Conv<pads=[1, 1, 1, 1]>(r, L, b)",
        **{name: value.astype(np.float32) for name, value in weights.items()},
    )
    data = {"x": noise(4, 40, 16, 6, 6).astype(np.float32)}
    before = count_parameters(ModelStore.load(proto))
    for ratio in np.arange(0.31, 0.41, 0.02).tolist():
        config = CompressConfig(param_ratio=ratio, refit=False, moves=("low-rank", "pivot"))
        made = compress(proto, data, config).model
        assert (ratio - 0.05) * before < count_parameters(ModelStore.load(made)) <= ratio * before


@pytest.mark.parametrize("name", ["size_ratio", "flop_ratio", "param_ratio"])
def test_whole_models_are_kept_where_all_may_stay(name: str):
    proto = classifier()
    result = compress(proto, DATA, CompressConfig(**{name: 1.0}))
    assert result.verdict == "unchanged"
    assert result.model.SerializeToString() == proto.SerializeToString()


def test_command_line_takes_both(saved: Path, tmp_path: Path, capsys):
    np.savez(tmp_path / "d.npz", **DATA)
    given = ["compress", str(saved), "--data", str(tmp_path / "d.npz"), "--json"]
    made = tmp_path / "made.onnx"
    for option, figure in (("--size-ratio", "file_bytes"), ("--flop-ratio", "flops")):
        assert main([*given, "-o", str(made), option, "0.5"]) == 0
        figures = json.loads(capsys.readouterr().out)["validation"]
        assert figures["candidate"][figure] <= 0.5 * figures["reference"][figure]


# --- operators that torch does not know ---------------------------------------------------------


def foreign() -> onnx.ModelProto:
    """MatMul, an operator of ONNX Runtime that gradients are not known of, and MatMul."""
    body = """
        h = MatMul(x, W)
        [odd_one] t = com.microsoft.NGramRepeatBlock<ngram_size=3>(tokens, h)
        y = MatMul(t, V)
    """
    weights = {"W": noise(1, 24, 24), "V": noise(2, 24, 24)}
    cast = {name: value.astype(np.float32) for name, value in weights.items()}
    return model(
        "(float[n,24] x, int64[n,4] tokens) => (float[n,24] y)",
        body,
        domains=', "com.microsoft" : 1',
        **cast,
    )


TOKENS = {
    "x": noise(3, 200, 24).astype(np.float32),
    "tokens": np.arange(800).reshape(200, 4) % 24,
}


def test_gradients_that_cannot_be_had_name_node_and_operator():
    config = CompressConfig(param_ratio=0.6, method="two-sided")
    with pytest.raises(UnsupportedOperatorError) as raised:
        compress(foreign(), TOKENS, config)
    assert isinstance(raised.value, ModelError)
    message = str(raised.value)
    assert "odd_one" in message
    assert "NGramRepeatBlock" in message
    assert "\n" not in message


def test_one_sided_factors_are_the_fallback(caplog):
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compress(foreign(), TOKENS, CompressConfig(param_ratio=0.6))
    (warning,) = (r.getMessage() for r in caplog.records if "gradients" in r.getMessage())
    (note,) = (n for n in result.notes if "gradients" in n)
    for text in (warning, note):
        assert "odd_one" in text
        assert "NGramRepeatBlock" in text
        assert "one-sided" in text
    assert result.plan.method == "one-sided"
    assert not result.plan.refit
    assert result.plan.predicted_divergence is None
    assert result.plan.param_ratio <= 0.6
    asked = compress(foreign(), TOKENS, CompressConfig(param_ratio=0.6, method="one-sided"))
    assert asked.model.SerializeToString() == result.model.SerializeToString()
    assert not [n for n in asked.notes if "gradients" in n]


def test_fallback_of_the_command_line_is_one_warning(tmp_path: Path, capsys):
    path, data = tmp_path / "foreign.onnx", tmp_path / "d.npz"
    path.write_bytes(foreign().SerializeToString())
    np.savez(data, **TOKENS)
    given = ["compress", str(path), "--data", str(data), "--param-ratio", "0.6", "--dry-run"]
    assert main([*given, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["plan"]["method"] == "one-sided"
    (line,) = (line for line in err.splitlines() if "gradients cannot be had" in line)
    assert "odd_one" in line
    assert main([*given, "--method", "two-sided"]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = (line for line in err.splitlines() if "error:" in line)
    assert "NGramRepeatBlock" in line


def test_values_that_do_not_fit_the_memory_are_the_fallback_too():
    wide = model(
        "(float[n,512,8] x) => (float[n,512,600] y)",
        "h = MatMul(x, W) y = Relu(h)",
        W=noise(1, 8, 600).astype(np.float32),
    )
    data = {"x": noise(2, 6, 512, 8).astype(np.float32)}
    config = CompressConfig(param_ratio=0.9, memory_budget=2**20, force=True)
    result = compress(wide, data, config)
    (note,) = (n for n in result.notes if "memory budget" in n)
    assert "gradients cannot be had" in note
    assert result.plan.method == "one-sided"


def test_weights_count_in_the_memory_budget():
    width = 512
    proto = model(
        f"(float[n,{width}] x) => (float[n,{width}] y)",
        "y = MatMul(x, W)",
        W=noise(1, width, width).astype(np.float32),
    )
    data = {"x": noise(2, 6, width).astype(np.float32)}
    roomy, tight = (CompressConfig(param_ratio=0.9, memory_budget=n) for n in (2**24, 2**22))
    job = Job.open(proto, data, roomy, silent)
    # Once as it was read, once in ONNX Runtime, once in torch; 8 KiB for the nodes and names.
    left = roomy.memory_budget - 3 * 4 * width**2
    assert left - 3 * 2**13 < job.room(roomy) < left
    assert job.room(tight) == tight.memory_budget // 2  # and the weights on top


@pytest.mark.parametrize("shared", [True, False])
def test_parameters_are_counted_in_what_was_made(shared: bool):
    """Groups of a Conv become nodes with sizes and slices of their own, beside what stays."""
    second = "y = Conv<pads=[1,1,1,1]>(r, w2, b)" if shared else "y = Conv<pads=[1,1,1,1]>(r, w2)"
    proto = model(
        "(float[n,8,6,6] x) => (float[n,16,h,w] y)",
        f"a = Conv<group=2, pads=[1,1,1,1]>(x, w1, b) r = Relu(a) {second}",
        w1=noise(1, 16, 4, 3, 3).astype(np.float32) / 6,
        w2=noise(2, 16, 16, 3, 3).astype(np.float32) / 12,
        b=noise(3, 16).astype(np.float32),
    )
    data = {"x": noise(4, 24, 8, 6, 6).astype(np.float32)}
    before = count_parameters(ModelStore.load(proto))
    moves = ("low-rank", "pivot")
    for ratio in (0.35, 0.41, 0.47, 0.53, 0.59, 0.65):
        config = CompressConfig(param_ratio=ratio, method="one-sided", moves=moves)
        result = compress(proto, data, config)
        assert result.store is not None
        made = count_parameters(result.store)
        assert made == result.plan.parameters_after <= ratio * before
