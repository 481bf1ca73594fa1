"""What a method found out about every site of a model, and what a reader has to know of it."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx_utilrank.calibration.cache import Cache
from onnx_utilrank.calibration.collect import SUM_BYTES, Collected, Progress, collect, in_passes
from onnx_utilrank.calibration.data import Dataset
from onnx_utilrank.engine.engine import Engine, EngineUse
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.ranking.cost import bias_cost
from onnx_utilrank.ranking.method import Measured, Method, MomentMethod, site_moment, use_view
from onnx_utilrank.runtime.provider import Provider
from onnx_utilrank.sensitivity.effort import Effort
from onnx_utilrank.sites.bias import own_biases
from onnx_utilrank.sites.find import site_matrix
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import RowView, Side, Site, Skip
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.statistics.moments import ROWS_PER_FEATURE, SecondMoment
from onnx_utilrank.statistics.spill import spilled
from onnx_utilrank.statistics.tokens import TokenCounts
from onnx_utilrank.torch_graph.footprint import Footprint
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = [
    "Gradients",
    "Measurement",
    "losses_note",
    "measure_moments",
    "rows_notes",
    "unmeasured",
    "variations_note",
]


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
        engine: Who did it, where it was not this process alone.
    """

    method: Method
    sites: list[Measured]
    hidden: tuple[Hidden, ...] = ()
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    gradients: Gradients | None = None
    engine: EngineUse | None = None

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
    counted = []
    for loss in losses:
        told = loss.padding
        where = f" where {told.input!r} is {told.real}" if told else ""
        what = f"{loss.output!r}"
        if loss.decides is not None:
            what += f", which {loss.decides!r} is decided by,"
        if loss.scales is not None:
            where += f", each of the {len(loss.scales)} relative to its own deviation"
        if loss.faint:
            where += f", of which {loss.faint} hardly count, so much more do others vary"
        counted.append(f"{what} as {loss.weighting}{where}")
    return f"What counts at the outputs: {'; '.join(counted)}."


def measure_moments(
    method: MomentMethod,
    index: GraphIndex,
    sites: Sequence[Site],
    data: Dataset,
    samples: Sequence[int],
    provider: Provider,
    *,
    batch: int,
    memory_budget: int,
    progress: Progress,
    cache: Cache,
    engine: Engine,
) -> Measurement:
    """Decompose every site by what taps in the graph say of the rows on its sides.

    Args:
        method: The method.
        index: The model.
        sites: The sites.
        data: The samples.
        samples: Those that count.
        provider: Where the model runs.
        batch: Samples that one run may take.
        memory_budget: Bytes, of which running sums take half.
        progress: Called as work goes on.
        cache: Where what was collected is kept.
        engine: Who does it.

    Raises:
        ModelError: The model does not run, or a value is not finite.
    """

    def views(site: Site) -> list[RowView]:
        side = method.side(site)
        return [use_view(use, side) for use in site.uses] if side else []

    def sums(site: Site) -> dict[Hashable, int]:
        return {
            view: view.width * SUM_BYTES * (1 if view.one_hot else view.width)
            for view in views(site)
        }

    passes = list(in_passes([[s] for s in sites], sums, memory_budget // 2))

    def of_group(group: Sequence[Site]) -> tuple[Collected, list[Measured], list[Skip]]:
        collected = collect(
            index,
            [view for site in group for view in views(site)],
            data,
            samples,
            provider,
            batch=batch,
            progress=progress,
            cache=cache,
            engine=engine,
        )
        empty: list[Skip] = []

        def tasks() -> Iterator[tuple[Site, SecondMoment | None]]:
            for site in group:
                side = method.side(site)
                moment = _moment(index, site, side, collected) if side else None
                if moment is not None and not moment.rows:
                    empty.extend(unmeasured(site, "its input is empty on the calibration data"))
                else:
                    yield site, moment

        memory = max(4 * 8 * (s.m**2 + s.d**2 + s.m * s.d) for s in group)
        measured: list[Measured] = []
        progress("decomposing", 0, len(group))
        for one in engine.map(_decomposed, (method, index), tasks(), memory=memory):
            measured.append(spilled(one))
            progress("decomposing", len(measured), len(group))
        return collected, measured, empty

    found: list[Measured] = []
    skips: list[Skip] = []
    strides: dict[RowView, int] = {}
    for collected, measured, empty in engine.groups(of_group, passes):
        strides |= collected.strides
        found += measured
        skips += empty
    rows = {
        m.site.key: (m.moment.rows, m.moment.enough_rows) for m in found if m.moment is not None
    }
    notes = rows_notes(rows, strides, len(passes) if strides else 1)
    return Measurement(method=method, sites=found, skips=tuple(skips), notes=notes)


def _moment(index: GraphIndex, site: Site, side: Side, collected: Collected) -> SecondMoment:
    """The moment of x, or of W x, over all uses of a site; of a table that of W x."""
    if not site.one_hot:
        return site_moment(site, side, collected.moments, own_biases(index, site))
    tokens = (collected.tokens[use.inputs] for use in site.uses)
    return sum(tokens, TokenCounts.zero(site.d)).moment(site_matrix(index, site))


def _decomposed(
    method: MomentMethod, index: GraphIndex, task: tuple[Site, SecondMoment | None]
) -> Measured:
    """What a method makes of the moment of one site."""
    site, moment = task
    return method.measure(site, site_matrix(index, site), moment, bias_cost(index, site))


def unmeasured(site: Site, reason: str) -> Iterator[Skip]:
    """Every node of a site that nothing could be measured for."""
    for use in site.uses:
        yield Skip(node=use.label, op_type=site.op_type, reason=reason)
