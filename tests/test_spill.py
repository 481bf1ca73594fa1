"""Arrays that wait in files."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from builders import noise

from onnx_utilrank.errors import UtilrankError
from onnx_utilrank.statistics import spill
from onnx_utilrank.statistics.spill import spilled


@dataclass(frozen=True, kw_only=True)
class Holder:
    large: np.ndarray
    small: np.ndarray
    parts: tuple[np.ndarray, ...]
    name: str = "held"


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spill, "SPILLED", 800)
    monkeypatch.setattr(spill, "SEGMENT", 3 * 4096)
    monkeypatch.setattr(spill, "_SEGMENTS", [])


def in_file(array: np.ndarray) -> bool:
    base: object = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(base, np.memmap)


def test_large_arrays_of_a_dataclass_go_to_files_and_keep_their_values():
    held = Holder(large=noise(1, 20, 30).T, small=noise(2, 9), parts=(noise(3, 200), noise(4, 3)))
    found = spilled(held)
    assert [in_file(a) for a in (found.large, found.small, *found.parts)] == [
        True,
        False,
        True,
        False,
    ]
    np.testing.assert_array_equal(found.large, held.large)
    np.testing.assert_array_equal(found.parts[0], held.parts[0])
    assert found.small is held.small
    assert found.large.flags.writeable  # as torch wants them
    small = Holder(large=noise(1, 5), small=noise(2, 9), parts=())
    assert spilled(small) is small


def test_many_arrays_share_few_open_files():
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("open files are told on Linux alone")
    before = len(list(descriptors.iterdir()))
    values = [noise(k, 100) for k in range(30)]
    values[0] = np.full(801, 7, np.uint8)
    held = [spilled(v) for v in values]
    assert len(list(descriptors.iterdir())) - before <= 12  # ten files of three pages each
    for one, other in zip(held, values, strict=True):
        assert one.flags.aligned
        np.testing.assert_array_equal(one, other)
    whole = noise(99, 4, 4096)  # more than such a file
    np.testing.assert_array_equal(spilled(whole), whole)
    np.testing.assert_array_equal(held[0], values[0])
    del held, one
    assert len(list(descriptors.iterdir())) - before <= 1  # the one that is being filled


def test_no_room_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(spill.tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(UtilrankError, match="TMPDIR names another folder"):
        spilled(noise(1, 200))


def test_full_disk_is_told_before_anything_is_written(monkeypatch: pytest.MonkeyPatch):
    """A page of a mapped file that the disk has no room for would end the process."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UtilrankError, match="no room for 1,600 bytes of statistics"):
        spilled(noise(1, 200))
