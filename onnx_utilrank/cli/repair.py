"""`onnx-utilrank repair`: low-rank branches that bring back what quantization lost."""

import argparse

from onnx_utilrank.cli.emit import emit
from onnx_utilrank.cli.options import (
    add_calibration_options,
    add_data_options,
    add_engine_option,
    add_metric_options,
    add_model_output_option,
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
from onnx_utilrank.config import QUALITY_KEYS, QualityTarget
from onnx_utilrank.repairing.config import RepairConfig
from onnx_utilrank.repairing.repair import repair
from onnx_utilrank.report.repair_tables import repair_tables
from onnx_utilrank.statistics.divergence import WEIGHTINGS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s REFERENCE QUANTIZED -o OUT --data DATA TARGET […]"
    parser.epilog = (
        "example:\n  onnx-utilrank repair model.onnx int4.onnx -o repaired.onnx \\\n"
        "      --data calibration.npz --extra-bytes 0.1"
    )
    parser.description = (
        "Puts a low-rank branch beside quantized layers, y = Q(W) x + B (A x), of the "
        "error W - Q(W) in the directions that the data use. The branches are kept where outputs "
        "diverge less on samples held back; else OUT is the quantized model as it was."
    )
    parser.add_argument("reference", metavar="REFERENCE", help="the original .onnx file")
    parser.add_argument("quantized", metavar="QUANTIZED", help="the same, quantized")
    add_data_options(parser)
    target = group(parser, "target (one of these)").add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--rank",
        type=number(int, 0),
        metavar="R",
        help="of the branch at each layer that is predicted to gain by it",
    )
    target.add_argument(
        "--extra-bytes",
        type=number(float, 0),
        metavar="F",
        help="what branches may add to the file, as a share of the quantized model's bytes; spent "
        "where it is predicted to bring back most",
    )
    for name, what in (
        ("--max-drop", "with which the model loses at most so much of --evaluate or --labels"),
        (
            "--max-divergence",
            "with which outputs diverge at most so much: nats a decision, or half of the relative "
            "squared error of values",
        ),
        ("--min-agreement", "with which the model makes this share of decisions alike"),
        ("--min-snr", "with which output values have this signal-to-noise ratio, dB"),
    ):
        target.add_argument(name, type=float, metavar="D", help=f"the smallest branches {what}")
    add_metric_options(parser)
    group(parser, "method").add_argument(
        "--output-weighting",
        choices=WEIGHTINGS,
        help="what counts at the outputs (default: told from the model and the values)",
    )
    group(parser, "method").add_argument(
        "--no-augment",
        action="store_true",
        help="use the samples as they are (default: variations of them too, of a model that is "
        "cheap to run)",
    )
    add_site_options(parser)
    add_calibration_options(parser)
    add_engine_option(parser)
    add_provider_option(parser)
    group(parser, "output").add_argument(
        "-o", "--output", required=True, metavar="OUT", help="the .onnx file to write"
    )
    add_model_output_option(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    check_outputs(
        [args.reference, args.quantized, args.data, *args.custom_op_library],
        [args.output, args.report],
    )
    asked = {key: getattr(args, key) for key in QUALITY_KEYS}
    quality = next(
        (QualityTarget(key=key, limit=v) for key, v in asked.items() if v is not None), None
    )
    config = RepairConfig(
        rank=args.rank,
        extra_bytes=args.extra_bytes,
        quality=quality,
        evaluate=args.evaluate,
        labels=args.labels,
        weighting=args.output_weighting,
        augment=not args.no_augment,
        **run_options(args),
        **site_options(args),
    )
    with ProgressBars() as progress:
        result = repair(args.reference, args.quantized, args.data, config, progress=progress)
    result.save(args.output, save_as_external_data=args.save_as_external_data)
    emit(args, result, repair_tables(result, args.output))
    return 0
