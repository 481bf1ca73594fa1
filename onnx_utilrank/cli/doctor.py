"""`onnx-utilrank doctor`: what is wrong with the installation, and which providers work."""

import argparse

from onnx_utilrank.cli.emit import emit
from onnx_utilrank.cli.output import add_output_options, check_outputs
from onnx_utilrank.cli.parser import group
from onnx_utilrank.errors import ProviderUnavailableError
from onnx_utilrank.installation.doctor import doctor
from onnx_utilrank.report.doctor_tables import doctor_tables

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s […]"
    parser.epilog = "example:\n  onnx-utilrank doctor --provider cuda"
    parser.description = (
        "Versions beside those that are needed; every execution provider that the "
        "installed ONNX Runtime has, tried on a model of two nodes; processor and memory. Ends in "
        "status 4 where the provider that is asked for does not work."
    )
    group(parser, "where it runs").add_argument(
        "--provider",
        default="cpu",
        metavar="NAME",
        help="the execution provider that has to work (default: cpu)",
    )
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    check_outputs([], [args.report])
    report = doctor(args.provider)
    emit(args, report, doctor_tables(report))
    if report.fault is not None:
        raise ProviderUnavailableError(f"provider {report.asked}: {report.fault}")
    return 0
