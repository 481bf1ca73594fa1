"""What a page is made of. Texts are as they come, from models that may be hostile: the template
escapes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

__all__ = [
    "Bar",
    "Cell",
    "Chart",
    "Charts",
    "Code",
    "Column",
    "Content",
    "Fact",
    "Facts",
    "Part",
    "Section",
    "Sentences",
    "TableView",
    "Tone",
    "duration",
    "number",
    "percent",
    "quantity",
    "ratio",
]

Content = dict[str, Any]
"""The content of a report: see `schema.json`."""

Tone = Literal["", "plain", "good", "bad", "warn"]

# JSON has no infinity; see `ValidationReport.as_dict`.
_ENDLESS = {"Infinity": "∞", "-Infinity": "−∞"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A figure with its name.

    Attributes:
        name: What it is.
        value: The figure.
        more: What belongs to it, in small.
        tone: How good it is.
    """

    name: str
    value: str
    more: str = ""
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Figures beside each other."""

    facts: Sequence[Fact]
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True, slots=True)
class Sentences:
    """Sentences, a paragraph each; with a tone they stand out."""

    lines: Sequence[str]
    tone: Tone = ""
    kind: Literal["sentences"] = "sentences"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A bar behind a figure.

    Attributes:
        share: Its length, in [0, 1] of the cell.
        of: Length of a paler bar behind it, such as what was before; 0 for none.
    """

    share: float
    of: float = 0.0


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell of a table shows.

    Attributes:
        text: The text.
        sort: What the column is sorted by; the text where it is None.
        bar: A bar beside the text.
        tone: How good it is.
        more: What belongs to it, in small.
    """

    text: str
    sort: float | None = None
    bar: Bar | None = None
    tone: Tone = ""
    more: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column.

    Attributes:
        title: Its head.
        words: Whether it holds words, which are flush left; a name that may be long is `name`, and
            a sentence `prose`.
    """

    title: str
    words: Literal["", "name", "prose", "short"] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableView:
    """A table.

    Attributes:
        title: What it is of.
        columns: The columns.
        rows: One cell a column in each.
        folded: Whether it is shut at first: for what is long and looked up.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False
    kind: Literal["table"] = "table"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture.

    Attributes:
        title: What it is of.
        drawing: SVG, which holds no text of a model.
        caption: What to see in it.
    """

    title: str
    drawing: Markup
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Charts:
    """Pictures beside each other; many small ones where they are alike."""

    charts: Sequence[Chart]
    small: bool = False
    kind: Literal["charts"] = "charts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Lines to copy."""

    title: str
    lines: Sequence[str]
    folded: bool = True
    kind: Literal["code"] = "code"


Part = Facts | Sentences | TableView | Charts | Code


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page with a head.

    Attributes:
        key: Its anchor.
        title: Its head.
        parts: What is in it.
    """

    key: str
    title: str
    parts: Sequence[Part]


def number(value: float | str | None, digits: int = 3) -> str:
    """A figure in so many digits; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return _ENDLESS.get(value, value)
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    size = abs(value)
    if 1e-3 <= size < 1e6:
        shown = f"{value:,.{digits}g}" if size < 10**digits - 0.5 else f"{value:,.0f}"
    else:
        shown = f"{value:.{digits - 1}e}"
    return shown.replace("-", "−")


def ratio(after: float | None, before: float | None) -> str:
    """How much of something is left."""
    if after is None or not before:
        return "–"
    return f"{after / before:.3f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def quantity(count: float | None) -> str:
    """Bytes in the unit that people read."""
    if count is None:
        return "–"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} bytes"


def duration(seconds: float | None) -> str:
    """Seconds, or minutes where they are many."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
