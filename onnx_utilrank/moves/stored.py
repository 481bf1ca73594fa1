"""Store what moves compute as initializers, in the dtype of the weight."""

import numpy as np

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.sites.site import Site, Use

__all__ = ["corrected_bias", "store"]


def store(
    surgeon: Surgeon,
    site: Site,
    name: str,
    values: np.ndarray,
    dtype: np.dtype[np.generic] | None = None,
) -> str:
    """Add an initializer in a dtype, by default that of the site's weight; the name it got.

    Raises:
        ModelError: A value does not fit that dtype.
    """
    dtype = dtype or site.dtype
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored.astype(np.float64)).all():
        raise ModelError(
            f"{surgeon.index.store.label}: {site.uses[0].label}: a factor of weight "
            f"{site.weight!r} does not fit {dtype.name}"
        )
    return surgeon.constant(name, stored)


def corrected_bias(surgeon: Surgeon, site: Site, use: Use, lost: np.ndarray) -> str:
    """Add the initializer that holds bias + lost mean; wire it in where an Add holds the bias."""
    slot = use.bias
    values = slot.values(surgeon.index, site.m) + use.gain * lost
    hint = slot.name if slot.name else f"{site.weight}/bias"
    name = store(surgeon, site, hint, values.reshape(slot.shape))
    if slot.kind == "add":
        surgeon.rewire(slot.node, slot.name, name, slot.place)
    return name
