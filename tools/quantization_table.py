"""Low-rank factors, quantization, and both: size, time and the real metrics of a zoo's models.

For each model of a zoo (see `zoo_commands.py`), ratio of parameters and scheme: `onnx-utilrank
compress` without and with `--then`, `onnx-utilrank quantize`, and `zoo.py eval` of what each made.
Size, latency and divergence are those of the report of the second: every stage is timed in turns
with the original, on the samples that are held back. Where int8 and int4 are both asked for,
factors in int8 are made once more, as small as int4 alone. The table is printed in Markdown.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
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

__all__ = ["COLUMNS", "RATIOS", "SCHEMES", "main"]

# What each model bears without a loss, about.
RATIOS = {"vit_cifar10": 0.5, "kwt1": 0.5, "minilm_l6": 0.8, "mobilenet_v2": 0.8}
OTHER_RATIO = 0.8
SCHEMES = ("int8", "int8-dynamic", "int4")

COLUMNS = (
    *("model", "made", "bytes", "of original", "latency ratio", "to plain", "divergence"),
    *("metric", "value", "drop"),
)
WORDS = ("model", "made", "metric")

# Exit status of a target that was missed, and of a model that has nothing for a scheme: answers.
ANSWERS = (3, 5)


def rows_of(zoo: Zoo, name: str, ratio: float, schemes: Sequence[str]) -> Iterator[list[str]]:
    """Measure one model.

    Raises:
        StepError: A command failed.
    """
    common = ("--data", f"{name}.npz")
    compress = (zoo.program, "compress", zoo.model(name), *common, "--cache", f"{name}.cache")
    kept = ("--param-ratio", str(ratio))
    low = f"{name}.low.onnx"
    zoo.must("compress", *compress, *kept, "-o", low)
    shown = False
    of_whole: dict[str, float] = {}
    for scheme in schemes:
        made, plain = (f"{name}.{kind}.{scheme}.onnx" for kind in ("both", "plain"))
        found = _quantized(zoo, (*compress, *kept), made, scheme)
        if isinstance(found, str):
            yield [name, f"{scheme}: {found}", *[NOTHING] * (len(COLUMNS) - 2)]
            continue
        zoo.must(
            "quantize",
            *(zoo.program, "quantize", zoo.model(name), *common, "-o", plain, "--to", scheme),
        )
        files = {"low-rank": low, scheme: plain, f"low-rank + {scheme}": made}
        if not shown:
            measured = zoo.metric(name, zoo.model(name))
            yield [
                *(name, "original", f"{_whole_bytes(found):,}", "1.000", "1.00", NOTHING, NOTHING),
                *(str(measured["metric"]), f"{measured['before']:.2f}", NOTHING),
            ]
        for stage in found["stages"]:
            label = stage["name"]
            if label == scheme:
                size = stage["validation"]["candidate"]["file_bytes"]
                of_whole[scheme] = size / _whole_bytes(found)
            if label == "low-rank" and shown:
                continue
            asked = f" ({100 * ratio:g} %)" if "low-rank" in label else ""
            yield _row(zoo, name, f"{label}{asked}", stage, found, files[label])
        shown = True
    if {"int8", "int4"} <= of_whole.keys():
        made, label = f"{name}.as-int4.onnx", "low-rank + int8"
        as_small = ("--size-ratio", str(of_whole["int4"]))
        found = _quantized(zoo, (*compress, *as_small), made, "int8")
        if isinstance(found, str):
            yield [name, f"{label} (bytes of int4): {found}", *[NOTHING] * (len(COLUMNS) - 2)]
            return
        (stage,) = (stage for stage in found["stages"] if stage["name"] == label)
        yield _row(zoo, name, f"{label} (bytes of int4)", stage, found, made)


def _quantized(
    zoo: Zoo, compress: Sequence[str], made: str, scheme: str
) -> Mapping[str, Any] | str:
    """What the report of `compress --then` says of each stage, or why there is no such model."""
    report = zoo.work / f"{made}.json"
    done = zoo.run(*compress, "-o", made, "--then", scheme, "--report", str(report))
    if done.returncode in ANSWERS:
        return zoo.error_line(done.stderr).partition(f"{scheme}: ")[2] or "not reached"
    if done.returncode:
        raise StepError(f"compress --then {scheme}: {zoo.error_line(done.stderr)}")
    quantized: Mapping[str, Any] = read_json(report.read_text(encoding="utf8"), "compress")[
        "quantized"
    ]
    return quantized


def _row(
    zoo: Zoo,
    name: str,
    label: str,
    stage: Mapping[str, Any],
    found: Mapping[str, Any],
    file: str,
) -> list[str]:
    """One stage of what a report found, and the metric of its file."""
    whole, size = _whole_bytes(found), stage["validation"]["candidate"]["file_bytes"]
    beside = found["beside_plain"] if "low-rank + " in label else None
    lost = stage["quality"]["divergence"]
    measured = zoo.metric(name, file)
    after, drop = measured["after"], measured["drop"]
    return [
        *(name, label, f"{size:,}", f"{size / whole:.3f}"),
        _spread(stage["validation"]["providers"][0]["latency"]),
        NOTHING if beside is None else _spread(beside),
        NOTHING if lost is None else f"{lost['mean']:.2g} ± {lost['standard_error']:.1g}",
        str(measured["metric"]),
        NOTHING if after is None else f"{after:.2f}",
        NOTHING if drop is None else f"{drop:.2f}",
    ]


def _whole_bytes(found: Mapping[str, Any]) -> int:
    return int(found["stages"][0]["validation"]["reference"]["file_bytes"])


def _spread(time: Mapping[str, float]) -> str:
    """The median of paired ratios and their quartiles."""
    return f"{time['ratio']:.2f} ({time['ratio_low']:.2f}-{time['ratio_high']:.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the table and print it; 0 where all went as it should, 1 where not, 2 for usage."""
    parser = new_parser("quantization_table.py", __doc__)
    add_zoo_option(parser)
    parser.add_argument("--models", nargs="+", default=list(RATIOS), metavar="NAME")
    parser.add_argument(
        "--ratio", type=float, metavar="R", help="parameters to keep (default: by model)"
    )
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), metavar="SCHEME")
    parser.add_argument(
        "--samples", type=int, default=256, metavar="N", help="calibration samples (default: 256)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="measure metrics on N samples")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    where = check_zoo(parser, options.zoo)
    program = find_program()
    if program is None:
        parser.error(f"onnx-utilrank is not installed beside {sys.executable}")
    rows: list[list[str]] = []
    problems: list[str] = []
    with open_zoo(where, samples=options.samples, limit=options.limit, program=program) as zoo:
        for name in options.models:
            ratio = options.ratio or RATIOS.get(name, OTHER_RATIO)
            try:
                zoo.calibrate(name)
                for row in rows_of(zoo, name, ratio, options.schemes):
                    rows.append(row)
                    print(*row, sep=" | ", file=sys.stderr, flush=True)
            except StepError as e:
                problems.append(f"{parser.prog}: {name}: {e}")
                print(problems[-1], file=sys.stderr)
    print(f"{command(parser.prog, given, SAID)}\n")
    print(markdown(COLUMNS, rows, WORDS))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
