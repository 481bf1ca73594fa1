"""What was asked, what was reached, on which provider, and how far that can be trusted."""

from collections.abc import Iterator
from pathlib import PurePath

from onnx_utilrank.report.html.found import stages, validation
from onnx_utilrank.report.html.parts import (
    Content,
    Fact,
    Facts,
    Part,
    Section,
    Sentences,
    Tone,
    duration,
    number,
    percent,
    quantity,
    ratio,
)

__all__ = ["page_title", "summary"]

VERDICTS: dict[str, tuple[str, Tone]] = {
    "planned": ("Planned only: no model was made.", ""),
    "unchanged": ("Unchanged: nothing was gained.", "warn"),
    "larger": ("Larger, as was forced: no gain.", "bad"),
    "smaller": ("Smaller; in time no clear difference.", "good"),
    "faster": ("Smaller and faster.", "good"),
    "slower": ("Smaller, but slower on this machine.", "warn"),
}
REPAIRS: dict[str, tuple[str, Tone]] = {
    "unchanged": ("Unchanged: the output is the quantized model.", "warn"),
    "slower": ("Repaired, but slower than the original on this machine.", "warn"),
    "repaired": ("Repaired; not clearly slower than the original.", "good"),
}

# What reads as a target in words.
TARGETS = {
    "param_ratio": "of the parameters",
    "size_ratio": "of the bytes",
    "flop_ratio": "of the operations",
    "latency_ratio": "of the time",
    "energy": "of the energy of each layer",
    "extra_bytes": "more bytes",
}


def page_title(content: Content) -> str:
    """The verb and the model."""
    files = content["run"]["files"]
    named = next((f["path"] for f in files if f["role"] in ("model", "reference")), "")
    named = named or content.get("model", "")
    named = named if isinstance(named, str) else ""
    # Files of the same name lie in folders that tell them apart.
    return f"{content['run']['verb']} {'/'.join(PurePath(named).parts[-2:])}".strip()


def summary(content: Content) -> Section:
    """The head of the page."""
    parts: list[Part] = []
    verdict, tone = _verdict(content)
    if verdict:
        parts.append(Sentences([verdict], tone))
    parts.append(Facts([f for f in _facts(content) if f.value != "–"]))
    notes = [*_notes(content)]
    if notes:
        parts.append(Sentences(notes, "plain"))
    return Section(key="summary", title="Summary", parts=parts)


def _verdict(content: Content) -> tuple[str, Tone]:
    verb = content["run"]["verb"]
    if "verdict" in content:
        return (REPAIRS if verb == "repair" else VERDICTS)[content["verdict"]]
    if verb == "validate":
        return ("Passed.", "good") if content["passed"] else ("Failed.", "bad")
    if verb == "finetune":
        if content["kept"]:
            return "The new weights are kept.", "good"
        return "The candidate is unchanged: training brought nothing.", "warn"
    if verb == "doctor":
        return (
            ("Something is wrong.", "bad") if content["faults"] else ("Nothing is wrong.", "good")
        )
    return "", ""


def _facts(content: Content) -> Iterator[Fact]:
    verb = content["run"]["verb"]
    yield from _asked(content)
    found = validation(content)
    if found is not None:
        yield from _reached(found)
    if verb == "analyze":
        mean = content["mean_layer_utilization"]
        yield Fact(
            name="Mean layer utilization (MLU)",
            value=percent(mean),
            more=f"{len(content['layers'])} weights, at energy {content['energy']:g}",
        )
    if verb == "sweep":
        yield from _points(content["points"])
    if verb == "repair":
        yield Fact(name="Divergence brought back", value=percent(content["recovered"]))
        yield Fact(name="Bytes more", value=percent(content["extra_bytes"], 2))
    if verb == "train":
        yield Fact(
            name="Accuracy",
            value=f"{content['accuracy']:.2f} %",
            more=f"{content['accuracy_before']:.2f} % before, on {content['held']} held back",
        )
        yield Fact(
            name="Parameters",
            value=ratio(content["parameters"], content["parameters_before"]),
            more=f"{content['parameters']:,} of {content['parameters_before']:,}",
        )
    if verb == "benchmark":
        yield Fact(name="Models", value=str(len(content["models"])))
        yield Fact(name="Cases", value=str(len(content["cases"])))
    if verb == "inspect":
        yield Fact(name="Parameters", value=f"{content['parameters']:,}")
        share = content["factorable"] / max(content["parameters"], 1)
        yield Fact(name="Could be factored", value=percent(share), more="of the parameters")
        yield Fact(name="File", value=quantity(content["file_bytes"]))
    yield from _quality(content)
    yield from _trust(content)
    yield Fact(name="Took", value=duration(content["run"]["seconds"]))


def _points(points: list[Content]) -> Iterator[Fact]:
    plans = [point["plan"] for point in points]
    kept = [p["parameters_after"] / max(p["parameters_before"], 1) for p in plans]
    span = f"{percent(min(kept))} to {percent(max(kept))} of the parameters kept" if kept else ""
    yield Fact(name="Points", value=str(len(points)), more=span)
    for each in points[0]["validation"]["providers"] if points else []:
        yield Fact(name="Measured on", value=each["provider"].removesuffix("ExecutionProvider"))


def _asked(content: Content) -> Iterator[Fact]:
    target = content.get("target") or (content.get("plan") or {}).get("target") or {}
    for key, value in target.items():
        words = TARGETS.get(key, "")
        shown = number(value)
        more = words or key.replace("_", " ")
        method = (content.get("plan") or {}).get("method", "")
        yield Fact(name="Asked for", value=shown, more=f"{more}, by {method}" if method else more)
    if content["run"]["verb"] == "quantize":
        yield Fact(name="Asked for", value=content["quantized"]["scheme"])


def _reached(found: Content) -> Iterator[Fact]:
    before, after = found["reference"], found["candidate"]
    yield Fact(
        name="Parameters",
        value=ratio(after["parameters"], before["parameters"]),
        more=f"{after['parameters']:,} of {before['parameters']:,}",
    )
    yield Fact(
        name="File",
        value=ratio(after["file_bytes"], before["file_bytes"]),
        more=f"{quantity(after['file_bytes'])} of {quantity(before['file_bytes'])}",
    )
    if before["flops"] and after["flops"] is not None:
        yield Fact(
            name="Operations",
            value=ratio(after["flops"], before["flops"]),
            more="of products and convolutions",
        )
    for each in found["providers"]:
        time = each["latency"]
        tone: Tone = "good" if time["faster"] else "bad" if time["slower"] else ""
        yield Fact(
            name=f"Time on {each['provider'].removesuffix('ExecutionProvider')}",
            value=number(time["ratio"]),
            more=f"{number(time['ratio_low'])} to {number(time['ratio_high'])}, "
            f"{time['pairs']} pairs of runs",
            tone=tone,
        )
        if accuracy := each["accuracy"]:
            error = accuracy["drop_error"]
            spread = "" if error is None else f" ± {number(error, 2)}"
            yield Fact(
                name=f"Loss of accuracy on {each['provider'].removesuffix('ExecutionProvider')}",
                value=f"{number(accuracy['drop'])}{spread}",
                more=f"of {accuracy['output']}: {accuracy['reference']:.2f} % before, "
                f"{accuracy['candidate']:.2f} % after, on {accuracy['count']:,} labels",
            )
    if found["relative_error"] is not None:
        yield Fact(
            name="Relative error",
            value=number(found["relative_error"]),
            more="of all values of the worst output, padding too",
        )


def _quality(content: Content) -> Iterator[Fact]:
    quality = content.get("quality") or content.get("after")
    if quality is None and content["run"]["verb"] == "quantize" and stages(content):
        quality = stages(content)[-1]["quality"]
    if quality is None:
        return
    found = quality.get("divergence") if "divergence" in quality else quality
    if found is not None:
        predicted = (content.get("plan") or {}).get("predicted_divergence")
        expected = "" if predicted is None else f", {number(predicted)} predicted"
        yield Fact(
            name="Divergence of outputs",
            value=number(found["mean"]),
            more=f"± {number(found['standard_error'], 2)} on {found['samples']} samples held back"
            + expected,
        )
        yield Fact(name="Decisions alike", value=percent(found["agreement"], 2))
        if found["snr_db"] is not None:
            yield Fact(name="Signal to noise", value=f"{found['snr_db']:.1f} dB")
    if quality.get("drop") is not None:
        error = quality["drop_error"]
        spread = "" if error is None else f" ± {number(error, 2)}"
        yield Fact(
            name="Loss of the metric",
            value=number(quality["drop"]),
            more=f"{number(quality['metric'])} after{spread}",
        )


def _trust(content: Content) -> Iterator[Fact]:
    layers = [e for e in content.get("layers", []) if "trusted" in e and e["rows"] is not None]
    if layers:
        enough = sum(e["trusted"] for e in layers)
        yield Fact(
            name="Weights with enough rows",
            value=f"{enough} of {len(layers)}",
            more="four a feature: fewer look emptier than they are",
            tone="good" if enough == len(layers) else "warn",
        )
    if "samples" in content and content["run"]["verb"] != "validate":
        yield Fact(name="Samples that it rests on", value=number(content["samples"]))


def _notes(content: Content) -> Iterator[str]:
    found = validation(content)
    said = [*content.get("failures", []), *content.get("faults", []), *content.get("notes", [])]
    if found is not None:
        said += found["notes"]
    yield from dict.fromkeys(said)
