"""The errors of the tool: one class per documented exit status.

Every message is one line that names what is wrong with *the user's* input: the file, the node and
the tensor where they are known. The library raises; only the command line turns an error into an
exit status.
"""

from typing import ClassVar

__all__ = [
    "ConfigError",
    "DataError",
    "ModelError",
    "ProviderUnavailableError",
    "TargetMissedError",
    "UtilrankError",
]


class UtilrankError(Exception):
    """Base of everything this package raises on purpose (exit status 1)."""

    exit_status: ClassVar[int] = 1


class ConfigError(UtilrankError):
    """Options that contradict each other or are out of range (exit status 2)."""

    exit_status: ClassVar[int] = 2


class TargetMissedError(UtilrankError):
    """The size target or a tolerance cannot be met; nothing was written (exit status 3)."""

    exit_status: ClassVar[int] = 3


class ProviderUnavailableError(UtilrankError):
    """An execution provider was asked for and the session does not use it (exit status 4)."""

    exit_status: ClassVar[int] = 4


class ModelError(UtilrankError):
    """The model, or a plan for it, cannot be used (exit status 5)."""

    exit_status: ClassVar[int] = 5


class DataError(UtilrankError):
    """The calibration data cannot be used with the model (exit status 5)."""

    exit_status: ClassVar[int] = 5
