"""What is looked at of each site, and how it is decomposed by what was seen."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_utilrank.calibration.taps import ROWS_KEPT, ROWS_PER_FEATURE_KEPT
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.moves.two_convs import CHANNELS, TWO_CONVS
from onnx_utilrank.ranking.cost import bias_cost
from onnx_utilrank.ranking.inner import Reading, Units, forgiven
from onnx_utilrank.ranking.two_sided import (
    TwoSidedSite,
    reading,
    two_sided_site,
    with_heads,
    with_inner,
)
from onnx_utilrank.sensitivity.collect import Collector, Seen
from onnx_utilrank.sensitivity.gradients import GradientPass, Splits
from onnx_utilrank.sensitivity.quadratic import Probe
from onnx_utilrank.sensitivity.side import Changes, SmallerSide
from onnx_utilrank.sensitivity.sums import RowSums
from onnx_utilrank.sites.bias import own_biases
from onnx_utilrank.sites.find import site_matrix, site_weight
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site
from onnx_utilrank.sites.tied import find_tied
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["Aspects"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aspects:
    """What is looked at of each site.

    Attributes:
        index: The model.
        losses: What counts at its outputs.
        biases: What the node of each use adds to W x itself, [m], by node.
        heads: By key of the site that makes hidden features of any basis: rows of each group, and
            whether their mean may go.
        added: By key, what is added to the features that a site makes, on their way.
        readers: Keys of the sites that read such features.
        readers_of_units: Keys of those that read units, and of all that read the same.
        changes: What is decomposed in the place of the weights, if anything is.
        tied: Keys of tables and of the layers that share their weight.
        splits: Of Convs that may become two, by node.
    """

    index: GraphIndex
    losses: tuple[OutputLoss, ...]
    biases: Mapping[int, np.ndarray]
    heads: Mapping[str, Sequence[tuple[slice, bool]]]
    added: Mapping[str, np.ndarray]
    readers: frozenset[str]
    readers_of_units: Mapping[str, tuple[str, ...]]
    changes: Changes | None
    tied: Mapping[str, str]
    splits: Mapping[int, Splits]

    @classmethod
    def of(
        cls,
        index: GraphIndex,
        sites: Sequence[Site],
        hidden: Sequence[Hidden],
        losses: Sequence[OutputLoss],
        *,
        moves: Collection[str],
        changes: Changes | None,
    ) -> "Aspects":
        """What has to be looked at.

        Args:
            index: The model.
            sites: The sites.
            hidden: Features between them that may shrink.
            losses: What counts at the outputs.
            moves: Keys of those by which a Conv may become two.
            changes: What is decomposed in the place of the weights, if anything is.
        """
        basis = [h for h in hidden if not h.units]
        of_units = {key: h.readers for h in hidden for key in h.readers}
        added = {
            s.key: h.added(index, s.key, s.m) for h in basis for s in sites if s.key in h.sites
        }
        met = [g.met for h in basis for g in h.groups]
        return cls(
            index=index,
            losses=tuple(losses),
            biases={node: b for site in sites for node, b in own_biases(index, site).items()},
            heads=_heads(sites, basis),
            added=added,
            readers=frozenset(each.site for each in met if each.side == "columns"),
            readers_of_units=of_units,
            changes=changes,
            tied={table.key: head.key for table, head in find_tied(index, sites)},
            splits=_splits(index, sites, frozenset(moves), frozenset(of_units)),
        )

    def joined(self, sites: Sequence[Site]) -> list[list[Site]]:
        """Sites in order; with each come those that have to be looked at together with it.

        With a table it is the layer that shares its weight, and with a weight that reads hidden
        units the others that read them.
        """
        by_key = {site.key: site for site in sites}
        sets = [*self.tied.items(), *dict.fromkeys(self.readers_of_units.values())]
        found: list[list[Site]] = []
        seen: set[str] = set()
        for site in sites:
            together = [] if site.key in seen else [site.key]
            for key in together:  # which grows
                others = [other for each in sets if key in each for other in each]
                together += [k for k in dict.fromkeys(others) if k in by_key and k not in together]
            if together:
                found.append([by_key[key] for key in together])
            seen.update(together)
        return found

    def sums(self, site: Site) -> dict[Hashable, int]:
        """Bytes of the running sums of a site."""
        needed = sum(map(RowSums.bytes, (site.full_rank, *self._inner(site).values())))
        if self._reads_units(site):
            needed += RowSums.bytes(site.d, gradients=False)
        return {site.key: needed}

    def described(self, sites: Sequence[Site]) -> tuple[object, ...]:
        """All that tells what is looked at of sites."""
        of_sites = [
            (
                # Patterns choose uses: one key may stand for more of them, or fewer.
                *(s.key, s.op_type, [use.node for use in s.uses], self.heads.get(s.key)),
                tuple(self._inner(s)),
                *(s.key in self.readers, self.readers_of_units.get(s.key)),
            )
            for s in sites
        ]
        changes = () if self.changes is None else (self.changes.fingerprint,)
        return of_sites, *changes

    def sides(self, sites: Sequence[Site]) -> dict[str, SmallerSide]:
        """The rows of their smaller sides, by key."""
        own = self.changes is None
        return {s.key: SmallerSide(s, self._weight(s), self.biases, applied=own) for s in sites}

    def _weight(self, site: Site) -> np.ndarray:
        """What is decomposed, [m, d]."""
        return site_weight(self.index, site) if self.changes is None else self.changes.of(site)

    def backward(
        self, graph: TorchGraph, sites: Sequence[Site], draws: int, *, smooth: bool, seed: int
    ) -> GradientPass:
        """Gradients of all uses of the sites; see `GradientPass`."""
        uses = [use for s in sites for use in s.uses]
        return GradientPass(
            graph,
            uses,
            self.losses,
            draws=draws,
            smooth=smooth,
            seed=seed,
            splits=self.splits,
        )

    def collectors(self, sites: Sequence[Site]) -> dict[str, Collector]:
        """Sums over no runs yet, by key."""
        sides = self.sides(sites)
        return {site.key: self._collector(site, sides[site.key]) for site in sites}

    def _collector(self, site: Site, side: SmallerSide) -> Collector:
        return Collector(
            site,
            side,
            max(ROWS_PER_FEATURE_KEPT * site.full_rank, ROWS_KEPT),
            inner=self._inner(site),
            groups=[rows for rows, _ in self.heads.get(site.key, ())],
            input_mean=site.key in self.readers,
            inputs=site.d if self._reads_units(site) else 0,
        )

    def _inner(self, site: Site) -> dict[str, int]:
        """Features that the first of two Convs reads, by key of the move."""
        found = self.splits.get(site.uses[0].node)
        return {} if found is None else {key: s.features for key, s in found.moves.items()}

    def _reads_units(self, site: Site) -> bool:
        """Whether hidden units are its inputs, and not the channels of a Conv of several taps."""
        return site.key in self.readers_of_units and CHANNELS.key not in self._inner(site)

    def decomposed(self, seen: Sequence[tuple[Site, Seen]]) -> list[TwoSidedSite]:
        """Sites that come together, by what was seen of them."""
        found = {site.key: self._decomposed(site, of_site) for site, of_site in seen}
        readers = self.readers_of_units
        for keys in dict.fromkeys(readers[key] for key in found if key in readers):
            together = [(s, of_site) for s, of_site in seen if s.key in keys]
            ranked = Units.of([self._reading(found[s.key], of_site) for s, of_site in together])
            for (site, _), units in zip(together, ranked, strict=True):
                found[site.key] = replace(found[site.key], units=units)
        return list(found.values())

    def _reading(self, site: TwoSidedSite, seen: Seen) -> Reading:
        """The hidden units that a site reads."""
        channels = seen.inner.get(CHANNELS.key)
        moment = seen.inputs if channels is None else channels.moment
        assert moment is not None
        weight = self._weight(site.site).astype(np.float64)
        return reading(site, weight, seen.side, moment, channels)

    def _decomposed(self, site: Site, seen: Seen) -> TwoSidedSite:
        weight = self._weight(site).astype(np.float64)
        cost = bias_cost(self.index, site)
        side = seen.side
        if seen.tokens is not None:
            side = replace(side, moment=seen.tokens.moment(weight))
        found = two_sided_site(site, weight, side, cost, seen.input_mean)
        if site.key in self.heads:
            own, added = self.biases[site.uses[0].node], self.added[site.key]
            found = with_heads(found, weight, self.heads[site.key], seen.side, own, added)
        for move, of_inner in seen.inner.items():
            if of_inner.moment.rows:
                found = with_inner(found, move, of_inner)
        return found

    def probes(self, found: TwoSidedSite) -> list[Probe]:
        """In the order that `TwoSidedSite.corrected` wants."""
        mean = found.moment.mean if found.centred else np.zeros(found.moment.width)
        probes = [Probe(found=found.found, rows="smaller", mean=mean)]
        heads, units = found.heads, found.units
        if heads is not None:
            lost = forgiven(heads.groups, heads.mean)
            probes.append(Probe(found=heads.found, rows="outputs", mean=lost - heads.behind))
        probes += [Probe(found=i.found, rows=i.move, mean=i.mean) for i in found.inner]
        if units is not None:
            inner = self._reads_units(found.site)
            probes.append(
                Probe(
                    found=units.selection.found,
                    rows="inputs" if inner else CHANNELS.key,
                    mean=units.mean,
                    weight=site_matrix(self.index, found.site) if inner else None,
                    together=self.readers_of_units[found.site.key],
                )
            )
        return probes


def _splits(
    index: GraphIndex, sites: Sequence[Site], moves: frozenset[str], of_units: frozenset[str]
) -> dict[int, Splits]:
    """Of Convs that may become two, or of which the channels are units, by node."""
    found = {}
    for site in sites:
        wanted = moves | {CHANNELS.key} if site.key in of_units else moves
        kinds = [kind for kind in TWO_CONVS if kind.key in wanted]
        ways = {kind.key: split for kind in kinds if (split := kind.split(site)) is not None}
        if ways:
            kernel = index.constant(site.weight)
            assert kernel is not None
            found[site.uses[0].node] = Splits(kernel=kernel.astype(np.float32), moves=ways)
    return found


def _heads(sites: Sequence[Site], hidden: Sequence[Hidden]) -> dict[str, list[tuple[slice, bool]]]:
    takes = {s.key: s.bias in ("input", "add") for s in sites}
    found: dict[str, list[tuple[slice, bool]]] = {}
    for each in hidden:
        for made in each.made:
            rows = slice(made.start, made.start + each.size)
            met = (g.met for g in each.groups if g.made == made)
            centred = all(p.side == "columns" and takes.get(p.site, False) for p in met)
            found.setdefault(made.site, []).append((rows, centred))
    return found
