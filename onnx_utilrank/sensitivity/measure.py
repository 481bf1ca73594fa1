"""Measure every site of a model: gradients, decompositions and the predicted loss of each rank."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.calibration.data import Dataset
from onnx_utilrank.calibration.taps import ROWS_KEPT, ROWS_PER_FEATURE_KEPT
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.moves.channels import channel_patches
from onnx_utilrank.ranking.cost import bias_cost
from onnx_utilrank.ranking.two_sided import (
    TwoSidedSite,
    forgiven,
    two_sided_site,
    with_channels,
    with_heads,
    with_units,
)
from onnx_utilrank.sensitivity.collect import Collector, collect_sensitivity
from onnx_utilrank.sensitivity.gradients import GradientPass
from onnx_utilrank.sensitivity.quadratic import Probe, sample_quadratics
from onnx_utilrank.sensitivity.side import SmallerSide
from onnx_utilrank.sites.find import site_matrix
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.torch_graph.footprint import Footprint
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["Effort", "choose_effort", "measure_sensitivity"]

logger = logging.getLogger(__name__)

# Up to this many operations over all samples, about the work of a minute, nothing is spared.
CHEAP_FLOPS = 10**12
DRAWS = 4
# The samples of a dear model that gradients are taken of, that losses are predicted on, and that
# layers are refitted to: shares, the dearer the less, and at least so many samples where each holds
# few decisions.
GRADIENT_SHARES, QUADRATIC_SHARE, REFIT_SHARES = (1 / 4, 1 / 2), 1 / 8, (1 / 4, 1.0)
LEAST_DECISIONS = 4096
LEAST_SAMPLES = 16
# Samples of one run, at most; smaller where the memory budget asks for it.
BATCH = 16
BYTES = 8  # all statistics are float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much of the data is used, from the price of the model and never from a clock.

    Attributes:
        draws: Directions drawn at the outputs for each run.
        gradients: Samples that Γ and Cov(x) are collected from.
        quadratics: Samples that the losses are predicted on.
        refit: Samples that layers are refitted to.
        batch: Samples of one run with gradients.
        run: Samples of one run without.
        statistics_bytes: What the sums of one group of sites may take.
    """

    draws: int
    gradients: int
    quadratics: int
    refit: int
    batch: int
    run: int
    statistics_bytes: int


def choose_effort(
    *,
    samples: int,
    flops: int,
    decisions: int,
    footprint: Footprint,
    batch: int,
    budget: int,
    run: int = 1,
) -> Effort:
    """How many samples and draws a model is worth.

    A run with gradients and its sums costs several without (`tools/engine_cost.py` says how many).
    So a model that is dear to run gets one draw, and gradients of a part of its samples: half of
    them down to a quarter the dearer it is, or fewer where each sample makes many decisions (the
    pixels of an image, the tokens of a text). Its layers are refitted to all of the samples down to
    a quarter.

    Args:
        samples: Samples to calibrate with.
        flops: Operations of one sample.
        decisions: Rows of the outputs that one sample has.
        footprint: Bytes that one sample takes.
        batch: Samples that one run may take.
        budget: Bytes that statistics and activations may take together.
        run: Samples of one run, where the model fixes them.
    """
    room = max(1, budget // (4 * max(footprint.kept, 1)))
    batch = max(1, min(batch, BATCH))
    if flops * samples <= CHEAP_FLOPS:
        draws, gradients, quadratics, refit = DRAWS, samples, samples, samples
    else:
        cheap = CHEAP_FLOPS / (flops * samples)
        enough = max(LEAST_SAMPLES, -(-LEAST_DECISIONS // max(decisions, 1)))
        draws = 1
        gradients = min(_share(samples, cheap, *GRADIENT_SHARES), enough)
        quadratics = min(_share(samples, QUADRATIC_SHARE, 0.0, 1.0), enough)
        refit = _share(samples, 2 * cheap, *REFIT_SHARES)
    # Whole runs: what is left over of one cannot be used.
    gradients, quadratics, refit = (-(-n // run) * run for n in (gradients, quadratics, refit))
    return Effort(
        draws=draws,
        gradients=min(gradients, samples),
        quadratics=min(quadratics, samples),
        refit=min(refit, samples),
        batch=min(batch, room),
        run=batch,
        statistics_bytes=budget // 2,
    )


def _share(samples: int, share: float, low: float, high: float) -> int:
    return max(int(samples * min(max(share, low), high)), 1)


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
    progress: Callable[[str, int, int], None],
) -> list[TwoSidedSite]:
    """Decompose every site that the outputs depend on.

    Sites whose sums do not fit the memory budget together are taken in groups, with a pass over
    the samples for each.

    Raises:
        ModelError: A node cannot be computed, or a weight is not finite.
    """
    biases = {
        use.node: use.bias.values(index, site.m) if use.bias.kind == "input" else np.zeros(site.m)
        for site in sites
        for use in site.uses
    }
    spread = np.random.default_rng(seed).permutation(len(samples))
    chosen = [samples[k] for k in sorted(spread[: effort.gradients])]
    tested = [samples[k] for k in sorted(spread[-effort.quadratics :])]
    readers_of_units = {h.reader for h in hidden if h.units}
    hidden = [h for h in hidden if not h.units]
    heads_of = _heads(sites, hidden)
    added = {s.key: h.added(index, s.key, s.m) for h in hidden for s in sites if s.key in h.sites}
    readers = {g.met.site for h in hidden for g in h.groups if g.met.side == "columns"}
    looked_into = sites if channels else [s for s in sites if s.key in readers_of_units]
    kernels = _kernels(index, looked_into)
    measured = []
    passes = list(_groups(sites, effort.statistics_bytes))
    if len(passes) > 1:
        logger.warning(
            "%s: the statistics of all weights do not fit the memory budget; %d passes over the "
            "samples are made",
            index.store.label,
            len(passes),
        )
    for group in passes:
        sides = {s.key: SmallerSide(s, site_matrix(index, s), biases) for s in group}
        collectors = {
            s.key: Collector(
                s,
                sides[s.key],
                max(ROWS_PER_FEATURE_KEPT * s.full_rank, ROWS_KEPT),
                channels=kernels[s.uses[0].node].shape[1] if s.uses[0].node in kernels else 0,
                groups=[rows for rows, _ in heads_of.get(s.key, ())],
                input_mean=s.key in readers,
                inputs=s.d if s.key in readers_of_units and s.uses[0].node not in kernels else 0,
            )
            for s in group
        }
        backward = GradientPass(
            graph,
            [use for s in group for use in s.uses],
            losses,
            draws=effort.draws,
            smooth=True,
            seed=seed,
            kernels=kernels,
        )
        collect_sensitivity(
            backward,
            collectors,
            list(data.feeds(chosen, batch=effort.batch)),
            lambda done, total: progress("calibrating", done, total),
        )
        if backward.dropped:
            logger.warning(
                "%s: the gradients of %d samples of a run or more are not finite; those do not "
                "count",
                index.store.label,
                backward.dropped,
            )
        found = []
        for k, collector in enumerate(collectors.values()):
            progress("decomposing", k, len(collectors))
            site = collector.site
            seen = collector.found
            if seen.moment.rows:
                weight = site_matrix(index, site)
                cost = bias_cost(index, site)
                one = two_sided_site(site, weight, seen, cost, collector.input_mean)
                groups = heads_of.get(site.key)
                if groups:
                    own, gammas = biases[site.uses[0].node], seen.block_fishers()
                    one = with_heads(one, weight, groups, gammas, own, added[site.key])
                channels_seen = collector.channels
                if channels_seen is not None and channels_seen.moment.rows:
                    one = with_channels(one, channels_seen)
                if site.key in readers_of_units:
                    of_units = channels_seen.moment if channels_seen else collector.inputs
                    assert of_units is not None
                    one = with_units(one, weight, of_units, channels_seen)
                found.append(one)
        progress("decomposing", len(collectors), len(collectors))
        measured += _predicted(
            graph, index, found, sides, losses, kernels, data, tested, effort, seed, progress
        )
    return measured


def _predicted(
    graph: TorchGraph,
    index: GraphIndex,
    found: Sequence[TwoSidedSite],
    sides: Mapping[str, SmallerSide],
    losses: Sequence[OutputLoss],
    kernels: Mapping[int, np.ndarray],
    data: Dataset,
    samples: Sequence[int],
    effort: Effort,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> list[TwoSidedSite]:
    """The same sites with the larger of both predictions."""
    sites = [f.site for f in found]
    probes = {}
    for f in found:
        mean = f.moment.mean if f.centred else np.zeros(f.moment.width)
        probes[f.site.key] = [Probe(found=f.found, rows="smaller", mean=mean)]
        if f.heads is not None:
            lost = forgiven(f.heads.groups, f.heads.mean)
            rest = Probe(found=f.heads.found, rows="outputs", mean=lost - f.heads.behind)
            probes[f.site.key].append(rest)
        if f.channels is not None:
            of_channels = Probe(found=f.channels.found, rows="channels", mean=f.channels.mean)
            probes[f.site.key].append(of_channels)
        if f.units is not None:
            inner = f.channels is None
            of_units = Probe(
                found=f.units.selection.found,
                rows="inputs" if inner else "channels",
                mean=f.units.mean,
                weight=site_matrix(index, f.site) if inner else None,
            )
            probes[f.site.key].append(of_units)
    backward = GradientPass(
        graph,
        [use for s in sites for use in s.uses],
        losses,
        draws=min(effort.draws, 2),
        smooth=False,
        seed=seed + 1,  # other directions than the factors were made for
        kernels=kernels,
    )
    quadratics = sample_quadratics(
        backward,
        sites,
        probes,
        sides,
        list(data.feeds(samples, batch=effort.batch)),
        lambda done, total: progress("predicting", done, total),
    )
    return [f.corrected(quadratics[f.site.key]) for f in found]


def _kernels(index: GraphIndex, sites: Sequence[Site]) -> dict[int, np.ndarray]:
    """Kernels of Convs whose input channels may be decomposed, by node."""
    found = {}
    for site in sites:
        if channel_patches(site) is not None:
            kernel = index.constant(site.weight)
            assert kernel is not None
            found[site.uses[0].node] = kernel.astype(np.float32)
    return found


def _heads(sites: Sequence[Site], hidden: Sequence[Hidden]) -> dict[str, list[tuple[slice, bool]]]:
    """By key of the site that makes them: rows of each group, and whether their mean may go."""
    takes = {s.key: s.bias in ("input", "add") for s in sites}
    found: dict[str, list[tuple[slice, bool]]] = {}
    for each in hidden:
        for group in each.groups:
            rows = slice(group.made.start, group.made.start + each.size)
            centred = group.met.side == "columns" and takes.get(group.met.site, False)
            found.setdefault(group.made.site, []).append((rows, centred))
    return found


def _groups(sites: Sequence[Site], limit: int) -> Iterator[list[Site]]:
    """Sites in order, cut where their sums would take more than `limit` bytes."""
    group: list[Site] = []
    held = 0
    for site in sites:
        need = BYTES * 2 * site.full_rank**2
        if group and held + need > limit:
            yield group
            group, held = [], 0
        group.append(site)
        held += need
    if group:
        yield group
