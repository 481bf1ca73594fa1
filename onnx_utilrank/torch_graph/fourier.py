"""Fourier transforms: complex numbers are pairs along a last axis."""

import torch

from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table, ints

__all__ = ["FOURIER"]

Tensor = torch.Tensor


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x.squeeze(-1)


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x.unsqueeze(-1)


def _dft(
    context: Context, x: Tensor, length: Tensor | None = None, given: Tensor | None = None
) -> Result:
    if context.opset >= 20:
        axis = -2 if given is None else ints(given)[0]
    else:
        axis = context.integer("axis", 1)
    axis %= x.dim()
    values = _complex(x)
    n = None if length is None else ints(length)[0]
    one_sided = context.flag("onesided")
    if context.flag("inverse"):
        made = (torch.fft.irfft if one_sided else torch.fft.ifft)(values, n, axis)
    else:
        made = torch.fft.fft(values, n, axis)
        if one_sided:
            made = made.narrow(axis, 0, made.shape[axis] // 2 + 1)
    return _pairs(made)


def _stft(
    context: Context,
    x: Tensor,
    step: Tensor,
    window: Tensor | None = None,
    length: Tensor | None = None,
) -> Result:
    (hop,) = ints(step)
    if length is not None:
        (size,) = ints(length)
    elif window is not None:
        size = window.shape[0]
    else:
        raise ValueError("neither a window nor a frame length is given")
    values = _complex(x) if x.dim() == 3 else x
    frames = values.unfold(1, size, hop)
    made = torch.fft.fft(frames if window is None else frames * window, dim=-1)
    if context.flag("onesided", True):
        made = made[..., : size // 2 + 1]
    return _pairs(made)


FOURIER: Table = {
    "DFT": Operator(_dft, frozenset({1, 2})),
    "STFT": Operator(_stft, frozenset({1, 3})),
}
