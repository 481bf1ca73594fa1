"""Tables and sentences of any report. Names come from the model, so they are never markup."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from onnx_utilrank.engine.engine import EngineUse
from onnx_utilrank.errors import printable

__all__ = ["add_row", "empty_table", "sentences"]

# Columns of words, which are flush left; so is the first of any table.
WORDS = frozenset(
    {"op", "reason", "provider", "model", "asked for", "ran on", "size", "in time"}
    | {"name", "type", "shape", "moves", "remark"}
)


def sentences(
    notes: Sequence[str], reasons: dict[str, int], engine: EngineUse | None = None
) -> Iterator[Text]:
    """Who did the work, if others than this process; notes; reasons with how often each holds."""
    if engine is not None:
        yield Text(
            f"Statistics by {engine.name}: {engine.tasks} tasks, done by {engine.workers} workers "
            f"on {engine.nodes} machines."
        )
    for note in notes:
        yield Text(printable(f"Note: {note}"))
    for reason, count in reasons.items():
        yield Text(printable(f"Left alone: {count} x {reason}"))


def empty_table(*columns: str) -> Table:
    """A table without rows; columns of numbers are flush right."""
    table = Table(box=box.SIMPLE_HEAD)
    for k, column in enumerate(columns):
        words = k == 0 or column in WORDS
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def add_row(table: Table, *cells: object) -> None:
    """A row of cells as they are, without markup."""
    table.add_row(*(Text(printable(str(cell))) for cell in cells))
