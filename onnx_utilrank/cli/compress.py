"""`onnx-utilrank compress`: a smaller model, validated on samples that were held back."""

import argparse
from typing import Any

from onnx_utilrank.cli.options import (
    add_data_options,
    add_output_options,
    add_provider_option,
    add_site_options,
    check_outputs,
    number,
    run_options,
)
from onnx_utilrank.cli.progress import ProgressBars
from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import ConfigError
from onnx_utilrank.pipeline import compress
from onnx_utilrank.ranking.methods import METHODS
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.report.emit import emit
from onnx_utilrank.report.tables import compression_tables

__all__ = ["add_parser", "run"]


def add_parser(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "compress",
        help="make a smaller model and validate it",
        description="Collects second moments on the samples, chooses a rank for every MatMul, "
        "Gemm and Conv, puts factors in the place of their weights, and compares the result with "
        "the original on samples that were held back.",
    )
    parser.add_argument("model", metavar="MODEL", help="an .onnx file; it is not changed")
    parser.add_argument("-o", "--output", metavar="OUT", help="the .onnx file to write")
    add_data_options(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--param-ratio",
        type=number(float, 0, 1),
        metavar="R",
        help="parameters to keep, as a share of all initializers and constants of the model",
    )
    target.add_argument(
        "--energy",
        type=number(float, 0, 1),
        metavar="E",
        help="the paper's rule: each layer keeps the subspaces that hold this share of the energy",
    )
    target.add_argument("--plan", metavar="FILE", help="replay the decisions of a plan")
    parser.add_argument(
        "--method",
        choices=[m.key for m in METHODS],
        help="how --param-ratio is spent: the data-optimal factors with one budget over all "
        f"layers ({METHODS[0].key}, the default), the paper's rule, or plain SVD without data",
    )
    parser.add_argument(
        "--force", action="store_true", help="factor every weight, also where that saves nothing"
    )
    parser.add_argument("--plan-out", metavar="FILE", help="write the plan, to read or replay")
    parser.add_argument(
        "--rank-multiple",
        type=number(int, 1),
        default=1,
        metavar="K",
        help="ranks are multiples of K; 8 suits GPUs (default: 1)",
    )
    add_site_options(parser)
    add_provider_option(parser)
    parser.add_argument("--dry-run", action="store_true", help="stop at the plan; write no model")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    if not args.output and not args.dry_run:
        raise ConfigError("-o OUT is needed, or --dry-run")
    if args.plan and (args.method or args.force):
        raise ConfigError("--plan states method and ranks itself: --method and --force exclude it")
    check_outputs([args.model, args.plan], [args.output, args.plan_out, args.report])
    config = CompressConfig(
        param_ratio=args.param_ratio,
        energy=args.energy,
        method=args.method,
        force=args.force,
        rank_multiple=args.rank_multiple,
        **run_options(args),
    )
    plan = RankPlan.load(args.plan) if args.plan else None
    with ProgressBars() as progress:
        result = compress(
            args.model, args.data, config, plan=plan, dry_run=args.dry_run, progress=progress
        )
    # What is printed says that the model was written, so that comes first.
    if args.plan_out:
        result.plan.save(args.plan_out)
    if not args.dry_run:
        result.save(args.output)
    emit(
        result.as_dict(),
        compression_tables(result, args.output),
        as_json=args.json,
        file=args.report,
    )
    return 0
