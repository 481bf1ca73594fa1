"""How tables of weights begin."""

from onnx_utilrank.report.html.parts import Cell, Column, Content

__all__ = ["NAME", "named", "share"]

NAME = (Column("layer"), Column("weight", "name"), Column("op", "short"))


def named(k: int, entry: Content) -> tuple[Cell, ...]:
    """Number, weight with its nodes, and operator."""
    nodes = ", ".join(entry.get("nodes", ()))
    return Cell(str(k), k), Cell(entry["site"], more=nodes), Cell(entry["op_type"])


def share(value: float) -> float:
    """A length of a bar."""
    return min(max(value, 0.0), 1.0)
