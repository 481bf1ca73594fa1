"""The plan: what is decided for every site, as a file that can be read, edited and replayed."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.store import atomic_write
from onnx_utilrank.moves.moves import MOVES
from onnx_utilrank.moves.two_convs import TWO_CONVS
from onnx_utilrank.ranking.then import ThenEntry
from onnx_utilrank.statistics.divergence import WEIGHTINGS, Weighting

__all__ = ["HiddenEntry", "PlanEntry", "RankPlan", "SkippedNode"]

SCHEMA = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEntry:
    """What is decided for one site.

    Attributes:
        site: Key of the site.
        nodes: Names of the nodes that share its weight.
        op_type: Their operator.
        m: Output features.
        d: Input features.
        rank: Rank of the factors; None leaves the weight as it is.
        bias: Whether the mean of what is lost goes into the bias.
        subspaces: Dimensions k_S and k_T of the input and output subspaces (`utilized-rank`).
        move: How the factors are stored (a key of `MOVES`); None for dense sites.
        parameters_before: Elements of the weight.
        parameters_after: Elements of what takes its place, bias correction included.
        predicted_error: What the site is expected to lose: the rise of the model's divergence
            (`two-sided`), or the squared error of its outputs relative to their variance, or to
            their energy (`utilized-rank`); 0 for dense sites, None where the method does not know.
        rows: Rows that the decision rests on; None without data.
        trusted: False where those are fewer than four times the width.
        reason: Why, in words.
    """

    site: str
    nodes: tuple[str, ...]
    op_type: str
    m: int
    d: int
    rank: int | None
    bias: bool
    subspaces: tuple[int, int] | None
    move: str | None
    parameters_before: int
    parameters_after: int
    predicted_error: float | None
    rows: int | None
    trusted: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenEntry:
    """What is decided for features that lie between weights, such as those of attention heads.

    Attributes:
        hidden: What they are called.
        sites: Keys of all weights that make or read them.
        groups: Groups, such as heads.
        size: Features in each.
        kept: Features that each keeps; None for all.
        predicted_error: The rise of the model's divergence.
        reason: Why, in words.
    """

    hidden: str
    sites: tuple[str, ...]
    groups: int
    size: int
    kept: int | None
    predicted_error: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedNode:
    """A node that is no site, and why."""

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """Decisions for a whole model.

    Attributes:
        model_sha256: Fingerprint of the model it is for (`ModelStore.fingerprint`).
        method: Key of the method.
        target: What was asked for, such as {"param_ratio": 0.5}.
        parameters_before: Elements of all initializers and constants of the model.
        parameters_after: The same after the rewrite.
        predicted_divergence: What the whole model is expected to lose, the sum over the sites
            (`two-sided`); None where the method does not know.
        weighting: What counted at the outputs, where the user said so.
        refit: Whether layers are fitted anew to what they get behind compressed ones.
        augment: Whether variations of the samples were to count too.
        entries: One a site, in graph order.
        hidden: Features between sites that could shrink.
        skipped: Nodes that are not sites.
        then: How the model is quantized afterwards; None where it is not.
        schema: Version of this format.
    """

    model_sha256: str
    method: str
    target: dict[str, float]
    parameters_before: int
    parameters_after: int
    predicted_divergence: float | None
    weighting: Weighting | None
    refit: bool
    augment: bool
    entries: tuple[PlanEntry, ...]
    hidden: tuple[HiddenEntry, ...]
    skipped: tuple[SkippedNode, ...]
    then: ThenEntry | None = None
    schema: int = SCHEMA

    @property
    def factored(self) -> tuple[PlanEntry, ...]:
        """The entries that change something."""
        return tuple(e for e in self.entries if e.rank is not None)

    @property
    def shrunk(self) -> tuple[HiddenEntry, ...]:
        """The hidden features that lose some."""
        return tuple(h for h in self.hidden if h.kept is not None)

    @property
    def shrinking(self) -> frozenset[str]:
        """Keys of the sites that those belong to."""
        return frozenset(key for h in self.shrunk for key in h.sites)

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.factored or self.shrunk)

    @property
    def param_ratio(self) -> float:
        """Parameters kept, over the whole model."""
        return self.parameters_after / max(self.parameters_before, 1)

    @property
    def met(self) -> bool:
        """Whether the model as it is has what was asked for: a ratio of all of it."""
        return any(key.endswith("_ratio") and value >= 1 for key, value in self.target.items())

    def fingerprint(self) -> str:
        """SHA-256 of what is decided, for which model; predictions and reasons do not count."""
        decided = [(e.site, e.rank, e.bias, e.subspaces, e.move) for e in self.factored]
        shrunk = [(h.hidden, h.kept) for h in self.shrunk]
        parts = [self.model_sha256, self.method, self.refit, self.augment, decided, shrunk]
        if self.then is not None:
            parts.append(dataclasses.astuple(self.then))
        text = json.dumps(parts)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as JSON text; equal plans give equal text."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan.

        Raises:
            ModelError: The file cannot be written.
        """
        try:
            with atomic_write(Path(path)) as f:
                f.write(self.to_json().encode())
        except OSError as e:
            raise ModelError(f"{path}: cannot be written ({e.strerror or e})") from e

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, point: float | None = None) -> "RankPlan":
        """Read a plan.

        Args:
            path: What `save` wrote, or the report of a sweep.
            point: The ratio of the point, where it is a sweep.

        Raises:
            ModelError: It cannot be read, is not a plan of this version, or a sweep that has no
                such point.
        """
        try:
            text = Path(path).read_text(encoding="utf8")
        except (OSError, UnicodeDecodeError) as e:
            raise ModelError(f"{path}: cannot be read ({e})") from e
        if point is not None:
            text = _of_point(text, point, str(path))
        return cls.from_json(text, label=str(path))

    @classmethod
    def from_json(cls, text: str, *, label: str = "plan") -> "RankPlan":
        """The plan that `to_json` wrote.

        Raises:
            ModelError: The text is not JSON, a key is unknown or missing, or a value is not of
                its type or out of range.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ModelError(f"{label}: not JSON ({e})") from e
        _check_report(raw, label)
        # First, as another version has other keys.
        schema = raw.get("schema") if isinstance(raw, Mapping) else None
        if type(schema) is int and schema != SCHEMA:
            raise ModelError(f"{label}: plan schema {schema} is not {SCHEMA}")
        top = _fields(raw, cls, label)
        for key, value in top["target"].items():
            if not _is_finite(value):
                raise ModelError(f"{label}: target {key!r} is not a finite number")
        where = [f"{label}: entry {k}" for k in range(len(top["entries"]))]
        predicted = top["predicted_divergence"]
        if top["weighting"] not in (None, *WEIGHTINGS):
            raise ModelError(f"{label}: weighting {top['weighting']!r} is not known")
        if predicted is not None and not _is_finite(predicted):
            raise ModelError(f"{label}: 'predicted_divergence' is not a finite number")
        entries = [
            PlanEntry(**_fields(e, PlanEntry, w))
            for e, w in zip(top["entries"], where, strict=True)
        ]
        seen: set[str] = set()
        for entry, place in zip(entries, where, strict=True):
            _check_entry(entry, place)
            if entry.site in seen:
                raise ModelError(f"{place} ({entry.site!r}): the site has an entry already")
            seen.add(entry.site)
        skipped = [
            SkippedNode(**_fields(s, SkippedNode, f"{label}: skipped {k}"))
            for k, s in enumerate(top["skipped"])
        ]
        hidden = [
            HiddenEntry(**_fields(h, HiddenEntry, f"{label}: hidden {k}"))
            for k, h in enumerate(top["hidden"])
        ]
        for k, each in enumerate(hidden):
            _check_hidden(each, f"{label}: hidden {k} ({each.hidden!r})")
        parts = {"entries": tuple(entries), "hidden": tuple(hidden), "skipped": tuple(skipped)}
        then = ThenEntry.from_json(top["then"], label)
        return cls(**top | parts | {"then": then})


def _check_report(raw: object, label: str) -> None:
    """A report is no plan, but holds some.

    Raises:
        ModelError: It is one.
    """
    if not isinstance(raw, Mapping):
        return
    points = raw.get("points")
    if isinstance(points, list):
        ratios = [f"{p['ratio']:g}" for p in points if isinstance(p, Mapping) and "ratio" in p]
        raise ModelError(
            f"{label}: is the report of a sweep; say which point of it ({', '.join(ratios)})"
        )
    if isinstance(raw.get("plan"), Mapping):
        raise ModelError(f"{label}: is a report; the plan is what --plan-out writes")


def _of_point(text: str, point: float, label: str) -> str:
    """The plan of one point of a sweep's report."""
    try:
        points = json.loads(text)["points"]
        plans = [p["plan"] for p in points if p["ratio"] == point]
    except (ValueError, RecursionError, KeyError, TypeError) as e:
        raise ModelError(f"{label}: not the report of a sweep") from e
    if not plans:
        raise ModelError(f"{label}: the sweep has no point at {point:g}")
    return json.dumps(plans[0])


# JSON types of the fields; a list becomes a tuple.
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    # A literal type prints as the values it allows, which are checked apart.
    str(Weighting | None): (str, type(None)),
    "int": (int,),
    "bool": (bool,),
    "int | None": (int, type(None)),
    "float": (float, int),
    "float | None": (float, int, type(None)),
    "tuple[int, int] | None": (list, type(None)),
    "tuple[str, ...]": (list,),
    "tuple[PlanEntry, ...]": (list,),
    "tuple[HiddenEntry, ...]": (list,),
    "tuple[SkippedNode, ...]": (list,),
    "dict[str, float]": (dict,),
    str(ThenEntry | None): (dict, type(None)),
}


def _fields(raw: object, kind: type, label: str) -> dict[str, Any]:
    """The keys of a JSON object, checked against the fields of a dataclass."""
    if not isinstance(raw, Mapping):
        raise ModelError(f"{label}: not an object")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(raw) - set(fields))
    missing = sorted(set(fields) - set(raw))
    if unknown:
        raise ModelError(f"{label}: unknown key {unknown[0]!r}")
    if missing:
        raise ModelError(f"{label}: key {missing[0]!r} is missing")
    values: dict[str, Any] = {}
    for name, value in raw.items():
        declared = fields[name].type
        spelled = declared if isinstance(declared, str) else _spelled(declared)
        allowed = TYPES[spelled]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ModelError(f"{label}: {name!r} has the wrong type")
        values[name] = tuple(value) if isinstance(value, list) else value
    return values


def _spelled(declared: object) -> str:
    text = declared.__name__ if isinstance(declared, type) else str(declared)
    if text in ("tuple", "dict"):
        text = str(declared)
    return text.replace(f"{__name__}.", "")


def _check_entry(entry: PlanEntry, place: str) -> None:
    """Ranges that hold for any model; the pipeline checks the entry against its own."""
    place = f"{place} ({entry.site!r})"
    # What the first of two Convs reads is counted by itself: there may be more than outputs.
    inner = entry.move in {move.key for move in TWO_CONVS}
    full = entry.d if inner else min(entry.m, entry.d)
    if entry.rank is not None and not 1 <= entry.rank <= full:
        raise ModelError(f"{place}: rank {entry.rank} is not between 1 and {full}")
    if entry.subspaces is not None:
        pair = entry.subspaces
        if len(pair) != 2 or not all(type(k) is int for k in pair):
            raise ModelError(f"{place}: 'subspaces' is not a pair of whole numbers")
        if not (1 <= pair[0] <= entry.d and 1 <= pair[1] <= entry.m):
            raise ModelError(f"{place}: subspaces {list(pair)} are out of range")
        if entry.rank is not None and min(pair) != entry.rank:
            raise ModelError(f"{place}: subspaces {list(pair)} do not have rank {entry.rank}")
    if not all(isinstance(name, str) for name in entry.nodes):
        raise ModelError(f"{place}: 'nodes' holds something that is not a name")
    if entry.move is not None and entry.move not in {move.key for move in MOVES}:
        raise ModelError(f"{place}: move {entry.move!r} is not known")
    if (entry.move is None) != (entry.rank is None):
        raise ModelError(f"{place}: 'move' and 'rank' have to be given together")
    if entry.predicted_error is not None and not _is_finite(entry.predicted_error):
        raise ModelError(f"{place}: 'predicted_error' is not a finite number")


def _check_hidden(entry: HiddenEntry, place: str) -> None:
    if entry.kept is not None and not 1 <= entry.kept < entry.size:
        most = entry.size - 1
        raise ModelError(f"{place}: {entry.kept} kept features are not between 1 and {most}")
    if not all(isinstance(key, str) for key in entry.sites):
        raise ModelError(f"{place}: 'sites' holds something that is not a name")
    if not _is_finite(entry.predicted_error):
        raise ModelError(f"{place}: 'predicted_error' is not a finite number")


def _is_finite(value: object) -> bool:
    """Whether a JSON value is a number that float64 can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
