"""How the error of a candidate grows from layer to layer."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_utilrank.calibration.survey import LINEAR_OPS, expose, inputs_of
from onnx_utilrank.model.graph import node_label
from onnx_utilrank.model.plain import plain_model
from onnx_utilrank.model.scopes import captured_names
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, open_session
from onnx_utilrank.statistics.padding import Padding, find_padding

__all__ = ["LayerError", "error_through_depth"]

# Layers that are looked at, at most: evenly from the first to the last.
MOST_LAYERS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """How far the outputs of one layer are from those of the same layer in the original.

    Attributes:
        node: What messages call the layer.
        op_type: Its operator in the original.
        value: The value that it makes, by which it is known in both models.
        relative_error: ||y - y'||_F / ||y||_F over some samples; None where it is not finite.
    """

    node: str
    op_type: str
    value: str
    relative_error: float | None


def error_through_depth(
    reference: ModelStore, candidate: ModelStore, feeds: Iterable[Feed], provider: Provider
) -> tuple[LayerError, ...]:
    """Compare what layers with weights make, in the order of the graph.

    Layers are matrix products and convolutions whose output has the same name and shape in both
    models: what was factored keeps its output, what was shrunk or renamed does not. Padding does
    not count where an input says what is padding (`find_padding`).

    Args:
        reference: The original.
        candidate: The other.
        feeds: Some samples, one a run, as the values of all layers are held at once.
        provider: Where both run.

    Raises:
        ModelError: A model does not load or run.
    """
    first, second = plain_model(reference), plain_model(candidate)
    made = {name for node in second.proto.graph.node for name in node.output}
    layers = [node for node in _layers(first.proto.graph) if node.output[0] in made]
    if len(layers) > MOST_LAYERS:
        chosen = np.linspace(0, len(layers) - 1, MOST_LAYERS).round().astype(int)
        layers = [layers[k] for k in chosen]
    names = [node.output[0] for node in layers]
    lost, whole = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    runs = [inputs_of(first, feed) for feed in feeds] if names else []
    paddings: dict[str, Padding | None] = {}
    sessions = [open_session(expose(s, names), provider) for s in (first, second) if names]
    for feed in runs:
        one, other = (session.run(feed, names) for session in sessions)
        for name in list(lost):
            y, z = one[name], other[name]
            if y.shape != z.shape or y.dtype.kind != "f" or z.dtype.kind != "f":
                del lost[name]
                continue
            if name not in paddings:
                paddings[name] = find_padding(runs, y.shape)
            padding = paddings[name]
            kept = padding.kept(feed) if padding else None
            if kept is not None and kept.shape == y.shape[:2]:
                y, z = (value[kept] for value in (y, z))
            known = np.isfinite(y)  # what is infinite by design has no error
            y, z = y[known].astype(np.float64), z[known]
            lost[name] += float(np.sum((y - z) ** 2))
            whole[name] += float(np.sum(y**2))
    return tuple(
        LayerError(
            node=node_label(node),
            op_type=node.op_type,
            value=node.output[0],
            relative_error=_ratio(lost[node.output[0]], whole[node.output[0]]),
        )
        for node in layers
        if node.output[0] in lost
    )


def _layers(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Matrix products and convolutions of which one operand does not depend on the inputs."""
    moving = {i.name for i in graph.input} - {t.name for t in graph.initializer}
    for node in graph.node:
        if not moving.isdisjoint((*node.input, *captured_names(node))):
            moving.update(node.output)
        linear = node.op_type in LINEAR_OPS and node.domain in ("", "ai.onnx")
        if linear and len(moving.intersection(node.input[:2])) == 1:
            yield node


def _ratio(lost: float, whole: float) -> float | None:
    if not (math.isfinite(lost) and math.isfinite(whole)):
        return None
    if not whole:
        return None if lost else 0.0
    return math.sqrt(lost / whole)
