"""`onnx-utilrank compress`: a smaller model, validated on samples that were held back."""

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
from onnx_utilrank.config import (
    FINETUNE_METHODS,
    QUALITY_KEYS,
    SCHEME_KEYS,
    CompressConfig,
    FinetuneConfig,
    QualityTarget,
)
from onnx_utilrank.errors import ConfigError
from onnx_utilrank.pipeline import compress
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.report.tables import compression_tables

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s MODEL -o OUT --data DATA TARGET […]"
    parser.epilog = (
        "example:\n  onnx-utilrank compress model.onnx -o small.onnx --data calibration.npz \\\n"
        "      --param-ratio 0.5 --report report.json"
    )
    parser.description = (
        "Measures on the samples what each product, Conv and embedding does to the "
        "outputs, chooses a rank for it, puts factors in the place of its weight, and compares the "
        "result with the original on samples that were held back."
    )
    parser.add_argument("model", metavar="MODEL", help="an .onnx file; it is not changed")
    add_data_options(parser)
    target = group(parser, "target (one of these)").add_mutually_exclusive_group(required=True)
    for name, what in (
        ("--param-ratio", "parameters to keep, as a share of all initializers and constants"),
        ("--size-ratio", "bytes of the file to keep, as a share"),
        ("--flop-ratio", "operations of matrix products and convolutions to keep, as a share"),
        (
            "--latency-ratio",
            "time of a run to keep, as a share: layers, moves and the result are timed on the "
            "provider; slower than that ends in exit status 3",
        ),
        ("--energy", "the paper's rule: the share of energy that each layer's subspaces hold"),
    ):
        target.add_argument(name, type=number(float, 0, 1), metavar="R", help=what)
    for name, what in (
        ("--max-drop", "the smallest model that loses at most this much of --evaluate or --labels"),
        (
            "--max-divergence",
            "the smallest model whose outputs diverge at most so much: nats a decision, or half "
            "of the relative squared error of values",
        ),
        ("--min-agreement", "the smallest model that makes this share of decisions alike"),
        ("--min-snr", "the smallest model whose output values have this signal-to-noise ratio, dB"),
    ):
        target.add_argument(name, type=float, metavar="D", help=what)
    target.add_argument(
        "--plan", metavar="FILE", help="replay the decisions of a plan, or of a point of a sweep"
    )
    group(parser, "target (one of these)").add_argument(
        "--point",
        type=number(float, 0, 1),
        metavar="R",
        help="which point, where --plan is a sweep",
    )
    add_method_options(parser)
    group(parser, "method").add_argument(
        "--force", action="store_true", help="factor every weight, also where that saves nothing"
    )
    group(parser, "training").add_argument(
        "--finetune",
        nargs="?",
        const=FINETUNE_METHODS[0],
        choices=FINETUNE_METHODS,
        help="train the result after the original's outputs, as the verb finetune does with its "
        "defaults; the new weights are kept where outputs diverge less on the samples held back",
    )
    group(parser, "training").add_argument(
        "--steps", type=number(int, 1), metavar="N", help="steps of that training (default: 500)"
    )
    group(parser, "quantization").add_argument(
        "--then",
        choices=SCHEME_KEYS,
        help="quantize the result, as the verb quantize does; --size-ratio and quality targets are "
        "then of the quantized model",
    )
    group(parser, "quantization").add_argument(
        "--repair-rank",
        type=number(int, 0),
        default=0,
        metavar="R",
        help="with --then int8, int8-dynamic or int4: low-rank branches of this rank beside what "
        "is quantized, kept where they help on the samples held back (default: 0, none)",
    )
    group(parser, "output").add_argument(
        "--plan-out", metavar="FILE", help="write the plan, to read or replay"
    )
    add_site_options(parser)
    add_calibration_options(parser)
    add_engine_option(parser)
    add_provider_option(parser)
    group(parser, "output").add_argument(
        "--dry-run", action="store_true", help="stop at the plan; write no model"
    )
    group(parser, "output").add_argument(
        "-o", "--output", metavar="OUT", help="the .onnx file to write"
    )
    add_model_output_option(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    if not args.output and not args.dry_run:
        raise ConfigError("-o OUT is needed, or --dry-run")
    own = [args.method, args.moves, args.output_weighting]
    own += [args.then, args.repair_rank, args.rank_multiple]
    flags = (args.force, args.no_refit, args.no_augment and not args.finetune)
    if args.plan and (any(own) or any(flags)):
        raise ConfigError(
            "--plan states method, moves, weighting, refit, variations, ranks and quantization "
            "itself: --method, --moves, --output-weighting, --no-refit, --no-augment, "
            "--rank-multiple, --force, --then and --repair-rank exclude it"
        )
    if args.point is not None and not args.plan:
        raise ConfigError("--point goes with --plan")
    if args.steps is not None and args.finetune is None:
        raise ConfigError("--steps goes with --finetune")
    check_outputs(
        [args.model, args.plan, args.data, *args.custom_op_library],
        [args.output, args.plan_out, args.report],
    )
    asked = {key: getattr(args, key) for key in QUALITY_KEYS}
    quality = next(
        (QualityTarget(key=key, limit=v) for key, v in asked.items() if v is not None), None
    )
    config = CompressConfig(
        param_ratio=args.param_ratio,
        size_ratio=args.size_ratio,
        flop_ratio=args.flop_ratio,
        latency_ratio=args.latency_ratio,
        energy=args.energy,
        quality=quality,
        force=args.force,
        finetune=FinetuneConfig(method=args.finetune, steps=args.steps, augment=not args.no_augment)
        if args.finetune
        else None,
        then=args.then,
        repair_rank=args.repair_rank,
        **method_options(args),
        **run_options(args),
        **site_options(args),
    )
    plan = RankPlan.load(args.plan, point=args.point) if args.plan else None
    with ProgressBars() as progress:
        result = compress(
            args.model, args.data, config, plan=plan, dry_run=args.dry_run, progress=progress
        )
    # What is printed says that the model was written, so that comes first.
    if args.plan_out:
        result.plan.save(args.plan_out)
    if not args.dry_run:
        result.save(args.output, save_as_external_data=args.save_as_external_data)
    emit(args, result, compression_tables(result, args.output))
    return 0
