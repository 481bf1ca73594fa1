"""Statistics of earlier runs, in a folder that the user names.

An entry is one `.npz` file. Its name is the hash of all that it depends on: the model, the samples
and what was collected of them; so what belongs to another model or other data is never found.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_utilrank.calibration.data import DYNAMIC_BATCH, Dataset
from onnx_utilrank.calibration.limits import UNREADABLE
from onnx_utilrank.errors import ConfigError
from onnx_utilrank.model.store import ModelStore, atomic_write

__all__ = ["CHECKPOINT_SECONDS", "Cache", "numbered", "of_each"]

logger = logging.getLogger(__name__)

# Seconds between two entries of a pass that goes on: what a run that is killed loses at most.
CHECKPOINT_SECONDS = 60.0

# Goes up whenever what is collected, or how it is kept, changes.
FORMAT = 3

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
        cls,
        folder: Path | None,
        store: ModelStore,
        data: Dataset,
        samples: Sequence[int],
        *,
        libraries: Sequence[str] = (),
    ) -> "Cache":
        """The entries of a model and samples in a folder, which is made if it is not there.

        Args:
            folder: The folder; None for a cache that keeps nothing.
            store: The model.
            data: What the samples are of.
            samples: Their numbers.
            libraries: Files of operators of the user's, on which values depend too.

        Raises:
            ConfigError: The folder cannot be made, or a library cannot be read.
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
        for library in libraries:
            try:
                digest.update(hashlib.sha256(Path(library).read_bytes()).digest())
            except OSError as e:
                reason = e.strerror or e
                raise ConfigError(f"custom op library {library}: cannot be read ({reason})") from e
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
        except (*UNREADABLE, KeyError) as e:
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


def numbered(parts: Iterable[Arrays]) -> dict[str, np.ndarray]:
    """Arrays of several things as one entry: by number, for an archive cannot hold any name."""
    return {f"{k} {name}": array for k, part in enumerate(parts) for name, array in part.items()}


def of_each(entry: Arrays) -> Mapping[int, Arrays]:
    """The arrays of each thing by its number; what is of none is left out. See `numbered`."""
    parts: defaultdict[int, dict[str, np.ndarray]] = defaultdict(dict)
    for full, array in entry.items():
        number, _, name = full.partition(" ")
        if number.isdecimal():
            parts[int(number)][name] = array
    return parts


def _digest(values: object) -> bytes:
    """SHA-256 of names, types, shapes and values, of arrays and of whatever holds some.

    Sequences and maps, as some models take them, are lists and dictionaries.
    """
    digest = hashlib.sha256()
    if isinstance(values, Mapping):
        for name, value in sorted(values.items()):
            digest.update(repr(name).encode() + _digest(value))
    elif isinstance(values, list | tuple):
        digest.update(f"list {len(values)}".encode())
        for value in values:
            digest.update(_digest(value))
    elif isinstance(values, np.ndarray) and not values.dtype.hasobject:
        digest.update(f"{values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    elif isinstance(values, np.ndarray):  # of strings
        digest.update(f"object {values.shape}".encode() + _digest(values.reshape(-1).tolist()))
    else:
        digest.update(repr(values).encode())
    return digest.digest()
