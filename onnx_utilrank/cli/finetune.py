"""`onnx-utilrank finetune`: train a compressed model after its original's outputs."""

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
from onnx_utilrank.config import FINETUNE_METHODS, FinetuneConfig
from onnx_utilrank.finetuning import finetune
from onnx_utilrank.report.training_tables import finetune_tables
from onnx_utilrank.statistics.divergence import WEIGHTINGS
from onnx_utilrank.training.setting import DEFAULT_STEPS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s REFERENCE CANDIDATE -o OUT --data DATA […]"
    parser.epilog = (
        "example:\n  onnx-utilrank finetune model.onnx small.onnx -o tuned.onnx \\\n"
        "      --data calibration.npz"
    )
    parser.description = (
        "Trains the weights that compression changed until the outputs follow those "
        "of the original. The new weights are kept where outputs diverge less on samples held "
        "back from the training; else OUT is the candidate as it was."
    )
    parser.add_argument("reference", metavar="REFERENCE", help="the original .onnx file")
    parser.add_argument("candidate", metavar="CANDIDATE", help="the compressed .onnx file")
    add_data_options(parser)
    group(parser, "training").add_argument(
        "--method",
        choices=FINETUNE_METHODS,
        default=FINETUNE_METHODS[0],
        help="what is trained: all that compression changed, with all biases and norms (default); "
        "biases and norms alone; or the mixing between the bases of factors, which may lose "
        "directions on the way (OIALR)",
    )
    add_training_options(parser, steps=DEFAULT_STEPS)
    group(parser, "training").add_argument(
        "--no-augment",
        action="store_true",
        help="train on the samples as they are (default: also on variations of them: images and "
        "signals moved and with noise, texts with some tokens exchanged)",
    )
    group(parser, "training").add_argument(
        "--labels",
        metavar="KEY[=OUTPUT]",
        help="array of the data with the right classes, int64, one for each sample or position, to "
        "train on as well; OUTPUT, where several could be meant",
    )
    group(parser, "training").add_argument(
        "--blocks",
        action="store_true",
        help="values between blocks are to be as in the original too",
    )
    group(parser, "training").add_argument(
        "--output-weighting",
        choices=WEIGHTINGS,
        help="what counts at the outputs (default: told from the model and the values)",
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
    check_outputs(
        [args.reference, args.candidate, args.data, *args.custom_op_library],
        [args.output, args.report],
    )
    config = FinetuneConfig(
        method=args.method,
        weighting=args.output_weighting,
        blocks=args.blocks,
        labels=args.labels,
        augment=not args.no_augment,
        **training_options(args),
        **run_options(args),
    )
    with ProgressBars() as progress:
        result = finetune(args.reference, args.candidate, args.data, config, progress=progress)
    result.save(args.output, save_as_external_data=args.save_as_external_data)
    emit(args, result, finetune_tables(result, args.output))
    return 0
