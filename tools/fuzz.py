"""Throw broken and hostile input at the loaders and verbs, and see that each ends as documented.

    python tools/fuzz.py --seconds 600 --seed 0

Sound models, plans, reports and data are made, mutated (fields of the messages and bytes of the
files), and given to the package in another process, so that crashes and hangs of native code are
told apart. Every case ends well where the input is taken, or refused by a `UtilrankError` of one
printable line. Everything else is a failure: another exception, a crash, a hang. Inputs that fail
are kept in the folder of `--keep`, named after their number, and `--only NUMBER` makes one of them
again.

Exit status: 0 where no case failed, 1 where one did.
"""

import argparse
import collections
import copy
import io
import json
import logging
import multiprocessing
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from google.protobuf.message import Message
from onnx import numpy_helper
from onnx.external_data_helper import convert_model_to_external_data

from onnx_utilrank import (
    AnalyzeConfig,
    CompressConfig,
    RankPlan,
    UtilrankError,
    analyze,
    compress,
    inspect,
    write_report,
)
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore

__all__ = ["TARGETS", "attempt", "main", "make"]

SECONDS = 600.0
PATIENCE = 120.0  # seconds for one case
MEMORY = 24 * 2**30  # address space of the process that runs cases
WIDTH = 12

MODELS = (
    """agraph (float[n,12] x) => (float[n,12] y) {
        h = MatMul(x, U) g = Add(h, b) r = Relu(g) d = MatMul(r, D) s = Add(d, x)
        y = Softmax<axis = -1>(s)
    }""",
    """agraph (float[n,12] x) => (float[n,12] y) {
        t = Transpose<perm = [1, 0]>(D) c = Constant<value = float[12] {1,1,1,1,1,1,1,1,1,1,1,1}>()
        g = Gemm<transB = 1, alpha = 0.5>(x, D, c) m = ReduceMean<axes = [1]>(g)
        k = Sub(g, m) h = MatMul(k, U) r = Sigmoid(h) q = Mul(r, h) y = MatMul(q, D)
    }""",
    """agraph (float[n,12] x) => (float[n,4] y) {
        s = Constant<value = int64[4] {-1, 3, 2, 2}>() i = Reshape(x, s)
        c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(i, K) r = Relu(c)
        p = GlobalAveragePool(r) f = Flatten(p) y = MatMul(f, V)
    }""",
    """agraph (float[n,12] x) => (float[n,12] y) {
        z = ReduceSum<keepdims = 0>(x) o = Constant<value = float {0.0}>() flag = Greater(z, o)
        y = If (flag) <
            then_branch = one () => (float[n,12] a) { h = MatMul(x, U) a = MatMul(h, D) },
            else_branch = two () => (float[n,12] e) { l = local.f(x) e = MatMul(l, W) }
        >
    }
    <domain: "local", opset_import: ["" : 17]> f (v) => (w) { w = Relu(v) }""",
)

INTEGERS = (0, 1, -1, 2, 3, 7, 127, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
REALS = (0.0, -0.0, 1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    *("", "\n", "\x1b[31m", "[/]", "\u202e", "../../etc/passwd", "/dev/zero", "*/_ORT_MEM_ADDR_/*"),
    *("x" * 300, "99999999999999999999", "-1", "MatMul", "Gemm", "Conv", "Identity", "Loop"),
    *("com.microsoft", "x", "y", "U", "D", "ai.onnx.ml", "offset", "length", "location"),
)
JSON_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 10**30, 1.5, 1e400, "", "\ud800", "x" * 300, [], {}, [[]], {"a": 1}),
    *("low-rank", "pivot", "channels", "separable", "shrink", "svd", "two-sided", "one-sided"),
)


def sound_model(rng: random.Random) -> onnx.ModelProto:
    """One of the models, with weights."""
    text = rng.choice(MODELS)
    header = '<ir_version: 8, opset_import: ["" : 17, "local" : 1]>'
    proto = onnx.parser.parse_model(f"{header} {text}")
    values = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]]
    shapes = {
        "U": (12, 24),
        "D": (24, 12),
        "W": (12, 12),
        "V": (8, 4),
        "K": (8, 3, 3, 3),
        "b": (24,),
    }
    if "Gemm" in text:
        shapes["D"] = (12, 12)
        shapes["U"] = (12, 12)
    read = {name for node in proto.graph.node for name in node.input}
    for node in proto.graph.node:
        for attribute in node.attribute:
            read |= {name for inner in attribute.g.node for name in inner.input}
    for name, shape in shapes.items():
        if name in read:
            array = values.normal(size=shape).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto


def samples() -> dict[str, np.ndarray]:
    """Data for every model."""
    return {"x": np.random.default_rng(1).normal(size=(16, WIDTH)).astype(np.float32)}


# --- mutations ----------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Flip, cut out, repeat or overwrite a few bytes."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not data:
            break
        k = rng.randrange(len(data))
        match rng.randrange(6):
            case 0:
                data[k] ^= 1 << rng.randrange(8)
            case 1:
                data[k] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del data[k:]
            case 3:
                del data[k : k + rng.randrange(1, 64)]
            case 4:
                data[k:k] = data[k : k + rng.randrange(1, 64)]
            case 5:
                wide = struct.pack("<q", rng.choice(INTEGERS))
                data[k : k + 8] = wide[: rng.choice((2, 4, 8))]
    return bytes(data)


def mutate_message(rng: random.Random, root: Message) -> None:
    """Drop, change, repeat or exchange fields of a message or of those inside it."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        message = rng.choice(list(_messages(root)))
        fields = message.ListFields()
        if rng.random() < 0.2 or not fields:
            field = rng.choice(message.DESCRIPTOR.fields)
        else:
            field = rng.choice(fields)[0]
        _mutate_field(rng, message, field)


def _messages(root: Message) -> Iterable[Message]:
    yield root
    for field, value in root.ListFields():
        if field.message_type is not None:
            for inner in value if _is_repeated(field) else [value]:
                yield from _messages(inner)


def _is_repeated(field: Any) -> bool:
    return bool(field.is_repeated)


def _mutate_field(rng: random.Random, message: Message, field: Any) -> None:
    if rng.random() < 0.25:
        message.ClearField(field.name)
        return
    if not _is_repeated(field):
        if field.message_type is not None:
            getattr(message, field.name).SetInParent()
        else:
            _assign(message, field, _scalar(rng, field, getattr(message, field.name)))
        return
    values = getattr(message, field.name)
    match rng.randrange(4):
        case 0 if len(values):
            del values[rng.randrange(len(values))]
        case 1 if len(values):  # again
            picked = copy.deepcopy(values[rng.randrange(len(values))])
            values.append(picked)
        case 2 if len(values) > 1:  # in another order
            held = [copy.deepcopy(v) for v in values]
            rng.shuffle(held)
            del values[:]
            values.extend(held)
        case _ if field.message_type is None:
            if len(values) and rng.random() < 0.7:
                k = rng.randrange(len(values))
                held = list(values)
                held[k] = _scalar(rng, field, held[k])
            else:
                held = [*values, _scalar(rng, field, None)]
            del values[:]
            for value in held:
                try:
                    values.append(value)
                except (ValueError, TypeError):  # out of the field's range
                    continue
        case _:
            values.add()


def _assign(message: Message, field: Any, value: object) -> None:
    try:
        setattr(message, field.name, value)
    except (ValueError, TypeError):  # out of the field's range
        message.ClearField(field.name)


def _scalar(rng: random.Random, field: Any, old: Any) -> Any:
    if field.cpp_type == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return mutate_bytes(rng, old or b"abc")
        return rng.choice((*TEXTS, old or ""))
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice(REALS)
    if field.cpp_type == field.CPPTYPE_ENUM:
        return rng.choice([v.number for v in field.enum_type.values])
    return rng.choice((*INTEGERS, *range(0, 30), (old or 0) + 1, (old or 0) - 1))


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Drop, change, add or exchange a few entries of a JSON value."""
    root = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(root))
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1:
                holder[key] = rng.choice(JSON_VALUES)
            case 2 if isinstance(holder[key], int | float):
                holder[key] += rng.choice((-1, 1, 100))
            case 3 if isinstance(holder, dict):
                holder[rng.choice(TEXTS)] = rng.choice(JSON_VALUES)
            case _:
                other, there = rng.choice(places)
                holder[key] = copy.deepcopy(other.get(there) if isinstance(other, dict) else other)
    return root


def _places(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value if isinstance(value, dict) else range(len(value))):
            yield value, key
            yield from _places(value[key])


# --- cases --------------------------------------------------------------------------------------


def make_model(rng: random.Random, folder: Path) -> None:
    """A mutated model, with its weights inside or beside it."""
    proto = sound_model(rng)
    outside = rng.random() < 0.3
    path = folder / "model.onnx"
    if outside:
        convert_model_to_external_data(proto, location="weights.bin", size_threshold=16)
        onnx.save_model(proto, path)
        proto = onnx.load(path, load_external_data=False)
    if rng.random() < 0.75:
        mutate_message(rng, proto)
        raw = proto.SerializePartialToString()
    else:
        raw = mutate_bytes(rng, proto.SerializeToString())
    path.write_bytes(raw)
    data = folder / "weights.bin"
    if outside and rng.random() < 0.3:
        data.write_bytes(mutate_bytes(rng, data.read_bytes()))


def make_plan(rng: random.Random, folder: Path) -> None:
    """A sound model and a mutated plan for it."""
    proto = sound_model(rng)
    onnx.save_model(proto, folder / "model.onnx")
    config = CompressConfig(
        param_ratio=0.8, method=rng.choice(("svd", "one-sided")), force=True, refit=False
    )
    try:
        text = compress(proto, samples(), config, dry_run=True).plan.to_json()
    except UtilrankError:  # as with the model whose weights are all in subgraphs
        text = json.dumps({"schema": 2})
    if rng.random() < 0.8:
        text = json.dumps(mutate_json(rng, json.loads(text)))
        raw = text.encode()
    else:
        raw = mutate_bytes(rng, text.encode())
    (folder / "plan.json").write_bytes(raw)


def make_report(rng: random.Random, folder: Path) -> None:
    """A mutated report of a plan, an analysis or an inspection of a sound model."""
    proto, path = sound_model(rng), folder / "report.json"
    config = CompressConfig(param_ratio=0.8, method="one-sided", force=True)
    try:
        match rng.randrange(3):
            case 0:
                write_report(compress(proto, samples(), config, dry_run=True), path)
            case 1:
                write_report(analyze(proto, samples()), path)
            case _:
                write_report(inspect(proto), path)
    except UtilrankError:  # as with the model whose weights are all in subgraphs
        path.write_text('{"run": {"verb": "compress"}}', encoding="utf8")
    raw = path.read_bytes()
    if rng.random() < 0.8:
        raw = json.dumps(mutate_json(rng, json.loads(raw))).encode()
    else:
        raw = mutate_bytes(rng, raw)
    path.write_bytes(raw)


def make_npz(rng: random.Random, folder: Path) -> None:
    """A mutated archive: its bytes, or the headers and names of its members."""
    held = samples()["x"]
    out = io.BytesIO()
    if rng.random() < 0.4:
        rng.choice((np.savez, np.savez_compressed))(out, x=held)
        raw = mutate_bytes(rng, out.getvalue())
    else:
        method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
        with zipfile.ZipFile(out, "w", method) as archive:
            for name in rng.choice((["x.npy"], ["x"], ["x.npy", "x"], ["x.npy", "../y.npy"])):
                archive.writestr(name, _member(rng, held))
        raw = out.getvalue()
        if rng.random() < 0.3:
            raw = mutate_bytes(rng, raw)
    (folder / "data.npz").write_bytes(raw)


def make_npy(rng: random.Random, folder: Path) -> None:
    """A mutated array file."""
    (folder / "data.npy").write_bytes(_member(rng, samples()["x"]))


def make_proto(rng: random.Random, folder: Path) -> None:
    """A mutated test set."""
    tensor = numpy_helper.from_array(samples()["x"], "x")
    (place := folder / "data" / "test_data_set_0").mkdir(parents=True)
    if rng.random() < 0.6:
        mutate_message(rng, tensor)
        raw = tensor.SerializePartialToString()
    else:
        raw = mutate_bytes(rng, tensor.SerializeToString())
    (place / "input_0.pb").write_bytes(raw)


def _member(rng: random.Random, array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array)
    raw = out.getvalue()
    if rng.random() < 0.3:
        return mutate_bytes(rng, raw)
    dims = rng.choice(INTEGERS), rng.choice((0, 1, WIDTH, *INTEGERS))
    types = (
        "'<f4'",
        "'>f4'",
        "'|O'",
        "'<U0'",
        "'|V0'",
        "'<f8'",
        "'|b1'",
        "'<M8[s]'",
        "[('a','<f4')]",
    )
    shapes = (f"({dims[0]}, {dims[1]})", f"({dims[0]},)", "()", "(16, 12)", "(" * 200, "None")
    header = (
        f"{{'descr': {rng.choice(types)}, 'fortran_order': {rng.choice(('True', 'False', '0'))}, "
        f"'shape': {rng.choice(shapes)}, }}"
    )
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + array.tobytes()


# --- targets ------------------------------------------------------------------------------------


def load_model(folder: Path) -> None:
    """Read a model, index and hash it."""
    store = ModelStore.load(folder / "model.onnx")
    index = GraphIndex.build(store)
    for name in sorted(index.constants):
        index.constant(name)
    store.fingerprint()
    str((store.inputs, store.outputs, store.file_bytes))


def analyze_model(folder: Path) -> None:
    """Measure a model."""
    analyze(folder / "model.onnx", samples(), AnalyzeConfig())


def compress_model(folder: Path) -> None:
    """Make a model smaller and write it."""
    config = CompressConfig(param_ratio=0.9)
    compress(folder / "model.onnx", samples(), config).save(folder / "out.onnx")


def replay_plan(folder: Path) -> None:
    """Read a plan and follow it."""
    plan = RankPlan.load(folder / "plan.json")
    compress(folder / "model.onnx", samples(), plan=plan).save(folder / "out.onnx")


def draw_report(folder: Path) -> None:
    """Read a report and make a page of it."""
    write_report(folder / "report.json", folder / "report.html")


def read_data(folder: Path) -> None:
    """Read data and look at every sample."""
    (path,) = folder.glob("data*")
    inputs = ModelStore.load(sound_model(random.Random(0))).inputs
    data = open_data(path, inputs)
    for feed in data.feeds(range(len(data))):
        assert feed["x"].dtype == np.float32


@dataclass(frozen=True, slots=True)
class Target:
    """What is made and what it is given to.

    Attributes:
        make: Writes the input into a folder.
        call: Is to take it or refuse it.
        weight: How often.
    """

    make: Callable[[random.Random, Path], None]
    call: Callable[[Path], None]
    weight: int


TARGETS = {
    "model, loaded": Target(make_model, load_model, 8),
    "model, analyze": Target(make_model, analyze_model, 6),
    "model, compress": Target(make_model, compress_model, 3),
    "plan, replayed": Target(make_plan, replay_plan, 4),
    "report, drawn": Target(make_report, draw_report, 2),
    "npz": Target(make_npz, read_data, 4),
    "npy": Target(make_npy, read_data, 2),
    "test set": Target(make_proto, read_data, 2),
}


def make(seed: int, number: int, folder: Path) -> str:
    """Write the input of a case into an empty folder; its target's name."""
    rng = random.Random(f"{seed}/{number}")
    (name,) = rng.choices(list(TARGETS), [t.weight for t in TARGETS.values()])
    TARGETS[name].make(rng, folder)
    return name


def attempt(name: str, folder: Path) -> tuple[str, str]:
    """Give an input to its target: how it ended, and the message or trace."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[name].call(folder)
    except UtilrankError as e:
        line = str(e)
        if not line.isprintable():
            return "FAILED: more than a line", repr(line)
        return f"refused: {type(e).__name__}", line
    except Exception as e:  # noqa: BLE001 (which ones there are is the question)
        return f"FAILED: {type(e).__name__}", traceback.format_exc()
    return "taken", ""


# --- processes ----------------------------------------------------------------------------------


def _serve(connection: Connection, seed: int, folder: Path) -> None:
    """Run cases by number, each in a folder of its own, until there are no more."""
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("ready")  # which took the imports
    while (number := connection.recv()) is not None:
        place = folder / str(number)
        place.mkdir()
        name = make(seed, number, place)
        connection.send(name)
        connection.send(attempt(name, place))


class _Worker:
    """A process that runs cases, and is replaced where one kills it."""

    def __init__(self, seed: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, seed, folder), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()

    def run(self, number: int) -> tuple[str, str, str] | None:
        """Target, outcome and detail of a case; None where the process did not survive it."""
        self._connection.send(number)
        name = "?"
        try:
            for _ in range(2):
                if not self._connection.poll(PATIENCE):
                    return name, "FAILED: hang", f"more than {PATIENCE:g} s"
                found = self._connection.recv()
                if isinstance(found, str):
                    name = found
                else:
                    return name, *found
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else str(code)
            return name, f"FAILED: crash, {how}", "the process ended"
        return None

    @property
    def alive(self) -> bool:
        """Whether it can take another case."""
        return self._process.is_alive()

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


def _numbers(only: int | None, seconds: float) -> Iterable[int]:
    if only is not None:
        yield only
        return
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        yield number
        number += 1


def main(arguments: list[str] | None = None) -> int:
    """Run cases until the time is over; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long (600)")
    parser.add_argument("--seed", type=int, default=0, help="what the cases depend on (0)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run this case alone")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_failures"), help="folder")
    options = parser.parse_args(arguments)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    failures = 0
    with tempfile.TemporaryDirectory(prefix="fuzz_") as held:
        folder = Path(held)
        worker = _Worker(options.seed, folder)
        for number in _numbers(options.only, options.seconds):
            found = worker.run(number)
            assert found is not None
            name, outcome, detail = found
            counts[name, outcome] += 1
            if outcome.startswith("FAILED"):
                failures += 1
                kept = options.keep / f"{options.seed}_{number}"
                shutil.copytree(folder / str(number), kept, dirs_exist_ok=True)
                (kept / "outcome.txt").write_text(f"{name}\n{outcome}\n{detail}\n")
                print(f"case {number}, {name}: {outcome}: {detail.strip().splitlines()[-1]}")
                if "hang" in outcome or not worker.alive:
                    worker.stop()
                    worker = _Worker(options.seed, folder)
            elif options.only is not None:
                print(f"case {number}, {name}: {outcome}: {detail}")
            shutil.rmtree(folder / str(number), ignore_errors=True)
        worker.stop()
    print(f"{'input':<18} {'outcome':<34} {'cases':>7}")
    for (name, outcome), count in sorted(counts.items()):
        print(f"{name:<18} {outcome:<34} {count:>7}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
