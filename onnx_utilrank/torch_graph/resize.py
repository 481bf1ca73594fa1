"""Resize and Upsample, by taps and weights along one axis after the other."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table, ints

__all__ = ["RESIZE"]

Tensor = torch.Tensor

_ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _upsample(context: Context, x: Tensor, given: Tensor | None = None) -> Result:
    scales = context.numbers("scales") if given is None else given.tolist()
    mode = context.text("mode", "nearest")
    for axis, scale in enumerate(scales or []):
        size = int(x.shape[axis] * scale)
        at = _coordinates("asymmetric", x.shape[axis], size, scale, (0.0, 1.0))
        if mode == "nearest":
            x = _pick(x, axis, torch.floor(at))
        elif scale != 1:
            x = _interpolate(x, axis, *_linear_taps(at, x.shape[axis]))
    return x


def _resize(
    context: Context,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Result:
    if context.opset < 11:
        return _upsample(context, x, roi)  # version 10 is Upsample: its second input are scales
    axes = [a % x.dim() for a in context.integers("axes") or range(x.dim())]
    factors, lengths = _target(context, [x.shape[a] for a in axes], scales, sizes)
    transform = context.text("coordinate_transformation_mode", "half_pixel")
    regions = [(0.0, 1.0)] * len(axes)
    if transform == "tf_crop_and_resize" and roi is not None:
        ends = roi.tolist()
        regions = list(zip(ends[: len(axes)], ends[len(axes) :], strict=True))
    outside = x.new_zeros(1, dtype=torch.bool)
    shape = list(x.shape)
    for axis, scale, length, region in zip(axes, factors, lengths, regions, strict=True):
        n = shape[axis]
        if transform != "tf_crop_and_resize" and n == length and scale == 1:
            continue
        at = _coordinates(transform, n, length, scale, region)
        x = _along(context, x, axis, at, scale)
        view = [length if a == axis else 1 for a in range(x.dim())]
        outside = outside | ((at < 0) | (at > n - 1)).reshape(view).to(x.device)
    if transform == "tf_crop_and_resize":
        filler = context.number("extrapolation_value", 0.0)
        x = torch.where(outside, torch.full_like(x, filler), x)
    return x


def _target(
    context: Context, given: list[int], scales: Tensor | None, sizes: Tensor | None
) -> tuple[list[float], list[int]]:
    """Scale and size of each resized axis."""
    if sizes is None or sizes.numel() == 0:
        if scales is None:
            raise ValueError("neither scales nor sizes are given")
        factors = [float(s) for s in scales.tolist()]
        # The product of float32 numbers, as all runtimes take it.
        single = torch.tensor(given, dtype=torch.float32) * torch.tensor(factors)
        return factors, ints(torch.floor(single))
    lengths = ints(sizes)
    policy = context.text("keep_aspect_ratio_policy", "stretch")
    factors = [w / n for w, n in zip(lengths, given, strict=True)]
    if policy == "stretch":
        return factors, lengths
    scale = min(factors) if policy == "not_larger" else max(factors)
    return [scale] * len(given), [int(scale * n + 0.5) for n in given]


def _coordinates(
    transform: str, n: int, length: int, scale: float, region: Sequence[float]
) -> Tensor:
    """Where each output element lies among the `n` input elements."""
    k = torch.arange(length, dtype=torch.float32)
    if transform == "half_pixel":
        return (k + 0.5) / scale - 0.5
    if transform == "asymmetric":
        return k / scale
    if transform == "pytorch_half_pixel":
        return (k + 0.5) / scale - 0.5 if length > 1 else torch.zeros_like(k)
    if transform == "half_pixel_symmetric":
        offset = n / 2 * (1 - length / (n * scale))
        return offset + (k + 0.5) / scale - 0.5
    if transform == "align_corners":
        return k * (n - 1) / (length - 1) if length > 1 else torch.zeros_like(k)
    if transform == "tf_crop_and_resize":
        first, last = region
        if length > 1:
            return first * (n - 1) + k * ((last - first) * (n - 1) / (length - 1))
        return torch.full_like(k, 0.5 * (first + last) * (n - 1))
    raise ValueError(f"unknown coordinate transformation {transform!r}")


def _along(context: Context, x: Tensor, axis: int, at: Tensor, scale: float) -> Tensor:
    mode, n = context.text("mode", "nearest"), x.shape[axis]
    if mode == "nearest":
        rule = context.text("nearest_mode", "round_prefer_floor")
        return _pick(x, axis, _ROUND[rule](at))
    cubic, a = mode == "cubic", context.number("cubic_coeff_a", -0.75)
    # Antialiasing widens the kernel by as much as the image shrinks.
    wide = min(scale, 1.0) if context.flag("antialias") else 1.0
    if not cubic and wide == 1.0:
        return _interpolate(x, axis, *_linear_taps(at, n))
    reach = (2.0 if cubic else 1.0) / wide
    taps = torch.arange(-int(reach) - 1, int(reach) + 2)
    places = torch.floor(at).to(torch.int64)[:, None] + taps
    distance = (places - at[:, None]).abs() * wide
    weights = _cubic(distance, a) if cubic else (1 - distance).clamp(min=0)
    inside = (places >= 0) & (places < n)
    if context.flag("exclude_outside"):
        weights = weights * inside
    weights = weights / weights.sum(1, keepdim=True)
    # Taps that weigh nothing anywhere (the window is one too wide on each side) cost nothing.
    used = weights.any(0)
    return _interpolate(x, axis, places[:, used].clamp(0, n - 1), weights[:, used])


def _cubic(distance: Tensor, a: float) -> Tensor:
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    zero = torch.zeros_like(distance)
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, zero))


def _linear_taps(at: Tensor, n: int) -> tuple[Tensor, Tensor]:
    at = at.clamp(0, n - 1)
    low = torch.floor(at)
    places = torch.stack([low, (low + 1).clamp(max=n - 1)], 1).to(torch.int64)
    return places, torch.stack([1 - (at - low), at - low], 1)


def _pick(x: Tensor, axis: int, places: Tensor) -> Tensor:
    index = places.clamp(0, x.shape[axis] - 1).to(torch.int64)
    return x.index_select(axis, index.to(x.device))


def _interpolate(x: Tensor, axis: int, places: Tensor, weights: Tensor) -> Tensor:
    """Sum the elements at `places` [length, taps] with `weights` along an axis."""
    places, shape = places.to(x.device), [1] * x.dim()
    shape[axis] = len(places)
    kind = x.dtype if x.is_floating_point() else torch.float32
    factors = weights.to(x.device, kind)
    parts = [
        x.index_select(axis, places[:, t]).to(kind) * factors[:, t].reshape(shape)
        for t in range(places.shape[1])
    ]
    made = torch.stack(parts).sum(0)
    return made if x.is_floating_point() else made.round().to(x.dtype)


def _grid_sample(context: Context, x: Tensor, grid: Tensor) -> Result:
    mode = context.text("mode", "linear").removeprefix("bi")
    if mode == "cubic":
        mode = "bicubic"
    return F.grid_sample(
        x,
        grid,
        mode="bilinear" if mode == "linear" else mode,
        padding_mode=context.text("padding_mode", "zeros"),
        align_corners=context.flag("align_corners"),
    )


def _affine_grid(context: Context, theta: Tensor, size: Tensor) -> Result:
    return F.affine_grid(theta, ints(size), context.flag("align_corners"))


RESIZE: Table = {
    "AffineGrid": Operator(_affine_grid, frozenset({1})),
    "GridSample": Operator(_grid_sample),
    "Resize": Operator(_resize, frozenset({1, 2, 3})),
    "Upsample": Operator(_upsample, frozenset({1})),
}
