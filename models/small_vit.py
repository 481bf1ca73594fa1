"""A small vision transformer on square images of any size, for experiments, and their data."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from digits import INPUT_NAME, LABEL_NAME, write_npz
from digits_vit import BLOCKS, WIDTH, Block

__all__ = [
    "SmallTransformer",
    "add_data_options",
    "data_files",
    "print_table",
    "read_images",
]

PATCHES = 4  # along each side, at least; larger images have more
LARGEST_PATCH = 4


class SmallTransformer(nn.Module):
    """The demo's blocks on square images of any size."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        """Draw the weights."""
        super().__init__()
        self.patch = min(side // PATCHES, LARGEST_PATCH)
        self.patches = nn.Conv2d(channels, WIDTH, kernel_size=self.patch, stride=self.patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // self.patch) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def features(self, tokens: Tensor) -> Tensor:
        """What the blocks make of patches, float32 [N, tokens, WIDTH] to the same shape."""
        features: Tensor = self.norm(self.blocks(tokens + self.positions))
        return features

    def tokens(self, images: Tensor) -> Tensor:
        """Patches, embedded: float32 [N, channels, side, side] to [N, tokens, WIDTH]."""
        tokens: Tensor = self.patches(images).flatten(2).transpose(1, 2)
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """Classify images, float32 [N, channels, side, side], into logits [N, classes]."""
        logits: Tensor = self.head(self.features(self.tokens(images)).mean(dim=1))
        return logits


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Other data than the digits."""
    for name in ("train", "test"):
        parser.add_argument(f"--{name}", type=Path, metavar="NPZ", help="default: the digits")


def data_files(
    parser: argparse.ArgumentParser, options: argparse.Namespace, work: Path
) -> tuple[Path, Path]:
    """The files to train on and to measure accuracy on; the digits are written into `work`."""
    if (options.train is None) != (options.test is None):
        parser.error("--train and --test go together")
    _, test, train = write_npz(work)
    return options.train or train, options.test or test


def read_images(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images, float32 [N, channels, side, side], and labels, int64 [N]."""
    with np.load(path) as arrays:
        return arrays[INPUT_NAME], arrays[LABEL_NAME]


def print_table(columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    """A table in Markdown, whose first column holds words."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
