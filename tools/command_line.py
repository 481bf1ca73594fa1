"""What the command lines of the tools have in common."""

import argparse
import sys

from zoo_commands import StepError

from onnx_utilrank.errors import UtilrankError

__all__ = ["failed", "new_parser"]


def new_parser(program: str, text: str | None) -> argparse.ArgumentParser:
    """A parser that prints `text`, the tool's docstring, as it is written; no abbreviations."""
    return argparse.ArgumentParser(
        prog=program,
        allow_abbrev=False,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def failed(program: str, error: StepError | UtilrankError) -> int:
    """Say on standard error why a tool stops; the exit status."""
    print(f"{program}: error: {error}", file=sys.stderr)
    return error.exit_status if isinstance(error, UtilrankError) else 1
