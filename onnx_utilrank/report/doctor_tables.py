"""What is wrong with an installation, for a terminal."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from onnx_utilrank.errors import printable
from onnx_utilrank.installation.report import DoctorReport
from onnx_utilrank.report.table import add_row, empty_table

__all__ = ["doctor_tables"]


def doctor_tables(report: DoctorReport) -> Iterator[RenderableType]:
    """The machine, packages, providers, and at the end what is wrong."""
    yield from map(Text, _machine(report))
    table = empty_table("package", "version", "needed", "")
    for state in report.packages:
        add_row(table, state.name, state.version or "-", state.wanted, _word(state.fault))
    yield table
    for extra in report.extras:
        lacks = f"lacks {', '.join(extra.missing)}" if extra.missing else "installed"
        yield Text(f"Optional [{extra.name}]: {lacks}")
    table = empty_table("provider", "", "reason")
    for trial in report.providers:
        works = "does not work" if trial.fault else "works"
        add_row(table, trial.provider, works, trial.fault or "ran a model of two nodes")
    yield table
    if report.not_built:
        yield Text(f"Not in this ONNX Runtime: {', '.join(report.not_built)}")
    for fault in report.faults:
        yield Text(printable(f"WRONG: {fault}"))
    if not report.faults:
        yield Text("Nothing is wrong.")


def _machine(report: DoctorReport) -> Iterator[str]:
    machine = report.machine
    yield f"onnx-utilrank {report.version} on {machine.system}"
    yield printable(f"{machine.processor}, {machine.usable_cores} of {machine.cores} cores")
    if machine.features is not None:
        has = " ".join(name for name, there in machine.features.items() if there) or "none"
        lacks = " ".join(name for name, there in machine.features.items() if not there) or "none"
        yield f"Instructions: {has}; not there: {lacks}"
    if machine.memory is not None:
        free = "" if machine.free_memory is None else f", {_gib(machine.free_memory)} of it free"
        yield f"Memory: {_gib(machine.memory)}{free}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _word(fault: str | None) -> str:
    return "WRONG" if fault else "ok"
