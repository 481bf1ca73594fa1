"""Where the values around a weight count samples: by their first axis, or behind positions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_utilrank.sites.site import RowView, Site, Use

__all__ = ["with_order"]


def with_order(sites: Sequence[Site], values: Mapping[str, np.ndarray], samples: int) -> list[Site]:
    """The sites, of which those that read and make [positions, samples, …] are told so.

    Args:
        sites: The sites.
        values: What one run gives for what their uses read and make, by name.
        samples: Samples in that run: with a single one, no windows of it are taken for samples.
    """
    return [
        replace(site, uses=tuple(_ordered(use, values, samples) for use in site.uses))
        for site in sites
    ]


def _ordered(use: Use, values: Mapping[str, np.ndarray], samples: int) -> Use:
    read, made = (_beside_features(view, values) for view in (use.inputs, use.result))
    # Rows of both sides have to be the same ones.
    if read != made or len(read) < 2 or read[0] == samples or read[1] != samples:
        return use
    return replace(
        use,
        inputs=replace(use.inputs, positions_first=True),
        result=replace(use.result, positions_first=True),
    )


def _beside_features(view: RowView, values: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """Extents of a value without that of its features; none of a Conv, whose samples come first."""
    if view.tensor not in values or view.axis >= 0:
        return ()
    shape = values[view.tensor].shape
    if view.one_hot or len(shape) < 2:
        return shape if view.one_hot else ()
    axis = view.axis + len(shape)
    return shape[:axis] + shape[axis + 1 :]
