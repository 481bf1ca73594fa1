"""Installed packages beside what this one asks for in its metadata."""

import importlib.metadata
import platform
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from onnx_utilrank.installation.report import ExtraState, PackageState
from onnx_utilrank.runtime.packages import runtime_packages
from onnx_utilrank.runtime.trial import run_python

__all__ = ["DISTRIBUTION", "installed_versions", "optional_extras", "required_packages"]

DISTRIBUTION = "onnx-utilrank"
RUNTIME = "onnxruntime"

# For those who work on this package, not with it.
DEVELOPMENT = "dev"

# What to import of packages that hold compiled code, to know that they work.
_COMPILED = {
    "numpy": "numpy",
    "onnx": "onnx.checker",
    "onnx-graphsurgeon": "onnx_graphsurgeon",
    "torch": "torch",
}


def required_packages() -> tuple[PackageState, ...]:
    """Python and every package that is needed; those that hold compiled code are imported.

    That ONNX Runtime loads is left to `try_runtime`.
    """
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    python = SpecifierSet(metadata["Requires-Python"])
    states = [_state("Python", platform.python_version(), python)]
    for requirement in _requirements():
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            states.append(_installed(requirement))
    imports = [s for s in states if s.fault is None and s.name in _COMPILED]
    script = "import {}; print('{{}}')"
    outcomes = run_python([["-c", script.format(_COMPILED[s.name])] for s in imports])
    faults = {
        state.name: f"cannot be imported: {outcome}; pip install --force-reinstall {state.name}"
        for state, outcome in zip(imports, outcomes, strict=True)
        if isinstance(outcome, str)
    }
    return tuple(
        PackageState(name=s.name, version=s.version, wanted=s.wanted, fault=faults[s.name])
        if s.name in faults
        else s
        for s in states
    )


def installed_versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that it needs, as far as they are there."""
    states = [
        _installed(requirement)
        for requirement in _requirements()
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    found = {DISTRIBUTION: importlib.metadata.version(DISTRIBUTION)}
    found["Python"] = platform.python_version()
    return found | {state.name: state.version for state in states if state.version is not None}


def optional_extras() -> tuple[ExtraState, ...]:
    """The extras, and what each of them lacks."""
    names = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    return tuple(
        ExtraState(name=name, missing=tuple(dict.fromkeys(_missing(name))))
        for name in names
        if name != DEVELOPMENT
    )


def _missing(extra: str) -> Iterable[str]:
    for requirement in _requirements():
        marker = requirement.marker
        if (
            marker is None
            or marker.evaluate({"extra": ""})
            or not marker.evaluate({"extra": extra})
        ):
            continue
        if requirement.name == DISTRIBUTION:  # an extra that brings another
            for other in sorted(requirement.extras):
                yield from _missing(other)
        elif _installed(requirement).fault:
            yield f"{requirement.name}{requirement.specifier}"


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]


def _installed(requirement: Requirement) -> PackageState:
    # Other packages bring the same module, and are as good.
    owners = runtime_packages() if requirement.name.startswith(RUNTIME) else ()
    name = owners[0] if len(owners) == 1 else requirement.name
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return _state(name, version, requirement.specifier)


def _state(name: str, version: str | None, wanted: SpecifierSet) -> PackageState:
    fault = None
    if version is None:
        fault = f'is not installed; pip install "{name}{wanted}"'
    elif not wanted.contains(Version(version), prereleases=True):
        remedy = f'; pip install "{name}{wanted}"' if name != "Python" else ""
        fault = f"{version} is not {wanted}{remedy}"
    return PackageState(name=name, version=version, wanted=str(wanted), fault=fault)
