"""A benchmark as a table for a terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import RenderableType

from onnx_utilrank.benchmarking.report import BenchmarkCase, BenchmarkReport
from onnx_utilrank.report.tables import add_row, empty_table, sentences
from onnx_utilrank.validation.bench import LatencyComparison, Spread

__all__ = ["benchmark_tables"]

COLUMNS = ("model", "provider", "size", "ms a run", "ratio", "FLOP ratio", "in time", "peak MiB")


def benchmark_tables(report: BenchmarkReport) -> Iterator[RenderableType]:
    """One row for each model in each case; spreads are quartiles."""
    on_device = any(m.device is not None for case in report.cases for m in case.memory)
    table = empty_table(*COLUMNS, *(["device MiB"] if on_device else []))
    for case in report.cases:
        for k, model in enumerate(_short(report.models)):
            memory = case.memory[k]
            add_row(
                table,
                model,
                case.provider.removesuffix("ExecutionProvider"),
                _size(case),
                *_figures(case, k),
                _mebibytes(memory.resident),
                *([_mebibytes(memory.device)] if on_device else []),
            )
    yield table
    yield from sentences(report.notes, {})


def _short(models: Sequence[str]) -> Sequence[str]:
    """File names alone, where they tell the models apart."""
    names = [Path(model).name for model in models]
    return names if len(set(names)) == len(names) else models


def _size(case: BenchmarkCase) -> str:
    batch = [] if case.batch is None else [f"batch {case.batch}"]
    return ", ".join((*batch, *(f"{name} {length}" for name, length in case.dims))) or "as given"


def _figures(case: BenchmarkCase, k: int) -> tuple[str, str, str, str]:
    """Time, its ratio to the reference, the ratio of operations, and the verdict."""
    time = case.latencies[max(k - 1, 0)]
    if not k:
        return (_time(time.reference_ms, time.reference_spread), "", "", "reference")
    flops = case.flop_ratios[k - 1]
    return (
        _time(time.candidate_ms, time.candidate_spread),
        f"{time.ratio:.3f} ({time.ratio_low:.3f} to {time.ratio_high:.3f})",
        "-" if flops is None else f"{flops:.3f}",
        _verdict(time),
    )


def _verdict(time: LatencyComparison) -> str:
    return "faster" if time.faster else "SLOWER" if time.slower else "no clear difference"


def _time(median: float, spread: Spread | None) -> str:
    quartiles = "" if spread is None else f" ({spread.low_ms:.3f} to {spread.high_ms:.3f})"
    return f"{median:.3f}{quartiles}"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"
