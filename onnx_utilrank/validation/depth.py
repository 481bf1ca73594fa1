"""How the error of a candidate grows from layer to layer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.calibration.survey import LINEAR_OPS, expose
from onnx_utilrank.model.graph import node_label
from onnx_utilrank.model.plain import plain_model
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.runtime.sessions import Feed, open_session

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
    """Compare what matrix products and convolutions make, in the order of the graph.

    Layers are those whose output has the same name and shape in both models: what was factored
    keeps its output, what was shrunk or renamed does not.

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
    layers = [
        node
        for node in first.proto.graph.node
        if node.op_type in LINEAR_OPS and node.domain in ("", "ai.onnx") and node.output[0] in made
    ]
    if len(layers) > MOST_LAYERS:
        chosen = np.linspace(0, len(layers) - 1, MOST_LAYERS).round().astype(int)
        layers = [layers[k] for k in chosen]
    names = [node.output[0] for node in layers]
    lost, whole = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    sessions = [open_session(expose(s, names), provider) for s in (first, second) if names]
    for feed in feeds if names else ():
        one, other = (session.run(feed, names) for session in sessions)
        for name in list(lost):
            y, z = one[name], other[name]
            if y.shape != z.shape or y.dtype.kind != "f" or z.dtype.kind != "f":
                del lost[name]
                continue
            y = y.astype(np.float64)
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


def _ratio(lost: float, whole: float) -> float | None:
    if not (math.isfinite(lost) and math.isfinite(whole)):
        return None
    if not whole:
        return None if lost else 0.0
    return math.sqrt(lost / whole)
