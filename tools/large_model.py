"""Show what a model costs that is larger than memory should hold: the most memory, and seconds.

A model of residual MLP blocks with random weights is made, beside its data file, without ever being
in memory as a whole; then `onnx-utilrank compress` runs in a process of its own, whose anonymous
memory is looked at every hundredth of a second. Pages of files that are mapped to memory do not
count: the system drops them when it needs the room. Linux alone tells the two apart.

    plain        one pass of ONNX Runtime over the samples that calibrate
    copy         the file read once and written once
    ratio        the whole of `compress` to the two together
    largest      the largest weight in float64, which its decomposition works on
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from anonymous_memory import PERIOD, Peak
from command_line import failed, new_parser
from engine_cost import plain_seconds
from onnx import TensorProto, helper
from tables import command, markdown

from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.errors import UtilrankError
from onnx_utilrank.model.external import DATA_FILE, ExternalWriter
from onnx_utilrank.model.store import ModelStore

__all__ = ["build_large", "main", "watched"]

TOKENS = 16
HIDDEN = 4  # units for each feature
OPSET, IR_VERSION = 17, 9
COLUMNS = (
    *("file, GiB", "weights", "largest, MiB", "samples", "memory budget, GiB"),
    *("anonymous memory, GiB", "plain, s", "copy, s", "compress, s", "ratio", "result, GiB"),
)


def build_large(path: Path, *, size: int, width: int) -> int:
    """Write a model of at least `size` bytes, most of them in a file beside it.

    Args:
        path: Where; its data file gets the name `DATA_FILE`.
        size: Bytes.
        width: Features between the blocks, of which each has two weights [width, 4 width].

    Returns:
        The number of weights.
    """
    rng = np.random.default_rng(0)
    initializers: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    with (path.parent / DATA_FILE).open("wb") as file:
        writer = ExternalWriter(file, DATA_FILE)

        def constant(name: str, values: np.ndarray) -> str:
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=values.shape)
            writer.put(tensor, values.data)
            initializers.append(tensor)
            return name

        def linear(x: str, name: str, inputs: int, outputs: int) -> str:
            weight = rng.standard_normal((inputs, outputs), dtype=np.float32) / np.sqrt(inputs)
            product = helper.make_node(
                "MatMul", [x, constant(f"{name}/weight", weight.astype(np.float32))], [f"{name}/xw"]
            )
            bias = constant(f"{name}/bias", np.zeros(outputs, np.float32))
            nodes.extend([product, helper.make_node("Add", [f"{name}/xw", bias], [f"{name}/y"])])
            return f"{name}/y"

        x, k = "x", 0
        while file.tell() < size:
            up = linear(x, f"block{k}/up", width, HIDDEN * width)
            nodes.append(helper.make_node("Relu", [up], [f"block{k}/units"]))
            down = linear(f"block{k}/units", f"block{k}/down", HIDDEN * width, width)
            nodes.append(helper.make_node("Add", [down, x], [f"block{k}/sum"]))
            scale = constant(f"block{k}/scale", np.ones(width, np.float32))
            x, k = f"block{k}/out", k + 1
            nodes.append(helper.make_node("LayerNormalization", [f"block{k - 1}/sum", scale], [x]))
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    shape: list[str | int | None] = ["n", TOKENS, width]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        initializer=initializers,
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=[opset])
    path.write_bytes(model.SerializeToString())
    return 2 * k


def watched(command: Sequence[str | Path]) -> tuple[float, float]:
    """Run a command to its end; its seconds, and the most anonymous memory it held, in GiB.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    start, peak = time.perf_counter(), Peak()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak.look(process.pid)
            time.sleep(PERIOD)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, peak.bytes / 2**30


def _measure(folder: Path, options: argparse.Namespace) -> tuple[str, ...]:
    model, data, out = (folder / name for name in ("large.onnx", "samples.npz", "small.onnx"))
    weights = build_large(model, size=int(options.gib * 2**30), width=options.width)
    rows = np.random.default_rng(1).standard_normal(
        (options.samples, TOKENS, options.width), dtype=np.float32
    )
    np.savez(data, x=rows)
    dataset = open_data(data, ModelStore.load(model).inputs)
    samples, _ = dataset.split(samples=None, seed=0)
    start = time.perf_counter()
    shutil.copyfile(folder / DATA_FILE, folder / "copy")
    copied = time.perf_counter() - start
    (folder / "copy").unlink()
    plain = plain_seconds(model, dataset, samples)
    seconds, memory = watched(
        [
            *(sys.executable, "-m", "onnx_utilrank", "compress", model, "-o", out, "--data", data),
            *("--param-ratio", f"{options.param_ratio:g}"),
            *("--memory-budget", str(int(options.memory_budget * 2**30))),
        ]
    )
    return (
        f"{ModelStore.load(model).file_bytes / 2**30:.2f}",
        str(weights),
        f"{8 * HIDDEN * options.width**2 / 2**20:.0f}",
        str(len(samples)),
        f"{options.memory_budget:g}",
        f"{memory:.2f}",
        *(f"{s:.0f}" for s in (plain, copied, seconds)),
        f"{seconds / (plain + copied):.1f}",
        f"{ModelStore.load(out).file_bytes / 2**30:.2f}",
    )


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("large_model.py", __doc__)
    for name, default, words in (
        ("--gib", 3.0, "size of the model"),
        ("--memory-budget", 1.0, "what compress may plan with, in GiB"),
        ("--param-ratio", 0.5, "parameters to keep"),
    ):
        parser.add_argument(
            name, type=float, default=default, metavar="X", help=f"{words} (default: {default:g})"
        )
    for name, count, words in (
        ("--width", 1024, "features between blocks"),
        ("--samples", 80, "of which a fifth is held back"),
    ):
        parser.add_argument(
            name, type=int, default=count, metavar="N", help=f"{words} (default: {count})"
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    if not Path("/proc/self/status").is_file():
        parser.error("this system does not tell anonymous memory from mapped files")
    try:
        with tempfile.TemporaryDirectory() as folder:
            row = _measure(Path(folder), options)
    except UtilrankError as e:
        return failed(parser.prog, e)
    except subprocess.CalledProcessError as e:
        print(f"{parser.prog}: error: compress ended with status {e.returncode}", file=sys.stderr)
        return 1
    print(f"{command(parser.prog, given)}\n")
    print(markdown(COLUMNS, [row]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
