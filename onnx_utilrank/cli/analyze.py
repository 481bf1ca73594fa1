"""`onnx-utilrank analyze`: which share of its space each weight uses."""

import argparse

from onnx_utilrank.cli.emit import emit
from onnx_utilrank.cli.options import (
    add_calibration_options,
    add_data_options,
    add_engine_option,
    add_output_options,
    add_provider_option,
    add_site_options,
    check_outputs,
    number,
    run_options,
    site_options,
)
from onnx_utilrank.cli.parser import group
from onnx_utilrank.cli.progress import ProgressBars
from onnx_utilrank.config import DEFAULT_ENERGY, AnalyzeConfig
from onnx_utilrank.pipeline import analyze
from onnx_utilrank.report.tables import utilization_tables

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s MODEL --data DATA […]"
    parser.epilog = "example:\n  onnx-utilrank analyze model.onnx --data calibration.npz"
    parser.description = (
        "For every node with a constant weight: how many directions of its inputs "
        "(k_S) and outputs (k_T) hold the stated energy, the utilized rank min(k_S, k_T), the "
        "utilization, and their mean over the layers, MLU (arXiv 2407.04797). Writes no model."
    )
    parser.add_argument("model", metavar="MODEL", help="an .onnx file")
    add_data_options(parser)
    group(parser, "measuring").add_argument(
        "--energy",
        type=number(float, 0, 1),
        default=DEFAULT_ENERGY,
        metavar="E",
        help=f"share of the energy that a subspace has to hold (default: {DEFAULT_ENERGY})",
    )
    add_site_options(parser)
    add_calibration_options(parser)
    add_engine_option(parser)
    add_provider_option(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    check_outputs([args.model, args.data, *args.custom_op_library], [args.report])
    config = AnalyzeConfig(
        energy=args.energy,
        **run_options(args),
        **site_options(args),
    )
    with ProgressBars() as progress:
        report = analyze(args.model, args.data, config, progress=progress)
    emit(args, report, utilization_tables(report))
    return 0
