"""What data may take of memory, and how reading them fails.

Arrays are read into memory whole, so that a small compressed file could ask for any amount of it.
Two limits hold, both of them the memory that is available when a file is read: what an archive says
that the arrays for the model take, which is looked at before anything is decompressed; and what the
bookkeeping of samples takes, of which there may be many though they are empty.
"""

import contextlib
import lzma
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from onnx_utilrank.errors import DataError

__all__ = ["UNREADABLE", "available_memory", "check_archive", "check_count"]

# What numpy and zipfile raise for files that are cut short, damaged, encrypted or pickled.
UNREADABLE = (
    *(OSError, EOFError, ValueError, RuntimeError, OverflowError, MemoryError, zipfile.BadZipFile),
    *(zlib.error, lzma.LZMAError, tokenize.TokenError),
)

# What lists of sample numbers and feeds take for each sample, about.
SAMPLE_BYTES = 512

_CONTAINER = Path("/sys/fs/cgroup/memory.max")
_FIGURES = Path("/proc/meminfo")


def available_memory() -> int | None:
    """Bytes that can be had without swapping, or that the container may take; None if unknown.

    Linux: the smaller of `MemAvailable` and the limit of the control group. Elsewhere on POSIX:
    all memory.
    """
    found = []
    try:
        lines = dict(line.split(":", 1) for line in _FIGURES.read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        if hasattr(os, "sysconf"):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # no such group, or no limit
        found.append(int(_CONTAINER.read_text()))
    return min(found, default=None)


def check_archive(path: Path, archive: zipfile.ZipFile, names: Iterable[str]) -> None:
    """Refuse arrays that memory cannot hold, by the sizes that their archive states.

    No member gives more bytes than it states: `zipfile` stops there.

    Args:
        path: The file.
        archive: It, opened.
        names: The arrays that will be read; others stay as they are.

    Raises:
        DataError: They take more than there is.
    """
    wanted = {file for name in names for file in (name, f"{name}.npy")}
    taken = sum(m.file_size for m in archive.infolist() if m.filename in wanted)
    room = available_memory()
    if room is not None and taken > room:
        raise DataError(
            f"{path}: its arrays take {taken:,} bytes, more than the {room:,} of memory that are "
            "available"
        )


def check_count(where: str, samples: int) -> None:
    """Refuse more samples than can be listed.

    Raises:
        DataError: A list of them takes more than there is.
    """
    room = available_memory()
    if room is not None and samples * SAMPLE_BYTES > room:
        raise DataError(f"{where}: {samples:,} samples are more than memory can list")
