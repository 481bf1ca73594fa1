"""The process that loads a model and runs it for its memory alone; `memory` starts it."""

import contextlib
import json
import pickle
import sys
from pathlib import Path

from onnx_utilrank.runtime.creation import create_session, session_options
from onnx_utilrank.runtime.cuda_driver import used_memory
from onnx_utilrank.runtime.memory import Request
from onnx_utilrank.runtime.sessions import wrapped

__all__ = ["main", "measure"]

# The first run plans memory, the second is the first to use that plan.
RUNS = 2

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def main() -> None:
    """Measure what stdin asks for, a pickled `Request`, and write it to stdout as JSON."""
    print(json.dumps(measure(pickle.load(sys.stdin.buffer))))


def measure(request: Request) -> dict[str, int | None]:
    """Load and run; give the growth of `resident` and `device` memory in bytes, None if unknown."""
    options = session_options(
        request.provider,
        file_bytes=request.file_bytes,
        folder=str(Path(request.path).parent),
        threads=request.threads,
    )
    device = request.provider.cuda_device
    # First, for the context that it makes.
    taken = None if device is None else used_memory(device)
    before = _resident()
    session = wrapped(
        create_session(request.path, request.provider, options), request.provider, request.path
    )
    binding = session.bind(request.feed)
    for _ in range(RUNS):
        binding.run()
    # What ONNX Runtime's arena took of the device it keeps: after the runs it is at its peak.
    after = None if device is None else used_memory(device)
    return {
        "resident": None if before is None else _peak() - before,
        "device": None if taken is None or after is None else after - taken,
    }


def _resident() -> int | None:
    """Bytes of the resident set, from which on `_peak` counts; None where that cannot be told."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            _RESET.write_text("5")  # the peak is from now on: proc(5), clear_refs
            return _status("VmRSS")
        return None
    return None if sys.platform == "win32" else _peak()


def _peak() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    import resource  # not on Windows

    # Bytes on macOS, KiB elsewhere: getrusage(2).
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(lines[key].split()[0])
