"""What a method found out about every site of a model, and what a reader has to know of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_utilrank.calibration.data import Dataset
from onnx_utilrank.ranking.method import Measured, Method
from onnx_utilrank.sensitivity.effort import Effort
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import RowView, Skip
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.statistics.moments import ROWS_PER_FEATURE
from onnx_utilrank.torch_graph.footprint import Footprint
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["Gradients", "Measurement", "losses_note", "rows_notes", "variations_note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """What gradients are taken with.

    Attributes:
        graph: The model in torch.
        losses: What counts at its outputs.
        effort: How much of the data is used.
        footprint: Bytes that one sample takes.
        data: What they are taken on: the samples, with their variations.
        samples: Which of them.
    """

    graph: TorchGraph
    losses: tuple[OutputLoss, ...]
    effort: Effort
    footprint: Footprint
    data: Dataset
    samples: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Every site, decomposed.

    Attributes:
        method: The method that did it.
        sites: The sites, in graph order.
        hidden: Features between them that may shrink.
        skips: Sites that nothing could be measured for.
        notes: Sentences on what the statistics rest on.
        gradients: Where the method uses them.
    """

    method: Method
    sites: list[Measured]
    hidden: tuple[Hidden, ...] = ()
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    gradients: Gradients | None = None

    @property
    def losses(self) -> tuple[OutputLoss, ...]:
        """What counts at the outputs, where gradients had to know."""
        return self.gradients.losses if self.gradients else ()


def rows_notes(
    sites: Mapping[str, tuple[int, bool]],
    strides: Mapping[RowView, int] | None = None,
    passes: int = 1,
) -> tuple[str, ...]:
    """What a reader of the figures has to know about the statistics behind them.

    Args:
        sites: By key, how many rows were seen, and whether they are enough.
        strides: Every how many-th row of each tensor counted, where some did not.
        passes: Over the samples.
    """
    notes = []
    poor = {key: rows for key, (rows, trusted) in sites.items() if not trusted}
    if poor:
        worst = min(poor, key=lambda key: poor[key])
        notes.append(
            f"{len(poor)} of {len(sites)} weights saw fewer than {ROWS_PER_FEATURE} rows a "
            f"feature (fewest: {worst!r} with {poor[worst]}), so their spectra look emptier than "
            "they are; more samples would help, and savings there are not safe."
        )
    strided = [s for s in strides.values() if s > 1] if strides else []
    if strides and strided:
        least, most = min(strided), max(strided)
        share = f"one row in {least}" + (f" to one in {most}" if most > least else "")
        notes.append(
            f"{len(strided)} of {len(strides)} tensors have more rows than a rank "
            f"estimate needs: of those {share} was used."
        )
    if passes > 1:
        notes.append(
            f"The statistics of all weights do not fit the memory budget together: they took "
            f"{passes} passes over the samples."
        )
    return tuple(notes)


def variations_note(data: Dataset) -> tuple[str, ...]:
    """A sentence where samples were varied."""
    if data.variants == 1:
        return ()
    return (
        f"Each sample was calibrated with together with {data.variants - 1} variations of it; rows "
        "count those too.",
    )


def losses_note(losses: Sequence[OutputLoss]) -> str:
    """How outputs are weighted, as nothing else tells a reader what divergences are of."""
    counted = ", ".join(f"{loss.output!r} as {loss.weighting}" for loss in losses)
    return f"What counts at the outputs: {counted}."
