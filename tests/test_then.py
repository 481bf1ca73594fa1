"""Compression with quantization after it, from the command line and from Python."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, noise

import onnx_utilrank
from digits import write_npz
from onnx_utilrank import stages
from onnx_utilrank.cli.main import main
from onnx_utilrank.errors import ConfigError, TargetMissedError
from onnx_utilrank.quantization.blockwise import INT4
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.ranking.then import ThenEntry
from onnx_utilrank.validation import validate
from onnx_utilrank.validation.bench import compare_latency

MODELS = Path(__file__).resolve().parent.parent / "models"
VIT, CNN = str(MODELS / "digits_vit.onnx"), str(MODELS / "digits_cnn.onnx")

# What is quantized does not depend on it, and it is the quickest.
ONE_SIDED = ("--method", "one-sided")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("digits")
    test = write_npz(made)[1]  # the ones with labels
    with np.load(test) as arrays:
        np.savez(made / "labelled.npz", **{name: arrays[name][:120] for name in arrays.files})
        np.savez(made / "small.npz", image=arrays["image"][:60])
    return made


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    """The times themselves are tested elsewhere: here a few runs do."""

    def brief(*args, **options):
        return compare_latency(*args, **options | {"seconds": 0.0, "min_pairs": 3, "max_pairs": 5})

    monkeypatch.setattr(validate, "compare_latency", brief)
    monkeypatch.setattr(stages, "compare_latency", brief)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, folder):
    """Run a command line with the data in an empty folder: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words, data="small"):
        try:
            status = main([*map(str, words), "--data", str(folder / f"{data}.npz")])
        except SystemExit as e:  # argparse
            status = e.code
        streams = capsys.readouterr()
        return status, streams.out, streams.err

    return call


def error(text):
    (line,) = [line for line in text.splitlines() if "error:" in line]
    return line


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_replayed_plan_gives_the_same_file(run, tmp_path, scheme):
    words = ("--param-ratio", "0.6", "--then", scheme, *ONE_SIDED)
    status, out, _ = run("compress", VIT, "-o", "a.onnx", *words, "--plan-out", "p.json")
    assert status == 0
    for name in ("original", "low-rank", scheme, f"low-rank + {scheme}"):
        assert f"\n  {name} " in out
    assert f"Beside plain {scheme}" in out
    plan = RankPlan.load("p.json")
    assert plan.then is not None
    assert plan.then.scheme == scheme
    assert plan.then.in_float is not None
    assert plan.param_ratio <= 0.6
    status, *_ = run("compress", VIT, "-o", "b.onnx", "--plan", "p.json")
    assert status == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    onnx.checker.check_model("a.onnx")
    # And what it made is known as such.
    assert onnx.load("a.onnx").metadata_props[-1].value == plan.fingerprint()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "p.json"]


def test_the_report_has_every_stage(run):
    words = ("--param-ratio", "0.6", "--then", "int8", *ONE_SIDED, "--json")
    status, out, _ = run("compress", VIT, "-o", "a.onnx", *words)
    assert status == 0
    found = json.loads(out)["quantized"]
    assert found["scheme"] == "int8"
    assert [stage["name"] for stage in found["stages"]] == ["low-rank", "int8", "low-rank + int8"]
    low, plain, both = (stage["validation"]["candidate"] for stage in found["stages"])
    whole = found["stages"][0]["validation"]["reference"]
    assert both["file_bytes"] == Path("a.onnx").stat().st_size
    assert both["file_bytes"] < plain["file_bytes"] < whole["file_bytes"]
    assert (low["parameters"], low["flops"]) == (both["parameters"], both["flops"])
    assert (plain["parameters"], plain["flops"]) == (whole["parameters"], whole["flops"])
    assert found["beside_plain"]["pairs"] >= 3
    assert sum(found["left_alone"].values()) == len(found["left"])


@pytest.mark.parametrize(("scheme", "ratio"), [("int4", 0.13), ("int8", 0.2), ("fp16", 0.4)])
def test_size_is_that_of_the_quantized_file(folder, scheme, ratio):
    """The ledger knows what a weight takes in the end: the first plan is near."""
    config = onnx_utilrank.CompressConfig(size_ratio=ratio, then=scheme, method="one-sided")
    result = onnx_utilrank.compress(VIT, folder / "small.npz", config)
    limit = ratio * Path(VIT).stat().st_size
    assert 0.85 * limit < result.store.file_bytes <= limit
    assert result.validation.candidate.file_bytes == result.store.file_bytes


def test_a_size_that_quantization_alone_reaches_costs_no_rank(folder):
    config = onnx_utilrank.CompressConfig(size_ratio=0.6, then="int8", method="one-sided")
    result = onnx_utilrank.compress(VIT, folder / "small.npz", config)
    assert not result.plan.factored
    assert result.quantized.beside_plain is None
    assert [stage.name for stage in result.quantized.stages] == ["int8"]
    assert result.store.file_bytes <= 0.6 * Path(VIT).stat().st_size


def test_a_size_that_cannot_be_reached_is_an_error(run):
    words = ("--size-ratio", "0.01", "--then", "int8", *ONE_SIDED)
    status, out, err = run("compress", VIT, "-o", "a.onnx", *words)
    assert (status, out) == (3, "")
    assert "cannot be reached" in error(err)
    assert not Path("a.onnx").exists()


def test_a_rank_may_be_worth_less_at_4_bits(folder):
    """Where a rank costs a whole block of inputs, other ranks are chosen than in float."""
    size = onnx_utilrank.CompressConfig(size_ratio=0.13, then="int4", method="one-sided")
    small = onnx_utilrank.compress(VIT, folder / "small.npz", size, dry_run=True).plan
    ratio = onnx_utilrank.CompressConfig(param_ratio=small.param_ratio, method="one-sided")
    same = onnx_utilrank.compress(VIT, folder / "small.npz", ratio, dry_run=True).plan
    assert small.then is not None
    assert same.then is None
    ranks = [{e.site: e.rank for e in plan.factored} for plan in (small, same)]
    assert ranks[0] != ranks[1]
    # What int4 stores of a rank is a matrix of whole blocks.
    assert INT4.matrix_bytes("MatMul", 64, 8, np.dtype(np.float32)) > 64 * 8 / 2


@pytest.mark.parametrize("key", ["max_divergence", "min_agreement"])
def test_quality_is_that_of_the_quantized_model(folder, key):
    limit = {"max_divergence": 0.05, "min_agreement": 0.9}[key]
    target = onnx_utilrank.QualityTarget(key=key, limit=limit)
    config = onnx_utilrank.CompressConfig(quality=target, then="int4", method="one-sided")
    result = onnx_utilrank.compress(CNN, folder / "small.npz", config)
    assert result.quality is result.quantized.stages[-1].quality
    assert result.quality.meets(target, errors=2.0)
    assert result.store.file_bytes < Path(CNN).stat().st_size


def test_a_quality_that_quantization_misses_is_an_error(folder):
    target = onnx_utilrank.QualityTarget(key="max_divergence", limit=1e-9)
    config = onnx_utilrank.CompressConfig(quality=target, then="int4", method="one-sided")
    with pytest.raises(TargetMissedError, match="cannot be reached"):
        onnx_utilrank.compress(VIT, folder / "small.npz", config)


def test_what_is_trained_is_quantized_last(folder):
    config = onnx_utilrank.CompressConfig(
        param_ratio=0.4,
        then="int8",
        method="one-sided",
        finetune=onnx_utilrank.FinetuneConfig(steps=2, augment=False),
    )
    result = onnx_utilrank.compress(VIT, folder / "small.npz", config)
    assert result.recovered is not None
    assert "DequantizeLinear" in {n.op_type for n in result.model.graph.node}
    assert "DequantizeLinear" not in {n.op_type for n in result.recovered.model.graph.node}


# --- the verb, and what is refused ---------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int4", "fp16"])
def test_quantize_writes_the_model_and_the_report(run, scheme):
    words = ("--to", scheme, "--report", "r.json", "--labels", "label")
    status, out, err = run("quantize", VIT, "-o", "q.onnx", *words, data="labelled")
    assert status == 0, err
    assert f"weights stored by {scheme}" in out
    assert "Written to q.onnx" in out
    found = json.loads(Path("r.json").read_text())
    (stage,) = found["quantized"]["stages"]
    assert stage["quality"]["metric"] > 80
    assert stage["validation"]["candidate"]["file_bytes"] == Path("q.onnx").stat().st_size
    assert ("SMALLER BUT SLOWER" in out) == (found["verdict"] == "slower")


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (
            ("quantize", VIT, "-o", "q.onnx", "--to", "bf16"),
            4,
            "no bfloat16 kernels on provider cpu",
        ),
        (("quantize", VIT, "-o", "q.onnx", "--to", "int3"), 2, "invalid choice: 'int3'"),
        (("quantize", VIT, "-o", "q.onnx"), 2, "--to"),
        (("quantize", VIT, "--to", "int8"), 2, "-o/--output"),
        (("quantize", VIT, "-o", VIT, "--to", "int8"), 2, "would overwrite"),
        (("quantize", VIT, "-o", "nowhere/q.onnx", "--to", "int8"), 2, "folder does not exist"),
        (("quantize", "missing.onnx", "-o", "q.onnx", "--to", "int8"), 5, "cannot be read"),
        (
            ("compress", VIT, "-o", "q.onnx", "--param-ratio", "0.5", "--then", "bf16"),
            *(4, "no bfloat16 kernels"),
        ),
        (
            ("compress", VIT, "-o", "q.onnx", "--plan", "p.json", "--then", "int8"),
            *(2, "--then and --repair-rank exclude it"),
        ),
    ],
)
def test_what_cannot_be_ends_in_one_line(run, tmp_path, words, status, reason):
    before = Path(VIT).read_bytes()
    found, out, err = run(*words)
    assert (found, out) == (status, "")
    assert reason in error(err)
    assert not list(tmp_path.iterdir())
    assert Path(VIT).read_bytes() == before


def test_options_that_contradict_each_other(folder):
    data = folder / "small.npz"
    with pytest.raises(ConfigError, match="is none of"):
        onnx_utilrank.CompressConfig(param_ratio=0.5, then="int3")
    with pytest.raises(ConfigError, match="is none of"):
        onnx_utilrank.QuantizeConfig(scheme="int3")
    with pytest.raises(ConfigError, match="exclude each other"):
        onnx_utilrank.QuantizeConfig(scheme="int8", labels="label", evaluate="a:b")
    with pytest.raises(ConfigError, match="quantizes none"):
        onnx_utilrank.sweep(VIT, data, onnx_utilrank.CompressConfig(then="int8"))
    with pytest.raises(ConfigError, match="scheme has to be named"):
        onnx_utilrank.quantize(VIT, data)


def test_a_plan_states_its_quantization(folder, tmp_path):
    config = onnx_utilrank.CompressConfig(param_ratio=0.7, then="int8", method="one-sided")
    plan = onnx_utilrank.compress(VIT, folder / "small.npz", config, dry_run=True).plan
    plan.save(tmp_path / "p.json")
    loaded = RankPlan.load(tmp_path / "p.json")
    assert loaded == plan
    assert loaded.then.in_float is None
    with pytest.raises(ConfigError, match="then excludes it"):
        onnx_utilrank.compress(
            VIT, folder / "small.npz", onnx_utilrank.CompressConfig(then="int8"), plan=plan
        )
    result = onnx_utilrank.compress(VIT, folder / "small.npz", plan=plan)
    assert result.quantized.scheme == "int8"
    assert result.quantized.in_float == ()
    (last,) = [value.name for value in onnx.load(VIT).graph.output]
    edited = dataclasses.replace(plan, then=ThenEntry(scheme="int8", in_float=(last,)))
    result = onnx_utilrank.compress(VIT, folder / "small.npz", plan=edited)
    assert result.quantized.in_float == (last,)
    assert result.plan == dataclasses.replace(edited, parameters_after=result.plan.parameters_after)


def test_branches_bring_back_what_quantization_lost_and_replay(run, tmp_path):
    words = ("--param-ratio", "0.6", "--then", "int4", "--repair-rank", "4", *ONE_SIDED)
    status, out, _ = run(
        "compress", VIT, "-o", "a.onnx", *words, "--plan-out", "p.json", "--report", "r.json"
    )
    assert status == 0
    assert "\n  low-rank + int4 + repair " in out
    said = json.loads((tmp_path / "r.json").read_text())["quantized"]
    assert said["repair_rank"] == 4
    before, after = (s["quality"]["divergence"]["mean"] for s in said["stages"][-2:])
    assert after < before
    assert RankPlan.load("p.json").then.repair_rank == 4
    status, *_ = run("compress", VIT, "-o", "b.onnx", "--plan", "p.json")
    assert status == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_bytes_count_the_branches(run, tmp_path):
    words = ("--size-ratio", "0.2", "--then", "int4", "--repair-rank", "2", *ONE_SIDED)
    status, *_ = run("compress", VIT, "-o", "a.onnx", *words)
    assert status == 0
    assert (tmp_path / "a.onnx").stat().st_size <= 0.2 * Path(VIT).stat().st_size


@pytest.mark.parametrize("then", [(), ("--then", "fp16")])
def test_branches_need_a_rounding_to_repair(run, then):
    status, _, err = run(
        "compress", VIT, "-o", "a.onnx", "--param-ratio", "0.6", *then, "--repair-rank", "4"
    )
    assert status == 2
    assert "repair rank goes with then: int8 or int4" in error(err)


def test_tables_get_ranks_that_can_be_stored_in_4_bits():
    table = noise(1, 600, 48) * 0.85 ** np.arange(48)
    proto = model(
        "(int64[n,5] ids) => (float[n,5,40] y)",
        "h = Gather(T, ids) y = MatMul(h, W)",
        T=table.astype(np.float32),
        W=(noise(2, 48, 40) / 7).astype(np.float32),
    )
    data = {"ids": np.random.default_rng(3).integers(0, 600, (80, 5))}
    for ratio in (0.7, 0.6, 0.5, 0.4):
        config = onnx_utilrank.CompressConfig(param_ratio=ratio, then="int4")
        result = onnx_utilrank.compress(proto, data, config)
        ranks = [e.rank for e in result.plan.factored if e.op_type == "Gather"]
        assert ranks
        assert all(rank % 2 == 0 for rank in ranks)
        size = {s.name: s.validation.candidate.file_bytes for s in result.quantized.stages}
        assert size["low-rank + int4"] < size["int4"]
