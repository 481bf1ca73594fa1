"""The errors of the tool: one class per documented exit status.

Every message is one line that names what is wrong with *the user's* input: the file, the node and
the tensor where they are known. Names come from files that may be hostile, so line breaks and
control characters are spelled out. The library raises; only the command line turns an error into
an exit status.
"""

from typing import ClassVar

__all__ = [
    "ConfigError",
    "DataError",
    "EngineUnavailableError",
    "ModelError",
    "ProviderUnavailableError",
    "TargetMissedError",
    "UtilrankError",
    "printable",
]


def printable(text: str) -> str:
    """Text whose control characters, which a terminal would obey, are spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class UtilrankError(Exception):
    """Base of everything this package raises on purpose (exit status 1)."""

    exit_status: ClassVar[int] = 1

    def __str__(self) -> str:
        return printable(" ".join(super().__str__().split()))


class ConfigError(UtilrankError):
    """Options that contradict each other or are out of range (exit status 2)."""

    exit_status: ClassVar[int] = 2


class TargetMissedError(UtilrankError):
    """The size target or a tolerance cannot be met; nothing was written (exit status 3)."""

    exit_status: ClassVar[int] = 3


class ProviderUnavailableError(UtilrankError):
    """An execution provider was asked for and the session does not use it (exit status 4)."""

    exit_status: ClassVar[int] = 4


class EngineUnavailableError(UtilrankError):
    """Other machines were asked for and cannot be had (exit status 4)."""

    exit_status: ClassVar[int] = 4


class ModelError(UtilrankError):
    """The model, or a plan for it, cannot be used (exit status 5)."""

    exit_status: ClassVar[int] = 5


class DataError(UtilrankError):
    """The calibration data cannot be used with the model (exit status 5)."""

    exit_status: ClassVar[int] = 5
