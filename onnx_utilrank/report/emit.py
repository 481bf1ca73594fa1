"""Results to stdout and to a file."""

from collections.abc import Iterable

from rich.console import Console, RenderableType

from onnx_utilrank.report.run import RunRecord
from onnx_utilrank.report.write import Reported, as_json, report_content, write_content

__all__ = ["emit"]

# Columns where stdout is no terminal, so that names are not cut in a log.
LOG_WIDTH = 140


def emit(
    result: Reported,
    tables: Iterable[RenderableType],
    run: RunRecord,
    *,
    json: bool,
    file: str | None,
) -> None:
    """Print a result as tables or as JSON, and write it to a file if one is named.

    Args:
        result: The result.
        tables: The same for a terminal.
        run: What it came from.
        json: Whether JSON is printed.
        file: A file to write to: a page where its name ends in .html, else JSON.

    Raises:
        ModelError: The file cannot be written.
    """
    content = report_content(result, run)
    if file:
        write_content(content, file)
    if json:
        print(as_json(content))
        return
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, width=LOG_WIDTH)
    for table in tables:
        console.print(table)
