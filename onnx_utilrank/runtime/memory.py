"""Peak memory of loading and running a model, measured in a process of its own."""

import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.provider import Provider
from onnx_utilrank.runtime.sessions import Feed

__all__ = ["PeakMemory", "Request", "measure_memory"]

_PACKAGE = Path(__file__).resolve().parents[1]

# The package by its folder alone: all of it would bring torch, and take seconds, each time.
_START = """
import sys, types
package = types.ModuleType("onnx_utilrank")
package.__path__ = [sys.argv[1]]
sys.modules[package.__name__] = package
from onnx_utilrank.runtime.memory_child import main
main()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """What loading a model and running it took at most, beyond what was taken before.

    Attributes:
        resident: Bytes of the resident set, pages of mapped files included; None where the
            platform does not tell.
        device: Bytes on the CUDA device; None where there is none. Other processes that use the
            device meanwhile falsify it.
        failure: Why nothing was measured; None where something was.
    """

    resident: int | None = None
    device: int | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to load and run.

    Attributes:
        path: File of the model.
        file_bytes: Its size, with external data.
        provider: Where it runs.
        feed: What it is run on.
        threads: Threads within an operator; 0 leaves it to ONNX Runtime.
    """

    path: str
    file_bytes: int
    provider: Provider
    feed: Mapping[str, np.ndarray]
    threads: int


def measure_memory(
    model: ModelStore, provider: Provider, feed: Feed, *, threads: int = 0
) -> PeakMemory:
    """Load a model in a fresh process, run a feed twice, and look at the peak.

    Args:
        model: The model; one that is no file is written to a temporary one.
        provider: Where it runs.
        feed: What it is run on.
        threads: Threads within an operator; 0 leaves it to ONNX Runtime.

    Raises:
        ModelError: The model cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = model.path
        if path is None:
            path = Path(folder) / "model.onnx"
            model.save(path)
        request = Request(
            path=str(path.resolve()),
            file_bytes=model.file_bytes,
            provider=provider,
            feed=dict(feed),
            threads=threads,
        )
        done = subprocess.run(
            [sys.executable, "-P", "-c", _START, str(_PACKAGE)],
            input=pickle.dumps(request),
            capture_output=True,
            check=False,
        )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"it ended in status {done.returncode}"
        return PeakMemory(failure=f"the process that measured it failed: {why}")
    # The last line: libraries of a provider may have printed lines of their own.
    return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))
