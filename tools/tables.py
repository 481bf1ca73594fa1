"""Tables in Markdown, below the command that printed them."""

import shlex
from collections.abc import Collection, Sequence

__all__ = ["NOTHING", "command", "markdown"]

# A cell where nothing was measured.
NOTHING = "–"
# Options that name files of whoever runs a tool, which are nobody else's business.
PLACES = ("--zoo", "--out", "--plot")


def command(program: str, given: Sequence[str], before: str = "") -> str:
    """The command that was given, as a block of code, without places on this machine.

    Args:
        program: File in `tools/`.
        given: Its arguments.
        before: What has to be set for it.
    """
    words = [
        word
        for option, word in zip(("", *given), given, strict=False)
        if option not in PLACES and word.partition("=")[0] not in PLACES
    ]
    return f"    {before}python tools/{shlex.join([program, *words])}"


def markdown(
    head: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str] = ()
) -> str:
    """A table; the columns named in `words` are aligned as words are, the others as figures."""
    rule = ["---" if column in words else "---:" for column in head]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
