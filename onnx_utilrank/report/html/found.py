"""Where parts that several verbs report lie in their content."""

from collections.abc import Iterator
from typing import Any

from onnx_utilrank.report.html.parts import Content

__all__ = ["plans", "shrinking", "skipped", "stages", "validation"]


def validation(content: Content) -> Content | None:
    """The comparison of the model that was made with its original."""
    if content["run"]["verb"] == "validate":
        return content
    found: Content | None = content.get("validation")
    if found is None and stages(content):
        found = stages(content)[-1]["validation"]
    return found


def stages(content: Content) -> list[Content]:
    """The models on the way to a quantized one."""
    quantized = content.get("quantized") or {}
    found: list[Content] = quantized.get("stages", [])
    return found


def plans(content: Content) -> list[tuple[str, Content]]:
    """Plans with what they are called: one, or one a point of a sweep."""
    if "plan" in content:
        return [("", content["plan"])]
    return [(f"{point['ratio']:g}", point["plan"]) for point in content.get("points", [])]


def shrinking(plan: Content) -> dict[str, Content]:
    """Weights that lose features with their neighbours, and those."""
    return {key: h for h in plan["hidden"] if h["kept"] is not None for key in h["sites"]}


def skipped(content: Content) -> Iterator[tuple[str, str, str]]:
    """Node, operator and reason of all that was left alone."""
    each: list[Any] = list(content.get("skipped", []))
    for _, plan in plans(content)[:1]:
        each += plan["skipped"]
    for node in each:
        yield node["node"], node["op_type"], node["reason"]
    if "plan" in content:
        shrunk = shrinking(content["plan"])
        for entry in content["plan"]["entries"]:
            if entry["rank"] is None and entry["site"] not in shrunk:
                yield entry["site"], entry["op_type"], entry["reason"]
    for layer in content.get("layers", []) if content["run"]["verb"] == "repair" else []:
        if layer["rank"] is None:
            yield layer["site"], layer["op_type"], "no branch is worth its bytes there"
    quantized = content.get("quantized") or {}
    for node in quantized.get("left", []):
        yield node["node"], node["op_type"], f"not quantized: {node['reason']}"
