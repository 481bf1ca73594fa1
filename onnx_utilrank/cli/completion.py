"""`onnx-utilrank completion`: what completes this command line in a shell."""

import argparse
from importlib.util import find_spec

from onnx_utilrank.errors import ConfigError

__all__ = ["add_arguments", "run"]

SHELLS = ("bash", "zsh", "tcsh")

# Arguments that are files, by what help calls them.
FILES = {"CANDIDATE", "DATA", "FILE", "MODEL", "OUT", "QUANTIZED", "REFERENCE", "REPORT"}
FOLDERS = {"DIR"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s SHELL"
    parser.epilog = (
        "example:\n  onnx-utilrank completion bash \\\n"
        "      > ~/.local/share/bash-completion/completions/onnx-utilrank"
    )
    parser.description = (
        "Print the script that completes verbs, options and files in a shell. It is the same until "
        "the next version: store it where the shell looks for such scripts."
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or tcsh")


def run(args: argparse.Namespace) -> int:
    """Run the verb; its exit status."""
    if find_spec("shtab") is None:
        raise ConfigError("completion needs shtab: install onnx-utilrank[completion]")
    # Not everybody has it.
    import shtab

    from onnx_utilrank.cli.main import build_parser

    parser = build_parser()
    _mark(parser, shtab.FILE, shtab.DIRECTORY)
    print(shtab.complete(parser, args.shell))
    return 0


def _mark(parser: argparse.ArgumentParser, file: object, folder: object) -> None:
    """Say of each argument, in the attribute that shtab reads, whether files complete it."""
    for action in parser._actions:
        if action.metavar in FILES:
            vars(action)["complete"] = file
        elif action.metavar in FOLDERS:
            vars(action)["complete"] = folder
        if isinstance(action.choices, dict):  # the verbs
            for verb in action.choices.values():
                _mark(verb, file, folder)
