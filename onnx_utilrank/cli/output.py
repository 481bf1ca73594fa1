"""How results come out; this module loads next to nothing."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from onnx_utilrank.cli.parser import group
from onnx_utilrank.errors import ConfigError

__all__ = ["add_output_options", "check_outputs"]

# Files of a folder that are read as data.
SAMPLES = (".npz", ".npy", ".pb")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """How results come out."""
    options = group(parser, "output")
    options.add_argument(
        "--report",
        metavar="FILE",
        help="also write the results to FILE: one page to look at where "
        "its name ends in .html, else JSON",
    )
    options.add_argument(
        "--json", action="store_true", help="print the results as JSON instead of tables"
    )


def check_outputs(sources: Sequence[str | None], targets: Sequence[str | None]) -> None:
    """Check before the work that every file to write can be written and overwrites no source.

    Args:
        sources: What is read: files, folders of data, or names of functions that give data.
        targets: Files to write.

    Raises:
        ConfigError: A folder does not exist or cannot be written to, a target is a folder, is a
            source or holds data of one, or is named twice.
    """
    taken = {Path(s).resolve() for s in sources if s}
    for target in filter(None, targets):
        path = Path(target).resolve()
        if not path.parent.is_dir():
            raise ConfigError(f"{target}: its folder does not exist")
        if path.is_dir():
            raise ConfigError(f"{target}: is a folder, not a file")
        if not os.access(path.parent, os.W_OK):
            raise ConfigError(f"{target}: its folder cannot be written to")
        samples = path.suffix.lower() in SAMPLES and path.exists()
        if path in taken or (samples and not taken.isdisjoint(path.parents)):
            raise ConfigError(f"{target}: would overwrite another file of this command")
        if path.exists() and path in _weights(sources):
            raise ConfigError(f"{target}: would overwrite the weights of another file")
        taken.add(path)


def _weights(sources: Sequence[str | None]) -> set[Path]:
    """Files beside models that hold their weights."""
    from onnx_utilrank.model.store import data_files_of  # loads onnx, which most commands need late

    models = [Path(s) for s in sources if s and Path(s).suffix == ".onnx" and Path(s).is_file()]
    return {model.resolve().with_name(name) for model in models for name in data_files_of(model)}
