"""Train a small vision transformer from drawn weights, dense and by OIALR, under one budget.

OIALR (Coquelin et al., https://arxiv.org/abs/2401.08505) trains to low rank: after a delay weights
go into orthonormal bases that are frozen, and only what mixes them is trained and loses directions.
Both trainings see the same samples for the same number of steps; accuracy is that on images that
neither saw. The data are scikit-learn's digits, or any two files of `image`, float32
[N, channels, side, side], and `label`, int64 [N].
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from digits import LABEL_NAME, accuracy
from onnx_utilrank import TrainConfig, train
from small_vit import SmallTransformer, add_data_options, data_files, print_table, read_images
from training import SEED, export

COLUMNS = ("training", "accuracy, %", "trained at the end, %", "parameters, %")


def compare(train_path: Path, test_path: Path, steps: int, work: Path) -> list[tuple[str, ...]]:
    """Train both ways.

    Args:
        train_path: Images and labels to train on.
        test_path: Others, to measure accuracy on.
        steps: Of the optimizer.
        work: A folder for files.

    Returns:
        The rows of the table.
    """
    images, labels = read_images(train_path)
    shape, classes = images.shape[1:], int(labels.max()) + 1
    images, labels = read_images(test_path)
    torch.manual_seed(SEED)
    drawn = work / "drawn.onnx"
    export(SmallTransformer(shape[0], shape[1], classes).eval(), drawn, shape)
    rows = []
    for method in ("dense", "oialr"):
        config = TrainConfig(method=method, labels=LABEL_NAME, steps=steps, batch=64)
        result = train(drawn, train_path, config)
        path = work / f"{method}.onnx"
        result.save(path)
        shares = (
            accuracy(path, images, labels),
            result.trained / result.trainable,
            result.parameters / result.parameters_before,
        )
        rows.append((method, *(f"{100 * share:.2f}" for share in shares)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_options(parser)
    parser.add_argument("--steps", type=int, default=2000, help="default: 2000")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        files = data_files(parser, options, work)
        print_table(COLUMNS, compare(*files, options.steps, work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
