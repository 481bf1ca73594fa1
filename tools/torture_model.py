"""What `torture.py` does with one model: inputs, the steps, and what became of each."""

import contextlib
import hashlib
import io
import json
import math
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from rich.console import Console, RenderableType

import onnx_utilrank
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.model.store import ModelStore, TensorSpec
from onnx_utilrank.report.tables import compression_tables, utilization_tables, validation_tables
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session

__all__ = [
    "BAD",
    "CRASH",
    "FOREIGN",
    "NOTHING",
    "REFUSED",
    "STEPS",
    "TIMEOUT",
    "Outcome",
    "differences",
    "examine",
    "inputs_of",
]

STEPS = ("analyze", "full rank", "half")

# Outcomes that are faults of the library.
WRONG, SIGNATURE, UNRUNNABLE = "WRONG OUTPUT", "SIGNATURE CHANGED", "RESULT DOES NOT RUN"
TRACEBACK, UNCLEAR, WARNING = "TRACEBACK", "UNCLEAR REFUSAL", "PYTHON WARNING"
TOUCHED, LEFT_OVER, TIMEOUT, CRASH = "SOURCE TOUCHED", "FILES LEFT OVER", "TIMEOUT", "CRASH"
BAD = (
    WRONG,
    SIGNATURE,
    UNRUNNABLE,
    TRACEBACK,
    UNCLEAR,
    WARNING,
    TOUCHED,
    LEFT_OVER,
    TIMEOUT,
    CRASH,
)

# Outcomes that are not.
MEASURED, EQUAL, MADE = "measured", "factored, equal outputs", "made, runs"
NOTHING, REFUSED, FOREIGN = "nothing to factor", "refused", "ONNX Runtime cannot run the model"

FULL = onnx_utilrank.CompressConfig(energy=1.0, force=True)
HALF = onnx_utilrank.CompressConfig(param_ratio=0.5)

# Size of dimensions that a model leaves open, as `zoo.py torture-inputs` has it.
OPEN_DIMENSION = 2
# What all random feeds of a model may take together; where two do not fit, one is taken twice.
FEEDS_BYTES = 2**28
# Single values may be so many standard deviations off.
DEVIATIONS = 4.0

EPSILON: dict[int, float] = {
    TensorProto.FLOAT: 2.0**-23,
    TensorProto.DOUBLE: 2.0**-52,
    TensorProto.FLOAT16: 2.0**-10,
    TensorProto.BFLOAT16: 2.0**-7,
}

RANDOM = frozenset(
    {"Bernoulli", "Multinomial"}
    | {f"Random{kind}{like}" for kind in ("Normal", "Uniform") for like in ("", "Like")}
)

Feed = dict[str, Any]  # arrays; lists of them for sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one step made of one model.

    Attributes:
        model: How the table calls it.
        step: One of `STEPS`.
        word: What came out; one of `BAD` is a fault.
        detail: Figures or the reason.
    """

    model: str
    step: str
    word: str
    detail: str = ""


class Fault(Exception):
    """A step found a fault; the arguments are the word and the detail."""


# --- inputs -------------------------------------------------------------------------------------


def inputs_of(model: Path, zoo: Path | None, count: int, file: Path) -> Path | list[Feed]:
    """Samples for a model: `file`, where the zoo has samples of its own, or whole feeds.

    Raises:
        ModelError: The model cannot be read.
    """
    if zoo is not None and model.parent.parent == zoo:
        words = ("calib", model.parent.name, "-o", str(file), "--samples", str(count))
        if _zoo(zoo, *words):
            return file
    store = ModelStore.load(model)
    sets = sorted(model.parent.glob("test_data_set_*"))
    if sets and zoo is None:
        found = [_data_set(folder, store) for folder in sets[:count]]
        return found if len(found) > 1 else 2 * found
    first = _zoo_feed(model, zoo) or {s.name: _random_declared(s) for s in store.inputs}
    room = FEEDS_BYTES // max(sum(array.nbytes for array in first.values()), 1)
    if room < 2:
        return [first, first]
    return [first, *(_drawn_like(first, seed) for seed in range(1, min(count, room)))]


def _zoo(zoo: Path, *words: str) -> bool:
    """Whether a command of the zoo's program did what was asked."""
    command = [sys.executable, str(zoo / "zoo.py"), *words]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _zoo_feed(model: Path, zoo: Path | None) -> Feed | None:
    if zoo is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "inputs.npz"
        if not _zoo(zoo, "torture-inputs", str(model), "-o", str(file)):
            return None
        with np.load(file) as data:
            return dict(data)


def _data_set(folder: Path, store: ModelStore) -> Feed:
    files = [folder / f"input_{k}.pb" for k in range(len(store.inputs))]
    arrays = [numpy_helper.to_array(onnx.load_tensor(str(file))) for file in files]
    return {spec.name: array for spec, array in zip(store.inputs, arrays, strict=True)}


def _random_declared(spec: TensorSpec) -> np.ndarray:
    """Zeros of a declared type and shape, from which values are drawn."""
    shape = [d if isinstance(d, int) and d >= 0 else OPEN_DIMENSION for d in spec.shape or ()]
    kind = spec.dtype or np.dtype(np.float32)
    return _drawn_array(
        np.zeros(shape, "U4" if kind.kind == "O" else kind), np.random.default_rng(0)
    )


def _drawn_like(feed: Feed, seed: int) -> Feed:
    draws = np.random.default_rng(seed)
    return {name: _drawn_array(array, draws) for name, array in feed.items()}


def _drawn_array(array: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Other values in the same type and shape: floats are normal, the rest is 0 or 1."""
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        values = draws.standard_normal(array.shape, dtype=np.float32)
        return np.asarray(values).astype(array.dtype, copy=False)
    return np.asarray(draws.integers(0, 2, array.shape, dtype=np.int8)).astype(array.dtype)


# --- comparison ---------------------------------------------------------------------------------


def leaves(name: str, value: object) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of an output: of sequences each item, of maps the values by key."""
    if isinstance(value, Mapping):
        value = list(value.values()) if value else []
    if isinstance(value, list | tuple):
        yield f"{name} (length)", np.asarray(len(value))
        for k, item in enumerate(value):
            yield from leaves(f"{name}[{k}]", item)
    else:
        yield name, np.asarray(value)


def outputs_of(model: ModelStore, feeds: Sequence[Feed]) -> list[dict[str, np.ndarray]]:
    """All outputs by name for each feed, by ONNX Runtime without its graph optimizations.

    Raises:
        UtilrankError: It cannot load or run the model.
    """
    session = open_session(model, CPU, optimize=False, threads=1)
    return [
        dict(leaf for item in session.run(feed).items() for leaf in leaves(*item)) for feed in feeds
    ]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of two elements; infinite where shapes, types or places of NaN differ."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    if one.dtype.kind not in "fiub" and one.dtype.name != "bfloat16":
        return 0.0 if np.array_equal(one, other) else math.inf
    a, b = one.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(
        a[~finite], b[~finite], equal_nan=True
    ):
        return math.inf
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0))


def scale(array: np.ndarray) -> float:
    """The largest finite element."""
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        return 0.0
    values = np.abs(array.astype(np.float64))
    return float(values[np.isfinite(values)].max(initial=0.0))


def differences(
    source: ModelStore, result: ModelStore, feeds: Sequence[Feed], *, terms: int
) -> list[str]:
    """Outputs of a rewritten model that rounding cannot explain.

    The errors of a sum of k products are independent, so they grow with √k; k is what all rewritten
    sums together have. An output passes that is off by no more than that times the epsilon of the
    coarsest type in it, relative to its largest element. Where a model itself makes more of
    rounding (differences of large values, thresholds), the source says how much: with all weights
    off by as much as the rewritten sums may be. Of models that draw random numbers nothing can be
    said: ONNX Runtime draws others for nodes of other places.

    Args:
        source: The model as it was.
        result: The model as it was rewritten.
        feeds: What to run both on.
        terms: Products in the sums that were rewritten, before and after, one output each.

    Raises:
        UtilrankError: ONNX Runtime cannot run one of them.
    """
    if any(node.op_type in RANDOM for node in source.proto.graph.node):
        return []
    expected, made = outputs_of(source, feeds), outputs_of(result, feeds)
    kinds = {EPSILON.get(t.data_type, 0.0) for t in source.tensors()}
    relative = DEVIATIONS * max(kinds, default=0.0) * math.sqrt(terms)
    doubtful = {
        (k, name)
        for k, (before, after) in enumerate(zip(expected, made, strict=True))
        for name in before.keys() | after.keys()
        if name not in before
        or name not in after
        or distance(before[name], after[name]) > relative * scale(before[name])
    }
    if not doubtful:
        return []
    moved = outputs_of(_shaken(source, relative), feeds)
    found = []
    for k, name in sorted(doubtful):
        wanted, got = expected[k].get(name), made[k].get(name)
        if wanted is None or got is None:
            found.append(f"feed {k}: output {name!r} is there only once")
            continue
        off, bound = distance(wanted, got), relative * scale(wanted)
        bound += DEVIATIONS * distance(wanted, moved[k].get(name, wanted))
        if off > bound:
            found.append(f"feed {k}: output {name!r} is off by {off:.2g}, allowed {bound:.2g}")
    return found


def _shaken(source: ModelStore, relative: float) -> ModelStore:
    """The model with every floating weight of two or more dimensions off by a relative error."""
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    shaken = ModelStore(proto=proto, folder=source.folder)
    draws = np.random.default_rng(0)
    for tensor in shaken.tensors():
        if len(tensor.dims) < 2 or tensor.data_type not in EPSILON:
            continue
        values = shaken.array(tensor)
        noisy = values.astype(np.float64) * (1 + relative * draws.normal(size=values.shape))
        tensor.CopyFrom(numpy_helper.from_array(noisy.astype(values.dtype), tensor.name))
    return shaken


# --- one model ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One model on its inputs, and where its results go."""

    path: Path
    data: Path | list[Feed]
    folder: Path
    label: str
    outcomes: list[Outcome] = field(default_factory=list)

    def step(self, step: str, action: Callable[[], tuple[str, str]]) -> None:
        """Do one step; its outcome is noted whatever happens."""
        digest = _digest(self.path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            word, detail = guarded(action)
        if word not in BAD:
            if _digest(self.path) != digest:
                word, detail = TOUCHED, f"{self.path.name} has other bytes than before"
            elif caught:
                first = caught[0]
                place = f"{Path(first.filename).name}:{first.lineno}"
                word = WARNING
                detail = (
                    f"{first.category.__name__}: {' '.join(str(first.message).split())} ({place})"
                )
        detail = detail.replace(str(self.path), self.label)
        left = sorted(p.name for p in self.folder.iterdir())
        if left and word in (REFUSED, NOTHING):
            word, detail = LEFT_OVER, ", ".join(left)
        for file in self.folder.iterdir():
            file.unlink()
        self.outcomes.append(Outcome(model=self.label, step=step, word=word, detail=detail))

    @property
    def source(self) -> ModelStore:
        """The model."""
        return ModelStore.load(self.path)

    def feeds(self) -> list[Feed]:
        """What outputs are compared on."""
        if isinstance(self.data, list):
            return self.data
        samples = open_data(self.data, self.source.inputs)
        return list(samples.feeds(range(len(samples))))

    def analyze(self) -> tuple[str, str]:
        """Measure the utilization."""
        report = onnx_utilrank.analyze(self.path, self.data)
        _show(report.as_dict(), utilization_tables(report))
        if report.layers:
            return MEASURED, f"{len(report.layers)} weights"
        return NOTHING, _reasons({s.reason: 1 for s in report.skipped})

    def compress(self, config: onnx_utilrank.CompressConfig) -> tuple[str, str]:
        """Compress, and look at the file that comes out."""
        result = onnx_utilrank.compress(self.path, self.data, config)
        _show(result.as_dict(), compression_tables(result, "result.onnx"))
        target = self.folder / "result.onnx"
        result.save(target)
        made = ModelStore.load(target)
        _check_signature(self.source, made)
        report = onnx_utilrank.validate(self.path, target, self.data)
        _show(report.as_dict(), validation_tables(report))
        factored = [e for e in result.plan.entries if e.rank is not None]
        try:
            if config is FULL:
                terms = sum(e.d + (e.rank or 0) for e in factored)
                wrong = differences(self.source, made, self.feeds(), terms=terms)
                if wrong:
                    raise Fault(WRONG, "; ".join(wrong[:3]))
            else:
                outputs_of(made, self.feeds())
        except onnx_utilrank.ModelError as e:
            raise Fault(UNRUNNABLE, str(e)) from e
        if not factored and not result.plan.shrinking:
            same = target.read_bytes() == self.path.read_bytes()
            if not same and not made.has_external_data:
                raise Fault(WRONG, "nothing was factored, and the file is not the same")
            target.unlink()
            return NOTHING, _reasons(result.left_alone)
        kept = result.plan.param_ratio
        return (EQUAL if config is FULL else MADE), (
            f"{len(factored)} of {len(result.plan.entries)} weights factored, {kept:.0%} of the "
            f"parameters, relative error {report.relative_error}"
        )


def guarded(action: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """What an action says, or what its exception means."""
    try:
        return action()
    except Fault as e:
        return e.args[0], e.args[1]
    except onnx_utilrank.UtilrankError as e:
        text = str(e)
        clear = text.strip() and e.exit_status in range(2, 6) and "\n" not in text
        return (REFUSED, text) if clear else (UNCLEAR, f"exit status {e.exit_status}: {text}")
    except Exception as e:  # noqa: BLE001 - whatever else a user would see a traceback of
        place = [f for f in traceback.extract_tb(e.__traceback__) if "onnx_utilrank" in f.filename]
        where = f"{Path(place[-1].filename).name}:{place[-1].lineno}" if place else "elsewhere"
        return TRACEBACK, f"{type(e).__name__}: {' '.join(str(e).split())} ({where})"


def _check_signature(source: ModelStore, made: ModelStore) -> None:
    old, new = source.proto, made.proto
    for what, one, other in (
        ("inputs", source.inputs, made.inputs),
        ("outputs", list(old.graph.output), list(new.graph.output)),
        ("opset", list(old.opset_import), list(new.opset_import)),
        ("IR version", old.ir_version, new.ir_version),
    ):
        if one != other:
            raise Fault(SIGNATURE, what)


def _show(results: Mapping[str, object], tables: Iterable[RenderableType]) -> None:
    """Print results as the command line does, to nobody: strict JSON, and the tables."""
    json.dumps(results, allow_nan=False)
    console = Console(file=io.StringIO(), width=140)
    for table in tables:
        console.print(table)


def _reasons(counts: Mapping[str, int]) -> str:
    return "; ".join(counts) or "no node of a handled operator"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def examine(model: Path, *, label: str, zoo: Path | None = None, samples: int = 6) -> list[Outcome]:
    """Take one model through all steps, in this process.

    Args:
        model: The file.
        label: How outcomes call it.
        zoo: Folder of the zoo that it belongs to, if any.
        samples: Samples or feeds to run.
    """
    foreign = ""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results"
        results.mkdir()
        data: Path | list[Feed] = []
        with contextlib.suppress(onnx_utilrank.UtilrankError):  # the steps will meet it too
            data = inputs_of(model, zoo, samples, Path(scratch) / "data.npz")
        if isinstance(data, list) and data:
            try:
                outputs_of(ModelStore.load(model), data)
            except onnx_utilrank.UtilrankError as e:
                foreign = str(e).replace(str(model), label)
        case = _Case(path=model, data=data, folder=results, label=label)
        case.step("analyze", case.analyze)
        case.step("full rank", lambda: case.compress(FULL))
        case.step("half", lambda: case.compress(HALF))
    if not foreign:
        return case.outcomes
    return [
        replace(o, word=FOREIGN, detail=foreign) if o.word == REFUSED else o for o in case.outcomes
    ]
