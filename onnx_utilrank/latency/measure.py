"""Time every site of a model in every form that a plan may choose, each distinct shape once."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np

from onnx_utilrank.calibration.cache import Cache
from onnx_utilrank.calibration.collect import Progress
from onnx_utilrank.calibration.survey import survey
from onnx_utilrank.latency.costs import Curve, LatencyCosts, SiteTimes
from onnx_utilrank.latency.excerpt import Excerpt, excerpt, values_read
from onnx_utilrank.latency.timing import relative_time, run_overhead, seconds_of, warm
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.moves.move import MoveKind
from onnx_utilrank.moves.two_convs import TwoConvs
from onnx_utilrank.runtime.device import device_key
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, open_session
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site, Use
from onnx_utilrank.statistics.factorize import Factors
from onnx_utilrank.surgery.rewrite import Replacement, rewrite
from onnx_utilrank.torch_graph.placement import gpu_name

__all__ = ["measure_latency"]

logger = logging.getLogger(__name__)

# Shares of the largest rank, and of features, that are timed; times lie on lines between them.
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)

Forms = dict[str, dict[int, float]]


def measure_latency(
    index: GraphIndex,
    sites: Sequence[Site],
    hidden: Sequence[Hidden],
    moves: Mapping[str, Sequence[MoveKind]],
    feed: Feed,
    provider: Provider,
    *,
    multiple: int,
    cache: Path | None,
    progress: Progress,
) -> LatencyCosts:
    """Time a model and each of its sites, as they are and after moves.

    A site is timed by itself, with random weights, on what it reads in the model. Where all sites
    together take longer than the model, they are taken to share its time as they do by themselves.

    Args:
        index: The model.
        sites: Its sites.
        hidden: Features between them that may shrink.
        moves: Kinds of moves that may be made, by key of the site.
        feed: What the whole model is run on: rows and sequence lengths are those of this feed.
        provider: Where.
        multiple: Ranks are timed, and to be chosen, in multiples of this.
        cache: Folder that holds times of earlier runs on the same device; None for none.
        progress: Called as sites are done.

    Raises:
        ModelError: The model, or one of its nodes by itself, does not run.
    """
    names = {name for site in sites for name in values_read(index, site)}
    values = survey(index.store, names, feed, provider)
    timer = _Timer(
        provider=provider,
        multiple=multiple,
        cache=_device_cache(cache, provider),
        overhead=run_overhead(provider),
    )
    sides = _shrinking_sides(hidden)
    forms: dict[str, Forms | None] = {}
    for k, site in enumerate(sites):
        progress("timing layers", k, len(sites))
        parts = [
            timer.forms(index, use, values, moves[site.key], sides.get(site.key, frozenset()))
            for use in site.uses
        ]
        forms[site.key] = _added([p for p in parts if p]) if all(parts) else None
    progress("timing layers", len(sites), len(sites))
    whole = seconds_of(warm(open_session(index.source, provider), feed), seconds=1.0)
    return _costs(sites, forms, 1e9 * whole, provider)


def _device_cache(folder: Path | None, provider: Provider) -> Cache:
    if folder is None:
        return Cache()
    folder.mkdir(parents=True, exist_ok=True)
    said = (*device_key(provider), gpu_name(provider.cuda_device))
    return Cache(folder=folder, key=sha256(repr(said).encode()).hexdigest())


@dataclass(kw_only=True)
class _Timer:
    """Times forms of nodes, each distinct node once."""

    provider: Provider
    multiple: int
    cache: Cache
    overhead: float
    known: dict[tuple[object, ...], Forms] = field(default_factory=dict)

    def forms(
        self,
        index: GraphIndex,
        use: Use,
        values: Mapping[str, np.ndarray],
        moves: Sequence[MoveKind],
        sides: frozenset[str],
    ) -> Forms | None:
        """Nanoseconds of a node: dense at "", by the key of a move, and at "rows" and "columns"."""
        whole = excerpt(index, use, values)
        if whole is None:
            return None
        key = (whole.key, tuple(kind.key for kind in moves), tuple(sorted(sides)), self.multiple)
        if key not in self.known:
            entry = self.cache.load("latency", *key)
            if entry is None:
                forms = self._timed(whole, moves, sides, index, use, values)
                entry = {
                    name: np.array(list(times.items()), dtype=np.float64)
                    for name, times in forms.items()
                }
                self.cache.save(entry, "latency", *key)
            self.known[key] = {
                name: {int(size): float(t) for size, t in times} for name, times in entry.items()
            }
        return self.known[key]

    def _timed(
        self,
        whole: Excerpt,
        moves: Sequence[MoveKind],
        sides: frozenset[str],
        index: GraphIndex,
        use: Use,
        values: Mapping[str, np.ndarray],
    ) -> Forms:
        dense = warm(open_session(whole.index.store, self.provider), whole.feed)
        alone = seconds_of(dense)
        least = max(alone - self.overhead, alone / 100)
        forms: Forms = {"dense": {0: 1e9 * least}}

        def nanoseconds(store: ModelStore, feed: Feed) -> float:
            other = warm(open_session(store, self.provider), feed)
            now, ratio = relative_time(dense, other)
            # Of the run it was compared with, less what any run takes.
            share = max(ratio * now - self.overhead, 0.0) / max(now - self.overhead, now / 100)
            return 1e9 * share * least

        for kind in moves:
            ranks = _sizes(kind.top_rank(whole.site), self.multiple)
            if ranks and kind.applies(whole.index, whole.site):
                forms[kind.key] = {
                    rank: nanoseconds(_moved(whole, kind, rank), whole.feed) for rank in ranks
                }
        for side, size in (("rows", whole.site.m), ("columns", whole.site.d)):
            if side not in sides:
                continue
            forms[side] = {size: 1e9 * least}
            taps = _taps(whole.site) if side == "columns" else 1
            for share in SHARES[:-1]:
                kept = max(round(size * share / taps), 1) * taps
                part = excerpt(index, use, values, **{side: kept})
                if part is not None and kept < size:
                    forms[side][kept] = nanoseconds(part.index.store, part.feed)
        return forms


def _sizes(top: int, multiple: int) -> list[int]:
    """Ranks that are timed."""
    return sorted({r for s in SHARES if (r := int(top * s) // multiple * multiple) > 0})


def _taps(site: Site) -> int:
    patches = site.uses[0].inputs.patches
    return 1 if patches is None else site.d // patches.channels


def _moved(whole: Excerpt, kind: MoveKind, rank: int) -> ModelStore:
    """The excerpt after a move, with random factors."""
    site = whole.site
    m, d = site.m, site.d
    inner = outer = rank
    if isinstance(kind, TwoConvs):
        split = kind.split(site)
        assert split is not None
        inner, d = rank * split.taps, split.features
    rng = np.random.default_rng(0)
    factors = Factors(
        left=rng.standard_normal((m, inner)) / np.sqrt(inner),
        right=rng.standard_normal((outer, d)) / np.sqrt(d),
    )
    return rewrite(
        whole.index,
        [Replacement(site=site, move=kind.key, factors=factors, lost_mean=None)],
    )


def _shrinking_sides(hidden: Sequence[Hidden]) -> dict[str, frozenset[str]]:
    """Which sides of which sites lose features where hidden ones shrink."""
    found: dict[str, set[str]] = {}
    for each in hidden:
        for group in each.groups:
            for part in (group.made, group.met):
                found.setdefault(part.site, set()).add(part.side)
    return {key: frozenset(sides) for key, sides in found.items()}


def _added(parts: Sequence[Forms]) -> Forms:
    """Several uses of one weight, which all make the same move."""
    first, *others = parts
    total: Forms = {}
    for name, times in first.items():
        common = [p[name] for p in others if name in p]
        if len(common) == len(others):
            total[name] = {
                size: t + sum(c[size] for c in common)
                for size, t in times.items()
                if all(size in c for c in common)
            }
    return {name: times for name, times in total.items() if times}


def _costs(
    sites: Sequence[Site], forms: Mapping[str, Forms | None], total: float, provider: Provider
) -> LatencyCosts:
    timed = {key: each for key, each in forms.items() if each}
    taken = sum(each["dense"][0] for each in timed.values())
    scale = min(1.0, total / taken) if taken else 1.0

    def curve(each: Forms, name: str) -> Curve | None:
        if name not in each:
            return None
        return Curve.of({size: scale * t for size, t in each[name].items()})

    found = {}
    for site in sites:
        each = timed.get(site.key)
        if each is None:
            # Its share of the time is not known: nothing is gained by a move, as far as that goes.
            logger.warning("%s cannot be timed by itself", site.uses[0].label)
            found[site.key] = SiteTimes(dense=0.0, moves={})
            continue
        kinds = [name for name in each if name not in ("dense", "rows", "columns")]
        found[site.key] = SiteTimes(
            dense=scale * each["dense"][0],
            moves={key: c for key in kinds if (c := curve(each, key))},
            rows=curve(each, "rows"),
            columns=curve(each, "columns"),
        )
    return LatencyCosts(total=total, sites=found, provider=provider.name)
