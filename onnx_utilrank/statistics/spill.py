"""Large arrays in temporary files, mapped to memory: statistics that wait for their turn."""

import dataclasses
import tempfile
from typing import TypeVar

import numpy as np

from onnx_utilrank.errors import UtilrankError

__all__ = ["spilled"]

# Bytes from which an array goes to a file: a square of 362 numbers of 8 bytes. There are several of
# each weight, and of a large model hundreds of weights.
SPILLED = 2**20

T = TypeVar("T")


def spilled(value: T) -> T:
    """The same value with its large arrays in files, which go with the arrays.

    The system reads their pages when they are looked at and may drop them at any time, so that
    they do not count as memory of the process.

    Args:
        value: An array, or a dataclass or tuple that holds some. Anything else is given back.

    Raises:
        UtilrankError: A temporary file cannot be written.
    """
    if isinstance(value, np.ndarray):
        return _mapped(value) if value.nbytes >= SPILLED else value  # type: ignore[return-value]
    if isinstance(value, tuple):
        parts = tuple(map(spilled, value))
        same = all(new is old for new, old in zip(parts, value, strict=True))
        return value if same else parts  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        changed = {name: new for name, old in held.items() if (new := spilled(old)) is not old}
        return dataclasses.replace(value, **changed) if changed else value
    return value


def _mapped(array: np.ndarray) -> np.ndarray:
    try:
        with tempfile.TemporaryFile(prefix="onnx-utilrank-") as f:
            f.write(np.ascontiguousarray(array).data)
            f.flush()
            return np.asarray(np.memmap(f, array.dtype, "c", shape=array.shape))
    except OSError as e:
        raise UtilrankError(
            f"{tempfile.gettempdir()}: no room for {array.nbytes:,} bytes of statistics "
            f"({e.strerror or e}); TMPDIR names another folder"
        ) from e
