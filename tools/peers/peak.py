"""Run a script, and write down how much memory the process held at most.

python peak.py FILE SCRIPT [ARGUMENT ...]

What `wait4` tells of a child's memory can be that of its parent, which a child shares until it
becomes another program; what the process itself reads is its own.
"""

import runpy
import sys
from pathlib import Path

__all__ = ["main"]


def main() -> None:
    """Run the script as `python SCRIPT …` would; the peak goes into FILE, in MiB."""
    _, out, *sys.argv = sys.argv
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        Path(out).write_text(f"{_peak():.1f}\n", encoding="utf8")


def _peak() -> float:
    """The largest resident set so far, in MiB."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
        return int(dict(line.split(":", 1) for line in lines)["VmHWM"].split()[0]) / 2**10
    import resource  # not on Windows

    # Bytes on macOS, KiB elsewhere: getrusage(2).
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    main()
