"""What a user would use instead, beside ours: one run, one machine, the same samples.

    ONNX_UTILRANK_ZOO=ZOO python tools/peers/run.py

For each model of a zoo (see `zoo_commands.py`) and each peer: its script makes a model in its own
virtual environment, from the ONNX file and calibration samples. Then all that were made are
measured alike: bytes; divergence of the outputs on samples that nobody had; `zoo.py eval`; latency
of a run of one sample, all of them by turns with the original; and the seconds and the peak of the
resident memory of the process that made it. What cannot be made is a row that says why.
"""

import argparse
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from peer import HERE, PEERS, InstallError, Peer, python_of

# The modules of the folder above.
sys.path.append(str(HERE.parent))

from command_line import new_parser
from tables import NOTHING, command, markdown
from zoo_commands import SAID, StepError, Zoo, add_zoo_option, check_zoo, open_zoo

import onnx_utilrank
from onnx_utilrank.benchmarking.config import BenchmarkConfig
from onnx_utilrank.calibration.collect import usable_batch
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.errors import UtilrankError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.validation.bench import LatencyComparison
from onnx_utilrank.validation.divergence import Divergence, OutputRecorder, find_losses

__all__ = ["COLUMNS", "Row", "main", "table"]

# What each model bears without a loss, about: parameters that low-rank factors keep.
KEEP = {"vit_cifar10": 0.5, "kwt1": 0.5, "minilm_l6": 0.8, "mobilenet_v2": 0.8}
OTHER_KEEP = 0.8
# Samples held back, of all: nobody calibrates with them.
HELD = 0.2

COLUMNS = (
    *("model", "made by", "bytes, of original", "divergence", "metric", "drop"),
    *("latency ratio", "seconds", "peak MiB"),
)
WORDS = ("model", "made by")
# Characters of a reason, at most: messages of ONNX Runtime are long.
REASON = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model by one peer. What was not measured is None.

    Attributes:
        model: Name in the zoo.
        peer: Key of the peer; its share of parameters behind it where it keeps one.
        reason: Why there is no model.
        file: The model that was made.
        size: Its bytes over the original's.
        divergence: Of its outputs on the samples held back.
        metric: See `Zoo.metric`.
        latency: Beside the original.
        seconds: Wall clock of the process that made it, imports included.
        peak: Largest resident set of that process, MiB.
    """

    model: str
    peer: str
    reason: str | None = None
    file: Path | None = None
    size: float | None = None
    divergence: Divergence | None = None
    metric: Mapping[str, object] | None = None
    latency: LatencyComparison | None = None
    seconds: float | None = None
    peak: float | None = None


def watched(
    python: str, words: Sequence[str], folder: Path
) -> tuple[int, float, float | None, str]:
    """Run a script: its exit status, seconds, peak of resident memory in MiB, standard error."""
    errors, peak = folder / "errors.txt", folder / "peak.txt"
    peak.unlink(missing_ok=True)
    start = time.perf_counter()
    with errors.open("w", encoding="utf8") as file:
        command = [python, str(HERE / "peak.py"), str(peak), *words]
        status = subprocess.run(command, cwd=folder, stdout=file, stderr=file, check=False)
    seconds = time.perf_counter() - start
    held = float(peak.read_text(encoding="utf8")) if peak.exists() else None
    told = errors.read_text(encoding="utf8", errors="replace")
    return status.returncode, seconds, held, told


def _split(zoo: Zoo, name: str) -> tuple[Path, Path]:
    """Samples to calibrate with and samples held back, as two files."""
    with np.load(zoo.work / zoo.calibrate(name)) as arrays:
        held = dict(arrays)
    count = len(next(iter(held.values())))
    order = np.random.default_rng(0).permutation(count)
    cut = round(count * (1 - HELD))
    files = (zoo.work / f"{name}.calibration.npz", zoo.work / f"{name}.held.npz")
    for file, rows in zip(files, (order[:cut], order[cut:]), strict=True):
        parts: dict[str, np.ndarray] = {key: x[np.sort(rows)] for key, x in held.items()}
        np.savez(file, **parts)  # type: ignore[arg-type]
    return files


def _make(zoo: Zoo, name: str, peer: Peer, keep: float, samples: Path, environments: Path) -> Row:
    label = f"{peer.key} ({100 * keep:g} %)" if peer.low_rank else peer.key
    row = Row(model=name, peer=label)
    out = zoo.work / f"{name}.{peer.key}.onnx"
    try:
        python = python_of(peer, environments)
    except InstallError as e:
        return replace(row, reason=f"cannot be installed: {e}")
    words = [str(keep) if word == "KEEP" else word for word in peer.words]
    print("$", f"{name}: {peer.script}", *words, file=sys.stderr, flush=True)
    words = [str(HERE / peer.script), zoo.model(name), str(samples), str(out), *words]
    status, seconds, peak, told = watched(python, words, zoo.work)
    row = replace(row, seconds=seconds, peak=peak)
    if status or not out.exists():
        return replace(row, reason=zoo.error_line(told))
    return replace(row, file=out)


def rows_of(
    zoo: Zoo, name: str, peers: Sequence[Peer], keep: float, seconds: float, environments: Path
) -> list[Row]:
    """Make and measure one model by every peer.

    Raises:
        StepError: The zoo failed, or the original itself cannot be measured.
    """
    calibration, held = _split(zoo, name)
    original = Path(zoo.model(name))
    try:
        store = ModelStore.load(original)
        data, session = open_data(str(held), store.inputs), open_session(store, CPU)
        feeds = list(data.feeds(range(len(data)), batch=usable_batch(session, data)))
        recorder = OutputRecorder(session, find_losses(store, session, feeds), feeds)
    except UtilrankError as e:
        raise StepError(str(e)) from e
    made = [_make(zoo, name, peer, keep, calibration, environments) for peer in peers]
    rows = [_quality(zoo, row, recorder) for row in made]
    good = [row for row in rows if row.file is not None and row.reason is None]
    if good:
        config = BenchmarkConfig(seconds=seconds)
        files = [str(row.file) for row in good]
        (case,) = onnx_utilrank.benchmark(str(original), files, str(held), config).cases
        times = dict(zip((row.peer for row in good), case.latencies, strict=True))
        rows = [replace(row, latency=times.get(row.peer)) for row in rows]
    return [Row(model=name, peer="the original", metric=zoo.metric(name, str(original))), *rows]


def _quality(zoo: Zoo, row: Row, recorder: OutputRecorder) -> Row:
    if row.file is None:
        return row
    try:
        lost = recorder.compare(open_session(ModelStore.load(row.file), CPU))
        metric = zoo.metric(row.model, str(row.file))
    except (UtilrankError, StepError) as e:
        return replace(row, reason=f"made, but does not run: {zoo.error_line(str(e))}")
    whole = Path(zoo.model(row.model)).stat().st_size
    size = row.file.stat().st_size / whole
    return replace(row, size=size, divergence=lost, metric=metric)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    return markdown(COLUMNS, [_cells(row) for row in rows], WORDS)


def _cells(row: Row) -> list[str]:
    def shown(value: object, form: str) -> str:
        return format(value, form) if isinstance(value, float) else NOTHING

    if row.reason is not None:
        reason = textwrap.shorten(row.reason, REASON, placeholder=" …").replace("|", "\\|")
        blank = [NOTHING] * (len(COLUMNS) - len(WORDS))
        return [row.model, f"{row.peer}: {reason}", *blank]
    metric = row.metric or {}
    after = metric.get("before" if row.file is None else "after")
    lost, time_ = row.divergence, row.latency
    return [
        *(row.model, row.peer, shown(row.size, ".3f")),
        NOTHING if lost is None else f"{lost.mean:.2g} ± {lost.standard_error:.1g}",
        # A model that was measured and has no number is not finite.
        "not finite" if metric and after is None else shown(after, ".2f"),
        NOTHING if row.file is None else shown(metric.get("drop"), ".2f"),
        NOTHING
        if time_ is None
        else f"{time_.ratio:.2f} ({time_.ratio_low:.2f}-{time_.ratio_high:.2f})",
        shown(row.seconds, ".0f"),
        shown(row.peak, ".0f"),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("run.py", __doc__)
    add_zoo_option(parser)
    add, keys = parser.add_argument, [peer.key for peer in PEERS]
    add("--models", nargs="+", default=list(KEEP), metavar="NAME", help="models of the zoo")
    add("--peers", nargs="+", choices=keys, default=keys, metavar="PEER", help=f"of {keys}")
    what = "parameters that low-rank factors keep (default: by model)"
    add("--keep", type=float, metavar="R", help=what)
    what = "samples, a fifth of them held back (default: %(default)s)"
    add("--samples", type=int, default=128, metavar="N", help=what)
    add("--limit", type=int, metavar="N", help="measure metrics on the first N samples only")
    what = "how long the models of each are timed (default: %(default)s)"
    add("--seconds", type=float, default=20.0, metavar="S", help=what)
    what = "where virtual environments are kept (default: .peers in the checkout)"
    add("--environments", type=Path, default=HERE.parents[1] / ".peers", metavar="DIR", help=what)
    return parser


def _caption(options: argparse.Namespace, given: Sequence[str]) -> str:
    """The command, without places on this machine, and what a reader has to know."""
    versions = sorted({w for p in PEERS if p.key in options.peers for w in p.requirements})
    return (
        f"{command('peers/run.py', given, SAID)}\n\n{datetime.now(UTC).date()}; "
        f"{', '.join([f'onnx-utilrank {onnx_utilrank.__version__}', *versions])}; "
        f"{os.cpu_count()} CPU cores; at most "
        f"{options.samples} samples, a fifth of them held back."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the table and print it; 0 where all was measured, 1 where not, 2 for usage."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    where = check_zoo(parser, options.zoo)
    if options.keep is not None and not 0 < options.keep <= 1:
        parser.error("--keep is not in (0, 1]")
    if options.samples < 10 or (options.limit is not None and options.limit < 1):
        parser.error("too few samples: --samples is at least 10, and --limit 1")
    peers = [peer for peer in PEERS if peer.key in options.peers]
    environments = options.environments.resolve()
    rows: list[Row] = []
    failed = False
    with open_zoo(where, samples=options.samples, limit=options.limit) as zoo:
        for name in dict.fromkeys(options.models):
            keep = options.keep or KEEP.get(name, OTHER_KEEP)
            try:
                rows += rows_of(zoo, name, peers, keep, options.seconds, environments)
            except (StepError, UtilrankError) as e:
                failed = True
                print(f"{parser.prog}: {name}: {zoo.error_line(str(e))}", file=sys.stderr)
    print(f"{_caption(options, given)}\n\n{table(rows)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
