"""`onnx-utilrank quantize`: the weights of a model in fewer bits."""

import argparse

from onnx_utilrank.cli.emit import emit
from onnx_utilrank.cli.options import (
    add_data_options,
    add_metric_options,
    add_model_output_option,
    add_output_options,
    add_provider_option,
    check_outputs,
)
from onnx_utilrank.cli.parser import group
from onnx_utilrank.cli.progress import ProgressBars
from onnx_utilrank.config import SCHEME_KEYS
from onnx_utilrank.plain_quantization import quantize
from onnx_utilrank.quantization.config import QuantizeConfig
from onnx_utilrank.report.quantization_tables import quantization_tables
from onnx_utilrank.statistics.divergence import WEIGHTINGS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s MODEL -o OUT --to SCHEME --data DATA […]"
    parser.epilog = (
        "example:\n  onnx-utilrank quantize model.onnx -o small.onnx --to int8 \\\n"
        "      --data calibration.npz"
    )
    parser.description = (
        "Stores the weights of a model in fewer bits, calibrated on the samples where "
        "the scheme takes that, and compares the result with the original on samples that were "
        "held back. compress --then does the same to what it makes."
    )
    parser.add_argument("model", metavar="MODEL", help="an .onnx file; it is not changed")
    group(parser, "method").add_argument(
        "--to",
        required=True,
        choices=SCHEME_KEYS,
        help="int8: weights and activations, with ranges from the samples; int8-dynamic: with "
        "ranges at run time; int4: weights of matrix products and tables; fp16, bf16",
    )
    add_data_options(parser)
    add_metric_options(parser)
    group(parser, "method").add_argument(
        "--output-weighting",
        choices=WEIGHTINGS,
        help="what counts at the outputs (default: told from the model and the values)",
    )
    add_provider_option(parser)
    group(parser, "output").add_argument(
        "-o", "--output", required=True, metavar="OUT", help="the .onnx file to write"
    )
    add_model_output_option(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    check_outputs([args.model, args.data, *args.custom_op_library], [args.output, args.report])
    config = QuantizeConfig(
        scheme=args.to,
        evaluate=args.evaluate,
        labels=args.labels,
        weighting=args.output_weighting,
        samples=args.samples,
        seed=args.seed,
        provider=args.provider,
        custom_op_libraries=tuple(args.custom_op_library),
    )
    with ProgressBars() as progress:
        result = quantize(args.model, args.data, config, progress=progress)
    result.save(args.output, save_as_external_data=args.save_as_external_data)
    emit(args, result, quantization_tables(result, args.output))
    return 0
