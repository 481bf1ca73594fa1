"""Models beside each other: before and after, where the time went, and how errors grow."""

from collections.abc import Iterable, Iterator

from onnx_utilrank.report.html import charts
from onnx_utilrank.report.html.found import stages, validation
from onnx_utilrank.report.html.parts import (
    Bar,
    Cell,
    Chart,
    Charts,
    Column,
    Content,
    Part,
    Section,
    Sentences,
    TableView,
    Tone,
    number,
    percent,
    quantity,
    ratio,
)

__all__ = ["before_and_after", "benchmark", "depth", "time", "trade_off"]

QUALITY = (Column("divergence"), Column("decisions alike"), Column("SNR, dB"), Column("drop"))


def before_and_after(content: Content) -> Section | None:
    """Size, operations, time and outputs of both models, on every provider."""
    found = validation(content)
    if found is None:
        return None
    parts: list[Part] = [_sizes(found)]
    if stages(content):
        parts.append(_stages(stages(content)))
    if content["run"]["verb"] == "repair":
        parts.append(_repaired(content))
    parts.append(_outputs(found))
    parts += _providers(found)
    return Section(key="comparison", title="Before and after", parts=parts)


def _sizes(found: Content) -> TableView:
    before, after = found["reference"], found["candidate"]
    rows = [
        [Cell(name), Cell(show(old), old), Cell(show(new), new), Cell(ratio(new, old))]
        for name, old, new, show in (
            ("parameters", before["parameters"], after["parameters"], number),
            ("file", before["file_bytes"], after["file_bytes"], quantity),
            ("operations a sample", before["flops"], after["flops"], number),
        )
        if old is not None and new is not None
    ]
    for each in found["providers"]:
        t = each["latency"]
        spread = f"{number(t['ratio'])} ({number(t['ratio_low'])} to {number(t['ratio_high'])})"
        rows.append(
            [
                Cell(f"ms a run, {each['provider']}"),
                *(Cell(number(t[key]), t[key]) for key in ("reference_ms", "candidate_ms")),
                Cell(spread, tone="good" if t["faster"] else "bad" if t["slower"] else ""),
            ]
        )
    columns = [Column("figure", "short"), Column("before"), Column("after"), Column("ratio")]
    return TableView(title="Both models", columns=columns, rows=rows)


def _quality_cells(quality: Content) -> Iterator[Cell]:
    found = quality["divergence"]
    if found is None:
        yield from (Cell("–") for _ in range(3))
    else:
        error = number(found["standard_error"], 2)
        yield Cell(f"{number(found['mean'])} ± {error}", found["mean"])
        yield Cell(percent(found["agreement"], 2), found["agreement"])
        yield Cell(number(found["snr_db"]), found["snr_db"])
    yield Cell(number(quality["drop"]), quality["drop"])


def _beside(name: str, found: Content, quality: Content | None) -> list[Cell]:
    """One model beside the original."""
    before, after = found["reference"]["file_bytes"], found["candidate"]["file_bytes"]
    each = found["providers"][0]["latency"] if found["providers"] else None
    time = number(None if each is None else each["ratio"])
    if each is not None:
        time += f" ({number(each['ratio_low'])} to {number(each['ratio_high'])})"
    cells = [Cell("–")] * len(QUALITY) if quality is None else [*_quality_cells(quality)]
    return [
        Cell(name),
        Cell(quantity(after), after),
        Cell(ratio(after, before)),
        Cell(time),
        *cells,
    ]


def _models(title: str, rows: list[list[Cell]]) -> TableView:
    columns = (Column("model", "short"), Column("file"), Column("ratio"), Column("time"), *QUALITY)
    return TableView(title=title, columns=columns, rows=rows)


def _stages(found: list[Content]) -> TableView:
    rows = [_beside(stage["name"], stage["validation"], stage["quality"]) for stage in found]
    return _models("Models on the way, each beside the original", rows)


def _repaired(content: Content) -> TableView:
    rows = [
        _beside("quantized", content["quantized"], content["before"]),
        _beside("repaired", content["validation"], content["after"]),
    ]
    return _models("Quantized and repaired, each beside the original", rows)


def _outputs(found: Content) -> TableView:
    """Of the candidate; and of the reference on every provider after the first."""
    rows = []
    for each in found["providers"]:
        compared = [("candidate", o) for o in each["outputs"]]
        compared += [("reference, against the first provider", o) for o in each["against_first"]]
        for what, o in compared:
            agreement = percent(o["agreement"], 2)
            if o["agreement"] is not None:
                agreement += f" of {o['decisions']:,}"
            error = o["relative_error"]
            rows.append(
                [
                    *(Cell(o["name"]), Cell(each["provider"]), Cell(what)),
                    Cell(number(error), _sortable(error)),
                    Cell(number(o["snr_db"]), _sortable(o["snr_db"])),
                    Cell(number(o["max_abs_error"]), _sortable(o["max_abs_error"])),
                    Cell(agreement, o["agreement"]),
                ]
            )
    return TableView(
        title=f"Outputs, on {found['samples']:,} samples held back",
        columns=[
            *(Column("output", "name"), Column("provider", "short"), Column("of", "short")),
            *(Column("relative error"), Column("SNR, dB"), Column("largest error")),
            Column("decisions alike"),
        ],
        rows=rows,
    )


def _sortable(value: float | str | None) -> float | None:
    return float(value) if isinstance(value, str) else value


def _providers(found: Content) -> Iterator[Part]:
    lines = []
    fallen = []
    for each in found["providers"]:
        for role, placed in each["nodes"].items():
            total = sum(placed["counts"].values())
            own = total - len(placed["fallen"])
            if total:
                lines.append(f"{each['provider']} ran {own} of {total} nodes of the {role}.")
            fallen += [(each["provider"], role, node) for node in placed["fallen"]]
    if lines:
        yield Sentences(lines)
    if fallen:
        yield TableView(
            title="Nodes that ran elsewhere than asked for",
            columns=[
                *(Column("node", "name"), Column("op", "short"), Column("model", "short")),
                *(Column("asked for", "short"), Column("ran on", "short")),
            ],
            rows=[
                [Cell(n["name"]), Cell(n["op_type"]), Cell(role), Cell(asked), Cell(n["provider"])]
                for asked, role, n in fallen
            ],
            folded=True,
        )


def time(content: Content) -> Section | None:
    """Operators by the time that their nodes take in a run."""
    found = validation(content)
    tables = []
    for each in found["providers"] if found is not None else []:
        before, after = (
            {o["op_type"]: o for o in each["operators"][role]}
            for role in ("reference", "candidate")
        )
        if not before and not after:
            continue
        names = sorted(
            before | after,
            key=lambda n: -max(o[n]["ms"] for o in (before, after) if n in o),
        )
        most = max([o["ms"] for o in (*before.values(), *after.values())] or [0.0]) or 1.0
        rows = []
        for name in names:
            old, new = ((o.get(name) or {"ms": 0.0, "nodes": 0}) for o in (before, after))
            rows.append(
                [
                    Cell(name),
                    *(Cell(str(o["nodes"]), o["nodes"]) for o in (old, new)),
                    *(
                        Cell(number(o["ms"]), o["ms"], Bar(share=max(o["ms"], 0) / most))
                        for o in (old, new)
                    ),
                ]
            )
        tables.append(
            TableView(
                title=f"Time by operator, {each['provider']}",
                columns=[
                    *(Column("operator", "short"), Column("nodes before"), Column("nodes after")),
                    *(Column("ms before"), Column("ms after")),
                ],
                rows=rows,
            )
        )
    if not tables:
        return None
    said = Sentences(
        [
            "Sums over the nodes of a run as ONNX Runtime's profiler tells them, which fuses some "
            "and adds a little to each; the mean of a few runs. The ratio of whole runs is under "
            "“Before and after”."
        ]
    )
    return Section(key="time", title="Where the time went", parts=[said, *tables])


def depth(content: Content) -> Section | None:
    """Errors of layers that both models have, in their order."""
    found = validation(content)
    layers = [] if found is None else found["depth"]
    if not any(layer["relative_error"] is not None for layer in layers):
        return None
    errors = [layer["relative_error"] for layer in layers]
    drawn = Chart(
        title="Relative error of the outputs of layers",
        drawing=charts.depth(errors),
        caption="Matrix products and convolutions with weights whose output has the same name and "
        "shape in both models, on a few samples held back; without padding, where an input tells.",
    )
    most = max(e for e in errors if e is not None) or 1.0
    rows = [
        [
            Cell(str(k), k),
            Cell(layer["node"]),
            Cell(
                number(layer["relative_error"]),
                layer["relative_error"],
                Bar(share=max(layer["relative_error"] or 0, 0) / most),
            ),
        ]
        for k, layer in enumerate(layers, 1)
    ]
    table = TableView(
        title="Errors of layers",
        columns=[Column("layer"), Column("node", "name"), Column("relative error")],
        rows=rows,
        folded=True,
    )
    return Section(key="depth", title="How errors grow", parts=[Charts([drawn]), table])


def trade_off(content: Content) -> Section | None:
    """The points of a sweep."""
    points = content.get("points")
    if not points:
        return None
    kept = [
        100 * p["plan"]["parameters_after"] / max(p["plan"]["parameters_before"], 1) for p in points
    ]
    return Section(
        key="trade-off",
        title="Size against quality",
        parts=[Charts([*_curves(points, kept)]), _points(points, kept)],
    )


def _curves(points: list[Content], kept: list[float]) -> Iterator[Chart]:
    judged = [(x, p["quality"]["divergence"]) for x, p in zip(kept, points, strict=True)]
    measured = [
        (x, d["mean"], d["standard_error"] or 0.0)
        for x, d in judged
        if d is not None and d["mean"] is not None
    ]
    predicted = [
        (x, p["plan"]["predicted_divergence"], 0.0)
        for x, p in zip(kept, points, strict=True)
        if p["plan"]["predicted_divergence"] is not None
    ]
    if measured:
        curves = [("samples held back", measured), ("predicted", predicted)]
        drawing = charts.trade_off(curves, "divergence", logarithmic=True)
        yield Chart(title="Divergence of outputs", drawing=drawing)
    agreed = [
        (x, 100 * d["agreement"], 100 * (d["agreement_error"] or 0.0))
        for x, d in judged
        if d is not None and d["agreement"] is not None
    ]
    if agreed:
        drawing = charts.trade_off([("samples held back", agreed)], "%", most=100.0)
        yield Chart(title="Decisions alike", drawing=drawing)
    costs = [
        (
            "time",
            [
                (x, p["validation"]["providers"][0]["latency"]["ratio"], 0.0)
                for x, p in zip(kept, points, strict=True)
                if p["validation"]["providers"]
            ],
        ),
        ("operations", [*_ratios(points, kept, "flops")]),
        ("file", [*_ratios(points, kept, "file_bytes")]),
    ]
    drawing = charts.trade_off(costs, "ratio to the original", one=True)
    yield Chart(title="Time, operations and bytes", drawing=drawing)


def _ratios(
    points: Iterable[Content], kept: Iterable[float], key: str
) -> Iterator[tuple[float, float, float]]:
    for x, p in zip(kept, points, strict=True):
        old, new = (p["validation"][role][key] for role in ("reference", "candidate"))
        if old and new is not None:
            yield x, new / old, 0.0


def _points(points: list[Content], kept: list[float]) -> TableView:
    rows = []
    for point, share in zip(points, kept, strict=True):
        found = _beside(f"{point['ratio']:g}", point["validation"], point["quality"])
        flops = ratio(
            point["validation"]["candidate"]["flops"], point["validation"]["reference"]["flops"]
        )
        expected = point["plan"]["predicted_divergence"]
        rows.append(
            [
                Cell(found[0].text, point["ratio"]),
                Cell(f"{share:.2f} %", share),
                *found[1:3],
                Cell(flops),
                found[3],
                Cell(number(expected), expected),
                *found[4:],
            ]
        )
    columns = (
        *(Column("asked"), Column("kept"), Column("file"), Column("bytes")),
        *(Column("operations"), Column("time"), Column("predicted"), *QUALITY),
    )
    return TableView(title="Points", columns=columns, rows=rows)


def benchmark(content: Content) -> Section | None:
    """Time and memory of models."""
    if content["run"]["verb"] != "benchmark":
        return None
    rows = []
    for case in content["cases"]:
        dims = [f"{name} {length}" for name, length in case["dims"].items()]
        batch = [] if case["batch"] is None else [f"batch {case['batch']}"]
        most = max([m["ms"] for m in case["models"]] or [0.0]) or 1.0
        for m in case["models"]:
            spread = "–"
            if "ratio" in m:
                low, high = number(m.get("ratio_low")), number(m.get("ratio_high"))
                spread = f"{number(m['ratio'])} ({low} to {high})"
            tone: Tone = "good" if m.get("faster") else "bad" if m.get("slower") else ""
            rows.append(
                [
                    *(Cell(m["model"]), Cell(case["provider"])),
                    Cell(", ".join([*batch, *dims]) or "as given"),
                    Cell(number(m["ms"]), m["ms"], Bar(share=max(m["ms"], 0) / most)),
                    Cell(spread, m.get("ratio"), tone=tone),
                    Cell(number(m.get("flop_ratio")), m.get("flop_ratio")),
                    Cell(quantity(m["resident_bytes"]), m["resident_bytes"]),
                    Cell(quantity(m["device_bytes"]), m["device_bytes"]),
                ]
            )
    columns = [
        *(Column("model", "name"), Column("provider", "short"), Column("run", "short")),
        *(Column("ms a run"), Column("time ratio"), Column("operations ratio")),
        *(Column("peak memory"), Column("of the device")),
    ]
    table = TableView(title="Models in turn, on the same inputs", columns=columns, rows=rows)
    return Section(key="benchmark", title="Time and memory", parts=[table])
