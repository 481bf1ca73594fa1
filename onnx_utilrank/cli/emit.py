"""Results to stdout and to a file."""

import argparse
import time
from collections.abc import Iterable

from rich.console import Console, RenderableType

from onnx_utilrank.report.run import RunRecord
from onnx_utilrank.report.write import Reported, as_json, report_content, write_content

__all__ = ["emit"]

# Columns where stdout is no terminal, so that names are not cut in a log.
LOG_WIDTH = 140
# Arguments that name files which a verb reads or writes, by what they are called.
FILES = ("model", "reference", "candidate", "candidates", "quantized", "plan", "data", "output")


def emit(args: argparse.Namespace, result: Reported, tables: Iterable[RenderableType]) -> None:
    """Print a result as tables or as JSON, and write it to a file if one is named.

    Args:
        args: The command: `json`, whether JSON is printed; `report`, a file to write to, which is
            a page where its name ends in .html, else JSON; and what it was called with.
        result: The result.
        tables: The same for a terminal.

    Raises:
        ModelError: The file cannot be written.
    """
    if args.json or args.report:
        # Only here, for it hashes every file of the command.
        content = report_content(result, _run_record(args))
        if args.report:
            write_content(content, args.report)
        if args.json:
            print(as_json(content))
            return
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, width=LOG_WIDTH)
    for table in tables:
        console.print(table)


def _run_record(args: argparse.Namespace) -> RunRecord:
    named = ((role, getattr(args, role, None)) for role in FILES)
    files = [
        (role.removesuffix("s"), path)
        for role, given in named
        if given
        for path in (given if isinstance(given, list) else [given])
    ]
    return RunRecord.of(
        args.verb,
        command=("onnx-utilrank", *args.words),
        seconds=round(time.monotonic() - args.began, 1),
        files=files,
    )
