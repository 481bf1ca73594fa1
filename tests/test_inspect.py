"""What a file holds and what could be factored, told without data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import MICROSOFT, model, noise
from onnx import TensorProto, helper, numpy_helper

from onnx_utilrank import ModelError, UtilrankError, inspect
from onnx_utilrank.cli.main import main
from onnx_utilrank.inspection.report import InspectionReport
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.torch_graph.support import obstacles

ROOT = Path(__file__).resolve().parent.parent
VIT, CNN = (ROOT / "models" / f"digits_{name}.onnx" for name in ("vit", "cnn"))
ZOO = Path(os.environ.get("ONNX_UTILRANK_ZOO") or ROOT.parent / "shared" / "zoo")


def single(seed: int, *shape: int) -> np.ndarray:
    return noise(seed, *shape).astype(np.float32)


def reasons(report: InspectionReport) -> dict[str, str]:
    return {s.op_type: s.reason for s in report.skipped}


@pytest.mark.parametrize("path", [VIT, CNN], ids=lambda p: p.stem)
def test_figures_are_those_of_the_file(path):
    report, proto = inspect(path), onnx.load(path)
    assert report.file_bytes == path.stat().st_size
    assert report.nodes == len(proto.graph.node)
    assert sum(o.parameters for o in report.operators) == report.parameters
    assert sum(o.nodes for o in report.operators) == report.nodes
    held = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    for site in report.sites:
        assert site.parameters == site.m * site.d
        assert site.share == site.parameters / report.parameters
        if site.site in held:
            assert np.prod(held[site.site]) == site.parameters
        # By trying, not by the formula: factors at break-even are smaller, one rank more are not.
        ranks = [
            r for r in range(1, min(site.m, site.d) + 1) if r * (site.m + site.d) < site.m * site.d
        ]
        assert site.break_even_rank == len(ranks)
    assert report.load_fault is None
    assert report.gradients == ()
    assert report.factorable == sum(s.parameters for s in report.sites)
    assert report.hidden
    shrinking = {name for hidden in report.hidden for name in hidden.sites}
    assert shrinking == {s.site for s in report.sites if "shrink" in s.moves}


def test_tables_and_json(capsys, tmp_path):
    report = tmp_path / "report.json"
    assert main(["inspect", str(VIT), "--report", str(report)]) == 0
    out = capsys.readouterr().out
    found = json.loads(report.read_text())
    for text in (
        *(s["site"] for s in found["sites"]),
        "image",
        "Gradients can be had",
        "break-even",
    ):
        assert text in out
    assert main(["inspect", str(VIT), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again.pop("run")["command"][1:] == ["inspect", str(VIT), "--json"]
    assert again == {k: v for k, v in found.items() if k != "run"}
    assert found["inputs"] == [
        {"name": "image", "dtype": "float32", "shape": found["inputs"][0]["shape"]}
    ]


def test_weights_that_others_read_and_ties_are_said():
    table = single(1, 40, 8)
    proto = model(
        "(int64[n] t, float[n,6] x) => (float[n,40] y, float[n,4] z, float[6,4] s)",
        "e = Gather(E, t) T = Transpose<perm=[1,0]>(E) y = MatMul(e, T) z = MatMul(x, S) "
        "s = Identity(S)",
        E=table,
        S=single(2, 6, 4),
    )
    report = inspect(proto)
    tied = {s.op_type: s for s in report.sites if s.tied}
    assert tied["Gather"].tied == tied["MatMul"].site
    assert tied["MatMul"].tied == tied["Gather"].site
    (shared,) = (s for s in report.sites if not s.tied)
    assert not shared.freed
    assert report.factorable == table.size
    assert sum(o.parameters for o in report.operators) == report.parameters == 40 * 8 + 6 * 4


def test_what_is_left_alone_and_what_is_missing_has_a_reason():
    proto = model(
        "(float[1,n,8] x, int8[n,8] q) => (float[1,n,8] y, float[n,4] z)",
        "v = Tanh(W) r, h = LSTM<hidden_size=8>(x, v, R) y = Squeeze(r, axis) "
        "w = DequantizeLinear(Q, scale, zero) f = DequantizeLinear(q, scale, zero) "
        "z = MatMul(f, w)",
        W=single(1, 1, 32, 8),
        R=single(2, 1, 32, 8),
        axis=np.array([1]),
        Q=noise(3, 8, 4).astype(np.int8),
        scale=np.float32(0.5),
        zero=np.int8(0),
    )
    report = inspect(proto)
    assert not report.sites
    assert "recurrent" in reasons(report)["LSTM"]
    assert "quantized" in reasons(report)["MatMul"]
    assert report.quantized_nodes == 2
    assert report.factorable == 0
    unknown = model("(float[1] x) => (float[1] y)", "y = test.Thing(x)", domains=', "test" : 1')
    report = inspect(unknown)
    assert "'Thing'" in report.load_fault or "Thing" in report.load_fault
    assert report.hidden is None
    assert report.gradients == ("torch does not run test.Thing (1 x, first Thing 'y')",)


def test_parameters_count_for_who_computes_with_them():
    proto = model(
        "(float[n,6] x) => (float[n,4] y, float[4,6] t, float[2] o)",
        "k = Constant<value = float[2] {1, 2}>() o = Identity(k) "
        "t = Transpose<perm=[1,0]>(S) c = Cast<to=1>(W) y = MatMul(x, c)",
        S=single(1, 6, 4),
        W=noise(2, 6, 4),
        unread=single(3, 5),
    )
    counts = {o.op_type: o.parameters for o in inspect(proto).operators if o.parameters}
    assert counts == {"MatMul": 24, "(an output)": 26, "(read by nothing)": 5}


def test_parameters_in_subgraphs_and_functions_count_once():
    inner = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["i"])],
        "inner",
        [],
        [helper.make_tensor_value_info("i", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(3, np.float32), "c")],
    )
    proto = model(
        "(float[3] x, bool b) => (float[3] y)",
        "y = own.twice(u)",
        domains=', "own" : 1',
        functions='<domain: "own", opset_import: ["" : 17]> twice (a) => (b) '
        "{ k = Constant<value_floats=[2.0]>() t = Constant<value = float[1] {2}>() b = Mul(a, t) }",
    )
    node = helper.make_node("If", ["b"], ["u"], then_branch=inner, else_branch=inner)
    proto.graph.node.insert(0, node)
    counts = {o.op_type: o.parameters for o in inspect(proto).operators if o.parameters}
    assert counts == {"(in subgraphs of If)": 6, "(in function twice)": 1}


@pytest.mark.parametrize(
    ("shape", "batch"), [("4,3", 4), ("n,3", None), ("-1,3", None)], ids=["fixed", "named", "-1"]
)
def test_batch(shape, batch):
    proto = model("(float[4,3] x) => (float[n,2] y)", "y = MatMul(x, W)", W=single(1, 3, 2))
    dim = proto.graph.input[0].type.tensor_type.shape.dim[0]
    if shape[0] == "n":
        dim.dim_param = "n"
    elif shape[0] == "-":
        dim.dim_value = -1  # as some exporters write free axes
    report = inspect(proto)
    assert report.batch == batch
    assert report.load_fault is None


def test_inputs_that_cannot_be_made_up_are_said():
    proto = model(
        "(float[a,b,c,d,e,f,g,h,4] x) => (float[a,b,c,d,e,f,g,h,4] y)",
        "y = MatMul(x, W)",
        W=single(1, 4, 4),
    )
    report = inspect(proto)
    assert report.hidden is None
    assert "too large to be made up" in report.notes[0]
    assert len(report.sites) == 1


def test_names_are_printed_as_they_are(capsys):
    name = "w[bold red]\n[/]\x1b[2J\r\u202eonnx-utilrank: done"
    proto = model("(float[n,4] x) => (float[n,4] y)", "y = MatMul(x, W) ", W=single(1, 4, 4))
    proto.producer_name = proto.graph.node[0].name = name
    for value in (proto.graph.input[0], proto.graph.initializer[0]):
        value.name += name
    proto.graph.node[0].input[:] = [proto.graph.input[0].name, proto.graph.initializer[0].name]
    path = Path.cwd() / "named.onnx"
    onnx.save(proto, path)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "[bold red]" in out
    assert not {"\x1b", "\r", "\u202e"} & set(out)
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["site"] == f"W{name}"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no model", VIT.read_bytes()[:3000], None])
def test_broken_files_end_in_one_line(content, capsys):
    if content is not None:
        Path("m.onnx").write_bytes(content)
    assert main(["inspect", "m.onnx"]) == 5
    streams = capsys.readouterr()
    assert streams.out == ""
    (line,) = streams.err.splitlines()
    assert line.startswith("onnx-utilrank: error: m.onnx: ")


# Reports what anonymous memory an inspection adds at most; pages of mapped files do not count.
WATCHED = """
import re, sys, threading
from pathlib import Path
from onnx_utilrank import inspect

inspect(sys.argv[2])  # what is loaded once is none of the model's
anonymous = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
report = inspect(sys.argv[1])
done.set()
thread.join()
(site,) = report.sites
print(report.file_bytes, site.break_even_rank, report.hidden, report.notes)
print((peak - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told by Linux's /proc")
def test_a_model_beyond_two_gib_takes_little_memory():
    rows, columns = 2**15, 2**14 + 2**12
    proto = model("(float[n,r] x) => (float[n,c] y)", "y = MatMul(x, W)")
    tensor = proto.graph.initializer.add(name="W", data_type=TensorProto.FLOAT)
    tensor.dims.extend([rows, columns])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.data"), ("offset", 0), ("length", 4 * rows * columns)):
        tensor.external_data.add(key=key, value=str(value))
    with Path("w.data").open("wb") as f:
        f.truncate(4 * rows * columns)  # sparse: it takes no room
    onnx.save(proto, "large.onnx")
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "large.onnx", str(CNN)],
        capture_output=True,
        text=True,
        check=True,
    )
    figures, mebibytes = done.stdout.splitlines()
    assert figures.startswith(
        f"{4 * rows * columns + Path('large.onnx').stat().st_size} 12603 None"
    )
    assert "larger than" in figures
    assert int(mebibytes) < 64  # of 2560


@pytest.mark.zoo
@pytest.mark.skipif(not (ZOO / "torture").is_dir(), reason="there is no zoo with a torture folder")
def test_every_eighth_model_of_a_torture_folder():
    paths = [*sorted(ZOO.glob("*/model.onnx")), *sorted((ZOO / "torture").rglob("*.onnx"))[::8]]
    for path in paths:
        report = inspect(path)
        json.dumps(report.as_dict(), allow_nan=False)
        assert sum(o.parameters for o in report.operators) == report.parameters, path
        try:
            TorchGraph.build(ModelStore.load(path))
        except UtilrankError:
            assert obstacles(ModelStore.load(path)), path
        else:
            assert not obstacles(ModelStore.load(path)), path


def test_obstacles_are_those_that_torch_meets():
    text = model("(string[n] x) => (string[n] y)", "y = Identity(x)")
    old = model("(float[n] x) => (float[n] y)", "y = Abs(x)", opset=6)
    strings = model("(float[n] x) => (float[n] y, string[1] s)", "y = Abs(x) s = Identity(S)")
    strings.graph.initializer.append(helper.make_tensor("S", TensorProto.STRING, [1], [b"a"]))
    contrib = model(
        "(float[n] x) => (float[n] y)", "y = com.microsoft.Nothing(x)", domains=MICROSOFT
    )
    for proto in (old, strings, contrib):
        assert obstacles(ModelStore(proto=proto))
        with pytest.raises(ModelError):
            TorchGraph.build(ModelStore(proto=proto))
    assert obstacles(ModelStore(proto=text)) == ()
    assert inspect(text).gradients == ("no output holds floating values",)
