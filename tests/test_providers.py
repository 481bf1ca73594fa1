"""Execution providers: their names and options, why one cannot be had, and what really ran."""

import ctypes
import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from builders import model
from hypothesis import given
from hypothesis import strategies as st

from onnx_utilrank import ValidateConfig, validate
from onnx_utilrank.cli.main import main
from onnx_utilrank.errors import ConfigError, ProviderUnavailableError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.report.tables import validation_tables
from onnx_utilrank.runtime.creation import create_session, session_options
from onnx_utilrank.runtime.cuda_driver import device_fault
from onnx_utilrank.runtime.diagnosis import diagnose, missing_libraries
from onnx_utilrank.runtime.packages import runtime_packages
from onnx_utilrank.runtime.placement import read_placement
from onnx_utilrank.runtime.providers import CPU, PROVIDERS, find_provider, find_providers
from onnx_utilrank.runtime.sessions import InferenceError, open_session
from onnx_utilrank.torch_graph.placement import device_beside
from onnx_utilrank.validation.report import ModelFigures, ProviderResult
from onnx_utilrank.validation.validate import validate as validate_stores

AVAILABLE = ort.get_available_providers()
OTHERS = [name for name in ort.get_all_providers() if name not in AVAILABLE]
CUDA, TENSORRT = PROVIDERS[1:]
WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4) / 8


def linear(dtype: str = "float", weight: np.ndarray = WEIGHT) -> ModelStore:
    kind = {"float": np.float32, "float16": np.float16, "double": np.float64}[dtype]
    signature = f"({dtype}[N, 3] x) => ({dtype}[N, 4] y)"
    body = "[product] h = MatMul(x, W) [rectified] y = Relu(h)"
    return ModelStore.load(model(signature, body, W=weight.astype(kind)))


def rows(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((n, 3), dtype=np.float32)}


def without_gpu(*names: str):
    """A mark for what fails only where these providers are built in and have no device."""
    return pytest.mark.skipif(
        not set(names) <= set(AVAILABLE) or device_fault() is None,
        reason="needs a build with CUDA on a machine without a GPU",
    )


class TestNames:
    @pytest.mark.parametrize("name", AVAILABLE)
    def test_any_that_onnx_runtime_has_is_found_by_each_of_its_names(self, name):
        short = name.removesuffix("ExecutionProvider")
        found = {find_provider(n).key for n in (name, name.lower(), short, short.lower())}
        assert found == {short.lower()}
        assert find_provider(name).name == name

    @pytest.mark.parametrize("name", OTHERS)
    def test_one_that_is_not_in_this_build_says_so(self, name):
        with pytest.raises(ProviderUnavailableError) as e:
            find_provider(name)
        assert f"was built without {name}" in str(e.value)
        assert str(e.value).startswith(f"provider {name.lower().removesuffix('executionprovider')}")
        assert "To have it: " in str(e.value)

    def test_one_that_nobody_knows(self):
        with pytest.raises(ConfigError, match=r"'quux' is not known; this ONNX Runtime has: .*cpu"):
            find_provider("quux")

    def test_two_names_of_one_are_one(self):
        assert [p.key for p in find_providers(["cpu", "CPUExecutionProvider"])] == ["cpu"]

    def test_the_cpu_takes_no_options(self):
        with pytest.raises(ConfigError, match="option 'use_arena'"):
            find_provider("cpu", options={"use_arena": 0})

    def test_options_of_what_is_not_asked_for(self):
        with pytest.raises(ConfigError, match="cuda has options but is not asked for"):
            ValidateConfig(provider_options={"cuda": {"device_id": 1}})

    def test_the_device_that_torch_shares_with_them(self):
        second = dataclasses.replace(TENSORRT, options=(("device_id", "1"),))
        assert [p.cuda_device for p in (CUDA, second, CPU)] == [0, 1, None]
        assert device_beside(CPU.cuda_device) == "cpu"
        there = torch.cuda.is_available()
        assert device_beside(second.cuda_device) == ("cuda:1" if there else "cpu")


class TestDiagnosis:
    @without_gpu("CUDAExecutionProvider", "TensorrtExecutionProvider")
    @pytest.mark.parametrize("provider", [CUDA, TENSORRT], ids=lambda p: p.key)
    def test_what_is_missing_is_named(self, provider):
        with pytest.raises(ProviderUnavailableError) as e:
            open_session(linear(), provider)
        said = str(e.value)
        assert str(device_fault()) in said
        assert "an NVIDIA GPU with a driver" in said
        for library in missing_libraries(provider):
            assert library in said
            with pytest.raises(OSError, match=r"cannot open shared object file|No such file"):
                ctypes.CDLL(library)

    @without_gpu("TensorrtExecutionProvider")
    def test_what_brings_libraries_is_told_once(self):
        missing = missing_libraries(TENSORRT)
        remedies = diagnose(TENSORRT).remedies
        assert len(set(remedies)) == len(remedies)
        for stem, package in (("libnvinfer", "tensorrt"), ("libcudnn", "[cuda,cudnn]")):
            lacking = any(name.startswith(stem) for name in missing)
            assert lacking == any(package in remedy for remedy in remedies)

    def test_two_packages_at_once(self, tmp_path, monkeypatch):
        (installed,) = runtime_packages()
        folder = tmp_path / "onnxruntime_other-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-other\n")
        (folder / "top_level.txt").write_text("onnxruntime\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        both = sorted([installed, "onnxruntime-other"])
        assert list(runtime_packages()) == both
        unavailable = dataclasses.replace(CUDA, name=OTHERS[0])
        found = diagnose(unavailable)
        assert " and ".join(both) in found.faults[0]
        assert found.remedies == (f"pip uninstall {' '.join(both)}", "pip install onnxruntime-gpu")

    def test_only_the_other_package(self):
        (installed,) = runtime_packages()
        unavailable = dataclasses.replace(CUDA, name=OTHERS[0], package="onnxruntime-other")
        assert diagnose(unavailable).remedies == (
            f"pip uninstall {installed}",
            "pip install onnxruntime-other",
        )

    @pytest.mark.skipif("AzureExecutionProvider" not in AVAILABLE, reason="no Azure provider here")
    def test_a_provider_that_takes_no_node_is_not_used(self):
        # ONNX Runtime lists it among the providers of the session all the same.
        with pytest.raises(ProviderUnavailableError, match="takes none of the 2 nodes"):
            open_session(linear(), find_provider("azure"))


class TestPlacement:
    def test_it_is_what_the_profiler_sees(self, tmp_path):
        options = session_options(CPU, file_bytes=0)
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")
        # Neither is fused with the other, so that the profiler sees the nodes of the model.
        proto = model("(float[N, 3] x) => (float[N, 3] y)", "[a] h = Erf(x) [b] y = Softmax(h)")
        session = create_session(proto.SerializeToString(), CPU, options)
        session.run(None, rows(2))
        events = json.loads(Path(session.end_profiling()).read_text())
        ran = [(e["args"]["op_name"], e["args"]["provider"]) for e in events if e["cat"] == "Node"]
        placed = [(n.op_type, n.provider) for n in read_placement(session, "another").fallen]
        assert sorted(placed) == sorted(set(ran)) == [("Erf", CPU.name), ("Softmax", CPU.name)]

    def test_all_is_on_the_cpu_where_nothing_else_is(self):
        placement = open_session(linear(), CPU).placement()
        assert placement.counts == ((CPU.name, 2),)
        assert (placement.nodes, placement.fallen) == (2, ())

    def test_nodes_of_subgraphs_count(self):
        branches = "then_branch = t () => (float[N] a) { a = Relu(x) }, "
        branches += "else_branch = e () => (float[N] b) { c = Sin(x) b = Neg(c) }"
        proto = model("(float[N] x, bool p) => (float[N] y)", f"y = If(p) <{branches}>")
        assert open_session(ModelStore.load(proto), CPU).placement().nodes == 4

    def test_what_fell_back_is_in_the_report(self):
        # Read back for another provider than the one it ran on, as for any that takes no node.
        fallen = read_placement(open_session(linear(), CPU).raw, "QuuxExecutionProvider")
        assert [(n.name, n.op_type) for n in fallen.fallen] == [
            ("product", "MatMul"),
            ("rectified", "Relu"),
        ]
        report = validated(linear())
        (result,) = report.providers
        result = dataclasses.replace(result, candidate_nodes=fallen)
        report = dataclasses.replace(report, providers=(result,))
        assert "2 of 2 nodes of the candidate do not run on CPU" in " ".join(report.notes)
        nodes = report.as_dict()["providers"][0]["nodes"]
        assert nodes["reference"] == {"counts": {CPU.name: 2}, "fallen": []}
        assert nodes["candidate"]["fallen"][0]["name"] == "product"
        (table,) = (t for t in list(validation_tables(report)) if columns(t)[:1] == ["node"])
        assert table.row_count == 2


def columns(table: object) -> list[str]:
    return [str(c.header) for c in getattr(table, "columns", [])]


def validated(candidate: ModelStore, *providers):
    figures = ModelFigures(parameters=1, file_bytes=1, flops=1)
    return validate_stores(
        linear(),
        candidate,
        [rows(5), rows(2, seed=1)],
        samples=7,
        providers=providers or [CPU],
        figures=(figures, figures),
        seconds=0.0,
    )


class TestProviders:
    def test_the_reference_is_compared_with_itself_on_the_first(self):
        other = dataclasses.replace(CPU, key="again")
        first, second = validated(linear(weight=WEIGHT + 1), CPU, other).providers
        assert first.against_first == ()
        (itself,) = second.against_first
        assert (itself.name, itself.relative_error) == ("y", 0.0)
        assert second.outputs[0].relative_error > 0.1


class TestFloatTypes:
    @given(st.integers(1, 6), st.sampled_from(["float16", "double"]))
    def test_a_feed_is_cast_to_what_a_model_takes(self, n, dtype):
        session = open_session(linear(dtype), CPU)
        feed = rows(n, seed=n)
        kind = np.float16 if dtype == "float16" else np.float64
        expected = session.run({"x": feed["x"].astype(kind)})["y"]
        found = session.run(feed)["y"]
        assert found.dtype == kind
        np.testing.assert_array_equal(found, expected)
        assert feed["x"].dtype == np.float32

    def test_values_beyond_the_type(self):
        with pytest.raises(InferenceError, match="input 'x': the data leave the range of float16"):
            open_session(linear("float16"), CPU).run({"x": np.full((1, 3), 1e6, np.float32)})

    def test_other_types_are_not_touched(self):
        with pytest.raises(InferenceError, match="ONNX Runtime"):
            open_session(linear(), CPU).run({"x": np.ones((1, 3), np.int64)})

    def test_half_precision_validates_against_single(self):
        report = validated(linear("float16"))
        # Inputs, weights, three products and their sums are rounded, each by half a unit at most.
        assert 0 < report.relative_error < 8 * np.finfo(np.float16).eps
        (result,) = report.providers
        assert [(t.what, t.name, t.reference, t.candidate) for t in result.float_types] == [
            ("input", "x", "float32", "float16"),
            ("output", "y", "float32", "float16"),
        ]
        assert "its values are cast" in " ".join(report.notes)
        assert validated(linear()).providers[0].float_types == ()


class TestBinding:
    def test_tensors_are_bound_and_others_copied(self):
        strings = model("(string[N] s) => (string[N] t)", "t = Identity(s)")
        for proto, feed, copies in (
            (linear().proto, rows(2), False),
            (strings, {"s": np.asarray(["a"], object)}, True),
        ):
            binding = open_session(ModelStore.load(proto), CPU).bind(feed)
            assert binding.copies is copies
            assert binding.run() > 0

    def test_any_layout_of_memory_and_rank(self):
        proto = model("(float[N, 3] x, float s) => (float[N, 3] y)", "y = Mul(x, s)")
        session = open_session(ModelStore.load(proto), CPU)
        turned = np.ones((3, 5), np.float32).T
        session.bind({"x": turned, "s": np.asarray(2, np.float32)}).run()

    def test_outputs_may_change_their_shape_from_run_to_run(self):
        proto = model(
            "(float[N] x) => (int64[R, K] y)", "r = RandomNormalLike(x) p = Relu(r) y = NonZero(p)"
        )
        binding = open_session(ModelStore.load(proto), CPU).bind({"x": np.ones(64, np.float32)})
        assert all(binding.run() > 0 for _ in range(20))

    def test_a_feed_that_does_not_fit(self):
        with pytest.raises(InferenceError, match="ONNX Runtime"):
            open_session(linear(), CPU).bind({"x": np.ones((2, 7), np.float32)}).run()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(linear().proto, "a.onnx")
    onnx.save(linear(weight=WEIGHT * np.float32(1.01)).proto, "b.onnx")
    np.savez("d.npz", x=rows(24)["x"], label=np.zeros(24, np.int64))
    return tmp_path


GIVEN = ("--data", "d.npz")
VERBS = {
    "analyze": ("a.onnx", *GIVEN),
    "compress": ("a.onnx", "-o", "o.onnx", *GIVEN, "--param-ratio", "0.9"),
    "sweep": ("a.onnx", *GIVEN),
    "finetune": ("a.onnx", "b.onnx", "-o", "o.onnx", *GIVEN),
    "train": ("a.onnx", "-o", "o.onnx", *GIVEN, "--labels", "label"),
    "validate": ("a.onnx", "b.onnx", *GIVEN),
    "benchmark": ("a.onnx", "b.onnx"),
}


@pytest.mark.usefixtures("folder")
class TestCommandLine:
    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize(
        ("words", "status", "named"),
        [
            (("--provider", "quux"), 2, "provider 'quux' is not known"),
            (("--provider", OTHERS[0]), 4, f"built without {OTHERS[0]}"),
            (("--provider-option", "use_arena=0"), 2, "provider cpu: option 'use_arena'"),
            (("--provider-option", "device_id"), 2, "'device_id' is not of the form KEY=VALUE"),
        ],
        ids=["unknown", "absent", "refused", "malformed"],
    )
    def test_each_verb_ends_in_one_line(self, verb, words, status, named, capsys):
        try:
            found = main([verb, *VERBS[verb], *words])
        except SystemExit as e:  # argparse
            found = e.code
        out, err = capsys.readouterr()
        assert (found, out) == (status, "")
        (line,) = (line for line in err.splitlines() if "error:" in line)
        assert named in line
        assert not Path("o.onnx").exists()

    def test_options_of_several_providers_name_theirs(self, capsys):
        words = ("--provider", "cpu", "--provider", CUDA.name, "--provider-option", "device_id=1")
        assert main(["validate", *VERBS["validate"], *words]) == 2
        assert "write cpu:device_id=1" in capsys.readouterr().err

    def test_full_names_do(self, capsys):
        words = ("--provider", CPU.name, "--provider", "cpu", "--json")
        assert main(["validate", *VERBS["validate"], *words]) == 0
        (result,) = json.loads(capsys.readouterr().out)["providers"]
        assert result["provider"] == CPU.name
        assert result["latency"]["copies"] is False


@pytest.mark.skipif("OpenVINOExecutionProvider" not in AVAILABLE, reason="no OpenVINO here")
class TestOpenVINO:
    """Another provider that runs on any CPU, where its package is installed."""

    def test_options_pass_and_wrong_ones_are_named(self):
        given = {"device_type": "CPU", "num_of_threads": "1"}
        session = open_session(linear(), find_provider("openvino", options=given))
        assert session.placement().fallen == ()
        for key, value in (("nonsense", "1"), ("num_of_threads", "many"), ("device_type", "GPU.9")):
            with pytest.raises(ConfigError, match=f"refuses option {key}={value}"):
                open_session(linear(), find_provider("openvino", options=given | {key: value}))
        given["device_type"] = "NONE"  # which it lets pass, and then does nothing
        with pytest.raises(ProviderUnavailableError, match=r"with device_type=NONE, .*: it takes"):
            open_session(linear(), find_provider("openvino", options=given))

    def test_nodes_that_fall_back_are_listed(self):
        body = "[m] h = MatMul(x, W) [r] g = Relu(h) [u] v = Unique(g) s = ReduceSum(v) "
        body += "y = Mul(g, s)"
        proto = model("(float[N, 3] x) => (float[N, 4] y)", body, W=WEIGHT)
        report = validate(
            proto,
            proto,
            [rows(4)],
            ValidateConfig(providers=("cpu", "openvino")),
        )
        first, second = report.providers
        assert isinstance(second, ProviderResult)
        assert ("u", "Unique") in [(n.name, n.op_type) for n in second.reference_nodes.fallen]
        assert first.reference_nodes.fallen == ()
        (itself,) = second.against_first
        assert 0 <= itself.relative_error < 1e-5
