"""`onnx-utilrank benchmark`: time and memory of models beside each other."""

import argparse

from onnx_utilrank.benchmarking.config import BenchmarkConfig
from onnx_utilrank.benchmarking.run import benchmark
from onnx_utilrank.cli.emit import emit
from onnx_utilrank.cli.options import (
    add_data_options,
    add_output_options,
    add_providers_option,
    check_outputs,
    number,
    providers_options,
)
from onnx_utilrank.cli.parser import group
from onnx_utilrank.cli.progress import ProgressBars
from onnx_utilrank.report.benchmark_tables import benchmark_tables

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s REFERENCE CANDIDATE … […]"
    parser.epilog = "example:\n  onnx-utilrank benchmark model.onnx small.onnx --batch 1 16"
    parser.description = (
        "Runs all models in turn on the same inputs, after warming up: median and "
        "quartiles of the time of a run, and of its ratio to the reference in the same round; and "
        "the peak memory of each model, in a process of its own."
    )
    parser.add_argument("reference", metavar="REFERENCE", help="the .onnx file to compare with")
    parser.add_argument(
        "candidates", nargs="+", metavar="CANDIDATE", help=".onnx files with the same inputs"
    )
    add_data_options(parser, required=False)
    group(parser, "cases").add_argument(
        "--batch",
        type=number(int, 1),
        nargs="+",
        default=[1],
        metavar="N",
        help="samples of a run, each number a case, where the model leaves that free (default: 1)",
    )
    group(parser, "cases").add_argument(
        "--dim",
        action="append",
        type=_lengths,
        default=[],
        metavar="NAME=N,N,…",
        help="lengths of another free axis for inputs that are generated, such as a sequence; may "
        "be repeated, and each combination is a case",
    )
    group(parser, "where it runs").add_argument(
        "--threads",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="threads within an operator (default: ONNX Runtime's choice)",
    )
    group(parser, "cases").add_argument(
        "--seconds",
        type=number(float, 0),
        default=5.0,
        metavar="S",
        help="how long each case is timed, at least (default: 5)",
    )
    add_providers_option(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    check_outputs(
        [args.reference, *args.candidates, args.data, *args.custom_op_library], [args.report]
    )
    config = BenchmarkConfig(
        **providers_options(args),
        batches=tuple(args.batch),
        dims=dict(args.dim),
        threads=args.threads,
        samples=args.samples,
        seed=args.seed,
        seconds=args.seconds,
    )
    with ProgressBars() as progress:
        report = benchmark(args.reference, args.candidates, args.data, config, progress=progress)
    emit(args, report, benchmark_tables(report))
    return 0


def _lengths(text: str) -> tuple[str, tuple[int, ...]]:
    name, sign, lengths = text.rpartition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=N,N,…")
    return name, tuple(int(number(int, 1)(length.strip())) for length in lengths.split(","))
