"""Run the model over the calibration samples and gather the moments of its rows."""

import itertools
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np

from onnx_utilrank.calibration.cache import CHECKPOINT_SECONDS, Cache
from onnx_utilrank.calibration.data import DYNAMIC_BATCH, Dataset
from onnx_utilrank.calibration.survey import check_finite, expose, survey
from onnx_utilrank.calibration.taps import TappedModel, insert_taps, row_stride, view_rows
from onnx_utilrank.engine.engine import IN_PLACE, Engine, shards
from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import GraphIndex, node_label
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, InferenceError, Session, open_session
from onnx_utilrank.sites.site import RowView
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.tokens import TokenCounts

__all__ = ["SUM_BYTES", "Collected", "Progress", "collect", "in_passes", "silent", "usable_batch"]

logger = logging.getLogger(__name__)

# Bytes of an entry of a moment while it is collected: the running sum, and what one run adds to it.
SUM_BYTES = 12


T = TypeVar("T")


class Progress(Protocol):
    """What a caller passes to be told how work goes on."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Take note.

        Args:
            stage: What is being done.
            done: How much of it is done.
            total: How much there is; 0 where that is not known.
            detail: How it is going, in words; only training says so.
        """
        ...


def silent(stage: str, done: int, total: int, detail: str = "") -> None:
    """The progress callback of callers that want none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What calibration brought.

    Attributes:
        moments: The moment of each row view, one-hot ones apart.
        strides: Every how many-th row of each of those counted.
        tokens: What was counted of each view of one-hot rows.
    """

    moments: dict[RowView, SecondMoment]
    strides: dict[RowView, int]
    tokens: dict[RowView, TokenCounts]


def in_passes(
    sites: Sequence[Sequence[T]], sums: Callable[[T], dict[Hashable, int]], budget: int
) -> Iterator[list[T]]:
    """Sites in order, cut where their running sums would take more than the budget.

    Args:
        sites: Sites that have to come together.
        sums: Bytes of the sums of a site by what they are of, which sites may share.
        budget: Bytes. What needs more gets a pass for itself.
    """
    group: list[T] = []
    held: dict[Hashable, int] = {}
    for joined in sites:
        more = {of: needed for site in joined for of, needed in sums(site).items()}
        if group and sum((held | more).values()) > budget:
            yield group
            group, held = [], {}
        group += joined
        held |= more
    if group:
        yield group


def usable_batch(session: Session, data: Dataset) -> int:
    """Rows a run: `DYNAMIC_BATCH`, or 1 where the model only claims that its batch is free.

    Args:
        session: The model.
        data: Its samples, of which the first few are run.

    Raises:
        ModelError: The model does not run.
    """
    first = range(min(len(data), data.run or 2))
    try:
        session.run(next(data.feeds(first, batch=2)))  # if two fit, any number does
    except InferenceError:
        if data.run is not None:
            raise  # the data themselves say how many samples a run takes
        session.run(next(data.feeds(first, batch=1)))
        logger.warning(
            "%s: runs with one sample at a time only, though its batch size is free", session.label
        )
        return 1
    return DYNAMIC_BATCH


def collect(
    index: GraphIndex,
    views: Sequence[RowView],
    data: Dataset,
    samples: Sequence[int],
    provider: Provider,
    *,
    batch: int,
    progress: Progress,
    cache: Cache | None = None,
    engine: Engine = IN_PLACE,
) -> Collected:
    """Moments of the rows of every view over the given samples.

    One sample is run first with the viewed tensors exposed, to learn their shapes and means; then
    all samples once, with taps, by whatever workers the engine has.

    Raises:
        ModelError: The model does not load or run, or a value is NaN or infinite.
    """
    views = list(dict.fromkeys(views))
    if not views:
        return Collected(moments={}, strides={}, tokens={})
    single = next(data.feeds(samples, batch=1))
    tokens = {v: v.width for v in views if v.one_hot}
    store = expose(index.store, {v.tensor for v in tokens} - single.keys())
    views = [v for v in views if not v.one_hot]
    observed = survey(store, list({v.tensor for v in views}), single, provider)
    singles = data.count_feeds(samples, batch=1)
    runs = data.count_feeds(samples, batch=batch)
    strides = {}
    for view in views:
        rows = view_rows(view, observed[view.tensor].shape) * singles
        strides[view] = row_stride(rows, rows // max(runs, 1), view.width)
    tapped = insert_taps(store, views, observed, strides)
    del observed
    sums = _run(
        index, tapped, tokens, data, samples, provider, batch, progress, cache or Cache(), engine
    )
    return Collected(
        moments=sums.moments,
        strides={tap.view: tap.stride for tap in tapped.taps},
        tokens=sums.tokens,
    )


@dataclass(kw_only=True)
class _Sums:
    """Sums over some runs.

    Attributes:
        moments: Of z = x - shift, by row view.
        tokens: By view of one-hot rows.
    """

    moments: dict[RowView, SecondMoment]
    tokens: dict[RowView, TokenCounts]

    def add(self, other: "_Sums") -> None:
        """Add the sums over other runs."""
        for view, more in other.moments.items():
            held = self.moments[view]
            held.outer += more.outer
            held.total += more.total
            held.rows += more.rows
        for view, counts in other.tokens.items():
            self.tokens[view] += counts

    @property
    def state(self) -> dict[str, np.ndarray]:
        """All there is to go on from, as a cache keeps it; see `restore`."""
        state: dict[str, np.ndarray] = {}
        for k, held in enumerate(self.moments.values()):
            state |= {
                f"{k} outer": held.outer,
                f"{k} total": held.total,
                f"{k} rows": np.array(held.rows),
            }
        for k, counted in enumerate(self.tokens.values()):
            state |= {f"tokens {k} {name}": array for name, array in counted.state.items()}
        return state

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken."""
        for k, held in enumerate(self.moments.values()):
            held.outer, held.total = state[f"{k} outer"], state[f"{k} total"]
            held.rows = int(state[f"{k} rows"])
        for k, counted in enumerate(self.tokens.values()):
            counted.restore({name: state[f"tokens {k} {name}"] for name in counted.state})


@dataclass(kw_only=True)
class _Counting:
    """How runs are counted: all that it takes besides their feeds.

    Attributes:
        index: The model.
        tapped: And with taps.
        tokens: Views of one-hot rows, with how many tokens there are.
        provider: Where it runs.
        threads: Of a session; 0 for ONNX Runtime's own choice.
    """

    index: GraphIndex
    tapped: TappedModel
    tokens: dict[RowView, int]
    provider: Provider
    threads: int

    @cached_property
    def session(self) -> Session:
        """The model with taps, loaded once in a process."""
        return open_session(self.tapped.store, self.provider, threads=self.threads)

    def none(self) -> _Sums:
        """Sums over no runs."""
        return _Sums(
            moments={tap.view: SecondMoment.zero(tap.view.width) for tap in self.tapped.taps},
            tokens={view: TokenCounts.zero(width) for view, width in self.tokens.items()},
        )

    def add(self, sums: _Sums, feeds: Iterable[Feed], first: int) -> Iterator[int]:
        """Add runs to sums; give how many are done.

        Args:
            sums: What they are added to.
            feeds: What is run.
            first: Number of the first of them.

        Raises:
            ModelError: A value is NaN or infinite.
        """
        index = self.index
        own = tuple(o.name for o in index.store.outputs)
        for k, feed in enumerate(feeds, start=first):
            phases = {name: np.array([k % s]) for s, name in self.tapped.phases.items()}
            values = self.session.run({**feed, **phases})
            check_finite(index, {name: values[name] for name in own}, feed, self.provider)
            for view, counts in sums.tokens.items():
                ids = values[view.tensor] if view.tensor in values else feed[view.tensor]
                counts.add(_by_sample(ids, samples_in(feed)))
            for tap in self.tapped.taps:
                held = sums.moments[tap.view]
                held.outer += values[tap.outer]
                held.total += values[tap.total]
                held.rows += int(values[tap.matrix][tap.row_axis])
                # One look at a square of every feature: it is not finite if any value is not.
                if not np.isfinite(np.diagonal(values[tap.outer])).all():
                    raise ModelError(
                        f"{index.store.label}: value {tap.view.tensor!r} at "
                        f"{_place(index, tap.view.tensor)} holds NaN or infinity, or its squares "
                        f"overflow {values[tap.outer].dtype.name}, on the calibration data"
                    )
            yield k + 1

    @property
    def memory(self) -> int:
        """Bytes that a process needs for it, about: the model, as read and as loaded; the sums."""
        return 2 * self.tapped.store.file_bytes + sum(
            SUM_BYTES * tap.view.width**2 for tap in self.tapped.taps
        )


def _counted(counting: _Counting, task: tuple[int, Sequence[Feed]]) -> _Sums:
    """The sums of one part of the runs, of which the number of the first one is given."""
    first, feeds = task
    sums = counting.none()
    for _ in counting.add(sums, feeds, first):
        pass
    return sums


def _in_parts(
    engine: Engine, counting: _Counting, sums: _Sums, feeds: Iterator[Feed], runs: int, first: int
) -> Iterator[int]:
    """The same as `_Counting.add` by whatever workers an engine has."""
    parts = shards(runs, first)
    tasks = ((part.start, list(itertools.islice(feeds, len(part)))) for part in parts)
    found = engine.map(_counted, (counting,), tasks, memory=counting.memory, runs_model=True)
    for part, more in zip(parts, found, strict=True):
        sums.add(more)
        yield part.stop


def _run(
    index: GraphIndex,
    tapped: TappedModel,
    tokens: Mapping[RowView, int],
    data: Dataset,
    samples: Sequence[int],
    provider: Provider,
    batch: int,
    progress: Progress,
    cache: Cache,
    engine: Engine,
) -> _Sums:
    counting = _Counting(
        index=index,
        tapped=tapped,
        tokens=dict(tokens),
        provider=provider,
        threads=engine.threads,
    )
    sums, first = counting.none(), 0
    taps = [(tap.view, tap.stride) for tap in tapped.taps]
    what = ("moments", provider.key, provider.options, batch, taps, list(tokens))
    state = cache.load(*what)
    if state is not None:
        sums.restore(state)
        first = int(state["done"])
    saved = time.monotonic()
    runs = data.count_feeds(samples, batch=batch)
    feeds = itertools.islice(data.feeds(samples, batch=batch), first, None)
    if engine.in_place:
        steps = counting.add(sums, feeds, first)
    else:
        steps = _in_parts(engine, counting, sums, feeds, runs, first)
    for done in steps:
        if done == runs or time.monotonic() - saved > CHECKPOINT_SECONDS:
            cache.save({**sums.state, "done": np.array(done)}, *what)
            saved = time.monotonic()
        progress("calibrating", done, runs)
    # The shift is taken out of the sums once, at the end.
    for tap in tapped.taps:
        sums.moments[tap.view] = sums.moments[tap.view].shifted(tap.shift)
    return sums


def _by_sample(ids: np.ndarray, samples: int) -> np.ndarray:
    """Ids as [samples, positions]; where the first axis does not count samples, all are of one."""
    first = samples if ids.ndim and ids.shape[0] % samples == 0 else 1
    return ids.reshape(first, -1)


def _place(index: GraphIndex, value: str) -> str:
    if value in index.producers:
        return node_label(index.node(index.producers[value]))
    return "the graph input"
