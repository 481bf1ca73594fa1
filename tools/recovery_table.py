"""Show what fine-tuning recovers: metric and divergence before and after, in one run.

Each model of a zoo (see `zoo_commands.py`) is compressed to each share of its parameters, by the
paper's rule and by the default method; then each result is fine-tuned for some minutes, without
labels unless `--labels` names some, on the same samples or on more of them (`--train`), and `zoo.py
eval` measures its metric before and after, on data that no choice is made by.

    factors     all that compression changed is trained, with biases and norms
    oialr       what mixes the bases of factors is trained, and may lose directions
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from command_line import failed, new_parser
from tables import NOTHING, command, markdown
from zoo_commands import SAID, StepError, Zoo, add_zoo_option, check_zoo, open_zoo

from onnx_utilrank import CompressConfig, FinetuneConfig, compress, finetune
from onnx_utilrank.config import FinetuneMethod
from onnx_utilrank.errors import ModelError, TargetMissedError, UtilrankError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.cost import count_parameters

__all__ = ["main", "rows_of"]

MODELS = ("vit_cifar10", "kwt1", "minilm_l6", "mobilenet_v2", "resnet20")
RATIOS = (0.5, 0.25, 0.15, 0.1)
# What compresses, and what trains the result.
WAYS: tuple[tuple[str, FinetuneMethod], ...] = (
    ("utilized-rank", "factors"),
    ("default", "factors"),
    ("default", "oialr"),
)
COLUMNS = (
    *("model", "asked", "compressed by", "trained", "kept, %", "divergence", "drop"),
    *("after: kept, %", "divergence", "drop", "steps", "minutes"),
)


def rows_of(zoo: Zoo, name: str, ratio: float, options: argparse.Namespace) -> list[list[str]]:
    """The rows of one model at one size.

    Raises:
        StepError: A command of the zoo failed.
        UtilrankError: Compression or training failed, other than by missing its target.
    """
    source, data = zoo.model(name), str(zoo.work / f"{name}.npz")
    cache = zoo.work / f"{name}.cache"
    rows, made = [], {}
    for method, trained in WAYS:
        asked = [name, f"{100 * ratio:g} %", method, trained]
        small = zoo.work / f"{name}_{ratio:g}_{method}.onnx"
        if method not in made:
            config = CompressConfig(
                param_ratio=ratio, method=None if method == "default" else method, cache=cache
            )
            try:
                compress(source, data, config).save(small)
                made[method] = zoo.metric(name, str(small))["drop"]
            except (TargetMissedError, ModelError) as e:
                made[method] = None
                print(e, file=sys.stderr)
        if not small.exists():
            rows.append([*asked, *[NOTHING] * (len(COLUMNS) - len(asked))])
            continue
        tuned = zoo.work / "tuned.onnx"
        result = finetune(
            source,
            small,
            options.train.get(name, data),
            FinetuneConfig(
                method=trained,
                minutes=options.minutes,
                labels=options.labels if name in options.train else None,
                provider=options.provider,
            ),
        )
        result.save(tuned)
        drop = zoo.metric(name, str(tuned))["drop"] if result.kept else made[method]
        figures = result.validation
        whole = figures.reference.parameters
        before = count_parameters(ModelStore.load(small)) / whole
        rows.append(
            [
                *asked,
                f"{100 * before:.1f}",
                f"{result.before.mean:.2g}",
                _number(made[method]),
                f"{100 * figures.candidate.parameters / whole:.1f}",
                f"{result.after.mean:.2g}{'' if result.kept else ' (not kept)'}",
                _number(drop),
                str(result.history[-1].step if result.history else 0),
                f"{result.seconds / 60:.1f}",
            ]
        )
        print(f"| {' | '.join(rows[-1])} |", file=sys.stderr, flush=True)
    return rows


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _named(text: str) -> tuple[str, str]:
    name, separator, file = text.partition("=")
    if not separator or not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NPZ with a file that exists")
    return name, str(Path(file).resolve())


def _without_folder(word: str, train: Mapping[str, str]) -> str:
    name, _, file = word.removeprefix("--train=").partition("=")
    return word.replace(file, Path(file).name) if file and name in train else word


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("recovery_table.py", __doc__)
    add_zoo_option(parser)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS), metavar="R")
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="M", help="for each training (default: 10)"
    )
    parser.add_argument(
        "--samples", type=int, default=256, metavar="N", help="calibration samples (default: 256)"
    )
    parser.add_argument(
        "--train",
        action="append",
        type=_named,
        default=[],
        metavar="NAME=NPZ",
        help="samples to fine-tune that model on, in the place of its calibration samples",
    )
    parser.add_argument(
        "--labels", metavar="KEY", help="array of the files of --train with right classes to learn"
    )
    parser.add_argument("--provider", default="cpu", help="where to run (default: cpu)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; the exit status."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    where = check_zoo(parser, options.zoo)
    options.train = dict(options.train)
    if options.labels and not options.train:
        parser.error("--labels: needs --train, whose files hold them")
    if unknown := options.train.keys() - set(options.models):
        parser.error(f"--train: {', '.join(sorted(unknown))} is none of the models")
    rows = []
    with open_zoo(where, samples=options.samples) as zoo:
        try:
            for name in options.models:
                zoo.calibrate(name)
                for ratio in options.ratios:
                    rows += rows_of(zoo, name, ratio, options)
        except (StepError, UtilrankError) as e:
            return failed(parser.prog, e)
    shown = [_without_folder(word, options.train) for word in given]
    print(f"{command(parser.prog, shown, SAID)}\n")
    print(markdown(COLUMNS, rows, COLUMNS[:4]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
