"""Recipe of `digits_cnn.onnx`: a small convolutional network that reads handwritten digits."""

from collections import OrderedDict

from torch import nn

from digits import CLASSES
from training import Recipe, main

HIDDEN = 128


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Make a convolution with batch normalisation and ReLU; it pads so that stride 1 keeps size."""
    layers = {
        "convolution": nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        "norm": nn.BatchNorm2d(outputs),
        "activation": nn.ReLU(),
    }
    return nn.Sequential(OrderedDict(layers))


def build() -> nn.Module:
    """Make the untrained network, float32 [N, 1, 8, 8] to float32 [N, 10]."""
    layers = {
        "stem": convolution(1, 64, kernel=3),
        "reduce": convolution(64, 96, kernel=3, stride=2),
        "widen": convolution(96, 128, kernel=3),
        "mix": convolution(128, 128, kernel=1),
        "shrink": convolution(128, 128, kernel=3, stride=2),
        "flatten": nn.Flatten(),
        "hidden": nn.Linear(128 * 2 * 2, HIDDEN),
        "activation": nn.ReLU(),
        "head": nn.Linear(HIDDEN, CLASSES),
    }
    return nn.Sequential(OrderedDict(layers))


RECIPE = Recipe("digits_cnn", build, epochs=40, learning_rate=3e-3, weight_decay=0.05)

if __name__ == "__main__":
    main(RECIPE)
