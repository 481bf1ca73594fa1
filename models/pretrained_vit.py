"""Does a vision transformer use more of its weights when it first learned without labels?

Garg et al. (https://arxiv.org/abs/2407.04797) report that self-supervised pre-training raises the
mean layer utilization (MLU). Here two small vision transformers begin with the same drawn weights.
One learns from labels alone. The other first learns to fill in masked patches (Xie et al., SimMIM,
https://arxiv.org/abs/2111.09886), then from labels for as many steps. `analyze` measures the MLU of
both on the training images, and accuracy is that on images that neither saw. The data are
scikit-learn's digits, or any two files of `image`, float32 [N, channels, side, side], and `label`,
int64 [N].
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from digits import INPUT_NAME, accuracy
from digits_vit import WIDTH
from onnx_utilrank import AnalyzeConfig, analyze
from small_vit import SmallTransformer, add_data_options, data_files, print_table, read_images
from training import BATCH_SIZE, LABEL_SMOOTHING, SEED, export, shifted

# Share of the patches that are masked.
MASKED = 0.5
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05
ENERGIES = (0.99, 0.999)
# Images that utilization is measured on, at most.
MEASURED = 1000
COLUMNS = ("training", "accuracy, %", *(f"MLU at energy {e:g}, %" for e in ENERGIES))


class MaskedImages(nn.Module):
    """A transformer with a head that gives back the pixels of each patch."""

    def __init__(self, network: SmallTransformer, channels: int) -> None:
        """Draw the head and the token that stands for a masked patch."""
        super().__init__()
        self.network = network
        self.token = nn.Parameter(0.02 * torch.randn(WIDTH))
        self.pixels = nn.Linear(WIDTH, channels * network.patch**2)

    def forward(self, images: Tensor, masked: Tensor) -> Tensor:
        """Mean absolute error of the masked patches.

        Args:
            images: float32 [N, channels, side, side].
            masked: bool [N, patches].
        """
        tokens = torch.where(masked[..., None], self.token, self.network.tokens(images))
        patch = self.network.patch
        wanted = functional.unfold(images, patch, stride=patch).transpose(1, 2)
        return functional.l1_loss(
            self.pixels(self.network.features(tokens))[masked], wanted[masked]
        )


def learn(
    network: nn.Module, loss: Callable[[Tensor, torch.Generator], Tensor], count: int, steps: int
) -> None:
    """Take a network through so many steps.

    Args:
        network: What learns.
        loss: Of the samples of these numbers.
        count: Samples that there are.
        steps: Of the optimizer.
    """
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    network.train()
    for _ in range(steps):
        chosen = torch.randint(0, count, (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss(chosen, generator))
        optimizer.step()
        schedule.step()
    network.eval()


def compare(
    train_path: Path, test_path: Path, pretraining: int, steps: int, work: Path
) -> list[tuple[str, ...]]:
    """Train both ways and measure.

    Args:
        train_path: Images and labels to train on.
        test_path: Others, to measure accuracy on.
        pretraining: Steps without labels.
        steps: Steps with labels.
        work: A folder for files.

    Returns:
        The rows of the table.
    """
    images, labels = map(torch.from_numpy, read_images(train_path))
    shape = images.shape[1:]
    torch.manual_seed(SEED)
    drawn = SmallTransformer(shape[0], shape[1], int(labels.max()) + 1)
    pretrained = copy.deepcopy(drawn)
    masking = MaskedImages(pretrained, shape[0])

    def of_masked(chosen: Tensor, generator: torch.Generator) -> Tensor:
        moved = shifted(images[chosen], generator)
        patches = drawn.positions.shape[1]
        loss: Tensor = masking(moved, torch.rand(len(moved), patches, generator=generator) < MASKED)
        return loss

    def of_labels(network: nn.Module) -> Callable[[Tensor, torch.Generator], Tensor]:
        return lambda chosen, generator: functional.cross_entropy(
            network(shifted(images[chosen], generator)),
            labels[chosen],
            label_smoothing=LABEL_SMOOTHING,
        )

    learn(masking, of_masked, len(images), pretraining)
    rows = [("masked patches alone", "–", *_utilization(pretrained, images, work))]
    for name, network in (("labels alone", drawn), ("masked patches, then labels", pretrained)):
        learn(network, of_labels(network), len(images), steps)
        figures = _utilization(network, images, work)
        share = accuracy(work / "network.onnx", *read_images(test_path))
        rows.append((name, f"{100 * share:.2f}", *figures))
    return rows


def _utilization(network: nn.Module, images: Tensor, work: Path) -> list[str]:
    path = work / "network.onnx"
    export(network, path, images.shape[1:])
    data = {INPUT_NAME: np.ascontiguousarray(images[:MEASURED].numpy())}
    reports = (analyze(path, data, AnalyzeConfig(energy=energy)) for energy in ENERGIES)
    return [f"{100 * (report.mean_layer_utilization or 0):.1f}" for report in reports]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_options(parser)
    for name, what in (("pretraining", "without labels"), ("steps", "with labels")):
        parser.add_argument(f"--{name}", type=int, default=2000, help=f"{what} (default: 2000)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        files = data_files(parser, options, work)
        print_table(COLUMNS, compare(*files, options.pretraining, options.steps, work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
