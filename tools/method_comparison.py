"""Compare methods of low-rank compression: same models, samples and kept parameters, one run.

For each model of a zoo (see `zoo_commands.py`) the samples are split once, and each method measures
the model once. For each ratio of parameters to keep, the model is made, its outputs are compared
on samples held back, and `zoo.py eval` gives its real metric, which nothing is chosen by.

What is compared: plain SVD (`svd`); the paper's rule, at the energy that fits the ratio, the same
for every layer (`utilized-rank`); others' methods as `rival_methods.py` states them; this package's
methods with and without refitting and moves other than low-rank ones; and what it does unasked
(`default`). All but the latter may make a move wherever it is smaller, be it slower.
"""

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from command_line import new_parser
from rival_methods import ACTIVATION_SVD, GREEDY_SVD, WHITENED_SVD, measure_greedy, measure_rival
from tables import NOTHING, command, markdown
from zoo_commands import SAID, StepError, Zoo, add_zoo_option, check_zoo, open_zoo

from onnx_utilrank import __version__
from onnx_utilrank.compression import build
from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import ConfigError, ModelError, TargetMissedError, UtilrankError
from onnx_utilrank.job import SAMPLES_LOOKED_AT, Job
from onnx_utilrank.measurement import Measurement
from onnx_utilrank.moves.moves import MOVE_KEYS
from onnx_utilrank.planning import make_offers
from onnx_utilrank.quality import Judge
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.report.plot import check_plot
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.validation.divergence import find_losses

__all__ = ["CONTENDERS", "Entry", "Results", "draw", "main", "tables"]

MODELS = (
    *("vit_cifar10", "kwt1", "minilm_l6", "mobilenet_v2"),
    *("resnet20", "dncnn_s25", "imdn_x4", "stories260k"),
)
RATIOS = (0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)

DEFAULT = "default"
PAPER = "utilized-rank"
BASELINES = ("svd", PAPER, WHITENED_SVD.key, ACTIVATION_SVD.key, GREEDY_SVD.key)
_LOW = CompressConfig(moves=("low-rank",), refit=False)
_ALL = replace(_LOW, moves=MOVE_KEYS)
# For each row: what measures the model, once for all rows that name it, and the options.
CONTENDERS: dict[str, tuple[str, CompressConfig]] = {
    **{key: (key, _LOW) for key in (*BASELINES, "one-sided")},
    "two-sided": (DEFAULT, _LOW),
    "two-sided + refit": (DEFAULT, replace(_LOW, refit=True)),
    "two-sided + moves": (DEFAULT, _ALL),
    "two-sided + refit + moves": (DEFAULT, replace(_ALL, refit=True)),
    DEFAULT: (DEFAULT, CompressConfig()),
}

Key = tuple[str, float, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model at one ratio by one method. What was not measured is None.

    Attributes:
        model: Name in the zoo.
        ratio: Parameters to keep, as asked for.
        method: Key of the contender.
        measuring: Seconds that measuring took, once for all contenders of that way.
        seconds: Seconds that planning and making this one model took on top.
        reason: Why there is no model, or what failed afterwards.
        failed: Whether something failed that should not.
        kept: Parameters kept, as counted in the result.
        predicted: Divergence that the plan expects.
        divergence: Divergence on samples held back; infinite where outputs are not finite.
        error: Standard error of that.
        metric: What `zoo.py eval` found, see `Zoo.metric`; its drop is None where not finite.
    """

    model: str
    ratio: float
    method: str
    measuring: float
    seconds: float | None = None
    reason: str | None = None
    failed: bool = False
    kept: float | None = None
    predicted: float | None = None
    divergence: float | None = None
    error: float | None = None
    metric: dict[str, Any] | None = None

    @property
    def key(self) -> Key:
        """What makes it the row it is."""
        return self.model, self.ratio, self.method


class Results:
    """Rows by key, kept in a file after each one."""

    def __init__(self, settings: dict[str, Any], file: Path | None) -> None:
        """Begin, or go on with what `file` holds.

        Raises:
            StepError: The file holds something else, or results of other settings.
        """
        self.settings, self.file = settings, file
        self.entries: dict[Key, Entry] = {}
        if file is None or not file.exists():
            return
        try:
            held = json.loads(file.read_text(encoding="utf8"))
            other, entries = held["settings"], [Entry(**fields) for fields in held["rows"]]
        except (ValueError, KeyError, TypeError) as e:
            raise StepError(f"{file}: not results of this script ({e})") from e
        if other != settings:
            raise StepError(f"{file}: made with {other}, not {settings}; name another file")
        self.entries = {entry.key: entry for entry in entries if not entry.failed}

    def add(self, entry: Entry) -> None:
        """Keep a row; the file is replaced at once."""
        self.entries[entry.key] = entry
        _tell(f"{entry.model} at {entry.ratio:g} by {entry.method}: {_cell(entry)}")
        if self.file is None:
            return
        held = {"settings": self.settings, "rows": [asdict(e) for e in self.entries.values()]}
        partial = self.file.with_name(f"{self.file.name}.partial")
        partial.write_text(f"{json.dumps(held, indent=1)}\n", encoding="utf8")
        partial.replace(self.file)

    def holds(self, key: Key, evaluated: Sequence[str]) -> bool:
        """Whether a row is there, with its metric if that is wanted."""
        found = self.entries.get(key)
        return found is not None and bool(found.reason or found.metric or key[2] not in evaluated)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Subject:
    """A model of the zoo, open, with its samples split once."""

    def __init__(self, zoo: Zoo, name: str) -> None:
        self.zoo, self.name = zoo, name
        data, samples = str(zoo.work / f"{name}.npz"), str(zoo.samples)
        words = (sys.executable, zoo.script, "calib", name, "-o", data, "--samples", samples)
        zoo.must("zoo.py calib", *words)
        config = CompressConfig()
        self.job = Job.open(zoo.model(name), data, config, lambda *_: None)
        self.samples, held = self.job.data.split(samples=config.samples, seed=config.seed)
        self.judge = Judge(self.job, held, config)

    def measure(self, way: str) -> Measurement:
        job, samples = self.job, self.samples
        for rival in (WHITENED_SVD, ACTIVATION_SVD):
            if way == rival.key:
                return measure_rival(job, rival, samples)
        if way == GREEDY_SVD.key:
            looked_at = job.feeds(job.data.first(samples, SAMPLES_LOOKED_AT))
            losses = find_losses(job.store, open_session(job.store, job.provider), looked_at)
            return measure_greedy(job, losses, samples)
        return job.measure(None if way == DEFAULT else way, job.sites, samples, CompressConfig())

    def point(self, found: Measurement, entry: Entry, evaluate: bool) -> Entry:
        way, config = CONTENDERS[entry.method]
        if way == DEFAULT != entry.method and found.gradients is None:
            raise TargetMissedError(" ".join(found.notes))
        start = time.perf_counter()
        plan = make_offers(self.job, found, self.samples, config).plan(entry.ratio)
        plan = replace(plan, target={"param_ratio": entry.ratio})
        plan, store = build(self.job, plan, found, config)
        entry = replace(entry, seconds=time.perf_counter() - start)
        divergence = self.judge(store).divergence
        if divergence is None:
            raise ModelError("no output holds finite floating values to compare")
        metric = None
        if evaluate:
            path = self.zoo.work / "made.onnx"
            store.save(path)
            metric = self.zoo.metric(self.name, str(path))
        return replace(
            entry,
            kept=count_parameters(store) / count_parameters(self.job.store),
            predicted=plan.predicted_divergence,
            divergence=divergence.mean,
            error=divergence.standard_error,
            metric=metric,
        )


def _fill(results: Results, zoo: Zoo, missing: Sequence[Key], evaluated: Sequence[str]) -> int:
    """Measure the rows that are missing; how many things failed."""
    failed = 0

    @contextmanager
    def noted(where: str, entry: Entry | None = None) -> Iterator[None]:
        nonlocal failed
        try:
            yield
        except (StepError, UtilrankError) as e:
            reason = str(e).replace(str(zoo.folder), "ZOO")
            _tell(f"{where}: {reason}")
            missed = entry is not None and isinstance(e, TargetMissedError)
            failed += not missed
            if entry is not None:
                results.add(replace(entry, reason=reason, failed=not missed))

    for name in dict.fromkeys(model for model, _, _ in missing):
        gc.collect()  # sessions and graphs of the last model, before those of this one
        own = [key for key in missing if key[0] == name]
        with noted(name):
            subject = _Subject(zoo, name)
            for way in dict.fromkeys(CONTENDERS[method][0] for _, _, method in own):
                with noted(f"{name} by {way}"):
                    start = time.perf_counter()
                    found = subject.measure(way)
                    took = time.perf_counter() - start
                    _tell(f"{name}: measured by {way} in {took:.1f} s")
                    for _, ratio, method in (key for key in own if CONTENDERS[key[2]][0] == way):
                        entry = Entry(model=name, ratio=ratio, method=method, measuring=took)
                        with noted(f"{name} at {ratio:g} by {method}", entry):
                            results.add(subject.point(found, entry, method in evaluated))
                    del found
            del subject
    return failed


def _number(value: float | None) -> str:
    """Two digits, or whole numbers."""
    if value is None:
        return NOTHING
    return f"{value:.2g}" if abs(value) < 100 or not math.isfinite(value) else f"{value:.0f}"


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return ""
    if entry.divergence is None:
        return "failed" if entry.failed else NOTHING
    found = f"({_number(entry.divergence)})"
    if entry.metric is None:
        return found
    drop = entry.metric["drop"]
    return f"{'not finite' if drop is None else format(drop, '.2f')} {found}"


def _taken(entries: Sequence[Entry]) -> str:
    """Seconds that measuring took and, on the mean, making a model."""
    made = [entry.seconds for entry in entries if entry.seconds is not None]
    each = _number(sum(made) / len(made)) if made else NOTHING
    return f"{_number(entries[0].measuring)} + {each}"


def tables(entries: Sequence[Entry]) -> str:
    """A table of drops and divergences for each model, and one of how `default` does."""
    by_key = {entry.key: entry for entry in entries}
    methods = [m for m in CONTENDERS if any(entry.method == m for entry in entries)]
    parts = []
    for model in dict.fromkeys(entry.model for entry in entries):
        own = [entry for entry in entries if entry.model == model]
        ratios = sorted({entry.ratio for entry in own}, reverse=True)
        metric = next((e.metric["metric"] for e in own if e.metric), "no metric")
        rows = [
            [
                method,
                *(_cell(by_key.get((model, ratio, method))) for ratio in ratios),
                _taken(taken),
            ]
            for method in methods
            if (taken := [entry for entry in own if entry.method == method])
        ]
        head = ["method", *(f"{100 * ratio:g} %" for ratio in ratios), "seconds"]
        parts.append(f"{model}: drop of {metric} (divergence)\n\n{markdown(head, rows, head[:1])}")
    if DEFAULT in methods:
        parts.append(f"health of `{DEFAULT}`\n\n{_health(by_key)}")
    return "\n\n".join(parts)


def _health(by_key: dict[Key, Entry]) -> str:
    def against(value: float | None, other: float | None) -> str:
        return NOTHING if value is None or not other else f"{value / other:.2f}"

    rows = []
    for entry in (e for e in by_key.values() if e.method == DEFAULT):
        others = [by_key.get((entry.model, entry.ratio, method)) for method in BASELINES]
        rated = {e.method: e.divergence for e in others if e and e.divergence is not None}
        best = min(rated, key=lambda method: rated[method], default=NOTHING)
        own, spread = entry.divergence, "" if entry.error is None else f" ± {_number(entry.error)}"
        compared = [against(own, rated.get(method)) for method in (PAPER, best)]
        row = [entry.model, best, f"{100 * entry.ratio:g} %", _number(entry.predicted)]
        rows.append([*row, _number(own) + spread, *compared])
    head = ["model", "best baseline", "asked", "predicted divergence", "measured divergence"]
    return markdown([*head, "to utilized-rank", "to best baseline"], rows, head[:2])


def draw(entries: Sequence[Entry], file: Path) -> None:
    """Draw divergence over kept parameters, a panel for each model and a line for each method."""
    # It costs a second of start-up, and not everybody has it.
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(entry.model for entry in entries))
    columns = min(4, len(models))
    lines = math.ceil(len(models) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.5 * lines + 1), layout="constrained")
    shown = {}
    for k, model in enumerate(models):
        axes = figure.add_subplot(lines, columns, k + 1)
        axes.set(title=model, xlabel="parameters kept, %", ylabel="divergence", yscale="log")
        for n, method in enumerate(CONTENDERS):
            own = [e for e in entries if (e.model, e.method) == (model, method)]
            own = [e for e in own if 0 < (e.divergence or 0) < math.inf]  # for a logarithmic axis
            if points := sorted((100 * (e.kept or 0), e.divergence or 0) for e in own):
                xs, ys = zip(*points, strict=True)
                style = ".--" if method in BASELINES else ".-"
                colour = "black" if method == DEFAULT else f"C{n}"
                (shown[method],) = axes.plot(xs, ys, style, color=colour)
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=2 * columns)
    figure.savefig(file)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("method_comparison.py", __doc__)
    add_zoo_option(parser)
    add, every = parser.add_argument, list(CONTENDERS)
    add("--models", nargs="+", default=MODELS, metavar="NAME", help="models of the zoo")
    add("--ratios", nargs="+", type=float, default=RATIOS, metavar="R", help="parameters to keep")
    add("--methods", nargs="+", choices=every, default=every, metavar="M", help=f"of {every}")
    what = "methods whose real metric is measured (default: all)"
    add("--metric-methods", nargs="*", choices=every, default=every, metavar="M", help=what)
    what = "calibration samples, a fifth of them held back (default: %(default)s)"
    add("--samples", type=int, default=256, metavar="N", help=what)
    add("--limit", type=int, metavar="N", help="measure metrics on the first N samples only")
    what = "gets each row as it is made; rows that it holds are not made again"
    add("--out", type=Path, metavar="FILE.json", help=what)
    what = "draw divergence over kept parameters, of all rows that --out holds"
    add("--plot", type=Path, metavar="FILE.png", help=what)
    return parser


def _caption(options: argparse.Namespace, given: Sequence[str]) -> str:
    part = "" if options.limit is None else f" (with --limit {options.limit})"
    return (
        f"{command('method_comparison.py', given, SAID)}\n\n"
        f"onnx-utilrank {__version__}; at most {options.samples} calibration samples, a fifth of "
        "them held back for the divergence: nats a decision, or ½ of the relative squared error of "
        f"values. Metrics: `zoo.py eval`{part}; a drop above 0 is worse. {NOTHING}: out of reach. "
        "Seconds: to measure the model, once for all ratios, and to make one of them."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the tables and print them; 0 where all went as it should, 1 where not, 2 for usage."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    where = check_zoo(parser, options.zoo)
    counts = (options.samples, 1 if options.limit is None else options.limit)
    if min(counts) < 1 or not all(0 < ratio <= 1 for ratio in options.ratios):
        parser.error("a ratio is not in (0, 1], or there are no samples")
    for path in (options.out, options.plot):
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"{path}: its folder does not exist")
    settings = {"samples": options.samples, "limit": options.limit}
    try:
        if options.plot is not None:
            check_plot(options.plot)
        results = Results(settings, options.out)
    except (ConfigError, StepError) as e:
        parser.error(str(e))
    ratios = sorted(set(options.ratios), reverse=True)
    methods = [method for method in CONTENDERS if method in options.methods]
    models = dict.fromkeys(options.models)
    wanted = [(name, ratio, method) for name in models for ratio in ratios for method in methods]
    missing = [key for key in wanted if not results.holds(key, options.metric_methods)]
    with open_zoo(where, **settings) as zoo:
        failed = _fill(results, zoo, missing, options.metric_methods)
    entries = [results.entries[key] for key in wanted if key in results.entries]
    print(f"{_caption(options, given)}\n\n{tables(entries)}")
    if options.plot is not None and entries:
        draw(list(results.entries.values()), options.plot)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
