"""`onnx-utilrank train`: train a model with labels so that it comes out of low rank."""

import argparse

from onnx_utilrank.cli.emit import emit
from onnx_utilrank.cli.options import (
    add_calibration_options,
    add_data_options,
    add_model_output_option,
    add_output_options,
    add_provider_option,
    add_training_options,
    check_outputs,
    run_options,
    training_options,
)
from onnx_utilrank.cli.parser import group
from onnx_utilrank.cli.progress import ProgressBars
from onnx_utilrank.config import TRAIN_METHODS, TrainConfig
from onnx_utilrank.low_rank_training import train
from onnx_utilrank.report.training_tables import train_tables
from onnx_utilrank.training.setting import DEFAULT_STEPS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s MODEL -o OUT --data DATA --labels KEY […]"
    parser.epilog = (
        "example:\n  onnx-utilrank train model.onnx -o low.onnx --data train.npz --labels label"
    )
    parser.description = (
        "Trains a model, of drawn weights or trained ones, as OIALR does (Coquelin et "
        "al., arXiv 2401.08505): after a delay weights go into orthonormal bases that are frozen, "
        "what mixes them is trained, and directions that are worth little go."
    )
    parser.add_argument("model", metavar="MODEL", help="an .onnx file; it is not changed")
    add_data_options(parser)
    group(parser, "training").add_argument(
        "--labels",
        required=True,
        metavar="KEY[=OUTPUT]",
        help="array of the data with the right classes, int64, one for each sample or position; "
        "OUTPUT, where several could be meant",
    )
    group(parser, "training").add_argument(
        "--method",
        choices=TRAIN_METHODS,
        default=TRAIN_METHODS[0],
        help="OIALR (default), or dense weights to compare with",
    )
    add_training_options(parser, steps=DEFAULT_STEPS)
    group(parser, "training").add_argument(
        "--augment",
        action="store_true",
        help="also train on variations of the samples, which keep their labels: images and "
        "signals moved and with noise",
    )
    add_calibration_options(parser)
    add_provider_option(parser)
    group(parser, "output").add_argument(
        "-o", "--output", required=True, metavar="OUT", help="the .onnx file to write"
    )
    add_model_output_option(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    check_outputs([args.model, args.data, *args.custom_op_library], [args.output, args.report])
    config = TrainConfig(
        method=args.method,
        labels=args.labels,
        augment=args.augment,
        **training_options(args),
        **run_options(args),
    )
    with ProgressBars() as progress:
        result = train(args.model, args.data, config, progress=progress)
    result.save(args.output, save_as_external_data=args.save_as_external_data)
    emit(args, result, train_tables(result, args.output))
    return 0
