"""Input that is broken or means harm: one clear line, the documented exit status, nothing written.

Each case goes through the command line, with every verb that reads such input.
"""

import importlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import activations, model, noise, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_utilrank import (
    CompressConfig,
    ConfigError,
    DataError,
    ModelError,
    RankPlan,
    ValidateConfig,
    analyze,
    compress,
    validate,
)
from onnx_utilrank.calibration import limits
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.calibration.limits import available_memory
from onnx_utilrank.cli.main import main
from onnx_utilrank.errors import UtilrankError
from onnx_utilrank.model.graph import DEEPEST, GraphIndex
from onnx_utilrank.model.plain import index_model
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.sites.find import find_sites, site_matrix
from onnx_utilrank.sites.follow_units import values_followed
from onnx_utilrank.statistics.factorize import factored
from onnx_utilrank.surgery.rewrite import Replacement, rewrite

TOOLS = Path(__file__).resolve().parent.parent / "tools"
SIZE, WIDE = 12, 24
SIGNATURE = f"(float[n,{SIZE}] x) => (float[n,{SIZE}] y)"
ROWS = {"x": activations(5, 40, SIZE).astype(np.float32)}

Change = Callable[[onnx.ModelProto], object]


def sound() -> onnx.ModelProto:
    """Two MatMuls of low rank with names of their own."""
    return model(
        SIGNATURE,
        "[first] h = MatMul(x, U) [middle] r = Relu(h) [last] y = MatMul(r, D)",
        U=(noise(0, SIZE, 3) @ noise(1, 3, WIDE)).astype(np.float32),
        D=(noise(2, WIDE, 3) @ noise(3, 3, SIZE)).astype(np.float32),
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with data."""
    (place := tmp_path / "in").mkdir()
    monkeypatch.chdir(place)
    np.savez("data.npz", **ROWS)
    return place


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def verbs(path: str, data: str = "data.npz") -> Iterator[list[str]]:
    """A command of each verb, with every output that it can write."""
    given, report = ["--data", data], ["--report", "report.json"]
    out = ["-o", "out.onnx"]
    yield ["analyze", path, *given, *report]
    yield ["compress", path, *given, *report, *out, "--param-ratio", "0.7", "--plan-out", "p.json"]
    yield ["sweep", path, *given, *report, *out, "--ratios", "0.7", "--pick", "0.7"]
    yield ["validate", path, path, *given, *report]


def refused(
    words: list[str], capsys: pytest.CaptureFixture[str], folder: Path, *, status: int = 5
) -> str:
    """The one line that a command ends in, after a look at what it left behind."""
    before = files(folder)
    assert main(words) == status, words
    streams = capsys.readouterr()
    assert streams.out == ""
    (line,) = streams.err.splitlines()
    assert line.startswith("onnx-utilrank: error: ")
    assert line.isprintable()
    assert files(folder) == before
    return line


def refused_by_all(proto: onnx.ModelProto | bytes, capsys, folder: Path) -> str:
    raw = proto if isinstance(proto, bytes) else proto.SerializeToString()
    (folder / "bad.onnx").write_bytes(raw)
    lines = [refused(words, capsys, folder) for words in verbs("bad.onnx")]
    assert len(set(lines)) == 1, lines
    return lines[0]


# --- external data ------------------------------------------------------------------------------


def outside(**entries: str) -> onnx.ModelProto:
    """The model with U in a file beside it, where the entries do not say otherwise."""
    proto = sound()
    tensor = proto.graph.initializer[0]
    Path("weights.bin").write_bytes(tensor.raw_data)
    held = {"location": "weights.bin", "offset": "0", "length": str(len(tensor.raw_data))}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (held | entries).items():
        tensor.external_data.add(key=key, value=value)
    return proto


@pytest.mark.usefixtures("folder")
def test_external_data_in_the_folder_are_read():
    onnx.save_model(outside(), "good.onnx")
    assert main(["analyze", "good.onnx", "--data", "data.npz"]) == 0


@pytest.mark.parametrize(
    "location",
    [
        *("../secret.bin", "{folder}/weights.bin", "../in/weights.bin", "a/../weights.bin"),
        *(
            "link.bin",
            "inner.bin",
            "up/secret.bin",
            "*/_ORT_MEM_ADDR_/*",
            "gone.bin",
            ".",
            "a\n\x1b",
        ),
    ],
)
def test_data_files_stay_inside_the_folder(folder: Path, capsys, location: str):
    shutil.copy("data.npz", folder.parent / "secret.bin")
    Path("link.bin").symlink_to(folder.parent / "secret.bin")
    Path("inner.bin").symlink_to("weights.bin")
    Path("up").symlink_to("..")
    line = refused_by_all(outside(location=location.format(folder=folder)), capsys, folder)
    assert "bad.onnx: tensor 'U'" in line


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"offset": "1"}, "its data end at byte 1153 of 'weights.bin', which has 1152"),
        ({"offset": str(2**62)}, "which has 1152"),
        ({"offset": "9" * 40}, "is not a number of bytes"),
        ({"offset": "-4"}, "offset '-4' of its data is not a number of bytes"),
        ({"length": "nothing"}, "length 'nothing' of its data is not a number of bytes"),
        ({"length": "٣"}, "is not a number of bytes"),
        ({"length": "1148"}, "shape [12, 24] takes 1152 bytes, its data have 1148"),
        ({"length": str(2**62)}, "shape [12, 24] takes 1152 bytes"),
        ({"location": ""}, "not inside the model's folder"),
    ],
)
def test_offsets_and_lengths_stay_inside_the_file(folder: Path, capsys, entries, reason: str):
    assert reason in refused_by_all(outside(**entries), capsys, folder)


def test_strings_lie_in_the_model(folder: Path, capsys):
    proto = outside()
    tensor = proto.graph.initializer[0]
    tensor.data_type = TensorProto.STRING
    del tensor.external_data[2]
    assert "tensor 'U': data of this type" in refused_by_all(proto, capsys, folder)


# --- tensors ------------------------------------------------------------------------------------


def first(proto: onnx.ModelProto) -> onnx.TensorProto:
    return proto.graph.initializer[0]


def reshaped(*dims: int) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        first(proto).dims[:] = dims

    return change


def typed(count: int) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        first(proto).ClearField("raw_data")
        first(proto).float_data.extend([1.0] * count)

    return change


def sparse(*dims: int) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        tensor = proto.graph.sparse_initializer.add()
        tensor.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "S"))
        tensor.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "I"))
        tensor.dims[:] = dims

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (reshaped(12, 23), "tensor 'U': shape [12, 23] takes 1104 bytes, its data have 1152"),
        (reshaped(12, 25), "tensor 'U': shape [12, 25] takes 1200 bytes"),
        (reshaped(-12, -24), "tensor 'U': shape [-12, -24] has a negative dimension"),
        (reshaped(2**62, 4), "tensor 'U': shape [4611686018427387904, 4] overflows 64 bits"),
        (reshaped(2**32, 2**32, 0), "takes 0 bytes"),
        (typed(287), "tensor 'U': shape [12, 24] takes 288 values, its data have 287"),
        (typed(0), "tensor 'U': shape [12, 24] takes 288 values, its data have 0"),
        (lambda p: setattr(first(p), "data_type", 77), "tensor 'U': element type 77 is not known"),
        (lambda p: setattr(first(p), "data_type", 0), "tensor 'U': element type 0 is not known"),
        (lambda p: setattr(first(p).segment, "begin", 1), "tensor 'U': its data come in segments"),
        (sparse(2**20, 2**20), "sparse tensor 'S': shape [1048576, 1048576] is too large"),
        (sparse(-1, 4), "sparse tensor 'S': shape [-1, 4] has a negative dimension"),
        (
            lambda p: setattr(p.graph.input[0].type.tensor_type, "elem_type", 99),
            "value 'x': element type 99 is not known",
        ),
    ],
)
def test_tensors_whose_shape_and_data_disagree(folder: Path, capsys, change: Change, reason: str):
    proto = sound()
    change(proto)
    assert reason in refused_by_all(proto, capsys, folder)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_complex_numbers_are_two_values_each(count: int):
    proto = sound()
    values = np.arange(count) * (1 + 2j)
    proto.graph.initializer.append(
        helper.make_tensor("odd", TensorProto.COMPLEX64, [count], values.astype(np.complex64))
    )
    np.testing.assert_array_equal(ModelStore.load(proto).array(proto.graph.initializer[-1]), values)
    proto.graph.initializer[-1].float_data.append(0.0)
    with pytest.raises(ModelError, match="tensor 'odd': shape"):
        ModelStore.load(proto)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float4_e2m1fn", "bfloat16", "bool", "int8"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_packed_types_are_counted_as_they_lie(dtype: str, count: int):
    import ml_dtypes

    kind = np.dtype(bool) if dtype == "bool" else np.dtype(getattr(ml_dtypes, dtype, dtype))
    proto = sound()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(count, kind), "odd"))
    assert ModelStore.load(proto).array(proto.graph.initializer[-1]).shape == (count,)
    if count:
        proto.graph.initializer[-1].raw_data += b"\0"
        with pytest.raises(ModelError, match="tensor 'odd': shape"):
            ModelStore.load(proto)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files(folder: Path, capsys, share: float):
    raw = sound().SerializeToString()
    assert "bad.onnx: " in refused_by_all(raw[: int(share * len(raw))], capsys, folder)


def test_files_of_other_kinds(folder: Path, capsys):
    for raw in (b"\x89PNG\r\n\x1a\n" + bytes(64), b"PK\x03\x04", Path("data.npz").read_bytes()):
        assert "bad.onnx: not an ONNX model" in refused_by_all(raw, capsys, folder)


# --- graphs -------------------------------------------------------------------------------------


def node(k: int, **fields: object) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        for name, value in fields.items():
            if name in ("input", "output"):
                getattr(proto.graph.node[k], name)[:] = value
            else:
                setattr(proto.graph.node[k], name, value)

    return change


def inside_if(proto: onnx.ModelProto) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["lost"], ["in"])],
        "inner",
        [],
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, None)],
    )
    made = helper.make_node("If", ["flag"], ["i"], name="branch", then_branch=graph)
    made.attribute.append(helper.make_attribute("else_branch", graph))
    proto.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    proto.graph.node.append(made)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (node(0, input=["y", "U"]), "waits for its own output"),
        (node(1, input=["r"]), "Relu 'middle' waits for its own output"),
        (node(1, input=["lost"]), "Relu 'middle' reads 'lost', which nothing makes"),
        (node(2, output=["z"]), "nothing makes the output 'y'"),
        (lambda p: p.graph.node.append(helper.make_node("Neg", ["x"], ["h"])), "made twice"),
        (inside_if, "If 'branch' reads 'lost', which nothing makes"),
    ],
)
def test_cycles_and_names_that_dangle(folder: Path, capsys, change: Change, reason: str):
    proto = sound()
    change(proto)
    (folder / "bad.onnx").write_bytes(proto.SerializeToString())
    for words in verbs("bad.onnx"):
        line = refused(words, capsys, folder)
        assert "bad.onnx: " in line
        assert reason in line or words[0] == "validate"  # whose models are not searched for sites


def test_nodes_may_stand_in_any_order():
    proto = sound()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert analyze(proto, ROWS).layers


def attribute(k: int, made: onnx.AttributeProto, op_type: str = "") -> Change:
    def change(proto: onnx.ModelProto) -> None:
        proto.graph.node[k].op_type = op_type or proto.graph.node[k].op_type
        proto.graph.node[k].attribute.append(made)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (attribute(0, helper.make_attribute("alpha", "text"), "Gemm"), "alpha"),
        (attribute(0, helper.make_attribute("group", [1, 2]), "Conv"), "cannot load it"),
        (
            attribute(
                0, onnx.AttributeProto(name="alpha", type="FLOAT", ref_attr_name="a"), "Gemm"
            ),
            "Gemm 'first': attribute 'alpha' refers to another one",
        ),
        (node(0, input=[]), "bad.onnx"),
        (node(0, output=[]), "reads 'h', which nothing makes"),
        (lambda p: p.graph.ClearField("output"), "bad.onnx"),
        (lambda p: setattr(p, "ir_version", 999), "IR version"),
    ],
)
def test_nodes_that_onnx_does_not_know_that_way(folder: Path, capsys, change: Change, reason: str):
    proto = sound()
    change(proto)
    assert reason in refused_by_all(proto, capsys, folder)


# --- names --------------------------------------------------------------------------------------


def test_names_that_are_no_text(folder: Path, capsys):
    for name in ("first", "U"):
        proto = sound()
        raw = proto.SerializeToString().replace(name.encode(), b"\xff" * len(name))
        assert "is not UTF-8: b'\\xff" in refused_by_all(raw, capsys, folder)


SPOOF = "w[bold red]\n[/]\x1b[2J\r\u202eonnx-utilrank: done"


def renamed(proto: onnx.ModelProto, **names: str) -> onnx.ModelProto:
    for old, new in names.items():
        for each in proto.graph.node:
            each.input[:] = [new if name == old else name for name in each.input]
            each.output[:] = [new if name == old else name for name in each.output]
            each.name = new if each.name == old else each.name
        for held in (*proto.graph.initializer, *proto.graph.input, *proto.graph.output):
            held.name = new if held.name == old else held.name
    return proto


@pytest.mark.usefixtures("folder")
def test_names_are_neither_markup_nor_control(capsys):
    spoofed = {name: f"{SPOOF}{name}" for name in ("first", "last", "U", "D", "h", "y")}
    proto = renamed(sound(), **spoofed)
    proto.graph.name = SPOOF
    proto.graph.node.append(helper.make_node("MatMul", ["x", "x"], [f"{SPOOF}z"], name=SPOOF))
    del proto.graph.node[-1]
    onnx.save_model(proto, "spoof.onnx")
    extra = ["--moves", "low-rank", "--method", "one-sided"]
    for words in verbs("spoof.onnx"):
        words += extra if words[0] in ("compress", "sweep") else []
        assert main(words) == 0
        streams = capsys.readouterr()
        for text in (streams.out, streams.err):
            assert all(line.isprintable() for line in text.splitlines())
        assert "\\x1b[2J" in streams.out or words[0] == "sweep"  # which names no weight
    report = json.loads(Path("report.json").read_text())
    assert report["passed"]
    replayed = RankPlan.load("p.json")
    assert {entry.site for entry in replayed.entries} == {spoofed["U"], spoofed["D"]}


@pytest.mark.parametrize("change", [node(1, op_type=SPOOF), node(1, input=[SPOOF])])
def test_messages_are_one_line_whatever_the_names(folder: Path, capsys, change: Change):
    proto = sound()
    change(proto)
    line = refused_by_all(proto, capsys, folder)
    assert "\\x1b[2J" in line
    with pytest.raises(ModelError) as caught:
        analyze(proto, ROWS)
    assert str(caught.value).isprintable()


@pytest.mark.usefixtures("folder")
def test_warnings_are_one_line_whatever_the_names(capsys):
    np.savez("odd.npz", **ROWS, **{SPOOF: ROWS["x"]})
    onnx.save_model(sound(), "good.onnx")
    assert main(["analyze", "good.onnx", "--data", "odd.npz"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert "the model has no input" in line


# --- size ---------------------------------------------------------------------------------------


def long(op_type: str, many: int) -> onnx.ModelProto:
    """The model with many nodes that change nothing in the place of the Relu."""
    proto = sound()
    extra = ["zero"] if op_type == "Add" else []
    proto.graph.initializer.append(numpy_helper.from_array(np.float32([0.0]), "zero"))
    names = ["h", *(f"v{k}" for k in range(many - 1)), "r"]
    last = proto.graph.node.pop()
    proto.graph.node.pop()
    proto.graph.node.extend(
        helper.make_node(op_type, [one, *extra], [two]) for one, two in itertools.pairwise(names)
    )
    proto.graph.node.append(last)
    return proto


def test_what_looks_at_every_node_takes_many():
    proto = long("Add", 50_000)
    index = GraphIndex.build(ModelStore.load(proto))
    sites, _ = find_sites(index)
    assert [site.key for site in sites] == ["U", "D"]
    assert len(values_followed(index)) == 50_003
    left, values, right = np.linalg.svd(site_matrix(index, sites[0]), full_matrices=False)
    factors = factored(left[:, :3] * values[:3], right[:3])
    made = rewrite(index, [Replacement(site=sites[0], factors=factors, lost_mean=None)])
    assert len(made.proto.graph.node) == 50_003


def test_what_takes_nodes_apart_takes_many():
    many = 30_000
    proto = model(
        SIGNATURE, "y0 = Relu(x)", domains=', "com.microsoft" : 1', V=noise(0, SIZE, SIZE)
    )
    proto.graph.node.extend(
        helper.make_node("FusedMatMul", [f"y{k}", "V"], [f"y{k + 1}"], domain="com.microsoft")
        for k in range(many)
    )
    proto.graph.output[0].name = f"y{many}"
    (site,), skips = find_sites(index_model(ModelStore.load(proto)))
    assert len(site.uses) == many
    assert site.uses[-1].label == f"FusedMatMul 'y{many}'"
    assert not skips


@pytest.mark.parametrize("op_type", ["Identity", "Add"])
def test_models_of_many_nodes_are_made_smaller(op_type: str):
    proto = long(op_type, 3_000)
    config = CompressConfig(param_ratio=0.9, method="one-sided", force=True)
    result = compress(proto, ROWS, config)
    assert len(result.plan.factored) == 2
    feed = {"x": ROWS["x"][:4]}
    np.testing.assert_allclose(run(result.model, feed)["y"], run(proto, feed)["y"], atol=1e-3)


def test_constants_are_not_followed_through_endless_chains():
    proto = sound()
    del proto.graph.node[:]
    many = 5_000
    names = ["U", *(f"u{k}" for k in range(1, many + 1))]
    proto.graph.node.extend(
        helper.make_node("Identity", [one], [two]) for one, two in itertools.pairwise(names)
    )
    for k, weight in enumerate((names[DEEPEST], names[DEEPEST + 1], names[-1])):
        proto.graph.node.append(helper.make_node("MatMul", ["x", weight], [f"h{k}"]))
    proto.graph.node.append(helper.make_node("MatMul", ["h0", "D"], ["y"]))
    index = GraphIndex.build(ModelStore.load(proto))
    held = index.constant(names[DEEPEST])
    assert held is index.constant(names[1])  # and not a copy a node
    assert index.constant(names[DEEPEST + 1]) is None
    report = analyze(proto, ROWS)
    assert [layer.site for layer in report.layers] == ["U@h0", "D"]  # by what Identity only names
    assert {s.reason for s in report.skipped} == {"no operand is a constant weight"}


# --- values that are not finite -----------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_weights_that_are_not_finite_are_left_alone_where_they_do_no_harm(capsys):
    proto = sound()
    for name, value in (("N", np.nan), ("P", np.inf)):
        weight = noise(7, SIZE, WIDE).astype(np.float32)
        weight[3, 4] = value
        proto.graph.initializer.append(numpy_helper.from_array(weight, name))
        proto.graph.node.append(helper.make_node("MatMul", ["x", name], [f"unused_{name}"]))
    onnx.save_model(proto, "odd.onnx")
    words = ["compress", "odd.onnx", "--data", "data.npz", "-o", "out.onnx", "--plan-out", "p.json"]
    assert main([*words, "--param-ratio", "0.9", "--moves", "low-rank", "--force"]) == 0
    assert "Left alone: 2 x the weight holds NaN or infinity" in capsys.readouterr().out
    plan = RankPlan.load("p.json")
    assert {s.node for s in plan.skipped} == {"MatMul 'unused_N'", "MatMul 'unused_P'"}
    assert {e.site for e in plan.factored} <= {"U", "D"}
    assert plan.factored


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_and_reach_an_output(folder: Path, capsys, value: float):
    proto = sound()
    weight = numpy_helper.to_array(first(proto)).copy()
    weight[3, 4] = value
    first(proto).CopyFrom(numpy_helper.from_array(weight, "U"))
    onnx.save_model(proto, "bad.onnx")
    for words in verbs("bad.onnx"):
        assert "output 'y' holds NaN or infinity" in refused(words, capsys, folder)


@pytest.mark.parametrize("op_type", ["MatMul", "Gemm", "Conv"])
@pytest.mark.parametrize("method", ["one-sided", "two-sided"])
def test_constants_that_mask_by_infinity_are_no_biases(op_type: str, method: str):
    mask = np.zeros(SIZE, np.float32)
    mask[::3] = -np.inf
    body = "h = MatMul(x, U) r = Relu(h) "
    weight = numpy_helper.to_array(sound().graph.initializer[1])
    match op_type:
        case "MatMul":
            body += "z = MatMul(r, D) m = Add(z, mask) y = Softmax(m)"
        case "Gemm":
            body += "m = Gemm(r, D, mask) y = Softmax(m)"
        case "Conv":
            body += "i = Unsqueeze(r, two) z = Conv(i, D, mask) m = Squeeze(z, two)"
            body += " y = Softmax(m)"
            weight = weight.T[:, :, None]
    proto = model(
        SIGNATURE, body, U=numpy_helper.to_array(first(sound())), D=weight, mask=mask,
        two=np.array([2]),
    )  # fmt: skip
    config = CompressConfig(param_ratio=0.9, method=method, force=True, moves=("low-rank",))
    result = compress(proto, ROWS, config)
    assert "D" in {e.site for e in result.plan.factored}
    feed = {"x": ROWS["x"][:4]}
    np.testing.assert_allclose(run(result.model, feed)["y"], run(proto, feed)["y"], atol=1e-3)


@pytest.mark.parametrize("method", ["one-sided", "two-sided"])
def test_values_whose_squares_overflow(folder: Path, capsys, method: str):
    proto = sound()
    weight = 1e-25 * numpy_helper.to_array(first(proto))
    first(proto).CopyFrom(numpy_helper.from_array(weight.astype(np.float32), "U"))
    onnx.save_model(proto, "bad.onnx")
    np.savez("large.npz", x=(1e25 * ROWS["x"]).astype(np.float32))
    words = ["compress", "bad.onnx", "--data", "large.npz", "-o", "out.onnx", "--method", method]
    line = refused([*words, "--param-ratio", "0.7"], capsys, folder)
    assert "bad.onnx: " in line
    assert "overflow" in line
    if method == "two-sided":  # by default, what needs no gradients is tried before it ends
        line = refused([*words[:-2], "--param-ratio", "0.7"], capsys, folder)
        assert "value 'x' at the graph input holds NaN or infinity, or its squares" in line


# --- plans --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> dict[str, object]:
    config = CompressConfig(param_ratio=0.9, moves=("low-rank",), force=True, refit=False)
    found = compress(sound(), ROWS, config, dry_run=True).plan
    assert found.factored
    return json.loads(found.to_json())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_sha256": "0" * 64}, "the plan is for another model"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({SPOOF: 1}, "unknown key"),
        ({"schema": 99}, "plan schema 99 is not"),
        ({"entries": None}, "'entries' has the wrong type"),
        ({"entries": [{"rank": 1}]}, "entry 0"),
        ({"method": SPOOF}, "method"),
        ({"rank": 0}, "rank 0 is not between 1 and 12"),
        ({"rank": 13}, "rank 13 is not between 1 and 12"),
        ({"rank": -1}, "rank -1 is not between"),
        ({"rank": 10**40}, "is not between"),
        ({"m": 10**12, "d": 10**12, "rank": 10**11}, "the plan has 'U' as"),
        ({"site": "V"}, "which is no site"),
        ({"extra_key": 1}, "unknown key 'extra_key'"),
    ],
)
def test_plans_that_do_not_fit(folder: Path, capsys, plan, change: dict, reason: str):
    changed = json.loads(json.dumps(plan))
    entry = changed["entries"][0]
    assert entry["site"] == "U"
    of_entry = set(change) & {*entry, "extra_key"}
    (entry if of_entry else changed).update(change)
    Path("plan.json").write_text(json.dumps(changed))
    onnx.save_model(sound(), "good.onnx")
    words = ["compress", "good.onnx", "--data", "data.npz", "-o", "out.onnx", "--plan", "plan.json"]
    status = 2 if "method" in change else 5
    assert reason in refused(words, capsys, folder, status=status)


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "1" * 5_000, '{"schema": 1e999}', "\ufeff{}", '"\\ud800"', "NaN"]
)
def test_plans_that_are_no_plans(folder: Path, capsys, text: str):
    Path("plan.json").write_text(text, encoding="utf8")
    onnx.save_model(sound(), "good.onnx")
    words = ["compress", "good.onnx", "--data", "data.npz", "-o", "out.onnx", "--plan", "plan.json"]
    assert "plan.json: " in refused(words, capsys, folder)


# --- data ---------------------------------------------------------------------------------------


def archive(path: str, raw: bytes, *, stated: int | None = None, method: int = 8) -> None:
    """An .npz with one array x, whose directory may state another size than it has."""
    with zipfile.ZipFile(path, "w", method) as held:
        held.writestr("x.npy", raw)
        if stated is not None:
            held.filelist[0].file_size = stated


def header(shape: str, kind: str = "<f4") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


@pytest.mark.parametrize(
    ("raw", "stated", "reason"),
    [
        (npy(ROWS["x"]), 2**50, "its arrays take 1,125,899,906,842,624 bytes, more than the"),
        (npy(ROWS["x"]), 100, "cannot be read"),
        (header(f"({2**50}, 12)") + bytes(480), None, "cannot be read"),
        (header(f"({2**62}, {2**62})"), None, "cannot be read"),
        (header(f"({2**40}, 0)"), None, "wants float32[n, 12], got float32"),
        (header("(40, 12)")[:-20], None, "cannot be read"),
        (npy(np.array([{"a": 1}, print], dtype=object)), None, "allow_pickle=False"),
        (b"no array at all", None, "got bytes"),
    ],
)
def test_archives_that_cannot_be_used(folder: Path, capsys, raw: bytes, stated, reason: str):
    archive("bad.npz", raw, stated=stated)
    onnx.save_model(sound(), "good.onnx")
    for words in verbs("good.onnx", "bad.npz"):
        line = refused(words, capsys, folder)
        assert "bad.npz: " in line
        assert reason in line


@pytest.mark.usefixtures("folder")
def test_only_arrays_for_the_model_count():
    with zipfile.ZipFile("more.npz", "w") as held:
        held.writestr("x.npy", npy(ROWS["x"]))
        held.writestr("y.npy", b"")
        held.filelist[1].file_size = 2**50
    onnx.save_model(sound(), "good.onnx")
    assert main(["analyze", "good.onnx", "--data", "more.npz"]) == 0


def test_samples_without_values_are_counted_too(tmp_path: Path):
    proto = model("(float[n,m] x) => (float[n,m] y)", "y = Neg(x)")
    path = tmp_path / "empty.npy"
    path.write_bytes(header(f"({2**40}, 0)"))
    assert available_memory() is None or available_memory() < 512 * 2**40
    with pytest.raises(DataError, match="1,099,511,627,776 samples are more than memory can list"):
        open_data(path, ModelStore.load(proto).inputs)
    texts = model("(string[n] x) => (string[n] y)", "y = Identity(x)")
    path.write_bytes(header(f"({2**40},)", "<U0"))
    with pytest.raises(DataError, match="samples are more than memory can list"):
        open_data(path, ModelStore.load(texts).inputs)


def test_samples_are_counted_with_what_lists_of_them_take(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "available_memory", lambda: 512 * 1000)
    limits.check_count("x.npy", 1000)
    with pytest.raises(DataError, match="1,001 samples are more than memory can list"):
        limits.check_count("x.npy", 1001)
    monkeypatch.setattr(limits, "available_memory", lambda: None)
    limits.check_count("x.npy", 2**60)


@pytest.mark.parametrize(
    ("figures", "container", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable:   5 kB\n", "7000\n", 5120),
        ("MemTotal: 9 kB\nMemAvailable:   5 kB\n", "5000\n", 5000),
        ("MemTotal: 9 kB\nMemAvailable:   5 kB\n", "max\n", 5120),
        ("MemTotal: 9 kB\nMemAvailable:   5 kB\n", None, 5120),
        ("", "7\n", 7),
    ],
)
def test_memory_is_what_the_system_and_the_container_leave(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figures: str,
    container: str | None,
    expected: int,
):
    for name, text in (("_FIGURES", figures), ("_CONTAINER", container)):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(limits, name, path)
    assert available_memory() == expected


def test_damaged_members_of_every_method(tmp_path: Path):
    inputs = ModelStore.load(sound()).inputs
    path = tmp_path / "x.npz"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        archive(str(path), npy(ROWS["x"]), method=method)
        assert len(open_data(path, inputs)) == 40
        raw = bytearray(path.read_bytes())
        for k in range(60, 200, 7):
            raw[k] ^= 0x55
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"x\.npz"):
            open_data(path, inputs)


def test_pickles_are_never_opened(folder: Path, capsys):
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return os.mkdir, ("sprung",)

    onnx.save_model(sound(), "good.onnx")
    Path("bad.npy").write_bytes(npy(np.array([Trap()], dtype=object)))
    for words in verbs("good.onnx", "bad.npy"):
        refused(words, capsys, folder)
    assert not Path("sprung").exists()


# --- custom operators ---------------------------------------------------------------------------


def custom() -> onnx.ModelProto:
    proto = sound()
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Odd", "of.mine"
    proto.opset_import.add(domain="of.mine", version=3)
    return proto


def test_unknown_operators_are_named_with_their_node(folder: Path, capsys):
    line = refused_by_all(custom(), capsys, folder)
    assert "bad.onnx: Odd 'middle': ONNX Runtime does not have this operator" in line
    assert "'of.mine', version 3" in line
    assert "--custom-op-library" in line
    proto = sound()
    proto.graph.node[1].op_type = "Rellu"
    assert "Rellu 'middle'" in refused_by_all(proto, capsys, folder)


@pytest.mark.parametrize(
    ("library", "reason"),
    [("gone.so", "no such file"), ("data.npz", "cannot be loaded"), (".", "no such file")],
)
def test_libraries_that_cannot_be_loaded(folder: Path, capsys, library: str, reason: str):
    onnx.save_model(sound(), "good.onnx")
    for words in verbs("good.onnx"):
        words += ["--custom-op-library", library]
        line = refused(words, capsys, folder, status=2)
        assert f"custom op library {library}: {reason}" in line
    with pytest.raises(ConfigError, match=reason):
        validate(sound(), sound(), ROWS, ValidateConfig(custom_op_libraries=(library,)))


LIBRARY = """
#include <stdio.h>
#include <stdlib.h>
void *RegisterCustomOps(void *options, const void *api) {
    FILE *log = fopen(getenv("REGISTERED"), "a");
    fputs("x", log);
    fclose(log);
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_every_session_gets_the_libraries(folder: Path, monkeypatch):
    Path("ops.c").write_text(LIBRARY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "ops.so", "ops.c"], check=True)
    monkeypatch.setenv("REGISTERED", str(folder / "log"))
    onnx.save_model(sound(), "good.onnx")
    sessions = importlib.import_module("onnx_utilrank.runtime.sessions")
    opened = []

    class Counted(sessions.ort.InferenceSession):  # the real one, and a note that it was opened
        def __init__(self, *args, **kwargs):
            opened.append(1)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(sessions.ort, "InferenceSession", Counted)
    for words in verbs("good.onnx"):
        opened.clear()
        Path("log").write_text("")
        assert main([*words, "--custom-op-library", "ops.so"]) == 0
        # Once more as the options are checked.
        assert len(Path("log").read_text()) == len(opened) + 1 > 1


# --- killed -------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path

import onnx
from onnx_utilrank.model.store import ModelStore

target = Path(sys.argv[1])
renames = [Path.replace, Path.unlink]

def dying(moment):
    count = iter(range(100))
    def wrap(method):
        def call(self, *args, **kwargs):
            if next(count) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            result = method(self, *args, **kwargs)
            if next(count) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    Path.replace, Path.unlink = map(wrap, renames)

for moment in range(100):
    child = os.fork()
    if child == 0:
        dying(moment)
        ModelStore.load(sys.argv[2]).save(target)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    arrays = [ModelStore.load(target)]
    values = {float(s.array(t).flat[0]) for s in arrays for t in s.tensors()}
    print(os.WIFSIGNALED(status), sorted(values), flush=True)
    if not os.WIFSIGNALED(status):
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    ("before", "after"), [("outside", "outside"), ("outside", "inside"), ("inside", "outside")]
)
def test_killed_at_any_moment_the_target_is_old_or_new(folder: Path, before: str, after: str):
    for name, value, form in (("target.onnx", 1.0, before), ("source.onnx", 2.0, after)):
        proto = sound()
        for tensor in proto.graph.initializer:
            held = np.full(tuple(tensor.dims), value, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(held, tensor.name))
        onnx.save_model(
            proto,
            name,
            save_as_external_data=form == "outside",
            location=f"{name}.data",
            size_threshold=0,
        )
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "target.onnx", "source.onnx"],
        capture_output=True,
        text=True,
        check=True,
    )
    *killed, last = done.stdout.splitlines()
    assert len(killed) >= 4
    assert last == "False [2.0]"
    found = [line.removeprefix("True ") for line in killed]
    assert set(found) <= {"[1.0]", "[2.0]"}  # one or the other, never a mixture
    assert found == sorted(found)
    leftovers = [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]
    assert all(name.startswith(".target.onnx") for name in leftovers)


def test_killed_while_it_calibrates_it_has_written_nothing(folder: Path):
    onnx.save_model(sound(), "good.onnx")
    Path("out.onnx").write_bytes(b"what was here")
    Path("slow.py").write_text(
        "import time\nfrom pathlib import Path\nimport numpy as np\n"
        "def samples():\n"
        "    yield from ({'x': np.ones((1, 12), np.float32)} for _ in range(5))\n"
        "    Path('started').touch()\n"
        "    time.sleep(600)\n"
    )
    before = files(folder)
    words = ["compress", "good.onnx", "-o", "out.onnx", "--data", "slow:samples"]
    words += ["--param-ratio", "0.7", "--plan-out", "p.json", "--report", "r.json"]
    process = subprocess.Popen([sys.executable, "-m", "onnx_utilrank", *words])
    while not Path("started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    after = files(folder)
    del after["started"]
    assert after == before


# --- what the fuzzer found ----------------------------------------------------------------------


def test_softmax_over_samples_is_no_choice_of_classes():
    body = "h = MatMul(x, U) r = Relu(h) s = MatMul(r, D) y = Softmax<axis = 0>(s)"
    weights = {t.name: numpy_helper.to_array(t) for t in sound().graph.initializer}
    rows = {"x": ROWS["x"][:37]}  # the last run is shorter
    for method in ("one-sided", "two-sided"):
        config = CompressConfig(param_ratio=0.9, method=method, force=True)
        found = compress(model(SIGNATURE, body, **weights), rows, config)
        assert found.quality is not None
        assert found.quality.divergence is not None
        assert found.quality.divergence.agreement is None


def test_outputs_whose_last_extent_varies_are_compared_by_value():
    proto = model(
        f"(float[n,s,{SIZE}] x) => (float[n,s,s] y)",
        """
            h = MatMul(x, U) r = Relu(h) d = MatMul(r, D)
            t = Transpose<perm = [0, 2, 1]>(x) y = MatMul(d, t)
        """,
        **{t.name: numpy_helper.to_array(t) for t in sound().graph.initializer},
    )
    feeds = [{"x": noise(k, 1, k % 3 + 2, SIZE).astype(np.float32)} for k in range(12)]
    config = CompressConfig(param_ratio=0.9, moves=("low-rank",), force=True)
    result = compress(proto, feeds, config)
    found, report = result.quality, result.validation
    assert found is not None
    assert report is not None
    assert found.divergence is not None
    assert report.snr_db is not None
    # ½ of the squared error relative to the variance, as for any output of values.
    assert found.divergence.snr_db == pytest.approx(report.snr_db, abs=6.0)


# --- the fuzzer ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzz() -> Iterator[object]:
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("fuzz")
    sys.path.remove(str(TOOLS))


QUICK = ("model, loaded", "npz", "npy", "test set")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(name=st.sampled_from(QUICK), seed=st.integers(0, 2**32))
def test_loaders_take_or_refuse_whatever_they_get(fuzz, tmp_path_factory, name: str, seed: int):
    place = tmp_path_factory.mktemp("case")
    fuzz.TARGETS[name].make(random.Random(seed), place)
    outcome, detail = fuzz.attempt(name, place)
    assert not outcome.startswith("FAILED"), detail


def test_the_fuzzer_tells_how_cases_end(tmp_path: Path):
    command = [sys.executable, str(TOOLS / "fuzz.py"), "--seconds", "8", "--seed", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["input", "outcome", "cases"]
    assert len(rows) > 4
    assert not (tmp_path / "fuzz_failures").exists()


def test_the_fuzzer_reports_what_fails(fuzz, tmp_path: Path, monkeypatch):
    def broken(folder: Path) -> None:
        raise KeyError(folder.name)

    target = fuzz.TARGETS["npy"]
    monkeypatch.setitem(fuzz.TARGETS, "npy", fuzz.Target(target.make, broken, 1))
    outcome, detail = fuzz.attempt("npy", tmp_path)
    assert outcome == "FAILED: KeyError"
    assert "KeyError" in detail


def test_errors_are_one_line_by_themselves():
    assert str(UtilrankError("a\nb\x1b[0m  c\u2028d")) == "a b\\x1b[0m c d"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(UtilrankError("naïve 模型")) == "naïve 模型"
