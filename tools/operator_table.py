"""Which operators the torch executor knows, and how they do in ONNX's own tests.

    python tools/operator_table.py [--zoo DIR] [--device cuda]

Prints a Markdown table: for each operator how many tests of the onnx package use it, how many of
them were run and passed, and why the others were left out. With `--zoo`, another one of the largest
difference to ONNX Runtime for each model of a folder of models, relative to the largest element of
the output. The exit status is 1 if a test fails, or a model differs by more than its type explains.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from backend_cases import Case, cases, difference, zoo_feed, zoo_models

from onnx_utilrank.errors import UtilrankError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.torch_graph.operators import OPERATORS

# How many units in the last place a model of many layers may be off.
TOLERANCE = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; gives the exit status."""
    parser = argparse.ArgumentParser(description="Operators of the torch executor.")
    parser.add_argument("--zoo", type=Path, help="a folder of models to compare as well")
    parser.add_argument("--device", default="cpu", help="where torch runs (default: %(default)s)")
    options = parser.parse_args(arguments)
    failures = {case.name: _failure(case, options.device) for case in cases() if not case.left_out}
    failures = {name: reason for name, reason in failures.items() if reason}
    for line in operator_rows(cases(), set(failures)):
        print(line)
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    failed = bool(failures)
    if options.zoo:
        print()
        failed |= _zoo(options.zoo, options.device)
    return int(failed)


def _failure(case: Case, device: str) -> str:
    """Why a case fails; empty where it passes."""
    try:
        case.check(device)
    except (AssertionError, UtilrankError) as e:
        return " ".join(str(e).split())[:200] or type(e).__name__
    return ""


def operator_rows(found: Sequence[Case], failed: set[str]) -> Iterator[str]:
    """The lines of the table of operators.

    Args:
        found: All cases.
        failed: Names of those that failed.
    """
    using: defaultdict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in found:
        for key in case.operators & OPERATORS.keys():
            using[key].append(case)
    yield "| operator | passed | run | left out |"
    yield "| --- | ---: | ---: | --- |"
    for domain, name in sorted(OPERATORS):
        those = using[domain, name]
        run = [case for case in those if not case.left_out]
        passed = sum(case.name not in failed for case in run)
        reasons = Counter(case.left_out for case in those if case.left_out)
        left = "; ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
        yield f"| {f'{domain}.' if domain else ''}{name} | {passed} | {len(run)} | {left} |"
    run = [case for case in found if not case.left_out]
    yield f"| all tests | {len(run) - len(failed)} | {len(run)} | {len(found) - len(run)} |"


def _zoo(folder: Path, device: str) -> bool:
    """Print the table of models; gives whether one differs too much."""
    print("| model | largest relative difference |")
    print("| --- | ---: |")
    bad = False
    for model in zoo_models(folder):
        store = ModelStore.load(model)
        try:
            found = difference(store, zoo_feed(model, store), device=device)
        except (AssertionError, UtilrankError) as e:
            print(f"| {model.parent.name} | {' '.join(str(e).split())} |")
            bad = True
            continue
        print(f"| {model.parent.name} | {max(d.largest for d in found):.1e} |", flush=True)
        bad |= any(d.largest > TOLERANCE * d.epsilon for d in found)
    return bad


if __name__ == "__main__":
    sys.exit(main())
