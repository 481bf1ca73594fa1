"""Gradients by many workers: the runs are cut into parts, which a task each adds up.

What a part begins with hangs on the parts before it: the state that random directions are drawn
from, and the shifts that rows are summed about. Both are foretold, so that all parts can be done at
once: draws depend on the sizes of the outputs alone, which are alike for runs of like inputs, and
shifts are known from the first run. A part that began with something else than those before it led
to is done again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnx_utilrank.engine.engine import Engine, shards
from onnx_utilrank.sensitivity.aspects import Aspects
from onnx_utilrank.sensitivity.collect import Collector, collect_sensitivity
from onnx_utilrank.sensitivity.gradients import Drawn, GradientPass
from onnx_utilrank.sensitivity.quadratic import Quadratics
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["collected_in_parts", "predicted_in_parts"]

Feed: TypeAlias = Mapping[str, np.ndarray]
Shifts: TypeAlias = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passing:
    """What all tasks of a pass are told, besides the model.

    Attributes:
        sites: The sites.
        draws: See `GradientPass`.
        smooth: See `GradientPass`.
        total: Samples of all runs.
    """

    sites: tuple[Site, ...]
    draws: int
    smooth: bool
    total: int

    def backward(self, graph: TorchGraph, aspects: Aspects) -> GradientPass:
        """Gradients, drawn from whatever state is restored."""
        return aspects.backward(graph, self.sites, self.draws, smooth=self.smooth, seed=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One task.

    Attributes:
        first: Number of the first run.
        feeds: The runs.
        state: What directions are drawn from.
        shifts: Of the collectors, by key of their sites.
    """

    first: int
    feeds: list[Feed]
    state: np.ndarray
    shifts: Shifts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What became of a task.

    Attributes:
        sums: What was added up.
        state: What the next run draws from.
        dropped: See `GradientPass`.
    """

    sums: Any
    state: np.ndarray
    dropped: int


def collected_in_parts(
    engine: Engine,
    graph: TorchGraph,
    aspects: Aspects,
    sites: Sequence[Site],
    backward: GradientPass,
    collectors: Mapping[str, Collector],
    feeds: Sequence[Feed],
    first: int,
) -> Iterator[int]:
    """The same as `collect_sensitivity`, by the workers of an engine.

    Args:
        engine: It is not in place.
        graph: The model in torch.
        aspects: What is looked at.
        sites: The sites.
        backward: Where the draws of the first feed begin; it is left where the last one ends.
        collectors: What is added to, by key of the sites.
        feeds: All feeds.
        first: The feed to begin with: earlier ones were counted before.

    Raises:
        UtilrankError: See `Engine.map`.
    """
    passing = _Passing(
        sites=tuple(sites),
        draws=backward.draws,
        smooth=True,
        total=sum(map(samples_in, feeds)),
    )

    def shifts() -> Shifts:
        return {key: collector.shifts for key, collector in collectors.items()}

    def take(sums: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        for key, state in sums.items():
            collectors[key].merge(state)

    shared = (graph, aspects, passing)
    yield from _in_parts(engine, _collected, shared, backward, feeds, first, shifts, take)


def predicted_in_parts(
    engine: Engine,
    graph: TorchGraph,
    aspects: Aspects,
    sites: Sequence[Site],
    backward: GradientPass,
    quadratics: Quadratics,
    feeds: Sequence[Feed],
) -> Iterator[int]:
    """The same as `Quadratics.add`, by the workers of an engine; see `collected_in_parts`."""
    passing = _Passing(sites=tuple(sites), draws=backward.draws, smooth=False, total=0)
    shared = (graph, aspects, passing, quadratics.none())
    yield from _in_parts(
        engine, _predicted, shared, backward, feeds, 0, lambda: {}, quadratics.merge
    )


def _in_parts(
    engine: Engine,
    function: Callable[..., _Done],
    shared: tuple[Any, ...],
    backward: GradientPass,
    feeds: Sequence[Feed],
    first: int,
    shifts: Callable[[], Shifts],
    take: Callable[[Any], None],
) -> Iterator[int]:
    aspects, passing = shared[1], shared[2]
    memory = 2 * aspects.index.store.file_bytes
    memory += sum(sum(aspects.sums(site).values()) for site in passing.sites)
    kinds = {_kind(feed): feed for feed in feeds[first:]}
    sizes = engine.map(_drawn, shared[:3], kinds.values(), memory=memory, runs_model=True)
    drawn = dict(zip(kinds, sizes, strict=True))
    done = first
    while done < len(feeds):
        began = shifts()
        parts = shards(len(feeds), done)
        if began and not any(began.values()):
            parts = [range(done, done + 1)]
        states = list(_states(backward, [[drawn[_kind(feeds[k])] for k in p] for p in parts]))
        tasks = (
            _Part(first=p.start, feeds=list(feeds[p.start : p.stop]), state=state, shifts=began)
            for p, state in zip(parts, states, strict=True)
        )
        results = engine.map(function, shared, tasks, memory=memory, runs_model=True)
        for part, state, found in zip(parts, states, results, strict=True):
            if not np.array_equal(state, backward.state) or not _alike(began, shifts()):
                break
            take(found.sums)
            backward.restore(found.state)
            backward.dropped = max(backward.dropped, found.dropped)
            done = part.stop
            yield done


def _kind(feed: Feed) -> tuple[object, ...]:
    return tuple((name, value.shape) for name, value in feed.items())


def _alike(began: Shifts, now: Shifts) -> bool:
    """Whether no shift has come since."""
    return all(began[key].keys() == now[key].keys() for key in now)


def _states(backward: GradientPass, drawn: Sequence[Sequence[Drawn]]) -> Iterator[np.ndarray]:
    """What each part draws from, if such is drawn for the runs of each."""
    now = backward.state
    for of_part in drawn:
        yield backward.state
        for of_run in of_part:
            backward.skip(of_run)
    backward.restore(now)


def _drawn(graph: TorchGraph, aspects: Aspects, passing: _Passing, feed: Feed) -> Drawn:
    return passing.backward(graph, aspects).drawn(feed)


def _collected(graph: TorchGraph, aspects: Aspects, passing: _Passing, part: _Part) -> _Done:
    backward = passing.backward(graph, aspects)
    backward.restore(part.state)
    collectors = aspects.collectors(passing.sites)
    for key, shifts in part.shifts.items():
        collectors[key].begin(shifts)
    for _ in collect_sensitivity(backward, collectors, part.feeds, part.first, passing.total):
        pass
    sums = {key: collector.state for key, collector in collectors.items()}
    return _Done(sums=sums, state=backward.state, dropped=backward.dropped)


def _predicted(
    graph: TorchGraph, aspects: Aspects, passing: _Passing, blank: Quadratics, part: _Part
) -> _Done:
    backward = passing.backward(graph, aspects)
    backward.restore(part.state)
    quadratics = blank.none()
    for _ in quadratics.add(backward, aspects.sides(passing.sites), part.feeds):
        pass
    return _Done(sums=quadratics.state, state=backward.state, dropped=backward.dropped)
