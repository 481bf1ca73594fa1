"""Measure every site of a model: gradients, decompositions and the predicted loss of each rank."""

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_utilrank.calibration.cache import CHECKPOINT_SECONDS, Cache, numbered, of_each
from onnx_utilrank.calibration.collect import in_passes
from onnx_utilrank.calibration.data import Dataset
from onnx_utilrank.calibration.taps import ROWS_KEPT, ROWS_PER_FEATURE_KEPT
from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.moves.channels import channel_patches
from onnx_utilrank.ranking.cost import bias_cost
from onnx_utilrank.ranking.inner import forgiven
from onnx_utilrank.ranking.tied import tied
from onnx_utilrank.ranking.two_sided import (
    TwoSidedSite,
    two_sided_site,
    with_channels,
    with_heads,
    with_units,
)
from onnx_utilrank.sensitivity.collect import Collector, Seen, collect_sensitivity
from onnx_utilrank.sensitivity.effort import Effort
from onnx_utilrank.sensitivity.gradients import GradientPass
from onnx_utilrank.sensitivity.quadratic import Probe, sample_quadratics
from onnx_utilrank.sensitivity.side import Changes, SmallerSide
from onnx_utilrank.sites.bias import own_biases
from onnx_utilrank.sites.find import site_matrix, site_weight
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site
from onnx_utilrank.sites.tied import find_tied
from onnx_utilrank.statistics.divergence import OutputLoss, samples_in
from onnx_utilrank.statistics.spill import spilled
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["measure_sensitivity"]

logger = logging.getLogger(__name__)

BYTES = 8  # all statistics are float64

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
    channels: bool,
    seed: int,
    progress: Progress,
    cache: Cache | None = None,
    changes: Changes | None = None,
) -> tuple[list[TwoSidedSite], int]:
    """Decompose every site that the outputs depend on.

    What a rank loses is predicted on other samples than those that the decomposition is of: on
    ones that are left over, or else each half of them predicts for the decomposition of the other
    half (unless there is no more than one run). On its own samples a decomposition of few rows
    looks better than it is; and variations lose less than samples themselves where they are mixed.

    Sites whose sums do not fit the memory budget together are taken in groups, with a pass over
    the samples for each.

    With `changes`, those are decomposed, in the place of the weights.

    Returns:
        The sites, and how many passes there were.

    Raises:
        ModelError: A node cannot be computed, or a weight is not finite.
    """
    basis = [h for h in hidden if not h.units]
    of_units = frozenset(h.reader for h in hidden if h.reader is not None)
    measuring = _Measuring(
        graph=graph,
        index=index,
        losses=tuple(losses),
        data=data,
        effort=effort,
        seed=seed,
        progress=progress,
        cache=cache or Cache(),
        biases={node: b for site in sites for node, b in own_biases(index, site).items()},
        heads=_heads(sites, basis),
        added={s.key: h.added(index, s.key, s.m) for h in basis for s in sites if s.key in h.sites},
        readers=frozenset(g.met.site for h in basis for g in h.groups if g.met.side == "columns"),
        readers_of_units=of_units,
        changes=changes,
        tied={table.key: head.key for table, head in find_tied(index, sites)},
        kernels=_kernels(index, [s for s in sites if channels or s.key in of_units]),
    )
    apart = data.apart(samples)
    spread = [s for k in np.random.default_rng(seed).permutation(len(apart)) for s in apart[k]]
    chosen = sorted(spread[: effort.gradients])
    left_over = sorted(spread[max(effort.gradients, len(spread) - effort.quadratics) :])
    parts, halves_of = [chosen], data.apart(chosen)
    if not left_over and len(halves_of) > 1:
        parts = [[s for part in halves_of[half::2] for s in part] for half in range(2)]
    budget = effort.statistics_bytes // len(parts)
    passes = list(in_passes(measuring.joined(sites), measuring.sums, budget))
    measured: list[TwoSidedSite] = []
    for group in passes:
        seen = measuring.collect(group, parts)
        if len(parts) == 1:
            found = measuring.decompose(group, seen[0])
            measured += measuring.predict(found, chosen, left_over or chosen)
            continue
        whole = {key: one + seen[1][key] for key, one in seen[0].items()}
        halves = [
            {f.site.key: f for f in measuring.predict(measuring.decompose(group, own), *of)}
            for own, of in zip(seen, (parts, parts[::-1]), strict=True)
        ]
        for one in measuring.decompose(group, whole):
            twins = [half[one.site.key] for half in halves if one.site.key in half]
            measured.append(one.expecting(twins))
    places = {site.key: k for k, site in enumerate(sites)}
    return sorted(measured, key=lambda one: places[one.site.key]), len(passes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measuring:
    """What every step needs to know.

    Attributes:
        biases: What the node of each use adds to W x itself, [m], by node.
        heads: By key of the site that makes hidden features of any basis: rows of each group, and
            whether their mean may go.
        added: By key, what is added to the features that a site makes, on their way.
        cache: Where what was collected is kept.
        readers: Keys of the sites that read such features.
        readers_of_units: Keys of those that read units.
        changes: What is decomposed in the place of the weights, if anything is.
        tied: Keys of tables and of the layers that share their weight.
        kernels: Kernels of Convs whose input channels are looked at, by node.
    """

    graph: TorchGraph
    index: GraphIndex
    losses: tuple[OutputLoss, ...]
    data: Dataset
    effort: Effort
    seed: int
    progress: Progress
    cache: Cache
    biases: Mapping[int, np.ndarray]
    heads: Mapping[str, Sequence[tuple[slice, bool]]]
    added: Mapping[str, np.ndarray]
    readers: frozenset[str]
    readers_of_units: frozenset[str]
    changes: Changes | None
    tied: Mapping[str, str]
    kernels: Mapping[int, np.ndarray]

    def joined(self, sites: Sequence[Site]) -> list[list[Site]]:
        """Sites in order; a table comes with the layer that shares its weight."""
        by_key, behind = {site.key: site for site in sites}, set(self.tied.values())
        return [
            [site, *(by_key[key] for key in (self.tied.get(site.key),) if key)]
            for site in sites
            if site.key not in behind
        ]

    def sums(self, site: Site) -> dict[Hashable, int]:
        """Bytes of the running sums of a site."""
        kernel = self.kernels.get(site.uses[0].node)
        numbers = 2 * site.full_rank**2
        if kernel is not None:
            numbers += 2 * kernel.shape[1] ** 2
        elif site.key in self.readers_of_units:
            numbers += site.d**2
        return {site.key: BYTES * numbers}

    def collect(
        self, sites: Sequence[Site], parts: Sequence[Sequence[int]]
    ) -> list[dict[str, Seen]]:
        """What is seen of the sites in each part of the samples, by key."""
        sides = self._sides(sites)
        backward = self._backward(sites, self.effort.draws, smooth=True, seed=self.seed)
        total = sum(map(len, parts))
        seen: list[dict[str, Seen]] = []
        done = 0
        for part in parts:
            collectors = {s.key: self._collector(s, sides[s.key]) for s in sites}
            what = ("gradients", *self._described(sites), tuple(part))
            feeds = list(self.data.feeds(part, batch=self.effort.batch))
            first = self._resumed(what, collectors, backward)
            saved = time.monotonic()
            for k in collect_sensitivity(backward, collectors, feeds, first):
                late = time.monotonic() - saved > CHECKPOINT_SECONDS
                if k == len(feeds) or late:
                    self._keep(what, collectors, backward, k)
                    saved = time.monotonic()
                counted = done + sum(map(samples_in, feeds[:k]))
                self.progress("calibrating", counted, total)
            done += len(part)
            seen.append({key: collector.seen for key, collector in collectors.items()})
        if backward.dropped:
            logger.warning(
                "%s: the gradients of %d of the samples of a run, or more, are not finite; those "
                "do not count",
                self.index.store.label,
                backward.dropped,
            )
        return seen

    def _described(self, sites: Sequence[Site]) -> tuple[object, ...]:
        """All that decides what is collected of sites, beside the model and the samples."""
        of_sites = [
            (
                # Patterns choose uses: one key may stand for more of them, or fewer.
                *(s.key, s.op_type, [use.node for use in s.uses], self.heads.get(s.key)),
                s.uses[0].node in self.kernels,
                *(s.key in self.readers, s.key in self.readers_of_units),
            )
            for s in sites
        ]
        changes = () if self.changes is None else (self.changes.fingerprint,)
        return self.losses, self.effort.draws, self.effort.batch, self.seed, of_sites, *changes

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
        found = []
        for k, site in enumerate(sites):
            self.progress("decomposing", k, len(sites))
            if not seen[site.key].is_finite:
                raise ModelError(
                    f"{self.index.store.label}: {site.uses[0].label}: its values or gradients, or "
                    "the squares of them, overflow on the calibration data"
                )
            if seen[site.key].side.moment.rows:
                found.append(spilled(self._decomposed(site, seen[site.key])))
        self.progress("decomposing", len(sites), len(sites))
        return tied(found, list(self.tied.items()))

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
            quadratics = sample_quadratics(
                backward,
                sites,
                {f.site.key: self._probes(f) for f in found},
                self._sides(sites),
                list(self.data.feeds(self.data.given(samples), batch=self.effort.batch)),
                lambda done, total: self.progress("predicting", done, total),
            )
            losses = ({f"{k}": lost for k, lost in enumerate(quadratics[s.key])} for s in sites)
            state = numbered(losses)
            self.cache.save(state, *what)
        parts = of_each(state)
        return [
            f.corrected([parts[k][f"{which}"] for which in range(len(parts[k]))])
            for k, f in enumerate(found)
        ]

    def _sides(self, sites: Sequence[Site]) -> dict[str, SmallerSide]:
        own = self.changes is None
        return {s.key: SmallerSide(s, self._weight(s), self.biases, applied=own) for s in sites}

    def _weight(self, site: Site) -> np.ndarray:
        """What is decomposed, [m, d]."""
        return site_weight(self.index, site) if self.changes is None else self.changes.of(site)

    def _backward(
        self, sites: Sequence[Site], draws: int, *, smooth: bool, seed: int
    ) -> GradientPass:
        uses = [use for s in sites for use in s.uses]
        return GradientPass(
            self.graph,
            uses,
            self.losses,
            draws=draws,
            smooth=smooth,
            seed=seed,
            kernels=self.kernels,
        )

    def _collector(self, site: Site, side: SmallerSide) -> Collector:
        kernel = self.kernels.get(site.uses[0].node)
        of_inputs = site.key in self.readers_of_units and kernel is None
        return Collector(
            site,
            side,
            max(ROWS_PER_FEATURE_KEPT * site.full_rank, ROWS_KEPT),
            channels=0 if kernel is None else kernel.shape[1],
            groups=[rows for rows, _ in self.heads.get(site.key, ())],
            input_mean=site.key in self.readers,
            inputs=site.d if of_inputs else 0,
        )

    def _decomposed(self, site: Site, seen: Seen) -> TwoSidedSite:
        weight = self._weight(site).astype(np.float64)
        cost = bias_cost(self.index, site)
        side = seen.side
        if seen.tokens is not None:
            side = replace(side, moment=seen.tokens.moment(weight))
        found = two_sided_site(site, weight, side, cost, seen.input_mean)
        if site.key in self.heads:
            own, gammas = self.biases[site.uses[0].node], seen.side.block_fishers()
            groups, added = self.heads[site.key], self.added[site.key]
            found = with_heads(found, weight, groups, gammas, own, added)
        if seen.channels is not None and seen.channels.moment.rows:
            found = with_channels(found, seen.channels)
        if site.key in self.readers_of_units:
            moment = seen.inputs if seen.channels is None else seen.channels.moment
            assert moment is not None
            found = with_units(found, weight, moment, seen.channels)
        return found

    def _probes(self, found: TwoSidedSite) -> list[Probe]:
        """In the order that `TwoSidedSite.corrected` wants."""
        mean = found.moment.mean if found.centred else np.zeros(found.moment.width)
        probes = [Probe(found=found.found, rows="smaller", mean=mean)]
        heads, channels, units = found.heads, found.channels, found.units
        if heads is not None:
            lost = forgiven(heads.groups, heads.mean)
            probes.append(Probe(found=heads.found, rows="outputs", mean=lost - heads.behind))
        if channels is not None:
            probes.append(Probe(found=channels.found, rows="channels", mean=channels.mean))
        if units is not None:
            inner = channels is None
            probes.append(
                Probe(
                    found=units.selection.found,
                    rows="inputs" if inner else "channels",
                    mean=units.mean,
                    weight=site_matrix(self.index, found.site) if inner else None,
                )
            )
        return probes


def _kernels(index: GraphIndex, sites: Sequence[Site]) -> dict[int, np.ndarray]:
    found = {}
    for site in sites:
        if channel_patches(site) is not None:
            kernel = index.constant(site.weight)
            assert kernel is not None
            found[site.uses[0].node] = kernel.astype(np.float32)
    return found


def _heads(sites: Sequence[Site], hidden: Sequence[Hidden]) -> dict[str, list[tuple[slice, bool]]]:
    takes = {s.key: s.bias in ("input", "add") for s in sites}
    found: dict[str, list[tuple[slice, bool]]] = {}
    for each in hidden:
        for group in each.groups:
            rows = slice(group.made.start, group.made.start + each.size)
            centred = group.met.side == "columns" and takes.get(group.met.site, False)
            found.setdefault(group.made.site, []).append((rows, centred))
    return found
