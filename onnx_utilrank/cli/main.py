"""Entry point: parse, run the verb, turn errors into one line and the documented exit status."""

import argparse
import io
import logging
import sys
from collections.abc import Sequence

import onnxruntime as ort

from onnx_utilrank import __version__
from onnx_utilrank.cli import (
    analyze,
    benchmark,
    compress,
    finetune,
    inspect,
    sweep,
    train,
    validate,
)
from onnx_utilrank.errors import UtilrankError, printable

__all__ = ["build_parser", "main"]

VERBS = (inspect, analyze, compress, sweep, finetune, train, validate, benchmark)

EXIT_STATUS = """exit status:
  0  done
  1  anything not listed here
  2  usage: options that are wrong or contradict each other
  3  the target or a tolerance was missed
  4  an execution provider was asked for and is not available
  5  the model, the plan or the data cannot be used
  130  interrupted from the keyboard"""

# As shells have it: 128 and the number of the signal.
INTERRUPTED = 130


class _OneLine(logging.Formatter):
    """Warnings name nodes and values of the model, whose line breaks must not pass for ours."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="onnx-utilrank",
        description="Make a trained ONNX model smaller and faster by the rank its data really "
        "uses, and prove that it still works.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    for verb in VERBS:
        verb.add_parser(verbs)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words of the command line; None for the process's own.

    Returns:
        The exit status.
    """
    args = build_parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack letters that names have
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("onnx-utilrank: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)  # those of other packages quote what files hold, too
    # What ONNX Runtime logs is repeated in our own one line where it matters.
    ort.set_default_logger_severity(4)
    try:
        status: int = args.run(args)
    except UtilrankError as e:
        print(f"onnx-utilrank: error: {e}", file=sys.stderr)
        return e.exit_status
    except KeyboardInterrupt:
        print("onnx-utilrank: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
