"""What a result came from: the command, versions, files and their hashes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from onnx_utilrank.installation.packages import installed_versions
from onnx_utilrank.runtime.machine import look_at_machine

__all__ = ["RunRecord", "UsedFile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedFile:
    """A file that was read or written.

    Attributes:
        role: What it was to the command: `model`, `data`, `output`.
        path: As it was given.
        bytes: Its size; None for what is no file (a folder, a function), or no longer there.
        sha256: Of its bytes, without those of files beside it; None where there is no size.
    """

    role: str
    path: str
    bytes: int | None
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """How a result was had.

    Attributes:
        verb: The verb, or function.
        command: The words of the command line; None where it was called from Python.
        finished: When, in UTC (ISO 8601).
        seconds: How long it took; None where that is not known.
        system: Operating system and architecture.
        processor: Its model.
        cores: Logical cores that the process might run on.
        versions: Of this package, Python, and the packages that are needed.
        files: What was read and written.
    """

    verb: str
    command: tuple[str, ...] | None
    finished: str
    seconds: float | None
    system: str
    processor: str
    cores: int
    versions: dict[str, str]
    files: tuple[UsedFile, ...]

    @classmethod
    def of(
        cls,
        verb: str,
        *,
        command: Sequence[str] | None = None,
        seconds: float | None = None,
        files: Sequence[tuple[str, str]] = (),
    ) -> "RunRecord":
        """The record of a run that ends now.

        Args:
            verb: The verb.
            command: The words of the command line.
            seconds: How long it took.
            files: Role and path of what was read and written.
        """
        machine = look_at_machine()
        return cls(
            verb=verb,
            command=None if command is None else tuple(command),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
            system=machine.system,
            processor=machine.processor,
            cores=machine.usable_cores,
            versions=installed_versions(),
            files=tuple(_used(role, path) for role, path in files),
        )


def _used(role: str, path: str) -> UsedFile:
    file = Path(path)
    if not file.is_file():
        return UsedFile(role=role, path=path, bytes=None, sha256=None)
    try:
        with file.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        return UsedFile(role=role, path=path, bytes=file.stat().st_size, sha256=digest)
    except OSError:  # it went away meanwhile, which is no reason to lose the result
        return UsedFile(role=role, path=path, bytes=None, sha256=None)
