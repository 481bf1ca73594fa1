"""Tensor data outside the model file: mapped to memory where they are read, appended one by one."""

import math
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

import numpy as np
import onnx

__all__ = [
    "DATA_FILE",
    "SMALLEST_OUTSIDE",
    "ExternalWriter",
    "Scratch",
    "external_bytes",
    "external_entries",
    "mapped_array",
    "stored_bytes",
]

# Readers that map the file want tensors to begin at pages.
PAGE = 4096

# The data file of a model that has no file of its own yet.
DATA_FILE = "weights.data"

# Bytes below which a tensor stays in the model file.
SMALLEST_OUTSIDE = 1024

# Bits of the element types that are packed: several in a byte.
_PACKED_BITS = {
    number: bits
    for bits, names in ((4, ("INT4", "UINT4", "FLOAT4E2M1")), (2, ("INT2", "UINT2")))
    for name, number in onnx.TensorProto.DataType.items()
    if name in names
}


def external_entries(tensor: onnx.TensorProto) -> Mapping[str, str]:
    """Where the data of a tensor lie: `location`, `offset`, `length` (ONNX, External Data)."""
    return {entry.key: entry.value for entry in tensor.external_data}


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that the elements of a tensor take as raw data, by its type and shape."""
    elements = math.prod(tensor.dims)
    if tensor.data_type in _PACKED_BITS:
        return int(-(-elements * _PACKED_BITS[tensor.data_type] // 8))
    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return int(elements * kind.itemsize)


def external_bytes(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """The raw data of an external tensor, uint8 [bytes], mapped to memory: only read where looked.

    The pages are private: what is written to the array never gets to the file.

    Args:
        tensor: A tensor with external data.
        folder: The model's folder.

    Raises:
        ValueError: The location is not a plain file in the folder, or holds less than the shape
            says.
        OSError: It cannot be read.
    """
    entries = external_entries(tensor)
    location = entries.get("location", "")
    pure = (PurePosixPath(location), PureWindowsPath(location))
    if not location or any(p.is_absolute() or p.drive or ".." in p.parts for p in pure):
        raise ValueError(f"external data {location!r} are not in the model's folder")
    path = folder / location
    if path.resolve() != folder.resolve() / location:
        raise ValueError(f"external data {location!r} lie behind a link")
    if not path.is_file():
        raise ValueError(f"there is no file {location!r} with its external data")
    size = stored_bytes(tensor)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
    except ValueError as e:
        raise ValueError(f"offset or length of external data {location!r} is no number") from e
    if length != size:
        raise ValueError(f"external data of {length} bytes, where the shape says {size}")
    if offset < 0 or offset + size > path.stat().st_size:
        raise ValueError(
            f"external data end at byte {offset + size} of {location!r}, which has "
            f"{path.stat().st_size}"
        )
    if not size:
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "c", offset, (size,)))


def mapped_array(tensor: onnx.TensorProto, folder: Path) -> np.ndarray | None:
    """The values of an external tensor, mapped to memory; None for types that are packed.

    Raises:
        ValueError: See `external_bytes`.
        OSError: See `external_bytes`.
    """
    if tensor.data_type in _PACKED_BITS:
        return None
    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return external_bytes(tensor, folder).view(kind).reshape(tuple(tensor.dims))


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
        self._file.write(b"\0" * (-self._file.tell() % PAGE))
        entries = {"location": self._location, "offset": self._file.tell(), "length": len(data)}
        self._file.write(data)
        tensor.ClearField("raw_data")
        tensor.ClearField("external_data")
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
        self.path = Path(tempfile.mkdtemp(prefix="onnx-utilrank-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
