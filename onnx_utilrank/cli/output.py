"""How results come out; this module loads next to nothing."""

import argparse
from pathlib import Path

from onnx_utilrank.cli.parser import group
from onnx_utilrank.errors import ConfigError

__all__ = ["add_output_options", "check_outputs"]


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


def check_outputs(sources: list[str | None], targets: list[str | None]) -> None:
    """Check before the work that every file to write can be written and overwrites no source.

    Raises:
        ConfigError: A folder does not exist, a target is a folder, is a source, or is named twice.
    """
    taken = {Path(s).resolve() for s in sources if s}
    for target in filter(None, targets):
        path = Path(target)
        if not path.resolve().parent.is_dir():
            raise ConfigError(f"{target}: its folder does not exist")
        if path.is_dir():
            raise ConfigError(f"{target}: is a folder, not a file")
        if path.resolve() in taken:
            raise ConfigError(f"{target}: would overwrite another file of this command")
        taken.add(path.resolve())
