"""Progress bars on stderr; results alone go to stdout."""

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["ProgressBars"]


class ProgressBars:
    """One bar a stage; calling it is the library's progress callback."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,  # in a log, nothing but what matters
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Show that `done` of `total` (0: not known) of a stage are done, and how it is going."""
        if stage not in self._tasks:
            for task in self._tasks.values():  # a stage ends where the next begins
                self._bars.stop_task(task)
            self._tasks[stage] = self._bars.add_task(stage, total=total or None, detail="")
        self._bars.update(self._tasks[stage], completed=done, total=total or None, detail=detail)
