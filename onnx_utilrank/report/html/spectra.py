"""What weights use of their space, and what they lose at each rank, as pictures."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnx_utilrank.report.html import charts
from onnx_utilrank.report.html.found import plans, shrinking
from onnx_utilrank.report.html.parts import (
    Bar,
    Cell,
    Chart,
    Charts,
    Column,
    Content,
    Section,
    Sentences,
    TableView,
    number,
    percent,
)
from onnx_utilrank.report.html.weights import NAME, named, share

__all__ = ["spectra", "utilization"]

# How messages name a node: see `model.scopes.node_label`.
_LABEL = re.compile(r"\w+ (?P<quote>['\"])(?P<name>.+)(?P=quote)")

# Spectra that are drawn, at most: those of the largest weights.
DRAWN = 60


def utilization(content: Content) -> Section | None:
    """Utilization by layer, as the paper plots it, with the mean over layers (MLU)."""
    if content["run"]["verb"] == "analyze":
        return _paper(content)
    layers = [e for e in _spectra(content) if e["used"] is not None and (e["width"] or 0) > 0]
    if not layers:
        return None
    shares = [min(e["used"] / e["width"], 1.0) for e in layers]
    energy = layers[0]["energy"]
    mean = sum(shares) / len(shares)
    drawing = charts.bars(shares, [not e["trusted"] for e in layers], mean, "directions used, %")
    drawn = Chart(
        title="Directions that hold the energy, by layer",
        drawing=drawing,
        caption=f"Share of the directions of each weight's smaller side that hold {energy:g} of "
        f"its energy on the calibration rows; {percent(mean)} in the mean of the layers. An upper "
        "bound of the paper's utilization, for which analyze measures both sides." + _few(layers),
    )
    return Section(key="utilization", title="Utilization by layer", parts=[Charts([drawn])])


def _paper(content: Content) -> Section | None:
    layers = content["layers"]
    if not layers:
        return None
    mean = content["mean_layer_utilization"]
    drawn = Chart(
        title="Utilization by layer",
        drawing=charts.bars(
            [min(e["utilization"], 1.0) for e in layers],
            [not e["trusted"] for e in layers],
            mean,
            "utilization, %",
        ),
        caption=f"r / min(d, m) with r = min(k_S, k_T) at energy {content['energy']:g}; the line "
        f"is the mean layer utilization, MLU {percent(mean)}." + _few(layers),
    )
    rows = [
        [
            *named(k, e),
            *(
                Cell(number(e[key]), e[key])
                for key in ("d", "m", "input_rank", "output_rank", "rank")
            ),
            Cell(percent(e["utilization"]), e["utilization"], Bar(share=share(e["utilization"]))),
            Cell(number(e["rows"]), e["rows"], tone="" if e["trusted"] else "warn"),
        ]
        for k, e in enumerate(layers, 1)
    ]
    titles = ("d_in", "d_out", "k_S", "k_T", "rank", "utilization", "rows")
    table = TableView(title="Layers", columns=[*NAME, *map(Column, titles)], rows=rows)
    return Section(key="utilization", title="Utilization by layer", parts=[Charts([drawn]), table])


def _few(layers: Iterable[Content]) -> str:
    if all(e["trusted"] for e in layers):
        return ""
    return " Orange: fewer than four rows a feature, so that it looks emptier than it is."


def _spectra(content: Content) -> list[Content]:
    """Layers of the verbs that choose ranks."""
    return content["layers"] if content["run"]["verb"] in ("compress", "sweep") else []


def spectra(content: Content) -> Section | None:
    """What is lost beyond each rank, with the rank that was chosen."""
    if content["run"]["verb"] == "analyze":
        return _energies(content)
    layers = [e for e in _spectra(content) if len(e["loss"]) > 1]
    if not layers:
        return None
    found = plans(content)
    chosen = [(name, _decided(p)) for name, p in found]
    entries = {e["site"]: e for _, p in found[:1] for e in p["entries"]}
    numbers = {site: k for k, site in enumerate(entries, 1)}
    shrunk = {key for _, p in found for key in shrinking(p)}
    method = found[0][1]["method"] if found else ""
    unit = {
        "two-sided": "Predicted loss of the whole model where this weight alone gets the rank",
        "utilized-rank": "Share of the outputs' energy beyond the rank",
        "svd": "Share of the weight beyond the rank, in the Frobenius norm",
    }.get(method, "Predicted error of the weight's outputs, relative to their variance")
    drawn = []
    for layer in _largest(layers, entries):
        marks = [(name, r) for name, ranks in chosen if (r := ranks.get(layer["site"])) is not None]
        curve = layer["loss"]
        at = _at(curve, marks[0][1]) if marks else None
        drawing = charts.spectrum([("loss", curve)], [(n, r) for n, r in marks], at)
        full = curve[-1][0]
        said = f"{'shrunk' if layer['site'] in shrunk else 'dense'}, full rank {full}"
        if len(marks) == 1 and not marks[0][0]:
            said = f"rank {marks[0][1]} of {full}"
        elif marks:
            said = f"ranks {', '.join(f'{r} at {name}' for name, r in marks)} of {full}"
        if marks and layer["site"] in shrunk:
            said += ", and shrunk"
        if layer["site"] in numbers:
            said = f"layer {numbers[layer['site']]}: {said}"
        title = _title(entries.get(layer["site"], layer))
        drawn.append(Chart(title=title, drawing=drawing, caption=said))
    lines = [
        f"{unit}, over the rank. The orange line is the rank that was chosen; weights without one "
        "stay dense, or shrink with the heads or hidden units that they make or read."
    ]
    return _drawn(lines, drawn, len(layers))


def _energies(content: Content) -> Section | None:
    layers = content["layers"]
    if not layers:
        return None
    numbers = {e["site"]: k for k, e in enumerate(layers, 1)}
    drawn = [
        Chart(
            title=_title(e),
            drawing=charts.spectrum(
                [("outputs", e["output_energy"]), ("inputs", e["input_energy"])],
                [("k_T", e["output_rank"]), ("k_S", e["input_rank"])],
                None,
            ),
            caption=f"layer {numbers[e['site']]}: k_T {e['output_rank']:,} of {e['m']:,} (line), "
            f"k_S {e['input_rank']:,} of {e['d']:,} (dotted)",
        )
        for e in _largest(layers, {e["site"]: e for e in layers})
    ]
    lines = [
        "Share of the energy beyond so many directions: of the outputs in colour, of the inputs in "
        f"grey. The orange lines are where {content['energy']:g} of it is held."
    ]
    return _drawn(lines, drawn, len(layers))


def _drawn(lines: list[str], drawn: list[Chart], every: int) -> Section:
    if len(drawn) < every:
        lines.append(f"Drawn are the {len(drawn)} largest of {every} weights.")
    return Section(
        key="spectra", title="Spectra", parts=[Sentences(lines), Charts(drawn, small=True)]
    )


def _largest(layers: Sequence[Content], entries: Mapping[str, Content]) -> list[Content]:
    """Those of the largest weights, in their order."""

    def size(k: int) -> int:
        entry: dict[str, Any] = entries.get(layers[k]["site"], {"m": 0, "d": 0})
        return int(entry["m"] * entry["d"])

    chosen = sorted(range(len(layers)), key=lambda k: -size(k))[:DRAWN]
    return [layers[k] for k in sorted(chosen)]


def _title(entry: Content) -> str:
    """The node of a weight, which says more than the weight does: exporters number those."""
    nodes: Sequence[str] = entry.get("nodes", ())
    named = _LABEL.fullmatch(nodes[0]) if nodes else None
    return named["name"] if named else str(nodes[0] if nodes else entry["site"])


def _decided(found: Content) -> dict[str, int]:
    return {e["site"]: e["rank"] for e in found["entries"] if e["rank"] is not None}


def _at(curve: Sequence[Sequence[float]], rank: float) -> float | None:
    """The value of a curve at a rank, on the line between two points of its logarithm."""
    below = [p for p in curve if p[0] <= rank]
    above = [p for p in curve if p[0] >= rank]
    if not below or not above or below[-1][1] <= 0 or above[0][1] <= 0:
        return None
    (a, low), (b, high) = below[-1], above[0]
    share = 0.0 if a == b else (rank - a) / (b - a)
    return float(low ** (1 - share) * high**share)
