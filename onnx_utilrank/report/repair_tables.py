"""What a repair did, as tables for a terminal."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from onnx_utilrank.quality import Quality
from onnx_utilrank.repairing.result import RepairResult
from onnx_utilrank.report.tables import add_row, empty_table, sentences

__all__ = ["repair_tables"]

VERDICTS = {
    "unchanged": "UNCHANGED: the output is the quantized model.",
    "slower": "Repaired, but SLOWER than the original on this machine.",
    "repaired": "Repaired; not clearly slower than the original.",
}


def repair_tables(result: RepairResult, output: str) -> Iterator[RenderableType]:
    """The branches, and the original, the quantized and the repaired model side by side."""
    table = empty_table("weight", "op", "d_in", "d_out", "error", "rank", "predicted", "left")
    for layer in result.layers:
        rank = {None: "-", 0: "mean"}.get(layer.rank, layer.rank)
        figures = (layer.d, layer.m, f"{layer.distance:.4f}", rank)
        losses = (f"{layer.predicted_before:.2e}", f"{layer.predicted_after:.2e}")
        add_row(table, layer.site, layer.op_type, *figures, *losses)
    yield table
    reference, quantized = result.quantized.reference, result.quantized.candidate
    models = empty_table("model", "file bytes", "time", "divergence", "agreement", "SNR", "drop")
    add_row(models, "original", f"{reference.file_bytes:,}", "1", *["-"] * 4)
    shown = [("quantized", quantized, result.quantized, result.before)]
    if result.kept:
        shown.append(("repaired", result.validation.candidate, result.validation, result.after))
    for name, model, report, quality in shown:
        time = report.providers[0].latency
        ratio = f"{time.ratio:.3f} ({time.ratio_low:.3f} to {time.ratio_high:.3f})"
        add_row(models, name, f"{model.file_bytes:,}", ratio, *_cells(quality))
    yield models
    yield Text(
        f"Measured on {result.validation.samples} samples held back; time is the ratio to the "
        "original, with its quartiles."
    )
    if result.recovered is not None and result.latency is not None:
        yield Text(
            f"Of the divergence that quantization brought {100 * result.recovered:.1f} % is gone, "
            f"for {100 * result.extra_bytes:.2f} % more bytes and {result.latency.ratio:.3f} "
            f"({result.latency.ratio_low:.3f} to {result.latency.ratio_high:.3f}) times the "
            "quantized model's time."
        )
    yield from sentences(result.notes, result.left_alone, result.engine)
    yield Text(f"{VERDICTS[result.verdict]} Written to {output}.")


def _cells(quality: Quality) -> Iterator[str]:
    found = quality.divergence
    yield "-" if found is None else f"{found.mean:.3g} ± {found.standard_error:.2g}"
    agreement = None if found is None else found.agreement
    yield "-" if agreement is None else f"{100 * agreement:.2f} %"
    snr = None if found is None else found.snr_db
    yield "-" if snr is None else f"{snr:.1f} dB"
    yield "-" if quality.drop is None else f"{quality.drop:.3g}"
