"""How training went."""

from onnx_utilrank.report.html import charts
from onnx_utilrank.report.html.parts import (
    Cell,
    Chart,
    Charts,
    Column,
    Content,
    Part,
    Section,
    Sentences,
    TableView,
    duration,
    number,
)

__all__ = ["training"]


def training(content: Content) -> Section | None:
    """Loss and divergence over the steps, and the ranks that came of it."""
    found = content if "history" in content else content.get("recovered")
    if not isinstance(found, dict):  # there was none, or it is the share that a repair recovered
        return None
    labelled = found.get("accuracy") is not None
    apart = "loss on samples apart" if labelled else "divergence"
    history = found["history"]
    lines = [
        f"By {found['method']}, on {found['samples']:,} samples for {duration(found['seconds'])}."
    ]
    if "kept" in found:
        before, after = found["before"], found["after"]
        lines.append(
            f"Divergence on {before['samples']} samples held back: {number(before['mean'])} before"
            f", {number(after['mean'])} after. The new weights are "
            f"{'kept' if found['kept'] else 'NOT kept'}."
        )
        if labelled:
            lines.append(
                f"Accuracy on them: {number(found['accuracy_before'])} % before, "
                f"{number(found['accuracy'])} % after; outputs and labels together decide."
            )
    if found["dropped"]:
        lines.append(f"{found['dropped']} steps were not taken: their gradients were not finite.")
    parts: list[Part] = [Sentences(lines)]
    curves = [
        (name, [(e["step"], e[key]) for e in history if e[key] is not None])
        for name, key in (("loss", "loss"), (apart, "divergence"))
    ]
    if any(points for _, points in curves):
        parts.append(Charts([Chart(title="Course", drawing=charts.course(curves))]))
    if history:
        rows = [
            [Cell(number(e[key]), e[key]) for key in ("step", "loss", "divergence", "trained")]
            for e in history
        ]
        columns = [*map(Column, ("step", "loss", apart, "numbers trained"))]
        parts.append(TableView(title="Course", columns=columns, rows=rows, folded=True))
    if found.get("ranks"):
        rows = [
            [Cell(name), *(Cell(number(k), k) for k in (d, m, rank))]
            for name, (rank, m, d) in found["ranks"].items()
        ]
        columns = [Column("weight", "name"), *map(Column, ("d_in", "d_out", "rank"))]
        parts.append(TableView(title="Ranks", columns=columns, rows=rows))
    return Section(key="training", title="Training", parts=parts)
