"""A folder of trained models with their data, and one program that knows both.

A zoo has `zoo.py` and a folder a model, `NAME/model.onnx`, where

    zoo.py calib NAME -o FILE.npz --samples N     writes unlabelled calibration samples
    zoo.py eval NAME MODEL.onnx [--limit N]       prints a JSON line: metric, value, baseline, drop
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "ENVIRONMENT",
    "SAID",
    "StepError",
    "Zoo",
    "add_zoo_option",
    "check_zoo",
    "find_program",
    "open_zoo",
    "read_json",
]

ENVIRONMENT = "ONNX_UTILRANK_ZOO"
# What a command that is shown begins with.
SAID = f"{ENVIRONMENT}=ZOO "
# The line behind a traceback that names the exception.
RAISED = re.compile(r"^Traceback \(.*\n(?:[ \t].*\n)+(\S.*)$", re.MULTILINE)


class StepError(Exception):
    """A command of the chain failed; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Zoo:
    """The commands, as typed in one folder.

    Attributes:
        folder: The zoo.
        program: The command line tool.
        work: Where files are written.
        samples: Calibration samples.
        limit: Samples to measure metrics on; None for all.
    """

    folder: Path
    program: str
    work: Path
    samples: int
    limit: int | None

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the working folder."""
        print("$", shlex.join([Path(words[0]).name, *words[1:]]), file=sys.stderr, flush=True)
        return subprocess.run(
            words, cwd=self.work, capture_output=True, text=True, encoding="utf8", check=False
        )

    def must(self, what: str, *words: str) -> str:
        """Run a command that has to succeed; its standard output.

        Raises:
            StepError: It did not.
        """
        done = self.run(*words)
        if done.returncode:
            reason = self.error_line(done.stderr)
            raise StepError(f"{what} failed with exit status {done.returncode}: {reason}")
        return done.stdout

    @property
    def script(self) -> str:
        """The zoo's own program."""
        return str(self.folder / "zoo.py")

    def model(self, name: str) -> str:
        """The file of a model."""
        return str(self.folder / name / "model.onnx")

    def error_line(self, errors: str) -> str:
        """What is wrong by standard error: the tool's own line, an exception's, or the last one.

        The zoo is called ZOO in it, and the working folder goes: results are for others to read,
        wherever these lie here.
        """
        lines = [line.rstrip() for line in errors.splitlines() if line.strip()]
        own = [x.partition("error: ")[2] for x in lines if x.startswith("onnx-utilrank: error")]
        # What an exception says may take more lines than that with its name.
        raised = RAISED.findall(errors)
        line = (own or raised or lines or ["no message"])[-1].strip()
        return line.replace(f"{self.work}/", "").replace(str(self.folder), "ZOO")

    def calibrate(self, name: str) -> str:
        """Write the calibration samples of a model to `NAME.npz` in the working folder; that name.

        Raises:
            StepError: `zoo.py calib` failed.
        """
        data = f"{name}.npz"
        self.must(
            "zoo.py calib",
            *(sys.executable, self.script, "calib", name),
            *("-o", data, "--samples", str(self.samples)),
        )
        return data

    def metric(self, name: str, model: str) -> dict[str, Any]:
        """The real metric of a model: its name, `samples`, `before`, `after` and `drop`.

        Raises:
            StepError: `zoo.py eval` failed.
        """
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        printed = self.must("zoo.py eval", sys.executable, self.script, "eval", name, model, *limit)
        found = read_json(printed, "zoo.py eval")
        return {
            "metric": found["metric"],
            "samples": found["n"],
            "before": found["baseline"],
            "after": found["value"],
            "drop": found["drop"],
        }


def read_json(output: str, what: str) -> dict[str, Any]:
    """The JSON object that a command printed; nothing else belongs on standard output.

    Raises:
        StepError: It printed anything else.
    """
    try:
        found = json.loads(output)
    except ValueError as e:
        raise StepError(f"{what} printed something else than JSON ({e})") from e
    if not isinstance(found, dict):
        raise StepError(f"{what} printed no JSON object")
    return found


def add_zoo_option(parser: argparse.ArgumentParser) -> None:
    """Where the zoo is."""
    parser.add_argument(
        "--zoo",
        type=Path,
        metavar="DIR",
        default=os.environ.get(ENVIRONMENT) or None,
        help=f"the zoo's folder (default: the environment variable {ENVIRONMENT})",
    )


def check_zoo(parser: argparse.ArgumentParser, folder: Path | None) -> Path:
    """The whole path of the zoo that was named; a usage error where there is none."""
    if folder is None:
        parser.error(f"which zoo? Give --zoo DIR, or set {ENVIRONMENT}")
    if not (folder / "zoo.py").is_file():
        parser.error(f"{folder}: not a zoo, for there is no zoo.py in it")
    return folder.resolve()


@contextmanager
def open_zoo(
    folder: Path, *, samples: int, limit: int | None = None, program: str = ""
) -> Iterator[Zoo]:
    """A zoo whose commands write into a new folder, which is gone afterwards."""
    with tempfile.TemporaryDirectory() as work:
        yield Zoo(folder=folder, program=program, work=Path(work), samples=samples, limit=limit)


def find_program() -> str | None:
    """The command line tool of the environment that runs this, or else of the path."""
    # The environment that runs this need not be activated: its programs lie beside its interpreter.
    beside = shutil.which("onnx-utilrank", path=Path(sys.executable).parent)
    return beside or shutil.which("onnx-utilrank")
