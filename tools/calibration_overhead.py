"""Show what calibration costs beside plain inference of the same samples.

What is timed is the product's own `collect`. It is handed data that run the plain model on every
feed too, by turns before and after handing it over: both ways meet the same load on the machine,
and nothing of the product is rebuilt here. Row strides are those of
`onnx-utilrank compress --samples N`, also where `--feeds` ends the run early.

Ratios to plain inference, in the columns of the table:

runs    One run with taps, its finiteness checks and its sums in float64, to one run without; over
        all feeds timed but the first, on which both sessions plan their memory.
median  The same, as the median over those feeds.
whole   Everything for N samples: trying the batch, the survey of one sample, inserting taps,
        loading, and all runs, to loading and all runs.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from command_line import failed, new_parser
from tables import command, markdown

from onnx_utilrank.calibration.collect import collect, silent, usable_batch
from onnx_utilrank.calibration.data import DYNAMIC_BATCH, Dataset, DataSource, open_data
from onnx_utilrank.calibration.survey import expose
from onnx_utilrank.errors import ConfigError, UtilrankError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.method import MomentMethod, use_view
from onnx_utilrank.ranking.methods import METHODS, find_method
from onnx_utilrank.ranking.one_sided import ONE_SIDED
from onnx_utilrank.ranking.utilized_rank import UTILIZED_RANK
from onnx_utilrank.runtime.providers import PROVIDERS, Provider, find_provider
from onnx_utilrank.runtime.sessions import Feed, Session, open_session
from onnx_utilrank.sites.find import find_sites
from onnx_utilrank.sites.site import RowView

__all__ = ["Cost", "Job", "main", "measure_exposed", "measure_taps", "table"]

RECIPE = Path(__file__).resolve().parent.parent / "models" / "synthetic_vit.py"
SYNTHETIC = ("vit-s", "vit-b")
COLUMNS = (
    *("model", "way", "samples", "feeds timed", "row strides"),
    *("plain, s a feed", "calibrating, s a feed", "runs", "median", "whole"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model and the samples that `compress` would calibrate it with.

    Attributes:
        label: What the table calls it.
        index: The model.
        data: Its data.
        samples: Numbers of the samples.
        provider: Where it runs.
        most: Feeds to run at most; None for all.
    """

    label: str
    index: GraphIndex
    data: Dataset
    samples: Sequence[int]
    provider: Provider
    most: int | None

    @classmethod
    def open(
        cls,
        model: Path,
        data: DataSource,
        *,
        label: str,
        samples: int,
        provider: Provider,
        most: int | None,
    ) -> "Job":
        """Load a model and choose `samples` samples of its data, less those held back.

        Raises:
            UtilrankError: The model or the data cannot be used.
        """
        store = ModelStore.load(model)
        dataset = open_data(data, store.inputs)
        calibration, _ = dataset.split(samples=samples)
        return cls(
            label=label,
            index=GraphIndex.build(store),
            data=dataset,
            samples=calibration,
            provider=provider,
            most=most,
        )

    def views(self, method: str) -> list[RowView]:
        """The rows that a method asks for the moments of.

        Raises:
            ConfigError: There are none.
        """
        chosen = find_method(method)
        sites, _ = find_sites(self.index)
        sides = [(site, chosen.side(site)) for site in sites]
        views = [use_view(use, side) for site, side in sides if side for use in site.uses]
        if not views:
            raise ConfigError(f"{self.label}: method {method} needs no moments of this model")
        return list(dict.fromkeys(views))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What calibration took beside plain inference, on one model.

    Attributes:
        model: Which.
        way: How the moments were had.
        samples: Samples of the whole job.
        runs: Runs of the whole job.
        strides: Smallest and largest row stride.
        plain: Seconds of each plain run.
        calibrating: Seconds of each run that calibrates, and of what is done with its values; on
            the same feeds.
        plain_start: Seconds before the first plain run.
        calibrating_start: Seconds before the first run that calibrates.
    """

    model: str
    way: str
    samples: int
    runs: int
    strides: tuple[int, int]
    plain: Sequence[float]
    calibrating: Sequence[float]
    plain_start: float
    calibrating_start: float

    @property
    def pairs(self) -> np.ndarray:
        """Seconds of the pairs that count, float64 [pairs, 2], plain first."""
        pairs = np.array([self.plain, self.calibrating]).T
        return pairs[1:] if len(pairs) > 1 else pairs

    @property
    def ratio(self) -> float:
        """Calibrating runs to plain runs: the ratio of their sums."""
        plain, calibrating = self.pairs.sum(0)
        return float(calibrating / plain)

    @property
    def median_ratio(self) -> float:
        """The same as the median over the pairs."""
        return float(np.median(self.pairs[:, 1] / self.pairs[:, 0]))

    @property
    def whole_ratio(self) -> float:
        """The whole job to loading and plain runs; runs that were not timed are as the others."""
        left = self.runs - len(self.plain)
        rest = left * self.pairs.mean(0)
        plain = self.plain_start + sum(self.plain) + rest[0]
        calibrating = self.calibrating_start + sum(self.calibrating) + rest[1]
        return float(calibrating / plain)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairedData(Dataset):
    """Data that measure how long their reader takes for a feed, and what a plain run takes on it.

    They count all their feeds, from which row strides follow, but give the first ones only.

    Attributes:
        session: The plain model.
        most: Feeds to give at most.
        began: When the last pass asked for its first feed; None before any did.
        plain: Seconds of each plain run of the last pass.
        reader: Seconds that the reader took for each feed of the last pass.
    """

    session: Session
    most: int
    began: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    reader: list[float] = field(default_factory=list)

    def feeds(
        self, samples: Sequence[int], *, batch: int = DYNAMIC_BATCH
    ) -> Iterator[dict[str, np.ndarray]]:
        """The first feeds of `Dataset.feeds`."""
        return self._paired(Dataset.feeds(self, samples, batch=batch))

    def _paired(self, feeds: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        for times in (self.began, self.plain, self.reader):
            times.clear()
        self.began.append(time.perf_counter())
        for k, feed in enumerate(feeds):
            if k == self.most:
                return
            # The survey takes one feed and leaves: the first plain run comes after its feed.
            if k % 2:
                self.plain.append(_seconds(self.session, feed))
            start = time.perf_counter()
            yield feed
            self.reader.append(time.perf_counter() - start)
            if not k % 2:
                self.plain.append(_seconds(self.session, feed))


def measure_taps(job: Job, method: str) -> Cost:
    """Time the product's own calibration for a method.

    Raises:
        UtilrankError: The method needs no moments of the model, or the model does not run.
    """
    views = job.views(method)
    plain_start, session = _load(job, job.index.store)
    start = time.perf_counter()
    batch = usable_batch(open_session(job.index.store, job.provider), job.data)
    runs = job.data.count_feeds(job.samples, batch=batch)
    own = {f.name: getattr(job.data, f.name) for f in dataclasses.fields(Dataset)}
    data = PairedData(**own, session=session, most=job.most or runs)
    collected = collect(
        job.index,
        views,
        data,
        job.samples,
        job.provider,
        batch=batch,
        progress=silent,
    )
    strides = collected.strides.values()
    return Cost(
        model=job.label,
        way=f"taps, {method}",
        samples=len(job.samples),
        runs=runs,
        strides=(min(strides), max(strides)),
        plain=data.plain,
        calibrating=data.reader,
        plain_start=plain_start,
        calibrating_start=data.began[0] - start,
    )


def measure_exposed(job: Job) -> Cost:
    """Time the obvious way: every input of a weight is an output, and numpy multiplies it.

    In its favour, convolutions of more than one tap are left out: their patches would have to be
    unfolded first.

    Raises:
        UtilrankError: No weight is left, or the model does not run.
    """
    views = [view for view in job.views(UTILIZED_RANK.key) if view.patches is None]
    if not views:
        raise ConfigError(f"{job.label}: there is nothing to expose but patches of convolutions")
    plain_start, plain = _load(job, job.index.store)
    batch = usable_batch(open_session(job.index.store, job.provider), job.data)
    inner = {view.tensor for view in views} & set(job.index.producers)
    calibrating_start, exposed = _load(job, expose(job.index.store, inner))
    sums = {view: np.zeros((view.width, view.width)) for view in views}
    pairs = []
    for k, feed in enumerate(job.data.feeds(job.samples, batch=batch)):
        if k == job.most:
            break
        before = _seconds(plain, feed) if k % 2 else 0.0
        start = time.perf_counter()
        values = {**feed, **exposed.run(feed)}
        for view, total in sums.items():
            rows = np.moveaxis(values[view.tensor], view.axis, -1).reshape(-1, view.width)
            total += rows.T @ rows
        seconds = time.perf_counter() - start
        pairs.append((before or _seconds(plain, feed), seconds))
    return Cost(
        model=job.label,
        way="exposed, numpy",
        samples=len(job.samples),
        runs=job.data.count_feeds(job.samples, batch=batch),
        strides=(1, 1),
        plain=[one for one, _ in pairs],
        calibrating=[other for _, other in pairs],
        plain_start=plain_start,
        calibrating_start=calibrating_start,
    )


def table(costs: Sequence[Cost]) -> str:
    """The costs as a Markdown table."""
    rows = []
    for cost in costs:
        plain, calibrating = cost.pairs.mean(0)
        low, high = cost.strides
        rows.append(
            (
                *(cost.model, cost.way, str(cost.samples), str(len(cost.pairs))),
                *(str(low) if low == high else f"{low} to {high}",),
                *(f"{plain:.4g}", f"{calibrating:.4g}"),
                *(f"{r:.2f}" for r in (cost.ratio, cost.median_ratio, cost.whole_ratio)),
            )
        )
    return markdown(COLUMNS, rows, COLUMNS[:2])


def _load(job: Job, store: ModelStore) -> tuple[float, Session]:
    """Seconds of loading a model, and its session."""
    start = time.perf_counter()
    session = open_session(store, job.provider)
    return time.perf_counter() - start, session


def _seconds(session: Session, feed: Feed) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    session.run(feed)
    return time.perf_counter() - start


def _measure(job: Job, options: argparse.Namespace) -> list[Cost]:
    costs = [measure_taps(job, options.method)]
    if options.expose:
        costs.append(measure_exposed(job))
    return costs


def _synthetic(shape: str, options: argparse.Namespace, provider: Provider) -> list[Cost]:
    """Measure a synthetic transformer on noise."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / f"{shape}.onnx"
        subprocess.run([sys.executable, RECIPE, shape, "-o", model], check=True)
        (wanted,) = ModelStore.load(model).inputs
        pixels = [options.samples, *(int(n) for n in (wanted.shape or ())[1:] if n)]
        noise = np.random.default_rng(0).standard_normal(pixels, dtype=np.float32)
        job = Job.open(
            model,
            {wanted.name: noise},
            label=shape,
            samples=options.samples,
            provider=provider,
            most=options.feeds and options.feeds + 1,
        )
        return _measure(job, options)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("calibration_overhead.py", __doc__)
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SYNTHETIC,
        help="synthetic transformers to measure (default, without --model: all)",
    )
    parser.add_argument(
        "--model", type=Path, metavar="FILE", help="an .onnx file to measure, with --data"
    )
    parser.add_argument(
        "--data", metavar="DATA", help="its samples, in any form that onnx-utilrank reads"
    )
    parser.add_argument(
        "--samples",
        type=_positive,
        default=256,
        metavar="N",
        help="measure calibration as for `compress --samples N`, which holds a fifth of them back "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--feeds",
        type=_positive,
        metavar="K",
        help="time K feeds only, after one to warm up; row strides stay those of N samples "
        "(default: all)",
    )
    parser.add_argument(
        "--method",
        choices=[method.key for method in METHODS if isinstance(method, MomentMethod)],
        default=ONE_SIDED.key,
        help="whose moments are collected (default: %(default)s)",
    )
    parser.add_argument(
        "--provider",
        choices=[provider.key for provider in PROVIDERS],
        default="cpu",
        help="execution provider (default: %(default)s)",
    )
    parser.add_argument(
        "--expose",
        action="store_true",
        help="also the obvious way: activations as outputs, multiplied in numpy",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data belong together")
    shapes = options.shapes or (() if options.model else SYNTHETIC)
    costs = []
    try:
        provider = find_provider(options.provider)
        for shape in shapes:
            costs += _synthetic(shape, options, provider)
        if options.model:
            job = Job.open(
                options.model,
                options.data,
                label=options.model.stem,
                samples=options.samples,
                provider=provider,
                most=options.feeds and options.feeds + 1,
            )
            costs += _measure(job, options)
    except UtilrankError as e:
        return failed(parser.prog, e)
    print(f"{command(parser.prog, given)}\n")
    print(table(costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
