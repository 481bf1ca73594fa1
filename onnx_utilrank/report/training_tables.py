"""How training went, as tables for a terminal."""

import math
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from onnx_utilrank.report.tables import add_row, comparison, empty_table, sentences
from onnx_utilrank.results import FinetuneResult, TrainResult
from onnx_utilrank.training.history import Look

__all__ = ["finetune_tables", "train_tables"]


def finetune_tables(result: FinetuneResult, output: str) -> Iterator[RenderableType]:
    """The course of the training, and the comparison of what came out with the original."""
    yield from _course(result.history, "divergence" if result.accuracy is None else "loss apart")
    yield from comparison(result.validation)
    before, after = result.before, result.after
    yield Text(
        f"Divergence on {before.samples} samples held back: {before.mean:.3g} ± "
        f"{before.standard_error:.2g} before, {after.mean:.3g} ± {after.standard_error:.2g} after "
        f"training on {result.samples} samples for {result.seconds:.0f} s"
    )
    if result.accuracy is not None:
        yield Text(
            f"Accuracy on them: {result.accuracy_before:.2f} % before, {result.accuracy:.2f} % "
            "after; outputs and labels together decide"
        )
    yield from sentences((*result.notes, *_dropped(result.dropped)), {})
    done = "The new weights are kept." if result.kept else "The candidate is UNCHANGED."
    yield Text(f"{done} Written to {output}.")


def train_tables(result: TrainResult, output: str) -> Iterator[RenderableType]:
    """The course of the training, the ranks, and what came out."""
    yield from _course(result.history, "loss apart")
    if result.ranks:
        table = empty_table("weight", "d_in", "d_out", "rank")
        for name, (rank, m, d) in result.ranks.items():
            add_row(table, name, d, m, rank)
        yield table
    yield Text(
        f"Accuracy on {result.held} samples held back: {result.accuracy_before:.2f} % before, "
        f"{result.accuracy:.2f} % after training on {result.samples} samples for "
        f"{result.seconds:.0f} s"
    )
    yield Text(
        f"Parameters: {result.parameters_before:,} before, {result.parameters:,} after "
        f"({100 * result.parameters / result.parameters_before:.2f} %); trained at the end: "
        f"{result.trained:,} of {result.trainable:,} numbers "
        f"({100 * result.trained / result.trainable:.2f} %)"
    )
    yield from sentences((*result.notes, *_dropped(result.dropped)), {})
    yield Text(f"Written to {output}.")


def _course(history: Sequence[Look], judged: str) -> Iterator[RenderableType]:
    if not history:
        return
    ranks = any(look.rank for look in history)
    table = empty_table("step", "loss", judged, "trained", *["ranks"][:ranks])
    for look in history:
        loss = "-" if math.isnan(look.loss) else f"{look.loss:.4g}"
        rank = [f"{look.rank:,}"][:ranks]
        add_row(table, look.step, loss, f"{look.divergence:.4g}", f"{look.trained:,}", *rank)
    yield table


def _dropped(steps: int) -> tuple[str, ...]:
    if not steps:
        return ()
    return (f"{steps} steps were not taken: their gradients were not finite.",)
