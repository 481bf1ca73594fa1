"""An inspection as tables for a terminal."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from onnx_utilrank.errors import printable
from onnx_utilrank.inspection.report import InspectedHidden, InspectedSite, InspectionReport
from onnx_utilrank.model.store import TensorSpec
from onnx_utilrank.report.table import add_row, empty_table

__all__ = ["inspection_tables"]


def inspection_tables(report: InspectionReport) -> Iterator[RenderableType]:
    """What is in the file, what could be factored, what is left alone, and what data it needs."""
    yield from map(_line, _facts(report))
    yield _specs(report)
    yield from _operators(report)
    yield from _sites(report)
    yield from _left_alone(report)
    yield from map(_line, _sentences(report))


def _line(text: str) -> Text:
    return Text(printable(text))


def _facts(report: InspectionReport) -> Iterator[str]:
    yield report.model
    opsets = ", ".join(f"{domain} {version}" for domain, version in report.opsets.items())
    made = f" by {report.producer}" if report.producer else ""
    yield f"IR version {report.ir_version}, opset {opsets}{made}"
    outside = ""
    if report.external_files:
        names = ", ".join(report.external_files[:3])
        more = len(report.external_files) - 3
        names += f" and {more} files more" if more > 0 else ""
        outside = f", of which {report.external_bytes:,} in {names}"
    functions = f", {report.functions} functions" if report.functions else ""
    yield (
        f"{report.file_bytes:,} bytes{outside}; {report.parameters:,} parameters; "
        f"{report.nodes} nodes{functions}"
    )


def _specs(report: InspectionReport) -> RenderableType:
    table = empty_table("", "name", "type", "shape")
    for what, specs in (("input", report.inputs), ("output", report.outputs)):
        for spec in specs:
            kind = "not a tensor" if spec.dtype is None else spec.dtype.name
            add_row(table, what, spec.name, kind, _shape(spec))
    return table


def _shape(spec: TensorSpec) -> str:
    if spec.shape is None:
        return "any"
    return f"[{', '.join('?' if dim is None else str(dim) for dim in spec.shape)}]"


def _operators(report: InspectionReport) -> Iterator[RenderableType]:
    table = empty_table("operator", "nodes", "parameters", "share", "bytes")
    holding = [o for o in report.operators if o.parameters]
    for o in holding:
        share = f"{100 * o.parameters / report.parameters:.1f} %"
        add_row(table, o.op_type, o.nodes or "", f"{o.parameters:,}", share, f"{o.bytes:,}")
    if holding:
        yield table
    others = [o for o in report.operators if not o.parameters]
    if others:
        names = ", ".join(f"{o.op_type} ({o.nodes})" for o in others)
        yield _line(f"Without parameters: {names}")


def _sites(report: InspectionReport) -> Iterator[RenderableType]:
    if not report.sites:
        yield Text("Nothing can be factored.")
        return
    # Terminals are narrow, and most models have nothing to remark on.
    remarks = ["remark"] if any(map(_remark, report.sites)) else []
    columns = ("weight", "op", "d_in", "d_out", "share", "break-even", "moves", *remarks)
    table = empty_table(*columns)
    for site in report.sites:
        moves = " ".join(site.moves) or "none is smaller"
        share = f"{100 * site.share:.2f} %"
        figures = (site.d, site.m, share, site.break_even_rank)
        remark = [_remark(site)] if remarks else []
        add_row(table, site.site, site.op_type, *figures, moves, *remark)
    yield table
    whole = 100 * report.factorable / report.parameters
    yield Text(
        f"{len(report.sites)} weights can be factored: {report.factorable:,} parameters, "
        f"{whole:.1f} % of all. Two factors are smaller at ranks up to break-even."
    )
    alike: dict[tuple[str, int, int], list[InspectedHidden]] = {}
    for hidden in report.hidden or ():
        alike.setdefault((hidden.kind, hidden.size, hidden.groups), []).append(hidden)
    for (kind, size, groups), found in alike.items():
        what = "hidden units" if kind == "units" else "dimensions of heads"
        each = f" in each of {groups} groups" if groups > 1 else ""
        places = f"in {len(found)} places, the first of them" if len(found) > 1 else "of"
        yield _line(f"Could shrink: {size} {what}{each}, {places} {', '.join(found[0].sites)}")


def _remark(site: InspectedSite) -> str:
    if site.tied:
        return f"tied to {site.tied}"
    if not site.freed:
        return "something else reads it too: it would stay"
    return f"{len(site.nodes)} nodes share it" if len(site.nodes) > 1 else ""


def _left_alone(report: InspectionReport) -> Iterator[RenderableType]:
    if not report.left_alone:
        return
    table = empty_table("left alone", "nodes", "reason")
    for (op_type, reason), count in report.left_alone.items():
        add_row(table, op_type, count, reason)
    yield table


def _sentences(report: InspectionReport) -> Iterator[str]:
    needed = ", ".join(map(str, report.inputs))
    yield f"Data that it needs: {needed}." if needed else "It needs no data: it has no input."
    if report.batch is not None:
        yield f"The batch is fixed at {report.batch}."
    if report.load_fault:
        yield f"ONNX Runtime does not load it: {report.load_fault}"
    if report.quantized_nodes:
        yield (
            f"{report.quantized_nodes} nodes quantize or hold quantized weights: compress a model "
            "first and quantize it then; repair mends a quantized one."
        )
    if report.gradients:
        reasons = "; ".join(report.gradients)
        yield f"Gradients cannot be had, so that factors are one-sided: {reasons}."
    else:
        yield "Gradients can be had: torch runs all of its operators."
    yield from (f"Note: {note}" for note in report.notes)
