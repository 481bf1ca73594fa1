"""Find features that can shrink between weights."""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.sites.choose_hidden import choose_hidden
from onnx_utilrank.sites.follow import Meeting, Trace, Values, moves_within
from onnx_utilrank.sites.follow_units import UnitTrace
from onnx_utilrank.sites.hidden import Group, Hidden, Part, Repair, Vector
from onnx_utilrank.sites.site import Site

__all__ = ["find_hidden"]


def find_hidden(index: GraphIndex, sites: Sequence[Site], values: Values) -> tuple[Hidden, ...]:
    """Features between weights that can shrink, each weight in one set of them at most.

    Of sets that share weights, as those before and behind a hidden layer do, `choose_hidden` says.

    Args:
        index: The model.
        sites: Its sites.
        values: What `values_followed` names, on one sample.
    """
    # A table that is looked up makes features too, but of tokens never seen nothing is known.
    sites = [site for site in sites if not site.one_hot]
    trace = Trace(index, sites, values)
    trace.run()
    units = UnitTrace(index, sites, values)
    units.run()
    found = (*_Assembly(trace).hidden(), *_Assembly(units).units(units.pairs, units.added))
    return choose_hidden(found, sites)


@dataclass(frozen=True, slots=True)
class _Assembly:
    """Puts what met together."""

    trace: Trace

    def hidden(self) -> Iterable[Hidden]:
        """The meetings of features that nothing stopped, joined where they share a weight."""
        good = [m for m in self.trace.meetings if not self._lost(m)]
        for joined in _joined(good, self._sites_of):
            made = self._assemble(joined)
            if made is not None:
                yield made

    def _lost(self, meeting: Meeting) -> bool:
        features = set(meeting.made.ravel().tolist())
        if meeting.rows is not None:
            features |= set(meeting.rows.ravel().tolist())
        return not self.trace.stuck.isdisjoint(features)

    def _owner(self, feature: int) -> Site:
        starts = list(self.trace.first.values())
        return self.trace.sites[bisect.bisect_right(starts, feature) - 1]

    def _sites_of(self, meeting: Meeting) -> set[str]:
        found = {self._owner(int(f)).key for f in meeting.made[:, 0]}
        if meeting.rows is not None:
            found |= {self._owner(int(f)).key for f in meeting.rows[:, 0]}
        if meeting.columns is not None:
            found.add(meeting.columns[0].key)
        return found

    def _assemble(self, meetings: Sequence[Meeting]) -> Hidden | None:
        """One set of features of all its weights; None where a feature of them is left over."""
        sizes = {m.made.shape[1] for m in meetings}
        size = min(sizes)
        if len(sizes) > 1 or size < 2:
            return None
        groups = []
        makers: list[np.ndarray] = []  # which may be met several times
        others: list[np.ndarray] = []  # and what meets them: of one basis each
        for meeting in map(_from_the_shared, meetings):
            for k, line in enumerate(meeting.made):
                if meeting.rows is not None:
                    met = self._part(meeting.rows[k])
                    others.append(meeting.rows[k])
                else:
                    assert meeting.columns is not None
                    site, starts = meeting.columns
                    met = Part(site=site.key, side="columns", start=int(starts[k]))
                made = self._part(line)
                makers.append(line)
                if made is None or met is None:
                    return None
                groups.append(Group(made=made, met=met))
        every = np.concatenate([np.unique(np.concatenate(makers)), *others])
        return self._complete(groups, size, every, units=False)

    def units(self, pairs: Sequence[np.ndarray], added: Sequence[np.ndarray]) -> Iterable[Hidden]:
        """Units, with those that became one with them, as gates do, and all weights that read them.

        Of a squeeze-and-excitation block the second product makes gates, and the first reads too.

        Not the stream that blocks read and add to: what it loses all of them lose, and it would
        take their weights from the units within them, which lose less (`tests/test_units.py`).

        Args:
            pairs: Units that became one.
            added: Those that did in a sum.
        """
        meetings = [m for m in self.trace.meetings if m.columns is not None]
        read = [set(m.made[0].tolist()) for m in meetings]
        for k, meeting in enumerate(meetings):
            lines = _alike(meeting.made[0], pairs)
            if lines is None:
                continue
            features = np.concatenate(lines)
            every = set(features.tolist())
            reading = [j for j, units in enumerate(read) if not every.isdisjoint(units)]
            # All readers are looked at with the first of them.
            if reading[0] != k or not self.trace.stuck.isdisjoint(every):
                continue
            if len(reading) > 1 and any(not every.isdisjoint(sums[0].tolist()) for sums in added):
                continue
            if not all(_among(meetings[j].made[0], lines) for j in reading):
                continue
            made = [self._part(line) for line in lines]
            first = made[0]
            if first is None or len(every) < len(features) or len(lines[0]) < 2:
                continue
            groups = [Group(made=first, met=_columns(meetings[j])) for j in reading]
            groups += [Group(made=part, met=first) for part in made[1:] if part is not None]
            # Not where rows lie apart, a weight reads them twice, or what makes them reads them.
            readers = {_columns(meetings[j]).site for j in reading}
            distinct = len(readers) == len(reading) and len(groups) == len(reading) + len(made) - 1
            if not distinct or not readers.isdisjoint(g.made.site for g in groups):
                continue
            hidden = self._complete(groups, len(lines[0]), features, units=True)
            if hidden is not None:
                yield hidden

    def _complete(
        self, groups: Sequence[Group], size: int, covered: np.ndarray, *, units: bool
    ) -> Hidden | None:
        """What else belongs to some groups; None where their makers have other rows too."""
        every = np.sort(covered)
        owners = {self._owner(int(f)).key for f in every}
        wanted = [
            self.trace.first[s.key] + np.arange(s.m, dtype=np.int32)
            for s in self.trace.sites
            if s.key in owners
        ]
        if not np.array_equal(every, np.concatenate(wanted)):
            return None
        keys = owners | {p.site for g in groups for p in (g.made, g.met)}
        features = set(every.tolist())
        repairs = self._repairs(features, size)
        vectors = self._vectors(features, size)
        if repairs is None or vectors is None:
            return None
        return Hidden(
            key=groups[0].made.site,
            sites=tuple(s.key for s in self.trace.sites if s.key in keys),
            size=size,
            groups=tuple(groups),
            reshapes=tuple(r for op, r in repairs if op in ("Reshape", "Expand")),
            splits=tuple(r.node for op, r in repairs if op == "Split"),
            slices=tuple(r for op, r in repairs if op == "Slice"),
            shapes=tuple(r for op, r in repairs if op == "Shape"),
            depthwise=tuple(r for op, r in repairs if op == "Conv"),
            attentions=tuple(r for op, r in repairs if op == "Attention"),
            vectors=vectors,
            values=tuple(
                name
                for name, numbers in self.trace.numbers.items()
                if int(numbers.flat[0]) in features
            ),
            units=units,
        )

    def _part(self, features: np.ndarray) -> Part | None:
        """Rows that follow each other in one weight."""
        site = self._owner(int(features[0]))
        start = int(features[0]) - self.trace.first[site.key]
        if not np.array_equal(features, features[0] + np.arange(len(features))):
            return None
        return (
            Part(site=site.key, side="rows", start=start)
            if start + len(features) <= site.m
            else None
        )

    def _repairs(self, features: set[int], size: int) -> list[tuple[str, Repair]] | None:
        """Nodes that name the extents of these features; None where those do not lie in runs."""
        found = []
        for op, k, numbers in self.trace.seen:
            if int(numbers.flat[0]) not in features:
                continue
            axes = [a for a in range(numbers.ndim) if moves_within(numbers, a)]
            if len(axes) != 1:
                return None
            extent = numbers.shape[axes[0]]
            runs = np.moveaxis(numbers, axes[0], -1).reshape(-1, extent)
            if extent % size or not _in_runs(np.unique(runs, axis=0).reshape(-1, size)):
                return None
            if not self._cuts_between_groups(op, k, size, extent):
                return None
            stated = self._stated(op, k, axes[0], numbers.ndim)
            if stated is not None:
                place, length = stated
                found.append((op, Repair(node=k, place=place, length=length, extent=extent)))
        return found

    def _cuts_between_groups(self, op: str, k: int, size: int, extent: int) -> bool:
        """Whether a Split or Slice takes no group apart; True for what cuts nothing."""
        node, index = self.trace.index.node(k), self.trace.index
        if op == "Split":
            sizes = index.constant(node.input[1])
            return sizes is not None and not any(int(n) % size for n in sizes)
        if op == "Slice":
            bounds = [self.trace.told(name) for name in node.input[1:3]]
            inside = [int(b.flat[0]) for b in bounds if b is not None]
            return not any(bound % size for bound in inside if abs(bound) < extent)
        return True

    def _stated(self, op: str, k: int, axis: int, rank: int) -> tuple[int, int] | None:
        """Where a node states the extent of an axis, and among how many; None where it does not."""
        if op == "Shape":
            shown = _shown(self.trace.index.node(k), rank)
            return (shown.index(axis), len(shown)) if axis in shown else None
        if op == "Reshape" and self._target(k)[axis] <= 0:
            return None  # it follows from others
        if op == "Expand":
            target = self._target(k)
            place = axis - (rank - len(target))
            return (place, len(target)) if place >= 0 and target[place] != 1 else None
        return axis, rank

    def _target(self, k: int) -> np.ndarray:
        told = self.trace.told(self.trace.index.node(k).input[1])
        assert told is not None
        return told

    def _vectors(self, features: set[int], size: int) -> tuple[Vector, ...] | None:
        found = []
        for k, name, axis, line in self.trace.vectors:
            if int(line[0]) not in features:
                continue
            if len(line) % size:
                return None
            parts = [self._part(run) for run in line.reshape(-1, size)]
            kept = tuple(p for p in parts if p is not None)
            if len(kept) < len(parts):
                return None
            found.append(Vector(node=k, name=name, axis=axis, parts=kept))
        return tuple(found)


def _from_the_shared(meeting: Meeting) -> Meeting:
    """The meeting seen from keys that several queries meet: those have one basis together."""
    if meeting.rows is None or len(np.unique(meeting.rows[:, 0])) == len(meeting.rows):
        return meeting
    return Meeting(made=meeting.rows, rows=meeting.made)


def _alike(line: np.ndarray, pairs: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """The units and those that became one with them, in the same order; None where some did not."""
    lines = [line]
    for known in lines:  # which grows
        for pair in pairs:
            for here, there in (pair, pair[::-1]):
                partner = dict(zip(here.tolist(), there.tolist(), strict=True))
                met = [int(f) in partner for f in known]
                if not any(met):
                    continue
                if not all(met) or len(partner) < len(here) or len(set(there)) < len(there):
                    return None
                other = np.array([partner[int(f)] for f in known], dtype=line.dtype)
                if not _among(other, lines):
                    lines.append(other)
    return lines


def _among(line: np.ndarray, lines: Sequence[np.ndarray]) -> bool:
    return any(np.array_equal(line, each) for each in lines)


def _columns(meeting: Meeting) -> Part:
    """All the columns of the weight that reads units."""
    assert meeting.columns is not None
    site, _ = meeting.columns
    patches = site.uses[0].inputs.patches
    taps = math.prod(patches.kernel) if patches else 1
    return Part(site=site.key, side="columns", start=0, taps=taps)


def _shown(node: onnx.NodeProto, rank: int) -> range:
    """The axes whose extents a Shape gives (ONNX operators, Shape, `start` and `end`)."""
    given = {a.name: a.i for a in node.attribute}
    return range(rank)[given.get("start", 0) : given.get("end")]


def _in_runs(lines: np.ndarray) -> bool:
    return bool((np.diff(lines, axis=1) == 1).all())


def _joined(
    meetings: Sequence[Meeting], sites_of: Callable[[Meeting], set[str]]
) -> list[list[Meeting]]:
    """Meetings in sets that share no weight."""
    sets: list[tuple[set[str], list[Meeting]]] = []
    for meeting in meetings:
        keys, members = sites_of(meeting), [meeting]
        for other in [s for s in sets if not s[0].isdisjoint(keys)]:
            sets.remove(other)
            keys |= other[0]
            members = other[1] + members
        sets.append((keys, members))
    return [members for _, members in sets]
