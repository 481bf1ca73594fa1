"""Memory of a process without pages of mapped files, which the system drops when it needs room.

Linux alone tells the two apart.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["PERIOD", "Peak", "anonymous_bytes", "peak_of_this_process"]

# Seconds between two looks at a process.
PERIOD = 0.01


def anonymous_bytes(process: int | str = "self") -> int:
    """What it holds now; 0 where it has ended."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Peak:
    """The most that was seen.

    Attributes:
        bytes: That, since it was last taken.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def look(self, process: int | str = "self") -> None:
        """Look once."""
        self.bytes = max(self.bytes, anonymous_bytes(process))

    def take(self) -> int:
        """The most so far, now at the latest; what is seen from here on begins anew."""
        self.look()
        most, self.bytes = self.bytes, 0
        return most


@contextmanager
def peak_of_this_process() -> Iterator[Peak]:
    """Look at this process every hundredth of a second, from a thread of its own."""
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak.look()
            time.sleep(PERIOD)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
