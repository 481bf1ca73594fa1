"""ConvTranspose with a constant kernel (ONNX operators, ConvTranspose)."""

from dataclasses import replace

import numpy as np

from onnx_utilrank.sites.conv import Conv, patches_of
from onnx_utilrank.sites.site import Patches, Use
from onnx_utilrank.statistics.factorize import Factors

__all__ = ["CONV_TRANSPOSE", "ConvTranspose"]


class ConvTranspose(Conv):
    """A transposed convolution seen as W [C_out, C_in k_1 k_2 …].

    A row x holds what one output position sees, zeros where no input position meets a tap. It
    becomes the same transposed convolution with r outputs, then a Conv of extent 1.
    """

    op_type = "ConvTranspose"
    exempt = ""

    def seen(self, shape: tuple[int, ...], given: dict[str, object]) -> tuple[int, Patches]:
        """See `Conv.seen`."""
        channels, m, *kernel = shape
        return m, replace(
            patches_of(given, channels, tuple(kernel)),
            transposed=True,
            output_padding=_ints(given, "output_padding"),
            output_shape=_ints(given, "output_shape"),
        )

    def matrix(self, use: Use, weight: np.ndarray) -> np.ndarray:
        """See `SiteKind.matrix`."""
        return weight.swapaxes(0, 1).reshape(use.m, use.d)

    def stored(self, use: Use, weight: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """See `SiteKind.stored`."""
        return super().stored(use, weight, matrix).swapaxes(0, 1)

    def tensors(self, use: Use, weight: np.ndarray, factors: Factors) -> tuple[np.ndarray, ...]:
        """See `SiteKind.tensors`."""
        ones = (1,) * (weight.ndim - 2)
        return (
            self.stored(use, weight, factors.right),
            factors.left.reshape(len(factors.left), -1, *ones),
        )


def _ints(given: dict[str, object], key: str) -> tuple[int, ...]:
    value = given.get(key)
    return tuple(value) if isinstance(value, list) else ()


CONV_TRANSPOSE = ConvTranspose()
