"""What each site takes as it is, and after each move: the latency that a plan is made with."""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.moves.move import MoveKind
from onnx_utilrank.sites.site import Site

__all__ = ["PAYS", "Curve", "LatencyCosts", "SiteTimes"]

# A move is worth making where it takes at most this share of the dense weight's time: two sessions
# of one model can differ by as much.
PAYS = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Time over a size, from a few that were measured.

    Attributes:
        sizes: Ranks, rows or columns, rising.
        times: What they take.
    """

    sizes: tuple[int, ...]
    times: tuple[float, ...]

    @classmethod
    def of(cls, measured: Mapping[int, float]) -> "Curve":
        """A curve that does not fall: less work is never slower but by noise."""
        sizes = sorted(measured)
        rising = np.maximum.accumulate([measured[size] for size in sizes])
        return cls(sizes=tuple(sizes), times=tuple(float(t) for t in rising))

    def at(self, size: float) -> float:
        """The time at a size: on the line between its neighbours, flat beyond the smallest."""
        if len(self.sizes) == 1 or size <= self.sizes[0]:
            return self.times[0]
        k = min(bisect.bisect_left(self.sizes, size), len(self.sizes) - 1)
        (a, b), (s, t) = self.sizes[k - 1 : k + 1], self.times[k - 1 : k + 1]
        return s + (t - s) * (size - a) / (b - a)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteTimes:
    """One site, in nanoseconds a run, over all its uses.

    Attributes:
        dense: As it is.
        moves: After a move, by its key, over the rank.
        rows: With fewer outputs, over their number, where hidden features can take them away.
        columns: With fewer inputs.
    """

    dense: float
    moves: Mapping[str, Curve]
    rows: Curve | None = None
    columns: Curve | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyCosts:
    """A model on one provider and shape of feed.

    Attributes:
        total: Nanoseconds of a run of the whole model.
        sites: Its sites, by key; together they take no more than `total`.
        provider: ONNX Runtime's name of where it ran.
    """

    total: float
    sites: Mapping[str, SiteTimes]
    provider: str

    def dense(self, site: Site) -> float:
        """A site as it is."""
        return self.sites[site.key].dense

    def factored(self, site: Site, kind: MoveKind, rank: int) -> float:
        """A site after a move."""
        return self.sites[site.key].moves[kind.key].at(rank)

    def shrunk(self, site: Site, rows: int, columns: int) -> float:
        """A site with fewer outputs and inputs."""
        times = self.sites[site.key]
        taken = times.dense
        for curve, size in ((times.rows, rows), (times.columns, columns)):
            if curve is not None:
                taken *= curve.at(size) / max(curve.times[-1], 1e-9)
        return taken

    def pays(self, site: Site, kind: MoveKind, rank: int) -> bool:
        """Whether a move was measured to be faster than the dense weight."""
        times = self.sites[site.key]
        return kind.key in times.moves and times.moves[kind.key].at(rank) <= PAYS * times.dense

    def refused(self, site: Site) -> str | None:
        """Why a site has no move, where that is because none is faster; None where one is."""
        times = self.sites[site.key]
        if not times.dense:
            return "it cannot be timed by itself"
        if not times.moves:
            return None
        key, curve = min(times.moves.items(), key=lambda item: item[1].times[0])
        if curve.times[0] <= PAYS * times.dense:
            return None
        return (
            f"no move is faster on {self.provider}: {_time(times.dense)} as it is, "
            f"{_time(curve.times[0])} at rank {curve.sizes[0]} ({key})"
        )


def _time(nanoseconds: float) -> str:
    for unit, size in (("ms", 1e6), ("µs", 1e3)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:.3g} {unit}"
    return f"{nanoseconds:.3g} ns"
