"""Pictures as SVG, drawn by matplotlib; they take their colours from the page.

They hold figures and words of this package alone, never names of a model.
"""

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

__all__ = ["bars", "before_after", "course", "depth", "rows", "spectrum", "trade_off"]

# Stand-ins for colours that the page defines, for light and for dark: no other text has them.
INK, FAINT, GRID, BLUE, ORANGE, PALE = (f"#0a0b{k:02x}" for k in range(1, 7))
COLOURS = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    PALE: "var(--pale)",
}

# Inches; a unit of the drawing is 1/72 of one, and about a pixel on a phone.
WIDE = (4.9, 2.8)
SMALL = (2.9, 1.9)

# Any, as matplotlib lists all of its hundreds of keys as a type.
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "onnx-utilrank",
    "font.size": 10,
    "font.family": ["sans-serif"],
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "path.simplify": True,
}

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

P = ParamSpec("P")

_FAMILY = re.compile(r"font-family: [^;\"]*;? ?")
_MARK = re.compile(r' id="([^"]+)"')
_USED = re.compile(r'(?:href="#|url\(#)([^")]+)')


def _styled(draw: Callable[P, Markup]) -> Callable[P, Markup]:
    """Draw in this style, whatever the settings of the user are."""

    @wraps(draw)
    def styled(*args: P.args, **options: P.kwargs) -> Markup:
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(STYLE)
            return draw(*args, **options)

    return styled


@_styled
def bars(values: Sequence[float], few: Sequence[bool], mean: float | None, label: str) -> Markup:
    """Shares in per cent by number of the layer, with their mean.

    Args:
        values: In [0, 1].
        few: Which of them rest on too few rows.
        mean: The mean, which a line shows.
        label: Of the vertical axis.
    """
    figure, axes = _figure(WIDE)
    numbers = range(1, len(values) + 1)
    width = 0.8 if len(values) < 150 else 1.0
    shown = [100 * v for v in values]
    axes.bar(numbers, shown, width, color=[ORANGE if f else BLUE for f in few])
    if mean is not None:
        said = f"mean {100 * mean:.1f} %"
        axes.axhline(100 * mean, color=INK, linestyle="--", linewidth=1.2, label=said)
    axes.set_ylim(0, 104)
    axes.set_xlim(0.2, len(values) + 0.8)
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    _legend(figure, axes)
    return _svg(figure)


@_styled
def before_after(before: Sequence[float], after: Sequence[float], label: str) -> Markup:
    """What layers had and have, by number of the layer."""
    figure, axes = _figure(WIDE)
    numbers = range(1, len(before) + 1)
    width = 0.8 if len(before) < 150 else 1.0
    axes.bar(numbers, before, width, color=PALE, label="before")
    axes.bar(numbers, after, width, color=BLUE, label="after")
    axes.set_xlim(0.2, len(before) + 0.8)
    axes.yaxis.set_major_formatter(_counted)
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    _legend(figure, axes)
    return _svg(figure)


@_styled
def rows(shares: Sequence[float], enough: float) -> Markup:
    """Rows a feature by number of the layer, on a logarithmic axis.

    Args:
        shares: Rows over features of each layer.
        enough: From where on a spectrum can be trusted.
    """
    figure, axes = _figure(WIDE)
    known = [(k, v) for k, v in enumerate(shares, 1) if v > 0]
    for colour, label, chosen in (
        (BLUE, "enough", [p for p in known if p[1] >= enough]),
        (ORANGE, "too few", [p for p in known if p[1] < enough]),
    ):
        if chosen:
            axes.plot(*zip(*chosen, strict=True), "o", color=colour, label=label)
    axes.axhline(enough, color=INK, linestyle="--", linewidth=1.2)
    if known:
        _logarithmic(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel("rows a feature")
    _legend(figure, axes)
    return _svg(figure)


@_styled
def depth(errors: Sequence[float | None]) -> Markup:
    """Relative errors of layers, in their order."""
    figure, axes = _figure(WIDE)
    known = [(k, e) for k, e in enumerate(errors, 1) if e is not None]
    axes.plot(*zip(*known, strict=True), "o-", color=BLUE)
    axes.set_xlim(0.2, len(errors) + 0.8)
    if any(e > 0 for _, e in known):
        # The first layers may be without any error.
        axes.set_yscale("symlog", linthresh=min(e for _, e in known if e > 0))
        axes.set_ylim(0, 1.6 * max(e for _, e in known))
        axes.yaxis.set_major_formatter(_power)
    axes.set_xlabel("layer, in the order of the graph")
    axes.set_ylabel("relative error")
    return _svg(figure)


@_styled
def spectrum(
    curves: Sequence[tuple[str, Sequence[Sequence[float]]]],
    chosen: Sequence[tuple[str, float]],
    at: float | None,
) -> Markup:
    """What is lost at each rank, in small.

    Args:
        curves: Their names, and points (rank, value).
        chosen: Ranks that lines mark, and what they are.
        at: The value at the first of them, which a dot marks.
    """
    figure, axes = _figure(SMALL)
    drawn = False
    for (label, points), colour in zip(curves, (BLUE, FAINT), strict=False):
        known = [(r, v) for r, v in points if v > 0]
        if known:
            drawn = True
            axes.plot(*zip(*known, strict=True), color=colour, label=label)
    for k, (_, rank) in enumerate(chosen):
        axes.axvline(rank, color=ORANGE, linestyle=":" if k else "-", linewidth=1.4)
    if chosen and at is not None and at > 0:
        axes.plot([chosen[0][1]], [at], "o", color=ORANGE)
    if drawn:
        _logarithmic(axes, ticks=3)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, high * 1e-9), high)
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=11)
    return _svg(figure, ticks=3)


@_styled
def trade_off(
    curves: Sequence[tuple[str, Sequence[tuple[float, float, float]]]],
    label: str,
    *,
    logarithmic: bool = False,
    one: bool = False,
    most: float | None = None,
) -> Markup:
    """Figures over the parameters that are kept.

    Args:
        curves: Names, and points (kept in per cent, value, its standard error).
        label: Of the vertical axis.
        logarithmic: Whether that axis is so.
        one: Whether a line marks 1.
        most: The largest value that there can be.
    """
    figure, axes = _figure(WIDE)
    styles = (("o-", BLUE), ("s--", ORANGE), ("^:", INK))
    for (name, points), (style, colour) in zip(curves, styles, strict=False):
        shown = [p for p in points if p[1] > 0 or not logarithmic]
        if not shown:
            continue
        x, y, error = zip(*shown, strict=True)
        spread: Any = {"yerr": error} if any(error) else {}
        axes.errorbar(x, y, fmt=style, color=colour, label=name, ecolor=FAINT, capsize=2, **spread)
    if one:
        axes.axhline(1.0, color=FAINT, linewidth=0.8)
    if most is not None:
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, most + 0.02 * (most - low)))
    if logarithmic and axes.lines:
        _logarithmic(axes)
    axes.set_xlabel("parameters kept, %")
    axes.set_ylabel(label)
    _legend(figure, axes)
    return _svg(figure)


@_styled
def course(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> Markup:
    """Figures over the steps of a training, on a logarithmic axis."""
    figure, axes = _figure(WIDE)
    for (name, points), (style, colour) in zip(
        curves, (("o-", BLUE), ("s--", ORANGE)), strict=False
    ):
        known = [p for p in points if p[1] > 0]
        if known:
            axes.plot(*zip(*known, strict=True), style, color=colour, label=name)
            _logarithmic(axes)
    axes.set_xlabel("step")
    _legend(figure, axes)
    return _svg(figure)


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes) -> None:
    """Names of the curves above them, where they hide none."""
    if len(axes.get_legend_handles_labels()[0]) > 0:
        figure.legend(loc="outside upper right", ncols=3)


def _logarithmic(axes: Axes, ticks: int = 6) -> None:
    """Powers of ten at the vertical axis; between few of them, other figures too."""
    axes.set_yscale("log")
    axes.minorticks_off()
    low, high = axes.get_ylim()
    steps = (1.0,) if high / low > 50 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=ticks))
    axes.yaxis.set_major_formatter(_power)


def _power(value: float, _: object = None) -> str:
    """Powers of ten in signs that any font has."""
    if value == 0 or 1e-2 <= value < 1e4:
        return f"{value:g}"
    digits, _, exponent = f"{value:.0e}".partition("e")
    power = f"10{str(int(exponent)).translate(RAISED)}"
    return power if digits == "1" else f"{digits}·{power}"


def _counted(value: float, _: object = None) -> str:
    """Counts of things, as they are said."""
    for name, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g} {name}"
    return f"{value:g}"


def _svg(figure: Figure, ticks: int = 6) -> Markup:
    """The drawing without what a page has already, or has no use for."""
    axes = figure.axes[0]
    # So many layers need no tick between two of them.
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    buffer = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    used = set(_USED.findall(text))
    text = _MARK.sub(lambda m: m[0] if m[1] in used else "", text)
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    return Markup(re.sub(r"\s*\n\s*", " ", _FAMILY.sub("", text)))
