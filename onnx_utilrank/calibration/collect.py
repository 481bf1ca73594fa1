"""Run the model over the calibration samples and gather the moments of its rows."""

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnx_utilrank.calibration.cache import CHECKPOINT_SECONDS, Cache
from onnx_utilrank.calibration.data import DYNAMIC_BATCH, Dataset
from onnx_utilrank.calibration.survey import check_finite, expose, survey
from onnx_utilrank.calibration.taps import TappedModel, insert_taps, row_stride, view_rows
from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import GraphIndex, node_label
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import InferenceError, Session, open_session
from onnx_utilrank.sites.site import RowView, Site
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.tokens import TokenCounts

__all__ = ["Collected", "Progress", "collect", "in_passes", "silent", "usable_batch"]

logger = logging.getLogger(__name__)


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
    sites: Sequence[Sequence[Site]], sums: Callable[[Site], dict[Hashable, int]], budget: int
) -> Iterator[list[Site]]:
    """Sites in order, cut where their running sums would take more than the budget.

    Args:
        sites: Sites that have to come together.
        sums: Bytes of the sums of a site by what they are of, which sites may share.
        budget: Bytes. What needs more gets a pass for itself.
    """
    group: list[Site] = []
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
) -> Collected:
    """Moments of the rows of every view over the given samples.

    One sample is run first with the viewed tensors exposed, to learn their shapes and means; then
    all samples once, with taps.

    Raises:
        ModelError: The model does not load or run, or a value is NaN or infinite.
    """
    views = list(dict.fromkeys(views))
    if not views:
        return Collected(moments={}, strides={}, tokens={})
    single = next(data.feeds(samples, batch=1))
    tokens = {v: TokenCounts.zero(v.width) for v in views if v.one_hot}
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
    moments = _run(
        index, tapped, tokens, data, samples, provider, batch, progress, cache or Cache()
    )
    return Collected(
        moments=moments,
        strides={tap.view: tap.stride for tap in tapped.taps},
        tokens=tokens,
    )


def _run(
    index: GraphIndex,
    tapped: TappedModel,
    tokens: Mapping[RowView, TokenCounts],
    data: Dataset,
    samples: Sequence[int],
    provider: Provider,
    batch: int,
    progress: Progress,
    cache: Cache,
) -> dict[RowView, SecondMoment]:
    # Sums of z = x - shift, of which the shift is taken out once, at the end.
    sums = {tap.view: SecondMoment.zero(tap.view.width) for tap in tapped.taps}
    taps = [(tap.view, tap.stride) for tap in tapped.taps]
    what = ("moments", provider.key, provider.options, batch, taps, list(tokens))
    first = _resumed(cache.load(*what), sums, tokens)
    saved = time.monotonic()
    session = open_session(tapped.store, provider)
    own = tuple(o.name for o in index.store.outputs)
    runs = data.count_feeds(samples, batch=batch)
    for k, feed in enumerate(data.feeds(samples, batch=batch)):
        if k < first:
            continue
        phases = {name: np.array([k % stride]) for stride, name in tapped.phases.items()}
        values = session.run({**feed, **phases})
        check_finite(index, {name: values[name] for name in own}, feed, provider)
        for view, counts in tokens.items():
            ids = values[view.tensor] if view.tensor in values else feed[view.tensor]
            counts.add(_by_sample(ids, samples_in(feed)))
        for tap in tapped.taps:
            held = sums[tap.view]
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
        if k + 1 == runs or time.monotonic() - saved > CHECKPOINT_SECONDS:
            cache.save(_state(sums, tokens, k + 1), *what)
            saved = time.monotonic()
        progress("calibrating", k + 1, runs)
    return {tap.view: sums[tap.view].shifted(tap.shift) for tap in tapped.taps}


def _state(
    sums: Mapping[RowView, SecondMoment], tokens: Mapping[RowView, TokenCounts], done: int
) -> dict[str, np.ndarray]:
    """Sums over so many feeds, as a cache keeps them."""
    state = {"done": np.array(done)}
    for k, held in enumerate(sums.values()):
        state |= {
            f"{k} outer": held.outer,
            f"{k} total": held.total,
            f"{k} rows": np.array(held.rows),
        }
    for k, counted in enumerate(tokens.values()):
        state |= {f"tokens {k} {name}": array for name, array in counted.state.items()}
    return state


def _resumed(
    state: Mapping[str, np.ndarray] | None,
    sums: Mapping[RowView, SecondMoment],
    tokens: Mapping[RowView, TokenCounts],
) -> int:
    """Go on with the sums of an earlier run; how many feeds it had done."""
    if state is None:
        return 0
    for k, held in enumerate(sums.values()):
        held.outer, held.total = state[f"{k} outer"], state[f"{k} total"]
        held.rows = int(state[f"{k} rows"])
    for k, counted in enumerate(tokens.values()):
        counted.restore({name: state[f"tokens {k} {name}"] for name in counted.state})
    return int(state["done"])


def _by_sample(ids: np.ndarray, samples: int) -> np.ndarray:
    """Ids as [samples, positions]; where the first axis does not count samples, all are of one."""
    first = samples if ids.ndim and ids.shape[0] % samples == 0 else 1
    return ids.reshape(first, -1)


def _place(index: GraphIndex, value: str) -> str:
    if value in index.producers:
        return node_label(index.node(index.producers[value]))
    return "the graph input"
