"""Tensor data outside the model file: mapped to memory where they are read, appended one by one."""

import contextlib
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import onnx

from onnx_utilrank.errors import UtilrankError
from onnx_utilrank.model.check import outside_fault, stored_bytes

__all__ = [
    "DATA_FILE",
    "SMALLEST_OUTSIDE",
    "ExternalWriter",
    "Scratch",
    "external_bytes",
    "mapped_array",
]

# Readers that map the file want large tensors to begin at pages, and any at a line of the cache.
PAGE, LINE = 4096, 64
LARGE = 2**20

# The data file of a model that has no file of its own yet.
DATA_FILE = "weights.data"

# Bytes below which a tensor stays in the model file.
SMALLEST_OUTSIDE = 1024


def external_bytes(
    tensor: onnx.TensorProto, folder: Path, maps: dict[Path, np.ndarray]
) -> np.ndarray:
    """The raw data of an external tensor, uint8 [bytes], mapped to memory: only read where looked.

    The pages are private: what is written to the array never gets to the file.

    Args:
        tensor: A tensor with external data.
        folder: The model's folder.
        maps: Files that are mapped already, to which this one is added: each map costs an open
            file, and a model may have a thousand tensors.

    Raises:
        ValueError: The location is not a plain file in the folder, or holds less than the shape
            says.
        OSError: It cannot be read.
    """
    fault = outside_fault(tensor, folder)
    if fault:
        raise ValueError(fault)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    size = int(entries.get("length", stored_bytes(tensor) or 0))
    path, offset = folder / entries["location"], int(entries.get("offset", 0))
    if not size:
        return np.empty(0, np.uint8)
    if path not in maps:
        maps[path] = np.asarray(np.memmap(path, np.uint8, "c"))
    return maps[path][offset : offset + size]


def mapped_array(
    tensor: onnx.TensorProto, folder: Path, maps: dict[Path, np.ndarray]
) -> np.ndarray | None:
    """The values of an external tensor, mapped to memory; None for types that are packed.

    Raises:
        ValueError: See `external_bytes`.
        OSError: See `external_bytes`.
    """
    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if stored_bytes(tensor) != math.prod(tensor.dims) * kind.itemsize:
        return None
    return external_bytes(tensor, folder, maps).view(kind).reshape(tuple(tensor.dims))


# Fields of a tensor that may hold its elements.
_HELD = ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data")


class ExternalWriter:
    """Appends data of tensors to one open file."""

    def __init__(self, file: IO[bytes], location: str) -> None:
        """Begin where the file ends.

        Args:
            file: Opened for writing.
            location: Its name beside the model.
        """
        self._file, self._location = file, location

    def put(self, tensor: onnx.TensorProto, data: bytes | memoryview) -> None:
        """Append raw data, and let the tensor refer to them in the place of what it held.

        Args:
            tensor: The tensor.
            data: Its elements in order, little-endian, of whatever type the view is.

        Raises:
            OSError: The file cannot be written.
        """
        data = memoryview(data).cast("B")
        self._file.write(b"\0" * (-self._file.tell() % (PAGE if len(data) >= LARGE else LINE)))
        entries = {"location": self._location, "offset": self._file.tell(), "length": len(data)}
        self._file.write(data)
        for held in ("external_data", *_HELD):
            tensor.ClearField(held)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))


class Scratch:
    """A temporary folder that goes when nothing refers to it any more.

    It lies where Python's `tempfile` puts such folders; the variable TMPDIR says where that is.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        """Make it.

        Raises:
            UtilrankError: It cannot be made.
        """
        with _temporary():
            self.path = Path(tempfile.mkdtemp(prefix="onnx-utilrank-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    @contextlib.contextmanager
    def writer(self) -> Iterator[ExternalWriter]:
        """What appends to the data file of the folder, for the time of the block.

        Raises:
            UtilrankError: The file cannot be written.
        """
        with _temporary(), (self.path / DATA_FILE).open("ab") as f:
            yield ExternalWriter(f, DATA_FILE)


@contextlib.contextmanager
def _temporary() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UtilrankError(
            f"weights cannot be kept in a temporary file ({e.strerror or e}); TMPDIR names another "
            "folder"
        ) from e
