"""`onnx-utilrank validate`: compare a candidate with its reference."""

import argparse

from onnx_utilrank.cli.emit import emit
from onnx_utilrank.cli.options import (
    add_data_options,
    add_labels_option,
    add_output_options,
    add_providers_option,
    check_outputs,
    number,
    providers_options,
)
from onnx_utilrank.cli.parser import group
from onnx_utilrank.cli.progress import ProgressBars
from onnx_utilrank.config import ValidateConfig
from onnx_utilrank.errors import TargetMissedError
from onnx_utilrank.pipeline import validate
from onnx_utilrank.report.tables import validation_tables

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s REFERENCE CANDIDATE --data DATA […]"
    parser.epilog = (
        "example:\n  onnx-utilrank validate model.onnx small.onnx --data samples.npz \\\n"
        "      --min-agreement 0.99"
    )
    parser.description = (
        "Runs both models on the samples: output error, equal decisions, parameters, "
        "file size, FLOPs, and a paired latency ratio, on every provider asked for; with "
        "labels the accuracy of both, too."
    )
    parser.add_argument("reference", metavar="REFERENCE", help="the .onnx file that is right")
    parser.add_argument("candidate", metavar="CANDIDATE", help="the .onnx file to compare with it")
    add_data_options(parser)
    add_providers_option(parser)
    group(parser, "tolerances").add_argument(
        "--max-error",
        type=number(float, 0),
        metavar="E",
        help="largest relative error of an output that passes; more ends in exit status 3",
    )
    group(parser, "tolerances").add_argument(
        "--min-agreement",
        type=number(float, 0, 1),
        metavar="A",
        help="least share of equal decisions that passes; less ends in exit status 3",
    )
    group(parser, "tolerances").add_argument(
        "--max-drop",
        type=number(float, 0),
        metavar="D",
        help="most points of accuracy that may be lost, of --labels; more ends in exit status 3",
    )
    add_labels_option(
        group(parser, "metric"), "the accuracy of both models is measured, and what is lost"
    )
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    check_outputs(
        [args.reference, args.candidate, args.data, *args.custom_op_library], [args.report]
    )
    config = ValidateConfig(
        **providers_options(args),
        max_error=args.max_error,
        min_agreement=args.min_agreement,
        labels=args.labels,
        max_drop=args.max_drop,
        samples=args.samples,
        seed=args.seed,
    )
    with ProgressBars() as progress:
        report = validate(args.reference, args.candidate, args.data, config, progress=progress)
    emit(args, report, validation_tables(report))
    if not report.passed:
        raise TargetMissedError("; ".join(report.failures))
    return 0
