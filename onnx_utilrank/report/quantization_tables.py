"""The stages of quantization as tables for a terminal."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from onnx_utilrank.plain_quantization import QuantizeResult
from onnx_utilrank.report.tables import (
    VERDICTS,
    comparison,
    sentences,
    stages_table,
)

__all__ = ["quantization_tables"]


def quantization_tables(result: QuantizeResult, output: str) -> Iterator[RenderableType]:
    """The comparison of both models, and what was left in float."""
    report = result.report
    yield from comparison(result.stage.validation)
    yield stages_table(report)
    yield Text(f"{len(report.weights)} weights stored by {report.scheme}.")
    yield from sentences(result.notes, report.left_alone)
    yield Text(f"{VERDICTS[result.verdict]} Written to {output}.")
