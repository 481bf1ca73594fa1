"""The data of the demo models: scikit-learn's 1797 handwritten digits, split once for all.

The train part makes the models, the calibration part (without labels) drives the compression, and
accuracy is measured on the test part.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

INPUT_NAME = "image"
OUTPUT_NAME = "logits"
LABEL_NAME = "label"
CLASSES = 10
SIDE = 8
CALIBRATION_SIZE = 300
TEST_SIZE = 400
SPLIT_SEED = 1
# Pixels are counts of 0 to 16.
PIXEL_MAXIMUM = 16


@dataclass(frozen=True)
class DigitsSplit:
    """The three disjoint parts of the digits; each holds every class in the same proportion.

    Attributes:
        train_images: float32 [1097, 1, 8, 8] in [0, 1].
        train_labels: int64 [1097].
        calibration_images: float32 [300, 1, 8, 8] in [0, 1].
        test_images: float32 [400, 1, 8, 8] in [0, 1].
        test_labels: int64 [400].
    """

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    calibration_images: NDArray[np.float32]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int64]


def load_digits_split() -> DigitsSplit:
    """Load the digits that scikit-learn bundles; the split is the same on every call."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / PIXEL_MAXIMUM).astype(np.float32).reshape(-1, 1, SIDE, SIDE)
    labels = labels.astype(np.int64)
    rest_images, test_images, rest_labels, test_labels = train_test_split(
        images, labels, test_size=TEST_SIZE, stratify=labels, random_state=SPLIT_SEED
    )
    train_images, calibration_images, train_labels, _ = train_test_split(
        rest_images,
        rest_labels,
        test_size=CALIBRATION_SIZE,
        stratify=rest_labels,
        random_state=SPLIT_SEED,
    )
    return DigitsSplit(train_images, train_labels, calibration_images, test_images, test_labels)


def write_npz(folder: Path) -> tuple[Path, Path, Path]:
    """Write the three parts for the command line tool.

    Args:
        folder: Where to write; made where missing.

    Returns:
        The paths of `calibration.npz` (`image`), and of `test.npz` and `train.npz` (`image` and
        `label`).
    """
    split = load_digits_split()
    folder.mkdir(parents=True, exist_ok=True)
    calibration_path, test_path = folder / "calibration.npz", folder / "test.npz"
    calibration: dict[str, Any] = {INPUT_NAME: split.calibration_images}
    test: dict[str, Any] = {INPUT_NAME: split.test_images, LABEL_NAME: split.test_labels}
    np.savez(calibration_path, **calibration)
    np.savez(test_path, **test)
    train_path = folder / "train.npz"
    train: dict[str, Any] = {INPUT_NAME: split.train_images, LABEL_NAME: split.train_labels}
    np.savez(train_path, **train)
    return calibration_path, test_path, train_path


def accuracy(model_path: Path, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Measure how often a model names the right digit, on the CPU.

    Args:
        model_path: An ONNX file with one output of logits, [N, 10].
        images: float32 [N, 1, 8, 8].
        labels: int64 [N].

    Returns:
        The share of right answers, 0 to 1.
    """
    session = ort.InferenceSession(model_path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {INPUT_NAME: images})
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def main() -> None:
    """Write the files into the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Write calibration.npz, test.npz and train.npz.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    for path in write_npz(parser.parse_args().output):
        print(path)


if __name__ == "__main__":
    main()
