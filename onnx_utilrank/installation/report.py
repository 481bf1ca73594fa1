"""What an examination of the installation found."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from onnx_utilrank.runtime.machine import Machine
from onnx_utilrank.runtime.trial import ProviderTrial

__all__ = ["DoctorReport", "ExtraState", "PackageState"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageState:
    """A package that is needed.

    Attributes:
        name: Its name; `Python` for that itself.
        version: The installed one; None where there is none.
        wanted: The versions that this package works with, as in its metadata.
        fault: What is wrong with it; None where nothing is.
    """

    name: str
    version: str | None
    wanted: str
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraState:
    """An optional part of the installation.

    Attributes:
        name: As in `pip install "onnx-utilrank[NAME]"`.
        missing: What it lacks; empty where it is installed.
    """

    name: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """What is installed, what works of it, and where.

    Attributes:
        version: Of this package.
        machine: Where it runs.
        packages: What is needed.
        extras: What is optional.
        runtime_packages: Packages that bring ONNX Runtime; there must be just one.
        providers: Those that the installed ONNX Runtime was built with, and the one that was asked
            for; each was tried on a model of two nodes.
        not_built: Providers that ONNX Runtime knows of and was not built with.
        asked: The provider that has to work.
        faults: What is wrong, each a sentence with what to do about it; providers that nobody
            asked for do not count.
    """

    verb: ClassVar[str] = "doctor"

    version: str
    machine: Machine
    packages: tuple[PackageState, ...]
    extras: tuple[ExtraState, ...]
    runtime_packages: tuple[str, ...]
    providers: tuple[ProviderTrial, ...]
    not_built: tuple[str, ...]
    asked: str
    faults: tuple[str, ...]

    @property
    def fault(self) -> str | None:
        """Why the provider that was asked for does not work; None where it does."""
        return self.providers[0].fault

    def as_dict(self) -> dict[str, object]:
        """The report as JSON types."""
        return dataclasses.asdict(self) | {"works": self.fault is None}
