"""`onnx-utilrank inspect`: what is in a model, and what could be factored."""

import argparse

from onnx_utilrank.cli.emit import emit
from onnx_utilrank.cli.options import (
    add_library_option,
    add_output_options,
    check_outputs,
)
from onnx_utilrank.inspection.inspect import inspect
from onnx_utilrank.report.inspection_tables import inspection_tables

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s MODEL […]"
    parser.epilog = "example:\n  onnx-utilrank inspect model.onnx"
    parser.description = (
        "Inputs, outputs and parameters by operator; every weight that could be "
        "factored, with the rank below which that is smaller; every node that is left alone, with "
        "the reason; and what data the model needs."
    )
    parser.add_argument("model", metavar="MODEL", help="an .onnx file")
    add_library_option(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    check_outputs([args.model, *args.custom_op_library], [args.report])
    report = inspect(args.model, custom_op_libraries=args.custom_op_library)
    emit(args, report, inspection_tables(report))
    return 0
