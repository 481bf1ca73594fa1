"""A result as a file: JSON, or one HTML page."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, ClassVar, Protocol

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.atomic import atomic_write
from onnx_utilrank.report.run import RunRecord

__all__ = ["Reported", "as_json", "report_content", "write_content", "write_report"]

PAGES = (".html", ".htm")


class Reported(Protocol):
    """What every verb gives."""

    verb: ClassVar[str]
    """The definition of `schema.json` that it has the form of."""

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        ...


def report_content(result: Reported, run: RunRecord) -> dict[str, Any]:
    """All that a report says, as JSON types."""
    return {"run": dataclasses.asdict(run), **result.as_dict()}


def as_json(content: dict[str, Any]) -> str:
    """The content as JSON text."""
    return json.dumps(content, indent=1, allow_nan=False)


def write_content(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a page where the name of the file ends in .html, else JSON.

    Raises:
        ModelError: The file cannot be written.
    """
    if Path(path).suffix.lower() in PAGES:
        # It brings what draws, which takes half a second.
        from onnx_utilrank.report.html.render import render

        text = render(content)
    else:
        text = as_json(content) + "\n"
    try:
        with atomic_write(Path(path)) as f:
            f.write(text.encode())
    except OSError as e:
        raise ModelError(f"{path}: cannot be written ({e.strerror or e})") from e


def write_report(report: Reported | str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write a report: one HTML page where the name of the file ends in .html, else JSON.

    Args:
        report: What a verb gave, or a report that was written as JSON.
        path: The file.

    Raises:
        ModelError: The report cannot be read or is none, or the file cannot be written.
    """
    if isinstance(report, str | os.PathLike):
        # It brings what checks, which the command line does not need elsewhere.
        from onnx_utilrank.report.read import read_content

        content = read_content(report)
    else:
        content = report_content(report, RunRecord.of(report.verb))
    write_content(content, path)
