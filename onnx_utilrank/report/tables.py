"""Results as tables for a terminal. Names come from the model, so they are never markup."""

from collections.abc import Iterable, Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from onnx_utilrank.errors import printable
from onnx_utilrank.quality import Quality
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.ranking.utilization import UtilizationReport
from onnx_utilrank.report.table import add_row, empty_table, sentences
from onnx_utilrank.results import CompressResult, SweepResult
from onnx_utilrank.stages import QuantizationReport
from onnx_utilrank.validation.compare import OutputComparison
from onnx_utilrank.validation.report import ValidationReport

__all__ = [
    "VERDICTS",
    "add_row",
    "comparison",
    "compression_tables",
    "empty_table",
    "sentences",
    "stages_table",
    "sweep_tables",
    "utilization_tables",
    "validation_tables",
]

# Nodes that ran elsewhere than asked for, on a terminal.
NODES_SHOWN = 20

VERDICTS = {
    "planned": "Planned only: no model was made.",
    "unchanged": "Unchanged: nothing was factored.",
    "larger": "LARGER, as was forced: no gain.",
    "smaller": "Smaller; in time no clear difference: see the latency ratio and its spread.",
    "faster": "Smaller and faster: see the latency ratio and its spread.",
    "slower": "SMALLER BUT SLOWER on this machine: no gain in time.",
}


def utilization_tables(report: UtilizationReport) -> Iterator[RenderableType]:
    """One row a weight, the mean, and what was left out."""
    table = empty_table(
        "weight", "op", "d_in", "d_out", "k_S", "k_T", "rank", "utilization", "rows"
    )
    for layer in report.layers:
        figures = (layer.d, layer.m, layer.input_rank, layer.output_rank, layer.rank)
        add_row(
            table,
            layer.site,
            layer.op_type,
            *figures,
            f"{100 * layer.utilization:.1f} %",
            f"{layer.rows}{'' if layer.trusted else ' (few)'}",
        )
    yield table
    mean = report.mean_layer_utilization
    shown = "none measured" if mean is None else f"{100 * mean:.1f} %"
    yield Text(
        f"Mean layer utilization (MLU) at energy {report.energy:g}: {shown} "
        f"({len(report.layers)} weights, {report.samples} samples)"
    )
    reasons: dict[str, int] = {}
    for node in report.skipped:
        reasons[node.reason] = reasons.get(node.reason, 0) + 1
    yield from sentences(report.notes, reasons, report.engine)


def compression_tables(result: CompressResult, output: str | None) -> Iterator[RenderableType]:
    """The plan of a dry run, or the comparison of both models."""
    plan = result.plan
    if result.validation is None:
        yield _plan_table(plan)
    else:
        yield from comparison(result.validation)
    both = sum(e.site in plan.shrinking for e in plan.factored)
    of_both = f" ({both} of them both)" if both else ""
    shrunk = (
        f", {len(plan.shrinking)} shrunk with heads or hidden units{of_both},"
        if plan.shrunk
        else ""
    )
    yield Text(
        f"{len(plan.factored)} of {len(plan.entries)} weights factored{shrunk} by {plan.method}; "
        f"parameters kept: {100 * plan.param_ratio:.2f} %"
    )
    yield from _recovered(result)
    if result.quantized is not None:
        yield stages_table(result.quantized)
    yield from _quality(result)
    yield from sentences(result.notes, result.left_alone, result.engine)
    if result.quantized is not None:
        for reason, count in result.quantized.left_alone.items():
            yield Text(printable(f"Left by {result.quantized.scheme}: {count} x {reason}"))
    written = f" Written to {output}." if output and result.store is not None else ""
    yield Text(f"{VERDICTS[result.verdict]}{written}")


def sweep_tables(
    result: SweepResult, picked: float | None, output: str | None
) -> Iterator[RenderableType]:
    """One row a point."""
    table = empty_table(
        *("asked", "kept", "file bytes", "FLOPs", "latency ratio", "predicted"),
        *("divergence", "agreement", "SNR", "drop"),
    )
    for point in result.points:
        before, after = point.validation.reference, point.validation.candidate
        time = point.validation.providers[0].latency
        expected = point.plan.predicted_divergence
        flops = "-" if not before.flops or after.flops is None else after.flops / before.flops
        add_row(
            table,
            f"{point.ratio:g}",
            f"{100 * point.plan.param_ratio:.2f} %",
            f"{after.file_bytes / max(before.file_bytes, 1):.3f}",
            flops if isinstance(flops, str) else f"{flops:.3f}",
            f"{time.ratio:.3f} ({time.ratio_low:.3f} to {time.ratio_high:.3f})",
            "-" if expected is None else f"{expected:.2e}",
            *_quality_cells(point.quality),
        )
    yield table
    yield from sentences(result.notes, {}, result.engine)
    if output:
        yield Text(f"The point at {picked:g} is written to {output}.")


def validation_tables(report: ValidationReport) -> Iterator[RenderableType]:
    """The comparison of both models and whether it passed."""
    yield from comparison(report)
    yield Text("Passed." if report.passed else "FAILED.")


def stages_table(report: QuantizationReport) -> Table:
    """The original, and each model on the way beside it."""
    table = empty_table(
        *("model", "file bytes", "of original", "latency ratio"),
        *("divergence", "agreement", "SNR", "drop"),
    )
    add_row(
        *(table, "original", f"{report.stages[0].validation.reference.file_bytes:,}", "1.000", "1"),
        *("-",) * 4,
    )
    for stage in report.stages:
        before, after = stage.validation.reference, stage.validation.candidate
        time, quality = stage.validation.providers[0].latency, stage.quality
        add_row(
            *(table, stage.name, f"{after.file_bytes:,}"),
            f"{after.file_bytes / max(before.file_bytes, 1):.3f}",
            f"{time.ratio:.3f} ({time.ratio_low:.3f} to {time.ratio_high:.3f})",
            *_quality_cells(quality),
        )
    return table


def _quality_cells(quality: Quality) -> tuple[str, ...]:
    """Divergence, agreement, SNR, and the drop of the user's metric."""
    found = quality.divergence
    return (
        "-" if found is None else f"{found.mean:.2e} ± {found.standard_error:.1e}",
        "-" if found is None or found.agreement is None else f"{100 * found.agreement:.2f} %",
        "-" if found is None or found.snr_db is None else f"{found.snr_db:.1f} dB",
        "-" if quality.drop is None else f"{quality.drop:.3g}",
    )


def _recovered(result: CompressResult) -> Iterator[Text]:
    """What fine-tuning did, where it was asked for."""
    if result.recovered is None:
        return
    found = result.recovered
    done = "kept" if found.kept else "NOT kept"
    yield Text(
        f"Fine-tuned ({found.method}): divergence {found.before.mean:.3g} before, "
        f"{found.after.mean:.3g} after; the new weights are {done}."
    )


def _quality(result: CompressResult) -> Iterator[Text]:
    """Predicted beside measured, and the figure that was asked for with its uncertainty."""
    quality = result.quality
    if quality is None:
        return
    found, predicted = quality.divergence, result.plan.predicted_divergence
    if found is not None:
        unknown = predicted is None or result.quantized is not None  # of factors, not of bits
        expected = "" if unknown else f" (predicted {predicted:.3g})"
        yield Text(
            f"Divergence on {found.samples} samples held back: {found.mean:.3g} ± "
            f"{found.standard_error:.2g}{expected}"
        )
    if quality.drop is not None:
        error = "" if quality.drop_error is None else f" ± {quality.drop_error:.2g}"
        yield Text(
            f"Metric on the same samples: {quality.metric:.4g}, drop {quality.drop:.3g}{error}"
        )


def _plan_table(plan: RankPlan) -> Table:
    table = empty_table(
        "weight", "op", "d_in", "d_out", "rank", "before", "after", "error", "reason"
    )
    for e in plan.entries:
        error = "?" if e.predicted_error is None else f"{e.predicted_error:.2e}"
        rank = "dense" if e.rank is None else e.rank
        if e.site in plan.shrinking:
            rank = "shrunk" if e.rank is None else f"shrunk, {e.rank}"
        figures = (e.d, e.m, rank, e.parameters_before, e.parameters_after)
        add_row(table, e.site, e.op_type, *figures, error, e.reason)
    for h in plan.shrunk:
        error = f"{h.predicted_error:.2e}"
        add_row(table, h.hidden, "hidden", h.size, h.size, str(h.kept), "-", "-", error, h.reason)
    return table


def comparison(report: ValidationReport) -> Iterator[RenderableType]:
    """Size, time and outputs of two models."""
    before, after = report.reference, report.candidate
    table = empty_table("", "reference", "candidate", "ratio")
    for name, old, new in (
        ("parameters", before.parameters, after.parameters),
        ("file bytes", before.file_bytes, after.file_bytes),
        ("FLOPs a sample (products, convolutions)", before.flops, after.flops),
    ):
        if old is not None and new is not None:
            add_row(table, name, f"{old:,}", f"{new:,}", f"{new / old:.3f}" if old else "-")
    for result in report.providers:
        time = result.latency
        add_row(
            table,
            f"ms a run, {result.provider}",
            f"{time.reference_ms:.3f}",
            f"{time.candidate_ms:.3f}",
            f"{time.ratio:.3f} ({time.ratio_low:.3f} to {time.ratio_high:.3f})",
        )
    yield table
    yield _outputs((r.provider, r.outputs) for r in report.providers)
    yield Text(f"Compared on {report.samples} samples.")
    for result in report.providers:
        if (a := result.accuracy) is not None:
            spread = "" if a.drop_error is None else f" ± {a.drop_error:.2g}"
            yield Text(
                f"Accuracy of {printable(repr(a.output))} on {result.provider}: "
                f"{a.reference:.2f} % before, {a.candidate:.2f} % after, on {a.count} labels; "
                f"drop {a.drop:.3g}{spread}."
            )
    yield from _providers(report)
    yield from sentences(report.notes, {})


def _outputs(compared: Iterable[tuple[str, Sequence[OutputComparison]]]) -> Table:
    """One row for each output on each provider."""
    table = empty_table("output", "provider", "relative error", "SNR", "agreement")
    for provider, outputs in compared:
        for o in outputs:
            error = "-" if o.relative_error is None else f"{o.relative_error:.3e}"
            snr = "-" if o.snr_db is None else f"{o.snr_db:.1f} dB"
            agreement = "-"
            if o.agreement is not None:
                agreement = f"{100 * o.agreement:.2f} % of {o.decisions}"
            add_row(table, o.name, provider, error, snr, agreement)
    return table


def _providers(report: ValidationReport) -> Iterator[RenderableType]:
    """What providers did: which nodes they ran, and what they add to the error."""
    for result in report.providers:
        ran = (
            f"{p.nodes - len(p.fallen)} of {p.nodes} nodes of the {role}"
            for role, p in result.placements
        )
        yield Text(f"{result.provider} ran {' and '.join(ran)}.")
    first, *others = report.providers
    if others:
        yield Text(f"The reference on other providers, against itself on {first.provider}:")
        yield _outputs((r.provider, r.against_first) for r in others)
    fallen = [
        (result.provider, role, node)
        for result in report.providers
        for role, placement in result.placements
        for node in placement.fallen
    ]
    if not fallen:
        return
    table = empty_table("node", "op", "model", "asked for", "ran on")
    for provider, role, node in fallen[:NODES_SHOWN]:
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        add_row(table, node.name or "(no name)", op, role, provider, node.provider)
    yield table
    if len(fallen) > NODES_SHOWN:
        yield Text(f"... and {len(fallen) - NODES_SHOWN} more nodes: the report (--report) has all")
