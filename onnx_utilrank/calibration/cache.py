"""Statistics of earlier runs, in a folder that the user names.

An entry is one `.npz` file. Its name is the hash of all that it depends on: the model, the samples
and what was collected of them; so what belongs to another model or other data is never found.
"""

import hashlib
import importlib.metadata
import json
import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_utilrank.calibration.data import DYNAMIC_BATCH, Dataset
from onnx_utilrank.errors import ConfigError
from onnx_utilrank.model.store import ModelStore, atomic_write

__all__ = ["CHECKPOINT_SECONDS", "Cache"]

logger = logging.getLogger(__name__)

# Seconds between two entries of a pass that goes on: what a run that is killed loses at most.
CHECKPOINT_SECONDS = 60.0

# Goes up whenever what is collected, or how it is kept, changes.
FORMAT = 1

# The array that holds the hash of the others.
DIGEST = "sha256"

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Entries of one model and one set of samples.

    Attributes:
        folder: Where they are; None for a cache that keeps nothing.
        key: Hash of the model and the samples.
    """

    folder: Path | None = None
    key: str = ""

    @classmethod
    def open(
        cls, folder: Path | None, store: ModelStore, data: Dataset, samples: Sequence[int]
    ) -> "Cache":
        """The entries of a model and samples in a folder, which is made if it is not there.

        Raises:
            ConfigError: The folder cannot be made.
            ModelError: The model's weights cannot be read.
            DataError: The samples cannot be read.
        """
        if folder is None:
            return cls()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"{folder}: cannot be a cache ({e.strerror or e})") from e
        written_by = importlib.metadata.version("onnx-utilrank")
        digest = hashlib.sha256(f"{FORMAT} {written_by} {store.fingerprint()}".encode())
        for feed in data.feeds(samples, batch=DYNAMIC_BATCH):
            digest.update(_digest(feed))
        return cls(folder=folder, key=digest.hexdigest())

    def load(self, *of: object) -> dict[str, np.ndarray] | None:
        """The arrays of an entry; None where there is none, or none that is whole.

        Args:
            of: What it is of, besides the model and the samples: anything whose `repr` says it.
        """
        path = self._path(of)
        if path is None or not path.is_file():
            return None
        try:
            with path.open("rb") as f, np.load(f, allow_pickle=False) as entry:
                arrays = {name: entry[name] for name in entry.files}
            if arrays.pop(DIGEST).tobytes() == _digest(arrays):
                return arrays
            reason = "it was altered"
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
            reason = " ".join(str(e).split()) or type(e).__name__
        logger.warning("%s: this cache entry is not whole and is not used (%s)", path, reason)
        return None

    def save(self, arrays: Arrays, *of: object) -> None:
        """Keep an entry, in the place of an earlier one; nothing, where there is no folder.

        Args:
            arrays: By name.
            of: See `load`.

        Raises:
            ConfigError: It cannot be written.
        """
        path = self._path(of)
        if path is None:
            return
        try:
            with atomic_write(path) as f:
                digest = np.frombuffer(_digest(arrays), np.uint8)
                np.savez(f, **{DIGEST: digest, **arrays})  # type: ignore[arg-type]
        except OSError as e:
            raise ConfigError(f"{path}: the cache cannot be written ({e.strerror or e})") from e

    def _path(self, of: tuple[object, ...]) -> Path | None:
        if self.folder is None:
            return None
        name = json.dumps([self.key, *map(repr, of)])
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()}.npz"


def _digest(arrays: Arrays) -> bytes:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        array = np.ascontiguousarray(values)
        digest.update(f"{name!r} {array.dtype} {array.shape}".encode())
        if array.dtype.hasobject:  # strings
            digest.update(repr(array.tolist()).encode())
        else:
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()
