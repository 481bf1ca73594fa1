"""Show how much of the saving in operations becomes time, where latency is what was asked for.

Models of a zoo (see `zoo_commands.py`) are compressed by the default method; transformers of
standard shapes, with random weights, by plain SVD, as time does not depend on values. Each is made
for runs of every batch size that is asked for, and timed against its original in one run, by turns.

    operations   of MatMul, Gemm and Conv, after to before: the limit where a model does nothing
                 else and every operation takes the same time
    products     share of the original's time that these take, by the profiler
    time         median of after to before over pairs of runs, with quartiles
    realised     share of the saving in operations that is saved in time
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from command_line import failed, new_parser
from tables import NOTHING, command, markdown
from zoo_commands import SAID, StepError, add_zoo_option, check_zoo, open_zoo

from onnx_utilrank import CompressConfig, CompressResult, TargetMissedError, compress
from onnx_utilrank.errors import UtilrankError

__all__ = ["SHAPES", "main", "make_shape", "row"]

RECIPES = Path(__file__).resolve().parent.parent / "models"
# Which recipe makes a shape.
SHAPES = {
    **dict.fromkeys(("vit-s", "vit-b", "vit-l"), "synthetic_vit"),
    "bert-base": "synthetic_bert",
}
TOKENS = 128
COLUMNS = (
    *("model", "batch", "asked", "parameters", "operations", "products", "time", "quartiles"),
    *("pairs", "realised", "slower"),
)
# In the names of the operators whose operations are counted, and of those that hold them.
PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")


def row(label: str, batch: int, ratio: float, result: CompressResult | None) -> list[str]:
    """What came of one model at one batch size; None where nothing that fast can be made."""
    head = [label, str(batch), f"{ratio:g}"]
    if result is None or result.validation is None:
        return [*head, *[NOTHING] * (len(COLUMNS) - len(head))]
    figures = result.validation
    ran = figures.providers[0]
    time, operators = ran.latency, ran.reference_operators
    products = sum(o.ms for o in operators if any(name in o.op_type for name in PRODUCTS))
    before, after = figures.reference.flops or 0, figures.candidate.flops or 0
    operations = after / max(before, 1)
    realised = (1 - time.ratio) / (1 - operations) if operations < 1 else None
    return [
        *head,
        f"{figures.candidate.parameters / figures.reference.parameters:.3f}",
        f"{operations:.3f}",
        f"{100 * products / sum(o.ms for o in operators):.0f} %" if operators else NOTHING,
        f"{time.ratio:.3f}",
        f"{time.ratio_low:.3f} to {time.ratio_high:.3f}",
        str(time.pairs),
        NOTHING if realised is None else f"{100 * realised:.0f} %",
        "yes" if time.slower else "no",
    ]


def _made(model: Any, data: Any, **options: Any) -> CompressResult | None:
    try:
        return compress(model, data, CompressConfig(**options))
    except TargetMissedError as e:
        print(e, file=sys.stderr)
        return None


def make_shape(label: str, samples: int) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A transformer with random weights, and samples of noise."""
    sys.path.insert(0, str(RECIPES))
    recipe = importlib.import_module(SHAPES[label])
    shape = recipe.SHAPES[label]
    rng = np.random.default_rng(0)
    if SHAPES[label] == "synthetic_vit":
        pixels = (samples, 3, shape.image, shape.image)
        images = rng.standard_normal(pixels, dtype=np.float32)
        return recipe.build(shape), {recipe.INPUT_NAME: images}
    ids = rng.integers(0, shape.vocabulary, (samples, TOKENS))
    return recipe.build(shape), {recipe.IDS_NAME: ids, recipe.MASK_NAME: np.ones_like(ids)}


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("latency_table.py", __doc__)
    add_zoo_option(parser)
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME", help="of the zoo")
    parser.add_argument("--shapes", nargs="*", default=[], choices=SHAPES, metavar="SHAPE")
    parser.add_argument(
        "--latency-ratio", type=float, default=0.6, metavar="R", help="asked for (default: 0.6)"
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 16], metavar="N", help="default: 1 16"
    )
    parser.add_argument(
        "--samples", type=int, default=256, metavar="N", help="calibration samples (default: 256)"
    )
    parser.add_argument("--provider", default="cpu", help="where to run (default: cpu)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; the exit status."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    if not options.models and not options.shapes:
        parser.error("nothing to measure: give --models or --shapes")
    where = check_zoo(parser, options.zoo) if options.models else None
    common = {"latency_ratio": options.latency_ratio, "provider": options.provider}
    rows = []

    def add(label: str, batch: int, model: Any, data: Any, **own: Any) -> None:
        result = _made(model, data, latency_batch=batch, **common, **own)
        rows.append(row(label, batch, options.latency_ratio, result))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)

    try:
        for label in options.shapes:
            # A fifth is held back to be timed on: one run of the largest batch.
            model, data = make_shape(label, 5 * max(options.batch))
            for batch in options.batch:
                add(label, batch, model, data, method="svd")
        if where is not None:
            with open_zoo(where, samples=options.samples) as zoo:
                for name in options.models:
                    samples = str(zoo.work / zoo.calibrate(name))
                    for batch in options.batch:
                        add(name, batch, zoo.model(name), samples, cache=zoo.work / f"{name}.cache")
    except (StepError, UtilrankError) as e:
        return failed(parser.prog, e)
    print(f"{command(parser.prog, given, SAID if options.models else '')}\n")
    print(markdown(COLUMNS, rows, ["model"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
