"""Options that say where models run."""

import argparse
from typing import Any

from onnx_utilrank.cli.parser import group
from onnx_utilrank.errors import ConfigError

__all__ = [
    "add_library_option",
    "add_provider_option",
    "add_providers_option",
    "providers_options",
]

PROVIDER_HELP = (
    "execution provider: cpu, cuda, tensorrt, or any that ONNX Runtime names; not getting it is an "
    "error"
)


def add_provider_option(parser: argparse.ArgumentParser) -> None:
    """Where to run."""
    options = group(parser, "where it runs")
    options.add_argument(
        "--provider", default="cpu", metavar="NAME", help=f"{PROVIDER_HELP} (default: cpu)"
    )
    options.add_argument(
        "--provider-option",
        action="append",
        type=_assignment,
        default=[],
        metavar="KEY=VALUE",
        help="an option of the provider, such as device_id=1; may be repeated",
    )
    add_library_option(parser)


def add_providers_option(parser: argparse.ArgumentParser) -> None:
    """Where to run, in several places one after another."""
    options = group(parser, "where it runs")
    options.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help=f"{PROVIDER_HELP}; may be repeated (default: cpu)",
    )
    options.add_argument(
        "--provider-option",
        action="append",
        type=_assignment,
        default=[],
        metavar="[NAME:]KEY=VALUE",
        help="an option of a provider, which has to be named where there are several; may be "
        "repeated",
    )
    add_library_option(parser)


def add_library_option(parser: argparse.ArgumentParser) -> None:
    """Operators of the user's own."""
    options = group(parser, "where it runs")
    options.add_argument(
        "--custom-op-library",
        action="append",
        default=[],
        metavar="FILE",
        help="a shared library of operators that ONNX Runtime does not have; may be repeated",
    )


def _assignment(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return key.strip(), value


def providers_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_providers_option` was given.

    Raises:
        ConfigError: It is not clear of which provider an option is.
    """
    providers = tuple(dict.fromkeys(args.provider or ["cpu"]))
    options: dict[str, dict[str, str]] = {}
    for text, value in args.provider_option:
        name, sign, key = text.partition(":")
        if not sign and len(providers) > 1:
            raise ConfigError(
                f"provider option {text}={value}: there are several providers; write "
                f"{providers[0]}:{text}={value}"
            )
        owner, key = (name, key) if sign else (providers[0], text)
        options.setdefault(owner, {})[key] = value
    return {
        "providers": providers,
        "provider_options": options,
        "custom_op_libraries": tuple(args.custom_op_library),
    }
