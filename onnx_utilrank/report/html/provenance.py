"""What the figures came from: command, files with their hashes, versions, machine."""

import shlex
from collections.abc import Sequence

from onnx_utilrank.report.html.found import plans
from onnx_utilrank.report.html.parts import (
    Cell,
    Code,
    Column,
    Content,
    Part,
    Section,
    Sentences,
    TableView,
    duration,
    quantity,
)

__all__ = ["provenance"]

# Columns of a line of the command, where an option with its values is not longer.
COMMAND_WIDTH = 88


def provenance(content: Content) -> Section:
    """How to have the same again."""
    run = content["run"]
    parts: list[Part] = []
    if run["command"] is None:
        parts.append(Sentences([f"Called from Python: onnx_utilrank.{run['verb']}."]))
    else:
        parts.append(Code(title="Command", lines=_lines(run["command"]), folded=False))
    took = f", after {duration(run['seconds'])}" if run["seconds"] is not None else ""
    parts.append(
        Sentences(
            [
                f"Finished {run['finished']}{took}, on {run['processor']} ({run['system']}, "
                f"{run['cores']} cores)."
            ]
        )
    )
    if run["files"]:
        parts.append(_files(content))
    parts.append(
        TableView(
            title="Versions",
            columns=[Column("package", "short"), Column("version", "short")],
            rows=[[Cell(name), Cell(version)] for name, version in run["versions"].items()],
            folded=True,
        )
    )
    return Section(key="provenance", title="Where this came from", parts=parts)


def _lines(command: Sequence[str]) -> list[str]:
    """The command as one would type it, broken before an option where it is long."""
    options: list[str] = []
    for word in command:
        if not options or word.startswith("-"):
            options.append(shlex.quote(word))
        else:
            options[-1] += f" {shlex.quote(word)}"
    lines = options[:1]
    for option in options[1:]:
        if len(f"{lines[-1]} {option} \\") > COMMAND_WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {option}")
        else:
            lines[-1] += f" {option}"
    return lines


def _files(content: Content) -> TableView:
    rows = [
        [
            *(Cell(f["role"]), Cell(f["path"])),
            Cell(quantity(f["bytes"]), f["bytes"]),
            Cell(f["sha256"] or "–"),
        ]
        for f in content["run"]["files"]
    ]
    model = content.get("model_sha256") or next((p["model_sha256"] for _, p in plans(content)), "")
    if model:
        whole = "model with its weights, as plans name it"
        rows.append([Cell(whole), Cell(""), Cell("–"), Cell(model)])
    columns = [
        *(Column("file", "short"), Column("path", "name"), Column("size")),
        Column("SHA-256", "name"),
    ]
    return TableView(title="Files", columns=columns, rows=rows)
