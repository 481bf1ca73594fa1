"""Weights one by one: what became of them, what that rests on, and what was left alone."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from onnx_utilrank.report.html import charts
from onnx_utilrank.report.html.found import plans, shrinking, skipped
from onnx_utilrank.report.html.parts import (
    Bar,
    Cell,
    Chart,
    Charts,
    Code,
    Column,
    Content,
    Part,
    Section,
    Sentences,
    TableView,
    number,
)
from onnx_utilrank.report.html.weights import NAME, named, share

__all__ = ["adequacy", "left_alone", "parameters", "plan", "repairs"]

# Rows a feature from which on a spectrum is trusted: see `statistics.moments`.
ENOUGH = 4


def parameters(content: Content) -> Section | None:
    """Where the parameters went, weight by weight."""
    if "plan" not in content:
        return _of_points(content)
    found = content["plan"]
    entries = found["entries"]
    if not entries:
        return None
    before = [e["parameters_before"] for e in entries]
    after = [e["parameters_after"] for e in entries]
    rest = found["parameters_before"] - sum(before)
    shrunk = shrinking(found)
    rows = [
        [
            *named(k, e),
            *(Cell(number(e[key]), e[key]) for key in ("d", "m")),
            _rank(e, shrunk),
            Cell(number(e["parameters_before"]), e["parameters_before"]),
            Cell(
                number(e["parameters_after"]),
                e["parameters_after"],
                Bar(share=share(e["parameters_after"] / max(e["parameters_before"], 1)), of=1.0),
            ),
            Cell("–")
            if e["site"] in shrunk and e["rank"] is None
            else _number(e["predicted_error"]),
            Cell(e["reason"]),
        ]
        for k, e in enumerate(entries, 1)
    ]
    columns = [
        *NAME,
        *map(Column, ("d_in", "d_out", "rank", "before", "after", "predicted loss")),
    ]
    drawn = Chart(
        title="Parameters by layer",
        drawing=charts.before_after(before, after, "parameters"),
        caption=f"{len(entries):,} weights with {sum(before):,} parameters before and "
        f"{sum(after):,} after" + (f"; {rest:,} more lie elsewhere and stay." if rest > 0 else "."),
    )
    parts: list[Part] = [
        Charts([drawn]),
        TableView(title="Weights", columns=[*columns, Column("why", "prose")], rows=rows),
    ]
    if found["hidden"]:
        parts.append(_hidden(found["hidden"]))
    return Section(key="parameters", title="Where the parameters went", parts=parts)


def _number(value: float | None) -> Cell:
    return Cell(number(value), value)


def _rank(entry: Content, shrunk: Mapping[str, Content]) -> Cell:
    if entry["site"] in shrunk:
        rank = entry["rank"]
        return Cell("shrunk", -1) if rank is None else Cell(f"shrunk, {rank:,}", rank)
    if entry["rank"] is None:
        return Cell("dense", 10**9)
    kind = "" if entry["move"] in (None, "low-rank") else f", {entry['move']}"
    return Cell(f"{entry['rank']:,}{kind}", entry["rank"])


def _hidden(found: Sequence[Content]) -> TableView:
    rows = [
        [
            Cell(h["hidden"]),
            *(Cell(number(h[key]), h[key]) for key in ("groups", "size")),
            Cell("all" if h["kept"] is None else number(h["kept"]), h["kept"] or h["size"]),
            Cell(number(h["predicted_error"]), h["predicted_error"]),
            Cell(h["reason"]),
        ]
        for h in found
    ]
    columns = [
        *(Column("made by", "name"), Column("groups"), Column("features"), Column("kept")),
        *(Column("predicted loss"), Column("why", "prose")),
    ]
    return TableView(title="Heads and hidden units", columns=columns, rows=rows, folded=True)


def _of_points(content: Content) -> Section | None:
    """The rank of each weight at every point of a sweep."""
    found = plans(content)
    if not found:
        return None
    ranks = []
    for _, each in found:
        shrunk = shrinking(each)
        ranks.append({e["site"]: _rank(e, shrunk) for e in each["entries"]})
    rows = [
        [*named(k, e), *(Cell(number(e[key]), e[key]) for key in ("d", "m"))]
        + [each.get(e["site"], Cell("–")) for each in ranks]
        for k, e in enumerate(found[0][1]["entries"], 1)
    ]
    titles = ("d_in", "d_out", *(f"at {name}" for name, _ in found))
    table = TableView(
        title="Rank of each weight at each point", columns=[*NAME, *map(Column, titles)], rows=rows
    )
    return Section(key="parameters", title="Where the parameters went", parts=[table])


def adequacy(content: Content) -> Section | None:
    """Rows that statistics rest on, against the width of what they are of."""
    layers = [
        (e, e["rows"], width)
        for e in content.get("layers", [])
        if e.get("rows") is not None and (width := e.get("width") or e.get("d")) and width > 0
    ]
    if not layers:
        return None
    shares = [count / width for _, count, width in layers]
    drawn = Chart(
        title="Calibration rows for each feature",
        drawing=charts.rows(shares, ENOUGH),
        caption=f"Below the line at {ENOUGH} a spectrum looks emptier than it is: bring more "
        "samples before a saving there is relied on.",
    )
    table = TableView(
        title="Rows against width",
        columns=[
            Column("layer"),
            Column("weight", "name"),
            *map(Column, ("rows", "width", "ratio")),
        ],
        rows=[
            [
                *(Cell(str(k), k), Cell(e["site"])),
                *(Cell(number(count), count), Cell(number(width), width)),
                Cell(number(count / width), count / width, tone="" if e["trusted"] else "warn"),
            ]
            for k, (e, count, width) in enumerate(layers, 1)
        ],
        folded=True,
    )
    return Section(
        key="calibration", title="Was there enough data?", parts=[Charts([drawn]), table]
    )


def left_alone(content: Content) -> Section | None:
    """Nodes that stay, by reason and one by one."""
    found = [*skipped(content)]
    if not found:
        return None
    reasons = Counter((op, reason) for _, op, reason in found)
    columns = [Column("op", "short"), Column("nodes"), Column("reason", "prose")]
    by_reason = TableView(
        title="By reason",
        columns=columns,
        rows=[
            [Cell(op), Cell(f"{count:,}", count), Cell(reason)]
            for (op, reason), count in reasons.most_common()
        ],
    )
    one_by_one = TableView(
        title="One by one",
        columns=[Column("node", "name"), Column("op", "short"), Column("reason", "prose")],
        rows=[[Cell(node), Cell(op), Cell(reason)] for node, op, reason in found],
        folded=True,
    )
    return Section(
        key="left-alone", title="What was left alone, and why", parts=[by_reason, one_by_one]
    )


def repairs(content: Content) -> Section | None:
    """Branches beside quantized layers."""
    if content["run"]["verb"] != "repair" or not content["layers"]:
        return None
    rows = [
        [
            *named(k, e),
            *(Cell(number(e[key]), e[key]) for key in ("d", "m", "distance")),
            Cell({None: "–", 0: "mean"}.get(e["rank"], str(e["rank"])), e["rank"]),
            *(Cell(number(e[key]), e[key]) for key in ("predicted_before", "predicted_after")),
        ]
        for k, e in enumerate(content["layers"], 1)
    ]
    titles = ("d_in", "d_out", "distance", "rank", "predicted loss", "with branch")
    table = TableView(title="Branches", columns=[*NAME, *map(Column, titles)], rows=rows)
    return Section(key="branches", title="Branches by layer", parts=[table])


def plan(content: Content) -> Section | None:
    """The plan as it is replayed."""
    if "plan" not in content:
        return None
    text = json.dumps(content["plan"], indent=1)
    said = Sentences(["Saved as a file, it can be edited and replayed with --plan."])
    code: Iterator[Part] = iter([said, Code(title="Plan as JSON", lines=text.split("\n"))])
    return Section(key="plan", title="The plan", parts=[*code])
