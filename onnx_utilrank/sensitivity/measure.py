"""Measure every site of a model: gradients, decompositions and the predicted loss of each rank."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.calibration.cache import CHECKPOINT_SECONDS, Cache, numbered, of_each
from onnx_utilrank.calibration.collect import in_passes
from onnx_utilrank.calibration.data import Dataset
from onnx_utilrank.engine.engine import IN_PLACE, Engine
from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.ranking.tied import tied
from onnx_utilrank.ranking.two_sided import TwoSidedSite
from onnx_utilrank.sensitivity.aspects import Aspects
from onnx_utilrank.sensitivity.collect import Collector, Seen, collect_sensitivity
from onnx_utilrank.sensitivity.effort import Effort
from onnx_utilrank.sensitivity.gradients import GradientPass
from onnx_utilrank.sensitivity.parts import collected_in_parts, predicted_in_parts
from onnx_utilrank.sensitivity.quadratic import Quadratics
from onnx_utilrank.sensitivity.side import Changes
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.divergence import OutputLoss, samples_in
from onnx_utilrank.statistics.spill import spilled
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["measure_sensitivity"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


def measure_sensitivity(
    graph: TorchGraph,
    index: GraphIndex,
    sites: Sequence[Site],
    hidden: Sequence[Hidden],
    losses: Sequence[OutputLoss],
    data: Dataset,
    samples: Sequence[int],
    effort: Effort,
    *,
    moves: Collection[str],
    seed: int,
    progress: Progress,
    cache: Cache | None = None,
    changes: Changes | None = None,
    engine: Engine = IN_PLACE,
) -> tuple[list[TwoSidedSite], int]:
    """Decompose every site that the outputs depend on.

    What a rank loses is predicted on other samples than those that the decomposition is of: on
    ones that are left over, or else each half of them predicts for the decomposition of the other
    half (unless there is no more than one run). On its own samples a decomposition of few rows
    looks better than it is; and variations lose less than samples themselves where they are mixed.

    Sites whose sums do not fit the memory budget together are taken in groups, with a pass over
    the samples for each.

    With `changes`, those are decomposed, in the place of the weights. The engine says who does it.

    Returns:
        The sites, and how many passes there were.

    Raises:
        ModelError: A node cannot be computed, or a weight is not finite.
    """
    measuring = _Measuring(
        graph=graph,
        aspects=Aspects.of(index, sites, hidden, losses, moves=moves, changes=changes),
        data=data,
        effort=effort,
        seed=seed,
        progress=progress,
        cache=cache or Cache(),
        engine=engine,
    )
    apart = data.apart(samples)
    spread = [s for k in np.random.default_rng(seed).permutation(len(apart)) for s in apart[k]]
    chosen = sorted(spread[: effort.gradients])
    left_over = sorted(spread[max(effort.gradients, len(spread) - effort.quadratics) :])
    parts, halves_of = [chosen], data.apart(chosen)
    if not left_over and len(halves_of) > 1:
        parts = [[s for part in halves_of[half::2] for s in part] for half in range(2)]
    budget = effort.statistics_bytes // len(parts)
    passes = list(in_passes(measuring.aspects.joined(sites), measuring.aspects.sums, budget))

    def of_group(group: Sequence[Site]) -> list[TwoSidedSite]:
        seen = measuring.collect(group, parts)
        if len(parts) == 1:
            found = measuring.decompose(group, seen[0])
            return measuring.predict(found, chosen, left_over or chosen)
        whole = {key: one + seen[1][key] for key, one in seen[0].items()}
        halves = [
            {f.site.key: f for f in measuring.predict(measuring.decompose(group, own), *of)}
            for own, of in zip(seen, (parts, parts[::-1]), strict=True)
        ]
        return [
            one.expecting([half[one.site.key] for half in halves if one.site.key in half])
            for one in measuring.decompose(group, whole)
        ]

    measured = [one for found in engine.groups(of_group, passes) for one in found]
    places = {site.key: k for k, site in enumerate(sites)}
    return sorted(measured, key=lambda one: places[one.site.key]), len(passes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measuring:
    """What every step needs to know.

    Attributes:
        aspects: What is looked at.
        cache: Where what was collected is kept.
        engine: Who does it.
    """

    graph: TorchGraph
    aspects: Aspects
    data: Dataset
    effort: Effort
    seed: int
    progress: Progress
    cache: Cache
    engine: Engine

    def collect(
        self, sites: Sequence[Site], parts: Sequence[Sequence[int]]
    ) -> list[dict[str, Seen]]:
        """What is seen of the sites in each part of the samples, by key."""
        backward = self._backward(sites, self.effort.draws, smooth=True, seed=self.seed)
        total = sum(map(len, parts))
        seen: list[dict[str, Seen]] = []
        done = 0
        for part in parts:
            collectors = self.aspects.collectors(sites)
            what = ("gradients", *self._described(sites), tuple(part))
            feeds = list(self.data.feeds(part, batch=self.effort.batch))
            first = self._resumed(what, collectors, backward)
            saved = time.monotonic()
            if self.engine.in_place:
                steps = collect_sensitivity(backward, collectors, feeds, first)
            else:
                steps = collected_in_parts(
                    self.engine, self.graph, self.aspects, sites, backward, collectors, feeds, first
                )
            for k in steps:
                late = time.monotonic() - saved > CHECKPOINT_SECONDS
                if k == len(feeds) or late:
                    self._keep(what, collectors, backward, k)
                    saved = time.monotonic()
                counted = done + sum(map(samples_in, feeds[:k]))
                self.progress("calibrating", counted, total)
            done += len(part)
            # Each goes when its sums were taken: what is seen of it needs as much again.
            seen.append({key: collectors.pop(key).seen for key in list(collectors)})
        if backward.dropped:
            logger.warning(
                "%s: the gradients of %d of the samples of a run, or more, are not finite; those "
                "do not count",
                self.aspects.index.store.label,
                backward.dropped,
            )
        return seen

    def _resumed(
        self, what: tuple[object, ...], collectors: Mapping[str, Collector], backward: GradientPass
    ) -> int:
        """Let collectors go on where an earlier run was; how many feeds it had done."""
        state = self.cache.load(*what)
        if state is None:
            return 0
        parts = of_each(state)
        for k, collector in enumerate(collectors.values()):
            collector.restore(parts[k])
        backward.restore(state["draws"])
        backward.dropped = int(state["dropped"])
        return int(state["done"])

    def _keep(
        self,
        what: tuple[object, ...],
        collectors: Mapping[str, Collector],
        backward: GradientPass,
        done: int,
    ) -> None:
        state = numbered([collector.state for collector in collectors.values()])
        state |= {"draws": backward.state, "dropped": np.array(backward.dropped)}
        self.cache.save({**state, "done": np.array(done)}, *what)

    def decompose(self, sites: Sequence[Site], seen: Mapping[str, Seen]) -> list[TwoSidedSite]:
        """The sites that anything was seen of.

        Raises:
            ModelError: What was seen is not finite.
        """
        for site in sites:
            if not seen[site.key].is_finite:
                label = self.aspects.index.store.label
                raise ModelError(
                    f"{label}: {site.uses[0].label}: its values or gradients, or the squares of "
                    "them, overflow on the calibration data"
                )
        measured = [s for s in sites if seen[s.key].side.moment.rows]
        tasks = [[(s, seen[s.key]) for s in of] for of in self.aspects.joined(measured)]
        sizes = [sum(sum(self.aspects.sums(s).values()) for s, _ in task) for task in tasks]
        found: list[TwoSidedSite] = []
        self.progress("decomposing", 0, len(measured))
        for together in self.engine.map(
            _decomposed, (self.aspects,), tasks, memory=4 * max(sizes, default=0)
        ):
            found += map(spilled, together)
            self.progress("decomposing", len(found), len(measured))
        return tied(found, list(self.aspects.tied.items()))

    def predict(
        self, found: Sequence[TwoSidedSite], fitted: Sequence[int], samples: Sequence[int]
    ) -> list[TwoSidedSite]:
        """The sites, decomposed on some samples, with the larger prediction on some samples."""
        sites = [f.site for f in found]
        # Other directions than the factors were made for.
        draws = min(self.effort.draws, 2)
        backward = self._backward(sites, draws, smooth=False, seed=self.seed + 1)
        what = ("predictions", *self._described(sites), tuple(fitted), tuple(samples))
        state = self.cache.load(*what)
        if state is None:
            quadratics = Quadratics({f.site.key: self.aspects.probes(f) for f in found})
            feeds = list(self.data.feeds(self.data.given(samples), batch=self.effort.batch))
            if self.engine.in_place:
                steps = quadratics.add(backward, self.aspects.sides(sites), feeds)
            else:
                steps = predicted_in_parts(
                    self.engine, self.graph, self.aspects, sites, backward, quadratics, feeds
                )
            for done in steps:
                self.progress("predicting", done, len(feeds))
            losses = ({f"{k}": lost for k, lost in enumerate(quadratics.of(s))} for s in sites)
            state = numbered(losses)
            self.cache.save(state, *what)
        parts, apart = of_each(state), set(fitted).isdisjoint(samples)
        return [
            f.corrected([parts[k][f"{n}"] for n in range(len(parts[k]))], apart=apart)
            for k, f in enumerate(found)
        ]

    def _described(self, sites: Sequence[Site]) -> tuple[object, ...]:
        """All that decides what is collected of sites, beside the model and the samples."""
        effort = self.effort
        return (
            *(self.aspects.losses, effort.draws, effort.batch, self.seed),
            *self.aspects.described(sites),
        )

    def _backward(
        self, sites: Sequence[Site], draws: int, *, smooth: bool, seed: int
    ) -> GradientPass:
        return self.aspects.backward(self.graph, sites, draws, smooth=smooth, seed=seed)


def _decomposed(aspects: Aspects, task: Sequence[tuple[Site, Seen]]) -> list[TwoSidedSite]:
    return aspects.decomposed(task)
