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

# Columns of a line of the command, which goes on with a backslash.
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
    lines: list[str] = []
    for word in command:
        quoted = shlex.quote(word)
        if not lines or (word.startswith("-") and len(lines[-1]) + len(quoted) > COMMAND_WIDTH):
            lines.append(quoted if not lines else f"    {quoted}")
        else:
            lines[-1] += f" {quoted}"
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


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
