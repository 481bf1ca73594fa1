"""Large arrays in temporary files, mapped to memory: statistics that wait for their turn."""

import dataclasses
import os
import tempfile
import threading
from typing import TypeVar

import numpy as np

from onnx_utilrank.errors import UtilrankError

__all__ = ["spilled"]

# Bytes from which an array goes to a file: a square of 362 numbers of 8 bytes. There are several of
# each weight, and of a large model hundreds of weights.
SPILLED = 2**20

# Bytes of a file for several arrays, which begin at pages of it.
SEGMENT, PAGE = 2**26, 4096
# The one that is being filled.
_SEGMENTS: list["_Segment"] = []
_FILLING = threading.Lock()

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


class _Segment:
    """A temporary file that several arrays share: each that is mapped alone costs an open file."""

    def __init__(self, size: int) -> None:
        with tempfile.TemporaryFile(prefix="onnx-utilrank-") as f:
            # A disk that is full has to say so here: later on it would end the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), 0, size)
            else:
                f.truncate(size)
            self._bytes = np.asarray(np.memmap(f, np.uint8, "r+", shape=(size,)))
        self._used = 0

    def has_room(self, array: np.ndarray) -> bool:
        return self._used + array.nbytes <= len(self._bytes)

    def put(self, array: np.ndarray) -> np.ndarray:
        """A copy of the array in the file."""
        start, end = self._used, self._used + array.nbytes
        self._used = -(-end // PAGE) * PAGE
        held = self._bytes[start:end].view(array.dtype).reshape(array.shape)
        held[...] = array
        return held


def _mapped(array: np.ndarray) -> np.ndarray:
    try:
        with _FILLING:
            if not _SEGMENTS or not _SEGMENTS[0].has_room(array):
                # A full one goes when the last of its arrays does.
                _SEGMENTS[:] = [_Segment(max(SEGMENT, array.nbytes))]
            return _SEGMENTS[0].put(array)
    except OSError as e:
        raise UtilrankError(
            f"{tempfile.gettempdir()}: no room for {array.nbytes:,} bytes of statistics "
            f"({e.strerror or e}); TMPDIR names another folder"
        ) from e
