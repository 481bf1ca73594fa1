"""Take every model of a folder through the library, and tell what became of each.

    python tools/torture.py --zoo ZOO               ZOO/torture/**/*.onnx and the models of the zoo
    python tools/torture.py FOLDER_OR_MODEL ...     models of your own

Each model is analyzed, rewritten at full rank (energy 1.0 with force, which must not change what is
computed) and compressed to half of its parameters; each result is validated against it. The
rewritten model has to give ONNX Runtime's own outputs within what rounding may do; the compressed
one has to load and run; both have to keep the signature, and the source has to stay as it is. Or
there has to be a reason, in one line. The exit status is 1 if any model has an outcome that is
written in capitals.

Inputs are those of `zoo.py` where there is one; else the data sets `test_data_set_*` beside the
model; else random values of the declared types. Each model has a process of its own, with a limit
of time and memory, so that a crash is an outcome too and ends nothing else: this needs a system
that can fork.
"""

import argparse
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from command_line import new_parser
from torture_model import BAD, CRASH, FOREIGN, NOTHING, REFUSED, STEPS, TIMEOUT, Outcome, examine
from zoo_commands import ENVIRONMENT, add_zoo_option, check_zoo

__all__ = ["Limits", "examine_apart", "main", "models_in", "tables"]

# The library is read once; every model gets a fork of the process that did.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["onnx_utilrank", "onnxruntime"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the process of one model may take.

    Attributes:
        seconds: Wall-clock time.
        memory: Bytes of its own; mapped files do not count.
        samples: Samples or feeds to run.
    """

    seconds: float = 600.0
    memory: int = 12 * 2**30
    samples: int = 6


def models_in(zoo: Path | None, folders: Sequence[Path]) -> dict[str, Path]:
    """The models to take, by the name that tables give them."""
    found: dict[str, Path] = {}
    for folder in folders:
        files = sorted(folder.rglob("*.onnx")) if folder.is_dir() else [folder]
        top = folder.parent if folder.is_dir() else folder.parent.parent
        found |= {str(file.relative_to(top)): file for file in files}
    if zoo is not None and not folders:
        torture = zoo / "torture"
        found |= {str(f.relative_to(zoo)): f for f in sorted(zoo.glob("*/model.onnx"))}
        found |= {str(f.relative_to(zoo)): f for f in sorted(torture.rglob("*.onnx"))}
    return found


def examine_apart(label: str, model: Path, zoo: Path | None, limits: Limits) -> list[Outcome]:
    """`examine` in a process of its own, which may crash, hang or ask for too much."""
    with tempfile.NamedTemporaryFile(mode="r", errors="replace") as log:
        here, there = CONTEXT.Pipe(duplex=False)
        arguments = (there, log.name, label, model, zoo, limits)
        process = CONTEXT.Process(target=_child, args=arguments, daemon=True)
        process.start()
        there.close()
        outcomes: list[Outcome] = []
        try:
            answered = here.poll(limits.seconds)
            outcomes = here.recv() if answered else []
        except EOFError:  # it ends without an answer
            answered = True
            process.join(1)
        process.kill()
        process.join()
        if outcomes:
            return outcomes
        if not answered:
            word, detail = TIMEOUT, f"after {limits.seconds:g} s"
        else:
            code = process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            last = " ".join(log.read().split())[-200:]
            word, detail = CRASH, f"{how}: {last}"
        return [Outcome(model=label, step=step, word=word, detail=detail) for step in STEPS]


def _child(
    answer: Connection, log: str, label: str, model: Path, zoo: Path | None, limits: Limits
) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Path(log).open("w") as file:  # also what native libraries print
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    answer.send(examine(model, label=label, zoo=zoo, samples=limits.samples))


def tables(outcomes: Sequence[Outcome]) -> str:
    """Outcomes in numbers, the faults one by one, and why the others stayed: Markdown tables."""
    counts = Counter((o.word, o.step) for o in outcomes)
    words = sorted({o.word for o in outcomes}, key=lambda word: (word not in BAD, word))
    rows = [("outcome", *STEPS), *((w, *(str(counts[w, s]) for s in STEPS)) for w in words)]
    faults = [(o.word, o.model, o.step, o.detail) for o in outcomes if o.word in BAD]
    reasons: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for o in outcomes:
        if o.word in (NOTHING, REFUSED, FOREIGN):
            alike = re.sub(r"\d[\d,.]*", "N", o.detail.replace(o.model, "MODEL"))
            reasons[o.word, alike].append(o.model)
    why = [
        (word, reason, str(len(set(models))), models[0])
        for (word, reason), models in reasons.items()
    ]
    parts = [_table(rows)]
    if faults:
        parts.append(_table([("fault", "model", "step", "what"), *sorted(faults)]))
    if why:
        parts.append(_table([("outcome", "reason", "models", "such as"), *sorted(why)]))
    return "\n\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    plain = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    plain.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in plain)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("torture.py", __doc__)
    parser.add_argument(
        "models",
        nargs="*",
        type=Path,
        metavar="FOLDER_OR_MODEL",
        help="models to take (default: those of the zoo)",
    )
    add_zoo_option(parser)
    limits = Limits()
    parser.add_argument("--samples", type=int, default=limits.samples, metavar="N")
    parser.add_argument(
        "--seconds", type=float, default=limits.seconds, help="for one model (default: %(default)g)"
    )
    parser.add_argument(
        "--memory", type=float, default=limits.memory / 2**30, help="GiB (default: %(default)g)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="models at a time")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Take all models and print the tables; 1 where there is a fault, 2 for usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    zoo = None if options.zoo is None else check_zoo(parser, options.zoo)
    models = models_in(zoo, [path.resolve() for path in options.models])
    if not models:
        parser.error(f"no models: name a folder, give --zoo DIR, or set {ENVIRONMENT}")
    limits = Limits(
        seconds=options.seconds, memory=int(options.memory * 2**30), samples=options.samples
    )

    def take(label: str) -> list[Outcome]:
        found = examine_apart(label, models[label], zoo, limits)
        for o in found:
            print(f"{o.model}: {o.step}: {o.word}: {o.detail}", file=sys.stderr, flush=True)
        return found

    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = [o for found in pool.map(take, models) for o in found]
    print(f"{len(models)} models\n\n{tables(outcomes)}")
    return int(any(o.word in BAD for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
