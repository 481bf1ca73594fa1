"""The parser of every verb: what argparse has, with shorter errors that know what was meant."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

__all__ = ["Parser", "group"]

_CHOICE = re.compile(r"^(?:argument (?P<argument>.*): )?invalid choice: '(?P<given>.*?)' \(")


class _Formatter(argparse.HelpFormatter):
    """Wraps what is one paragraph, and leaves examples and lists as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # argparse forgets that verbs are indented, and breaks the line behind the longest.
            self._action_max_length += self._indent_increment


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line, and name the nearest word to a wrong one.

    argparse suggests only verbs and choices, and from Python 3.14 on (`suggest_on_error`).
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Formatter)
        super().__init__(**options)

    def parse_known_args(  # type: ignore[override]  # the base class overloads it by the namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As of the base class; a misspelt option is named before one that it leaves missing."""
        for word in args or ():
            # Behind a verb, options are its own.
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break
            name, known = word.partition("=")[0], self._option_string_actions
            if name.startswith("--") and not any(each.startswith(name) for each in known):
                self.error(f"there is no option {name}{_meant(name, known)}")
        parsed, rest = super().parse_known_args(args, namespace)
        if rest:  # else the parser around this one would name them, and itself
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line."""
        choice = _CHOICE.match(message)
        if choice and choice["argument"] == "VERB":
            (verbs,) = (a.choices for a in self._actions if a.dest == "verb")
            message = f"there is no verb {choice['given']!r}{_meant(choice['given'], verbs or ())}"
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help lists what there is)\n")


def group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The group of options of that title, which is made where there is none yet."""
    known = (each for each in parser._action_groups if each.title == title)
    return next(known, None) or parser.add_argument_group(title)


def _meant(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
