"""Prove on one machine what a GPU is needed for, and print it as tables.

    python tools/gpu_check.py                      # CUDA
    python tools/gpu_check.py --provider tensorrt

1. the execution provider works (`onnx-utilrank doctor`);
2. the part of the test suite that needs it passes;
3. calibration on it beside calibration on the CPU;
4. transformers of standard shapes, with random weights, at a share of their parameters (plain SVD:
   time does not depend on values): latency and device memory of both models in float32 and float16,
   beside the ratio of operations, which is the limit.

It runs on the CPU too (`--provider cpu`), slowly, to see that it runs at all.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from command_line import failed, new_parser
from latency_table import SHAPES, make_shape
from tables import NOTHING, command, markdown

from onnx_utilrank import (
    AnalyzeConfig,
    BenchmarkConfig,
    CompressConfig,
    QuantizeConfig,
    analyze,
    benchmark,
    compress,
    doctor,
    quantize,
)
from onnx_utilrank.errors import ProviderUnavailableError, UtilrankError
from onnx_utilrank.model.store import ModelStore

__all__ = ["main", "rows_of", "seconds_of_calibration"]

TESTS = Path(__file__).resolve().parent.parent / "tests"
COLUMNS = (
    *("model", "type", "batch", "operations", "time", "quartiles", "before, ms", "after, ms"),
    *("device memory, MiB", "after, MiB"),
)
PRECISIONS = ("fp32", "fp16")
CALIBRATED = 64


def rows_of(
    label: str,
    model: Any,
    data: Any,
    precisions: Sequence[str],
    options: argparse.Namespace,
) -> Iterator[list[str]]:
    """One row for each float type and batch of a model.

    Raises:
        UtilrankError: A model cannot be made, or does not run on the provider.
    """
    config = CompressConfig(
        param_ratio=options.param_ratio, method="svd", provider=options.provider
    )
    made = compress(model, data, config).store
    pair: list[Any] = [ModelStore.load(model), made]
    for precision in precisions:
        if precision == "fp16":
            half = QuantizeConfig(scheme="fp16", provider=options.provider)
            pair = [quantize(each, data, half).store for each in pair]
        timed = BenchmarkConfig(
            providers=(options.provider,), batches=options.batch, seconds=options.seconds
        )
        for case in benchmark(pair[0], pair[1:], data, timed).cases:
            (latency,), memory = case.latencies, [m.device for m in case.memory]
            yield [
                *(label, precision, str(case.batch)),
                NOTHING if case.flop_ratios[0] is None else f"{case.flop_ratios[0]:.3f}",
                f"{latency.ratio:.3f}",
                f"{latency.ratio_low:.3f} to {latency.ratio_high:.3f}",
                *(f"{ms:.2f}" for ms in (latency.reference_ms, latency.candidate_ms)),
                *(NOTHING if held is None else f"{held / 2**20:.0f}" for held in memory),
            ]


def seconds_of_calibration(model: Any, data: Any, provider: str) -> float:
    """How long it takes to measure utilization on all samples."""
    start = time.perf_counter()
    analyze(model, data, AnalyzeConfig(provider=provider))
    return time.perf_counter() - start


def _tests() -> str:
    """The last line of the part of the suite that needs a GPU; an error where it fails."""
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", str(TESTS)]
    done = subprocess.run(words, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    last = next((x for x in reversed(done.stdout.splitlines()) if x.strip()), "no output")
    if done.returncode:
        raise UtilrankError(f"tests that need a GPU: {last}\n{done.stdout[-4000:]}")
    return last


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("gpu_check.py", __doc__)
    parser.add_argument("--provider", default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=["vit-b", "vit-l", "bert-base"]
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64], metavar="N")
    parser.add_argument("--param-ratio", type=float, default=0.5, metavar="R")
    parser.add_argument(
        "--seconds", type=float, default=3.0, metavar="S", help="of each timing (default: 3)"
    )
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all of it; the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    print(command("gpu_check.py", given))
    rows: list[list[str]] = []
    calibrations: list[list[str]] = []
    try:
        fault = doctor(options.provider).providers[0].fault
        if fault:
            raise ProviderUnavailableError(f"provider {options.provider}: {fault}")
        print(f"\n{options.provider} works.")
        if not options.no_tests:
            print(f"Tests that need a GPU: {_tests()}")
        for label in options.shapes:
            model, data = make_shape(label, max(5 * max(options.batch), CALIBRATED))
            few = {name: values[:CALIBRATED] for name, values in data.items()}
            took = [seconds_of_calibration(model, few, p) for p in (options.provider, "cpu")]
            calibrations.append(
                [label, str(CALIBRATED), *(f"{s:.1f}" for s in took), f"{took[1] / took[0]:.1f}"]
            )
            for row in rows_of(label, model, data, options.precisions, options):
                rows.append(row)
                print(" | ".join(row), file=sys.stderr, flush=True)
    except UtilrankError as e:
        return failed("gpu_check.py", e)
    head = ("model", "samples", f"on {options.provider}, s", "on cpu, s", "cpu / it")
    print(f"\n{markdown(head, calibrations, head[:1])}\n")
    print(markdown(COLUMNS, rows, COLUMNS[:2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
