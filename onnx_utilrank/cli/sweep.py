"""`onnx-utilrank sweep`: the whole trade-off between size and quality, from one calibration."""

import argparse

from onnx_utilrank.cli.emit import emit
from onnx_utilrank.cli.options import (
    add_calibration_options,
    add_data_options,
    add_engine_option,
    add_method_options,
    add_model_output_option,
    add_output_options,
    add_provider_option,
    add_site_options,
    check_outputs,
    method_options,
    number,
    run_options,
    site_options,
)
from onnx_utilrank.cli.parser import group
from onnx_utilrank.cli.progress import ProgressBars
from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import ConfigError
from onnx_utilrank.report.plot import check_plot, plot_sweep
from onnx_utilrank.report.tables import sweep_tables
from onnx_utilrank.sweeping import SWEEP_RATIOS, sweep

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s MODEL --data DATA […]"
    parser.epilog = (
        "example:\n  onnx-utilrank sweep model.onnx --data calibration.npz --plot curve.svg"
    )
    parser.description = (
        "Calibrates once, makes a model of each size and measures size, FLOPs, "
        "latency and quality on samples that were held back. The report holds the plan of every "
        "point: pick one with --pick here, or later with compress --plan REPORT --point R."
    )
    parser.add_argument("model", metavar="MODEL", help="an .onnx file; it is not changed")
    add_data_options(parser)
    group(parser, "sizes").add_argument(
        "--ratios",
        type=_ratios,
        default=SWEEP_RATIOS,
        metavar="R,R,…",
        help="parameters to keep at each point (default: 0.9 to 0.1 in steps of 0.1)",
    )
    group(parser, "output").add_argument(
        "--plot", metavar="FILE", help="draw the curve: .svg, .png or .pdf"
    )
    group(parser, "output").add_argument(
        "--pick", type=number(float, 0, 1), metavar="R", help="write the model of this point to OUT"
    )
    add_method_options(parser)
    add_site_options(parser)
    add_calibration_options(parser)
    add_engine_option(parser)
    add_provider_option(parser)
    group(parser, "output").add_argument(
        "-o", "--output", metavar="OUT", help="the .onnx file to write"
    )
    add_model_output_option(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    if (args.pick is None) != (args.output is None):
        raise ConfigError("--pick R and -o OUT go together")
    check_outputs(
        [args.model, args.data, *args.custom_op_library], [args.output, args.plot, args.report]
    )
    if args.plot:
        check_plot(args.plot)
    ratios = args.ratios
    if args.pick is not None and args.pick not in ratios:
        ratios = (*ratios, args.pick)
    config = CompressConfig(**method_options(args), **run_options(args), **site_options(args))
    with ProgressBars() as progress:
        result = sweep(
            args.model, args.data, config, ratios=ratios, keep=args.pick, progress=progress
        )
    if args.output:
        result.save(args.output, save_as_external_data=args.save_as_external_data)
    if args.plot:
        plot_sweep(result, args.plot)
    emit(args, result, sweep_tables(result, args.pick, args.output))
    return 0


def _ratios(text: str) -> tuple[float, ...]:
    return tuple(number(float, 0, 1)(part.strip()) for part in text.split(","))
