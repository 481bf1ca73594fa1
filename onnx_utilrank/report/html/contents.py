"""What a model holds, and what an installation does."""

from collections.abc import Iterator

from onnx_utilrank.report.html.parts import (
    Bar,
    Cell,
    Column,
    Content,
    Part,
    Section,
    Sentences,
    TableView,
    number,
    percent,
    quantity,
)

__all__ = ["inspection", "installation"]


def inspection(content: Content) -> Section | None:
    """Inputs and outputs, operators, and what could be factored."""
    if content["run"]["verb"] != "inspect":
        return None
    return Section(key="contents", title="What is in it", parts=[*_inspected(content)])


def _inspected(content: Content) -> Iterator[Part]:
    opsets = ", ".join(f"{domain} {version}" for domain, version in content["opsets"].items())
    lines = [f"IR version {content['ir_version']}, opset {opsets}; {content['nodes']:,} nodes."]
    if content["producer"]:
        lines.append(f"Written by {content['producer']}.")
    if content["external_files"]:
        files = ", ".join(content["external_files"])
        lines.append(f"{quantity(content['external_bytes'])} lie outside, in {files}.")
    if content["load_fault"]:
        lines.append(f"ONNX Runtime does not load it: {content['load_fault']}")
    if content["gradients"]:
        lines.append(f"Gradients cannot be had: {'; '.join(content['gradients'])}.")
    yield Sentences(lines)
    yield TableView(
        title="Inputs and outputs",
        columns=[
            *(Column("end", "short"), Column("name", "name"), Column("type", "short")),
            Column("shape", "short"),
        ],
        rows=[
            [Cell(what), Cell(s["name"]), Cell(s["dtype"] or "not a tensor"), Cell(_shape(s))]
            for what, key in (("input", "inputs"), ("output", "outputs"))
            for s in content[key]
        ],
    )
    whole = max(content["parameters"], 1)
    yield TableView(
        title="Operators",
        columns=[
            *(Column("operator", "short"), Column("nodes"), Column("parameters")),
            *(Column("share"), Column("bytes")),
        ],
        rows=[
            [
                *(Cell(o["op_type"]), Cell(number(o["nodes"]), o["nodes"])),
                Cell(number(o["parameters"]), o["parameters"]),
                Cell(
                    percent(o["parameters"] / whole),
                    o["parameters"],
                    Bar(share=min(max(o["parameters"] / whole, 0.0), 1.0)),
                ),
                Cell(quantity(o["bytes"]), o["bytes"]),
            ]
            for o in content["operators"]
        ],
    )
    yield _sites(content)
    if content["hidden"]:
        yield TableView(
            title="Heads and hidden units that could shrink",
            columns=[
                Column("made by", "name"),
                Column("kind", "short"),
                Column("features"),
                Column("groups"),
            ],
            rows=[
                [
                    *(Cell(h["hidden"]), Cell(h["kind"])),
                    *(Cell(number(h[key]), h[key]) for key in ("size", "groups")),
                ]
                for h in content["hidden"]
            ],
            folded=True,
        )


def _sites(content: Content) -> TableView:
    titles = ("d_in", "d_out", "share", "break-even rank")
    tied = any(s["tied"] for s in content["sites"])
    return TableView(
        title="Weights that could be factored",
        columns=[
            *(Column("weight", "name"), Column("op", "short"), *map(Column, titles)),
            Column("moves, with the largest rank", "prose"),
            *([Column("tied to", "name")] if tied else []),
        ],
        rows=[
            [
                *(Cell(s["site"]), Cell(s["op_type"])),
                *(Cell(number(s[key]), s[key]) for key in ("d", "m")),
                Cell(percent(s["share"], 2), s["share"], Bar(share=min(max(s["share"], 0.0), 1.0))),
                Cell(number(s["break_even_rank"]), s["break_even_rank"]),
                Cell(", ".join(f"{k} {v}" for k, v in s["moves"].items()) or "none is smaller"),
                *([Cell(s["tied"] or "–")] if tied else []),
            ]
            for s in content["sites"]
        ],
    )


def _shape(spec: Content) -> str:
    if spec["shape"] is None:
        return "any"
    return f"[{', '.join('?' if dim is None else str(dim) for dim in spec['shape'])}]"


def installation(content: Content) -> Section | None:
    """Packages and execution providers."""
    if content["run"]["verb"] != "doctor":
        return None
    packages = TableView(
        title="Packages",
        columns=[Column(t, "short") for t in ("package", "version", "needed")]
        + [Column("fault", "prose")],
        rows=[
            [
                *(Cell(p["name"]), Cell(p["version"] or "–"), Cell(p["wanted"])),
                Cell(p["fault"] or "ok", tone="bad" if p["fault"] else "good"),
            ]
            for p in content["packages"]
        ],
    )
    extras = TableView(
        title="Optional",
        columns=[Column("extra", "short"), Column("lacks", "prose")],
        rows=[
            [Cell(e["name"]), Cell(", ".join(e["missing"]) or "nothing")] for e in content["extras"]
        ],
    )
    providers = TableView(
        title="Execution providers",
        columns=[Column("provider", "short"), Column("fault", "prose")],
        rows=[
            [Cell(p["provider"]), _worked(p, asked=p["provider"] == content["asked"])]
            for p in content["providers"]
        ],
    )
    return Section(key="installation", title="Installation", parts=[packages, extras, providers])


def _worked(provider: Content, *, asked: bool) -> Cell:
    """A fault of a provider that nobody asked for is none of the installation."""
    if provider["fault"] is None:
        return Cell("works", tone="good")
    return Cell(provider["fault"], tone="bad" if asked else "")
