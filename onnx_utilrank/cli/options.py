"""Options and checks that several verbs share."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from onnx_utilrank.cli.output import add_output_options, check_outputs
from onnx_utilrank.cli.parser import group
from onnx_utilrank.cli.provider_options import (
    add_library_option,
    add_provider_option,
    add_providers_option,
    providers_options,
)
from onnx_utilrank.config import DEFAULT_MEMORY, OPTIMIZE_FOR
from onnx_utilrank.moves.moves import MOVE_KEYS
from onnx_utilrank.ranking.methods import METHODS
from onnx_utilrank.sites.find import SITE_KINDS
from onnx_utilrank.statistics.divergence import WEIGHTINGS

__all__ = [
    "add_calibration_options",
    "add_data_options",
    "add_engine_option",
    "add_library_option",
    "add_method_options",
    "add_metric_options",
    "add_model_output_option",
    "add_output_options",
    "add_provider_option",
    "add_providers_option",
    "add_site_options",
    "add_training_options",
    "check_outputs",
    "method_options",
    "number",
    "providers_options",
    "run_options",
    "site_options",
    "training_options",
]

DATA_HELP = (
    "calibration samples: an .npz with one array per input, a folder of .npy or .npz files, a "
    "folder of test_data_set_*/input_k.pb, or package.module:function yielding dicts"
)


def number(
    kind: Callable[[str], float], low: float, high: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: a number of `kind` in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= value <= high:
            limits = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    return parse


def add_data_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """What to run on."""
    options = group(parser, "data")
    otherwise = "" if required else " (default: inputs are generated)"
    options.add_argument(
        "--data", required=required, metavar="DATA", help=f"{DATA_HELP}{otherwise}"
    )
    options.add_argument(
        "--samples", type=number(int, 1), metavar="N", help="use N samples at most (default: all)"
    )
    options.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of that choice (default: 0)",
    )


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """How statistics are collected."""
    options = group(parser, "measuring")
    options.add_argument(
        "--memory-budget",
        type=size,
        default=DEFAULT_MEMORY,
        metavar="BYTES",
        help="what weights, sums and activations may take, such as 500M or 4G (default: 4G)",
    )
    options.add_argument(
        "--cache",
        metavar="DIR",
        help="keep statistics in this folder, and take those of the same model and data from it; "
        "a run that was killed goes on where it was",
    )


def add_site_options(parser: argparse.ArgumentParser) -> None:
    """Which nodes count."""
    options = group(parser, "what is looked at")
    options.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only nodes whose name, weight or output matches this shell pattern; may be repeated",
    )
    options.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave nodes that match alone; wins over --include; may be repeated",
    )
    known = ", ".join(kind.op_type for kind in SITE_KINDS)
    options.add_argument(
        "--op-types",
        type=_words,
        metavar="OPS",
        help=f"comma-separated operators that count (default: {known})",
    )


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """How factors are made."""
    options = group(parser, "method")
    options.add_argument(
        "--method",
        choices=[m.key for m in METHODS],
        help="two-sided factors, which weigh each output of a layer by what it does to the "
        "outputs of the model (default; one-sided where gradients cannot be had), one-sided ones, "
        "the paper's rule, or plain SVD without data",
    )
    options.add_argument(
        "--output-weighting",
        choices=WEIGHTINGS,
        help="what counts at the outputs: the softmax of classes, their logits, or plain values "
        "(default: told from the model and the values)",
    )
    options.add_argument(
        "--moves",
        type=_words,
        metavar="MOVES",
        help=f"what may be done to weights, comma-separated: {', '.join(MOVE_KEYS)}; those named "
        "are made wherever that is smaller (default: all; pivot, channels and separable only where "
        "they should be faster too, and channels between Convs in multiples that are fast)",
    )
    options.add_argument(
        "--no-refit",
        action="store_true",
        help="do not fit layers anew to what they get behind compressed ones (default: do, where "
        "that is better on samples kept apart for it)",
    )
    options.add_argument(
        "--no-augment",
        action="store_true",
        help="use the samples as they are (default: variations of them too, of a model that is "
        "cheap to run: images and signals moved, mixed and with noise)",
    )
    options.add_argument(
        "--rank-multiple",
        type=number(int, 1),
        metavar="K",
        help="ranks are multiples of K (default: 1; 8 where latency counts, and from 8 on "
        "between Convs)",
    )
    group(parser, "latency").add_argument(
        "--optimize-for",
        choices=OPTIMIZE_FOR,
        default="size",
        help="latency: make no move that was timed to be slower than the dense weight on the "
        "provider, and let a quality target find the fastest model in place of the smallest; a "
        "result that is slower than the original ends in exit status 3 (default: size)",
    )
    group(parser, "latency").add_argument(
        "--latency-batch",
        type=number(int, 1),
        metavar="N",
        help="samples of a run that is timed (default: up to 32)",
    )
    add_metric_options(parser)


def add_metric_options(parser: argparse.ArgumentParser) -> None:
    """The user's own metric."""
    metric = group(parser, "metric").add_mutually_exclusive_group()
    metric.add_argument(
        "--evaluate",
        metavar="MODULE:FUNCTION",
        help="your metric, higher is better: takes the path of an ONNX file, gives a number",
    )
    add_labels_option(metric, "the metric is then the accuracy in per cent")


def add_labels_option(parser: argparse._ActionsContainer, effect: str) -> None:
    """The right classes of samples, and what they are for."""
    parser.add_argument(
        "--labels",
        metavar="KEY[=OUTPUT]",
        help="array of the data with the right classes, int64, one for each sample or position: "
        f"{effect}; OUTPUT, where several could be meant",
    )


def add_training_options(parser: argparse.ArgumentParser, *, steps: int) -> None:
    """How weights are trained."""
    options = group(parser, "training")
    length = options.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=number(int, 1),
        metavar="N",
        help=f"steps of the optimizer (default: {steps})",
    )
    length.add_argument(
        "--minutes",
        type=number(float, 0),
        metavar="M",
        help="or how long it may take: a few steps are timed, and their number is then fixed",
    )
    options.add_argument(
        "--batch",
        type=number(int, 1),
        metavar="N",
        help="samples of a step (default: 32, fewer of a model that is dear to run)",
    )
    options.add_argument(
        "--learning-rate",
        type=number(float, 0),
        metavar="R",
        help="the highest; finetune takes it as a share of each weight's own size "
        "(default: the method's own)",
    )
    for name, kind, what in (
        ("--share", number(float, 0, 1), "directions below this share of the largest one go (β)"),
        ("--interval", number(int, 1), "steps between two looks at them (ν)"),
        ("--delay", number(int, 0), "steps before the first of them"),
    ):
        options.add_argument(name, type=kind, metavar="X", help=f"of OIALR: {what}")


def training_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_training_options` was given."""
    names = ("steps", "minutes", "batch", "learning_rate", "share", "interval", "delay")
    return {name: getattr(args, name) for name in names}


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_method_options` was given."""
    return {
        "method": args.method,
        "weighting": args.output_weighting,
        "moves": args.moves,
        "refit": not args.no_refit,
        "augment": not args.no_augment,
        "rank_multiple": args.rank_multiple,
        "optimize_for": args.optimize_for,
        "latency_batch": args.latency_batch,
        "evaluate": args.evaluate,
        "labels": args.labels,
    }


def size(text: str) -> int:
    """An argparse type: bytes, with K, M or G for powers of 1024."""
    factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:].upper(), 1)
    digits = text if factor == 1 else text[:-1]
    return int(number(float, 1, 2.0**60)(digits) * factor)


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def add_model_output_option(parser: argparse.ArgumentParser) -> None:
    """How the model that is made comes out."""
    options = group(parser, "output")
    options.add_argument(
        "--save-as-external-data",
        action="store_true",
        help="put weights into OUT.data beside OUT, as models with external data and those beyond "
        "2 GiB have them anyway",
    )


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of data, calibration and provider."""
    return {
        "memory_budget": args.memory_budget,
        "cache": args.cache,
        "samples": args.samples,
        "seed": args.seed,
        "provider": args.provider,
        "provider_options": dict(args.provider_option),
        "custom_op_libraries": tuple(args.custom_op_library),
    }


def add_engine_option(parser: argparse.ArgumentParser) -> None:
    """Who does the work."""
    group(parser, "measuring").add_argument(
        "--engine",
        default="local",
        metavar="ENGINE",
        help="who collects statistics and decomposes: local, this process (default); ray, workers "
        "on this machine; ray:HOST:PORT or ray:auto, those of a cluster",
    )


def site_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_site_options` and `add_engine_option` were given."""
    return {
        "engine": args.engine,
        "include": tuple(args.include),
        "exclude": tuple(args.exclude),
        "op_types": args.op_types,
    }
