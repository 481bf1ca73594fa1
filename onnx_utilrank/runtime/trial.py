"""Try ONNX Runtime and its providers, each in a process of its own.

What is broken may end a process rather than raise, and a broken ONNX Runtime cannot be imported at
all: this module does without it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ProviderTrial", "RuntimeTrial", "run_python", "try_providers", "try_runtime"]

_ROOT = Path(__file__).resolve().parents[2]

# Seconds that a process may take: some providers compile what they run.
PATIENCE = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeTrial:
    """Whether ONNX Runtime can be loaded, and what it names.

    Attributes:
        version: Its version; empty where it cannot be loaded.
        known: Names of all providers that it knows of.
        built: Those that it was built with.
        fault: Why it cannot be loaded; None where it can.
    """

    version: str = ""
    known: tuple[str, ...] = ()
    built: tuple[str, ...] = ()
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderTrial:
    """Whether a provider runs a model of two nodes.

    Attributes:
        provider: Its name as it was given.
        fault: Why it does not, and what to install; None where it does.
    """

    provider: str
    fault: str | None = None


def try_runtime() -> RuntimeTrial:
    """Load ONNX Runtime."""
    (found,) = run_python([["-m", "onnx_utilrank.runtime.trial_child"]])
    if isinstance(found, str):
        return RuntimeTrial(fault=found)
    return RuntimeTrial(
        version=str(found["version"]),
        known=tuple(map(str, found["known"])),
        built=tuple(map(str, found["built"])),
    )


def try_providers(names: Sequence[str]) -> tuple[ProviderTrial, ...]:
    """Run a tiny model on each.

    Args:
        names: As users type them or as ONNX Runtime has them.
    """
    results = run_python([["-m", "onnx_utilrank.runtime.trial_child", name] for name in names])
    return tuple(
        ProviderTrial(provider=name, fault=found if isinstance(found, str) else found["fault"])
        for name, found in zip(names, results, strict=True)
    )


def run_python(commands: Sequence[Sequence[str]]) -> list[dict[str, Any] | str]:
    """Run Python several times at once.

    Args:
        commands: The arguments of each.

    Returns:
        For each the JSON object in the last line of what it prints, or what is wrong with it.
    """
    folders = (str(_ROOT), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    children = [
        subprocess.Popen(
            [sys.executable, "-P", *command],  # no file of the working folder passes for a module
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for command in commands
    ]
    return [_outcome(child) for child in children]


def _outcome(child: "subprocess.Popen[str]") -> dict[str, Any] | str:
    try:
        out, err = child.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return f"it did not end within {PATIENCE} seconds"
    last = ["", *(line.strip() for line in err.splitlines() if line.strip())][-1]
    if child.returncode < 0:
        return f"its process was ended by signal {-child.returncode}"
    if child.returncode:
        return last or f"its process ended with status {child.returncode}"
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found
