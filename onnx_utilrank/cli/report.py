"""`onnx-utilrank report`: a page to look at, of a report in JSON."""

import argparse

from onnx_utilrank.cli.output import check_outputs
from onnx_utilrank.cli.parser import group
from onnx_utilrank.report.write import write_report

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s REPORT -o OUT"
    parser.epilog = "example:\n  onnx-utilrank report report.json -o report.html"
    parser.description = (
        "Makes the page that --report FILE.html makes at once, of what --report FILE.json wrote: "
        "one file that needs nothing else, to look at, print or send."
    )
    parser.add_argument("given", metavar="REPORT", help="what --report wrote as JSON")
    group(parser, "output").add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="the file to write: a page where its name ends in .html, else JSON",
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    check_outputs([args.given], [args.output])
    write_report(args.given, args.output)
    print(f"Written to {args.output}.")
    return 0
