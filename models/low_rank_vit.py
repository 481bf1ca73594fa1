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

import numpy as np
import torch
from torch import Tensor, nn

from digits import INPUT_NAME, LABEL_NAME, accuracy, write_npz
from digits_vit import BLOCKS, WIDTH, Block
from onnx_utilrank import TrainConfig, train
from training import SEED, export

PATCHES = 4  # along each side, at least; larger images have more
LARGEST_PATCH = 4
COLUMNS = ("training", "accuracy, %", "trained at the end, %", "parameters, %")


class SmallTransformer(nn.Module):
    """The demo's blocks on square images of any size."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        """Draw the weights."""
        super().__init__()
        patch = min(side // PATCHES, LARGEST_PATCH)
        self.patches = nn.Conv2d(channels, WIDTH, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images, float32 [N, channels, side, side], into logits [N, classes]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


def compare(
    train_path: Path, test_path: Path, steps: int, work: Path
) -> list[tuple[str, float, float, float]]:
    """Train both ways.

    Args:
        train_path: Images and labels to train on.
        test_path: Others, to measure accuracy on.
        steps: Of the optimizer.
        work: A folder for files.

    Returns:
        The rows of the table.
    """
    with np.load(train_path) as arrays:
        shape, classes = arrays[INPUT_NAME].shape[1:], int(arrays[LABEL_NAME].max()) + 1
    with np.load(test_path) as arrays:
        images, labels = arrays[INPUT_NAME], arrays[LABEL_NAME]
    torch.manual_seed(SEED)
    drawn = work / "drawn.onnx"
    export(SmallTransformer(shape[0], shape[1], classes).eval(), drawn, shape)
    rows = []
    for method in ("dense", "oialr"):
        config = TrainConfig(method=method, labels=LABEL_NAME, steps=steps, batch=64)
        result = train(drawn, train_path, config)
        path = work / f"{method}.onnx"
        result.save(path)
        rows.append(
            (
                method,
                100 * accuracy(path, images, labels),
                100 * result.trained / result.trainable,
                100 * result.parameters / result.parameters_before,
            )
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, metavar="NPZ", help="default: the digits")
    parser.add_argument("--test", type=Path, metavar="NPZ", help="default: the digits")
    parser.add_argument("--steps", type=int, default=2000, help="default: 2000")
    options = parser.parse_args(arguments)
    if (options.train is None) != (options.test is None):
        parser.error("--train and --test go together")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _, test_path, train_path = write_npz(work)
        rows = compare(options.train or train_path, options.test or test_path, options.steps, work)
    print(f"| {' | '.join(COLUMNS)} |")
    print("| --- |" + " ---: |" * (len(COLUMNS) - 1))
    for name, *figures in rows:
        print(f"| {name} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
