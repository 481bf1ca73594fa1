"""Results to stdout and to a file."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console, RenderableType

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.atomic import atomic_write

__all__ = ["emit"]

# Columns where stdout is no terminal, so that names are not cut in a log.
LOG_WIDTH = 140


def emit(
    results: Mapping[str, object],
    tables: Iterable[RenderableType],
    *,
    as_json: bool,
    file: str | None,
) -> None:
    """Print results as tables or as JSON, and write them to a file if one is named.

    Raises:
        ModelError: The file cannot be written.
    """
    text = json.dumps(results, indent=1, allow_nan=False)
    if file:
        try:
            with atomic_write(Path(file)) as f:
                f.write(text.encode() + b"\n")
        except OSError as e:
            raise ModelError(f"{file}: cannot be written ({e.strerror or e})") from e
    if as_json:
        print(text)
        return
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, width=LOG_WIDTH)
    for table in tables:
        console.print(table)
