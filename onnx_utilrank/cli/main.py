"""Entry point: parse, run the verb, turn errors into one line and the documented exit status."""

import argparse
import importlib
import io
import logging
import sys
import time
from collections.abc import Sequence

from onnx_utilrank import __version__
from onnx_utilrank.cli.parser import Parser
from onnx_utilrank.errors import UtilrankError, printable

__all__ = ["build_parser", "main"]

# Each is a module beside this one, which is loaded where it is asked for: most bring torch, which
# takes seconds.
VERBS = {
    "inspect": "tell what is in a model and what could be factored, without data",
    "analyze": "measure which share of its space each weight uses",
    "compress": "make a smaller model and validate it",
    "sweep": "measure the trade-off between size and quality",
    "quantize": "store weights in fewer bits and validate the result",
    "finetune": "recover what compression lost, without labels",
    "repair": "bring back what quantization lost",
    "train": "train a model with labels so that it comes out of low rank",
    "validate": "compare a model with its reference",
    "benchmark": "compare models in latency and memory",
    "report": "make a page to look at of a report in JSON",
    "doctor": "tell what is wrong with the installation, and which providers work",
    "completion": "print what completes this command line in a shell",
}

START = """\
onnx-utilrank makes a trained ONNX model smaller and faster by the rank that
your data really use, and compares it with the original on samples held back.

  onnx-utilrank inspect MODEL
      what is in it, what could be made smaller, and what data that needs
  onnx-utilrank compress MODEL -o OUT --data DATA --param-ratio 0.5
      a model with half of the parameters, and what that cost
  onnx-utilrank validate MODEL OUT --data DATA
      compare any two models

onnx-utilrank --help lists all verbs, onnx-utilrank VERB --help its options.
If something does not run, ask onnx-utilrank doctor."""

EXIT_STATUS = """exit status:
  0  done
  1  anything not listed here
  2  usage: options that are wrong or contradict each other, or nothing to do
  3  the target or a tolerance was missed
  4  an execution provider, or a cluster, was asked for and is not available
  5  the model, the plan or the data cannot be used
  130  interrupted from the keyboard"""

USAGE = 2

# As shells have it: 128 and the number of the signal.
INTERRUPTED = 130


class _OneLine(logging.Formatter):
    """Warnings name nodes and values of the model, whose line breaks must not pass for ours."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def build_parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        wanted: The one verb whose arguments matter; None for all of them.
    """
    parser = Parser(
        prog="onnx-utilrank",
        description="Make a trained ONNX model smaller and faster by the rank its data really "
        "uses, and prove that it still works.",
        epilog=EXIT_STATUS,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(required=True, title="verbs", metavar="VERB", dest="verb")
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary)
        if wanted in (None, name):
            module = importlib.import_module(f"onnx_utilrank.cli.{name}")
            module.add_arguments(verb)
            verb.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words of the command line; None for the process's own.

    Returns:
        The exit status.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack letters of names and help
            stream.reconfigure(errors="backslashreplace")
    if not words:
        print(START, file=sys.stderr)
        return USAGE
    try:
        parser = build_parser(next((word for word in words if not word.startswith("-")), ""))
    except (ImportError, AttributeError, OSError) as e:  # as broken packages have it
        reason = printable(" ".join(str(e).split()))
        print(
            f"onnx-utilrank: error: the installation is broken ({reason}); "
            "onnx-utilrank doctor says more",
            file=sys.stderr,
        )
        return UtilrankError.exit_status
    args = parser.parse_args(words, argparse.Namespace(words=words, began=time.monotonic()))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("onnx-utilrank: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)  # those of other packages quote what files hold, too
    # What ONNX Runtime logs is repeated in our own one line where it matters. Not every verb loads
    # it, and where it is broken it must not be loaded.
    runtime = sys.modules.get("onnxruntime")
    if runtime is not None:
        runtime.set_default_logger_severity(4)
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
