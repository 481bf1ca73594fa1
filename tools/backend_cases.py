"""ONNX's own node tests, which the torch executor and rewriting are measured by, and whole models.

`operator_table.py` and the tests share what lies here.
"""

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test.loader
import torch
from onnx import TensorProto, numpy_helper
from onnx.backend.test.case.test_case import TestCase

from onnx_utilrank.model.graph import GraphIndex, subgraphs
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sites.find import SITE_KINDS, find_sites
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.torch_graph.operators import OPERATORS

__all__ = [
    "Case",
    "Difference",
    "SiteCase",
    "cases",
    "difference",
    "first_feed",
    "operators_of",
    "site_cases",
    "zoo_feed",
    "zoo_models",
]

# The kinds of tests that the onnx package brings along, models of many nodes left out.
KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted")

# Element types that torch computes with; others are only read and cast.
TYPES = {
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.BOOL,
    TensorProto.INT8,
    TensorProto.INT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.UINT8,
}

# Tests that are not run though their operators are known, by name, with the reason.
LEFT_OUT = {
    "test_resize_downsample_scales_linear_align_corners": "ONNX Runtime scales by whole sizes",
    "test_resize_downsample_scales_cubic_align_corners": "ONNX Runtime scales by whole sizes",
    "test_scan_sum": "Scan of opset 8 has a form of its own",
    "test_training_dropout": "random",
    "test_training_dropout_default": "random",
    "test_training_dropout_default_mask": "random",
    "test_training_dropout_mask": "random",
}

# Tests that expect the rounding errors of numpy's own transform where the true value is zero.
LARGER_ATOL = {"test_dft_inverse": 1e-6, "test_dft_inverse_opset19": 1e-6}

# The narrowest types are compared by their own precision: the common relative tolerance of 1e-3 is
# about the last bit of one of them, and below that of the other.
HALVES: dict[int, float] = {TensorProto.FLOAT16: 2 * 2.0**-10, TensorProto.BFLOAT16: 2 * 2.0**-7}

Key = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One test of the onnx package.

    Attributes:
        name: Its name there.
        model: Its model.
        data: Inputs and expected outputs in the model's order, once a data set.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        operators: Domain and name of the operators in it.
        left_out: Why it is not run; empty where it is.
    """

    name: str
    model: onnx.ModelProto
    data: list[tuple[list[np.ndarray], list[np.ndarray]]]
    rtol: float
    atol: float
    operators: frozenset[Key]
    left_out: str

    def check(self, device: str = "cpu") -> None:
        """Run the case.

        Raises:
            AssertionError: A value, a shape or a type is not the expected one.
            UtilrankError: The model cannot be built or run.
        """
        graph = TorchGraph.build(ModelStore.load(self.model), device=device)
        for inputs, expected in self.data:
            names = (i.name for i in self.model.graph.input)
            made = graph.run(dict(zip(names, inputs, strict=False)))
            for value, wanted in zip(made.values(), expected, strict=True):
                array = as_array(value)
                assert array.shape == wanted.shape
                narrow = wanted.dtype.itemsize == 2 and wanted.dtype.kind == "V"
                assert narrow or array.dtype == wanted.dtype
                np.testing.assert_allclose(
                    array.astype(np.float64) if narrow else array,
                    wanted.astype(np.float64) if narrow else wanted,
                    self.rtol,
                    self.atol,
                )


def as_array(value: torch.Tensor) -> np.ndarray:
    """A result as numpy has it; bfloat16, which numpy does not have, as float32."""
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


@cache
def cases() -> list[Case]:
    """All tests of single operators that the onnx package brings along."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # infinities and overflows that the tests are about
        found = [t for kind in KINDS for t in onnx.backend.test.loader.load_model_tests(kind=kind)]
        return [_case(t) for t in found]


@dataclass(frozen=True, kw_only=True)
class SiteCase:
    """A node test with one of its inputs made a weight, so that there is something to factor.

    Attributes:
        case: The test.
        weight: The input.
        model: The model, in which that is an initializer.
        feed: What the test feeds to the other inputs.
        expected: What the test expects, in the order of the outputs.
    """

    case: Case
    weight: str
    model: onnx.ModelProto
    feed: dict[str, np.ndarray]
    expected: list[np.ndarray]

    def __str__(self) -> str:
        return f"{self.case.name} with constant {self.weight!r}"


def site_cases() -> Iterator[SiteCase]:
    """Every node test and input of it that is a site once it is constant."""
    known = {("", kind.op_type) for kind in SITE_KINDS}
    for case in cases():
        if not case.operators & known or not case.data:
            continue
        (inputs, expected), *_ = case.data
        given = {i.name: a for i, a in zip(case.model.graph.input, inputs, strict=False)}
        fixed = {t.name for t in case.model.graph.initializer}
        if len(given) < 2:  # nothing would be left to feed
            continue
        for name in (n for n in given if n not in fixed):
            model = _with_constant(case.model, name, given[name])
            if find_sites(GraphIndex.build(ModelStore(proto=model)))[0]:
                feed = {key: array for key, array in given.items() if key not in (name, *fixed)}
                yield SiteCase(case=case, weight=name, model=model, feed=feed, expected=expected)


def _with_constant(source: onnx.ModelProto, name: str, values: np.ndarray) -> onnx.ModelProto:
    """A copy of a model in which an input is an initializer instead."""
    model = onnx.ModelProto()
    model.CopyFrom(source)
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(values, name))
    if model.ir_version >= 4:  # before, initializers were inputs too
        kept = [i for i in graph.input if i.name != name]
        del graph.input[:]
        graph.input.extend(kept)
    return model


def _arrays(values: Iterable[object]) -> list[np.ndarray]:
    """Values of a data set; those that are no tensors belong to cases that are left out."""
    arrays = []
    for value in values:
        if isinstance(value, TensorProto):
            arrays.append(numpy_helper.to_array(value))
        else:
            kind = None if isinstance(value, np.ndarray | np.generic) else object
            arrays.append(np.asarray(value, dtype=kind))
    return arrays


def _case(test: TestCase) -> Case:
    model, given = test.model, test.data_sets
    if model is None:
        folder = Path(test.model_dir or "")
        model = onnx.load(str(folder / "model.onnx"))
        given = [
            (_loaded(data_set, "input"), _loaded(data_set, "output"))
            for data_set in sorted(folder.glob("test_data_set_*"))
        ]
    operators = frozenset(operators_of(model.graph))
    return Case(
        name=test.name,
        model=model,
        data=[(_arrays(inputs), _arrays(outputs)) for inputs, outputs in given or []],
        rtol=max(test.rtol, *(HALVES.get(k, 0.0) for k in _kinds(model.graph))),
        atol=LARGER_ATOL.get(test.name, test.atol),
        operators=operators,
        left_out=_reason(test.name, model, operators),
    )


def _loaded(folder: Path, kind: str) -> list[np.ndarray]:
    count = len(list(folder.glob(f"{kind}_*.pb")))
    files = (folder / f"{kind}_{k}.pb" for k in range(count))
    return [numpy_helper.to_array(onnx.load_tensor(str(f))) for f in files]


def _reason(name: str, model: onnx.ModelProto, operators: frozenset[Key]) -> str:
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    unknown = sorted(n for d, n in operators - OPERATORS.keys() if (d, n) not in _functions(model))
    if unknown:
        return f"operator {', '.join(unknown)}"
    if any(o.domain == "" and o.version < 7 for o in model.opset_import):
        return "opset below 7"
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.HasField("tensor_type"):
            return "sequences and optional values"
        kind = value.type.tensor_type.elem_type
        if kind not in TYPES:
            return f"type {onnx.helper.tensor_dtype_to_string(kind).removeprefix('TensorProto.')}"
    return ""


def _kinds(graph: onnx.GraphProto) -> list[int]:
    """Element types of the outputs."""
    return [o.type.tensor_type.elem_type for o in graph.output]


def _functions(model: onnx.ModelProto) -> set[Key]:
    return {(f.domain, f.name) for f in model.functions}


def operators_of(graph: onnx.GraphProto) -> Iterator[Key]:
    """Domain and operator of the nodes of a graph and of the graphs inside it."""
    for node in graph.node:
        yield ("" if node.domain == "ai.onnx" else node.domain), node.op_type
        for inner in subgraphs(node):
            yield from operators_of(inner)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far an output of the executor is from ONNX Runtime's.

    Attributes:
        output: Name of the output.
        largest: Largest difference of two elements, by the largest element of the output.
        epsilon: The machine epsilon of the output's type; 0 where it is no floating type.
    """

    output: str
    largest: float
    epsilon: float


def difference(
    store: ModelStore, feed: Mapping[str, np.ndarray], *, device: str = "cpu"
) -> list[Difference]:
    """Compare all outputs with those of ONNX Runtime on the CPU, its optimizations disabled.

    Raises:
        UtilrankError: Either cannot run the model on the feed.
        AssertionError: An output differs in its shape or type.
    """
    graph = TorchGraph.build(store, device=device)
    with torch.no_grad():
        made = graph.run(feed)
    expected = open_session(store, CPU, optimize=False, threads=1).run(feed)
    return [_compared(name, as_array(made[name]), wanted) for name, wanted in expected.items()]


def _compared(name: str, array: np.ndarray, wanted: np.ndarray) -> Difference:
    assert array.shape == wanted.shape, f"{name}: {array.shape} is not {wanted.shape}"
    assert array.dtype == wanted.dtype, f"{name}: {array.dtype} is not {wanted.dtype}"
    floating = wanted.dtype.kind == "f"
    a, b = array.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(invalid="ignore"):
        off = np.where((a == b) | np.isnan(a) & np.isnan(b), 0.0, np.abs(a - b))
    off = np.where(np.isnan(off), np.inf, off)
    scale = np.abs(b[np.isfinite(b)]).max(initial=0.0) or 1.0
    epsilon = float(np.finfo(wanted.dtype).eps) if floating else 0.0
    return Difference(name, float(off.max(initial=0.0) / scale), epsilon)


def first_feed(store: ModelStore, data: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first sample of calibration data, which may hold one for each batch row or whole feeds.

    A dimension that the model fixes is filled with as many rows.
    """
    feed = {}
    for spec in store.inputs:
        values, shape = data[spec.name], spec.shape or ()
        if values.ndim > len(shape):
            feed[spec.name] = np.asarray(values[0])
        else:
            rows = shape[0] if shape and isinstance(shape[0], int) else 1
            feed[spec.name] = values[:rows]
    return feed


def zoo_models(folder: Path) -> list[Path]:
    """The models of a zoo."""
    return sorted(folder.glob("*/model.onnx"))


def zoo_feed(model: Path, store: ModelStore) -> dict[str, np.ndarray]:
    """One sample of the data that a zoo has for a model, as its `zoo.py calib` writes them."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "calib.npz"
        script = str(model.parent.parent / "zoo.py")
        command = [sys.executable, script, "calib", model.parent.name, "-o", str(file)]
        subprocess.run([*command, "--samples", "1"], check=True, capture_output=True)
        with np.load(file) as data:
            return first_feed(store, dict(data))
