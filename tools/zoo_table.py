"""Compress the models of a zoo as a user would, and print what it did to their real metrics.

For each model of a zoo (see `zoo_commands.py`): its calibration samples, `onnx-utilrank analyze`;
then for each ratio and method `onnx-utilrank compress`, the full check of `onnx.checker`, the
zoo's metric, and for the default method `onnx-utilrank validate`. Everything is a process of its
own, in a temporary folder; the commands are shown on stderr, the table is printed in Markdown.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from command_line import new_parser
from tables import NOTHING, command, markdown
from zoo_commands import (
    SAID,
    StepError,
    Zoo,
    add_zoo_option,
    check_zoo,
    find_program,
    open_zoo,
    read_json,
)

__all__ = ["Entry", "Results", "main", "table"]

DEFAULT_METHOD = "two-sided"
METHODS = (DEFAULT_METHOD, "one-sided", "utilized-rank", "svd")
# Ratios at which each model begins to lose, and where it still works.
RATIOS = {
    "mobilenet_v2": (0.9, 0.8),
    "minilm_l6": (0.8, 0.7),
    "kwt1": (0.7, 0.6),
    "resnet20": (0.9, 0.8),
    "dncnn_s25": (0.8,),
    "mnist8_cntk": (0.8, 0.6),
    "vit_cifar10": (0.5, 0.3),
}
# For a model that is not listed.
OTHER_RATIOS = (0.8, 0.6)

# Exit status of `compress` where the target cannot be met: an answer, not a failure.
NOT_REACHED = 3
CHECK = "import sys, onnx; onnx.checker.check_model(sys.argv[1], full_check=True)"

COLUMNS = (
    *("model", "asked", "kept", "method", "metric", "before", "after", "drop", "output error"),
    *("MLU", "compress, s", "latency ratio", "outcome"),
)
WORDS = ("model", "method", "metric", "outcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row: one model at one ratio by one method. What was not measured is None.

    Attributes:
        model: Name in the zoo.
        ratio: Parameters to keep, as asked for.
        method: How.
        status: Exit status of `compress`.
        outcome: Its verdict; why there is no model; or what failed afterwards.
        failed: Whether something failed that should not.
        mlu: Mean layer utilization of the original.
        seconds: Wall-clock seconds of the whole command, its validation included.
        kept: Parameters kept, as counted in the result.
        metric: Name of the real metric.
        samples: Samples it was measured on.
        before: Its value for the original.
        after: Its value for the result; None also where that is not finite.
        drop: Before and after compared; above 0 is worse.
        error: Relative error of the outputs on held-back samples.
        latency: Median of paired latency ratios; below 1 is faster.
    """

    model: str
    ratio: float
    method: str
    status: int
    outcome: str
    failed: bool
    mlu: float | None
    seconds: float
    kept: float | None = None
    metric: str | None = None
    samples: int | None = None
    before: float | None = None
    after: float | None = None
    drop: float | None = None
    error: float | None = None
    latency: float | None = None

    @property
    def key(self) -> tuple[str, float, str]:
        """What makes it the row it is."""
        return self.model, self.ratio, self.method


class Results:
    """Rows by key, kept in a file after each one."""

    def __init__(self, settings: dict[str, Any], file: Path | None) -> None:
        """Begin, or go on with what `file` holds.

        Raises:
            StepError: The file holds something else, or results of other settings.
        """
        self.settings = settings
        self.file = file
        self.entries: dict[tuple[str, float, str], Entry] = {}
        if file is None or not file.exists():
            return
        try:
            held = json.loads(file.read_text(encoding="utf8"))
            entries = [Entry(**fields) for fields in held["rows"]]
            settings_held = held["settings"]
        except (ValueError, KeyError, TypeError) as e:
            raise StepError(f"{file}: not results of this script ({e})") from e
        if settings_held != settings:
            raise StepError(f"{file}: made with {settings_held}, not {settings}; name another file")
        self.entries = {entry.key: entry for entry in entries if not entry.failed}

    def add(self, entry: Entry) -> None:
        """Keep a row; the file is replaced at once."""
        self.entries[entry.key] = entry
        if self.file is None:
            return
        rows = [asdict(e) for e in self.entries.values()]
        text = json.dumps({"settings": self.settings, "rows": rows}, indent=1)
        partial = self.file.with_name(f"{self.file.name}.partial")
        partial.write_text(f"{text}\n", encoding="utf8")
        partial.replace(self.file)


def prepare(zoo: Zoo, name: str) -> float | None:
    """Write `NAME.npz` and measure a model's mean layer utilization on it.

    Raises:
        StepError: A command failed.
    """
    data = zoo.calibrate(name)
    measured = zoo.must(
        "analyze", zoo.program, "analyze", zoo.model(name), "--data", data, "--json"
    )
    report = read_json(measured, "analyze")
    mean = report["mean_layer_utilization"]
    return None if mean is None else float(mean)


def measure(zoo: Zoo, name: str, ratio: float, method: str, mlu: float | None) -> Entry:
    """One row; what fails after compression becomes its outcome."""
    out = f"{name}_{ratio}_{method}.onnx"
    report = f"{out}.json"
    options = [] if method == DEFAULT_METHOD else ["--method", method]
    start = time.perf_counter()
    done = zoo.run(
        *(zoo.program, "compress", zoo.model(name), "-o", out, "--data", f"{name}.npz"),
        *("--param-ratio", str(ratio), "--report", report, *options),
    )
    fields: dict[str, Any] = {
        **{"model": name, "ratio": ratio, "method": method, "mlu": mlu},
        **{"status": done.returncode, "seconds": time.perf_counter() - start},
    }
    if done.returncode:
        reached = "not reached" if done.returncode == NOT_REACHED else "compress failed"
        outcome = f"{reached}: {zoo.error_line(done.stderr)}"
        return Entry(**fields, outcome=outcome, failed=done.returncode != NOT_REACHED)
    try:
        made = json.loads((zoo.work / report).read_text(encoding="utf8"))
        fields |= compression_figures(made)
        zoo.must("the full check of onnx.checker", sys.executable, "-c", CHECK, out)
        fields |= zoo.metric(name, out)
        if method == DEFAULT_METHOD:
            zoo.must(
                "validate",
                *(zoo.program, "validate", zoo.model(name), out),
                *("--data", f"{name}.npz"),
            )
    except StepError as e:
        return Entry(**fields, outcome=str(e), failed=True)
    return Entry(**fields, outcome=made["verdict"], failed=False)


def compression_figures(report: dict[str, Any]) -> dict[str, Any]:
    """What a report of `compress` says, as fields of an `Entry`."""
    found = report["validation"]
    error = found["relative_error"]  # the word Infinity where JSON has no number for it
    return {
        "kept": found["candidate"]["parameters"] / found["reference"]["parameters"],
        "error": None if error is None else float(error),
        "latency": found["providers"][0]["latency"]["ratio"],
    }


def table(entries: Sequence[Entry]) -> str:
    """The rows as a Markdown table."""
    return markdown(COLUMNS, [_cells(entry) for entry in entries], WORDS)


def _cells(entry: Entry) -> tuple[str, ...]:
    def shown(value: float | None, form: str, scale: float = 1.0) -> str:
        return NOTHING if value is None else format(scale * value, form)

    measured = entry.metric is not None
    return (
        entry.model,
        f"{100 * entry.ratio:g} %",
        f"{shown(entry.kept, '.1f', 100)} %" if entry.kept is not None else NOTHING,
        entry.method,
        _plain(entry.metric or NOTHING),
        shown(entry.before, ".2f"),
        # A model was made and measured, and its output is not finite.
        "not finite" if measured and entry.after is None else shown(entry.after, ".2f"),
        shown(entry.drop, ".2f"),
        shown(entry.error, ".3g"),
        f"{shown(entry.mlu, '.1f', 100)} %" if entry.mlu is not None else NOTHING,
        shown(entry.seconds, ".1f"),
        shown(entry.latency, ".2f"),
        _plain(entry.outcome),
    )


def _plain(text: str) -> str:
    """Text that cannot break a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _result_file(text: str) -> Path:
    path = Path(text).resolve()
    if path.suffix not in (".json", ".md"):
        raise argparse.ArgumentTypeError(f"{text} ends in neither .json nor .md")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: its folder does not exist")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("zoo_table.py", __doc__)
    add_zoo_option(parser)
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(RATIOS),
        metavar="NAME",
        help=f"models of the zoo (default: {' '.join(RATIOS)})",
    )
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=_share,
        metavar="R",
        help="parameters to keep, for every model (default: a list for each model)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"(default: {' '.join(METHODS)})",
    )
    parser.add_argument(
        "--samples",
        type=_positive,
        default=256,
        metavar="N",
        help="calibration samples, those that compress holds back included (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=_positive,
        metavar="N",
        help="measure metrics on the first N samples only, for a quick trial",
    )
    parser.add_argument(
        "--out",
        type=_result_file,
        action="append",
        default=[],
        metavar="FILE",
        help="also write to FILE; may be repeated. A .md gets the table. A .json gets each row as "
        "it is measured, and rows that it holds already are not measured again",
    )
    return parser


def _caption(options: argparse.Namespace, given: Sequence[str], version: str) -> str:
    """The command, without places on this machine, and what a reader of the table has to know."""
    part = "" if options.limit is None else f" (the first {options.limit} samples only)"
    return (
        f"{command('zoo_table.py', given, SAID)}\n\n"
        f"{version}; at most {options.samples} calibration samples, a fifth of them held back. "
        f"Metrics are those of `zoo.py eval`{part}; a drop above 0 is worse. Output error: "
        "relative, on the held-back samples. Latency ratio: median over pairs of runs of both "
        "models in one process. Seconds are those of the whole `compress` command, its "
        "validation included."
    )


def _fill(
    results: Results, zoo: Zoo, wanted: Sequence[tuple[str, float, str]], problems: list[str]
) -> None:
    """Measure the rows that are wanted and not there yet."""
    for name in dict.fromkeys(model for model, _, _ in wanted):
        missing = [key for key in wanted if key[0] == name and key not in results.entries]
        if not missing:
            continue
        try:
            mlu = prepare(zoo, name)
        except StepError as e:
            problems.append(f"{name}: {e}")
            print(problems[-1], file=sys.stderr)
            continue
        for model, ratio, method in missing:
            entry = measure(zoo, model, ratio, method, mlu)
            results.add(entry)
            if entry.failed:
                problems.append(f"{name} at {ratio:g} by {method}: {entry.outcome}")
                print(problems[-1], file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the table and print it; 0 where all went as it should, 1 where not, 2 for usage."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    folder = check_zoo(parser, options.zoo)
    program = find_program()
    if program is None:
        parser.error(f"onnx-utilrank is not installed beside {sys.executable}")
    wanted = [
        (name, ratio, method)
        for name in dict.fromkeys(options.models)
        for ratio in dict.fromkeys(options.ratios or RATIOS.get(name, OTHER_RATIOS))
        for method in dict.fromkeys(options.methods)
    ]
    file = next((path for path in options.out if path.suffix == ".json"), None)
    settings = {"samples": options.samples, "limit": options.limit}
    try:
        results = Results(settings, file)
    except StepError as e:
        parser.error(str(e))
    problems: list[str] = []
    with open_zoo(folder, samples=options.samples, limit=options.limit, program=program) as zoo:
        version = zoo.must("onnx-utilrank --version", program, "--version").strip()
        _fill(results, zoo, wanted, problems)
    rows = [results.entries[key] for key in wanted if key in results.entries]
    text = f"{_caption(options, given, version)}\n\n{table(rows)}"
    print(text)
    for path in options.out:
        if path.suffix == ".md":
            path.write_text(f"{text}\n", encoding="utf8")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
