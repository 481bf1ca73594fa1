"""How much memory a run takes, measured on one sample."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["Footprint", "footprint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of the values of one run, parameters not counted.

    Attributes:
        kept: All floating values together: what a run with gradients holds.
        live: The most that are alive at once: what a run without them holds.
    """

    kept: int
    live: int


def footprint(graph: TorchGraph, feed: Mapping[str, np.ndarray]) -> Footprint:
    """Run one feed and add up its values.

    Raises:
        ModelError: A node cannot be computed.
    """
    constants = set(graph.start(feed)) - set(feed)
    state = graph.start(feed)
    kept, live, most = 0, 0, 0
    with torch.no_grad():
        for k, dead in enumerate(graph.dead_after):
            made = sum(_bytes(state[name]) for name in graph.step(k, state))
            kept, live = kept + made, live + made
            most = max(most, live)
            for name in dead:
                value = state.pop(name)
                live -= 0 if name in constants else _bytes(value)
    return Footprint(kept=kept, live=max(most, 1))


def _bytes(value: torch.Tensor) -> int:
    return value.element_size() * value.numel() if value.is_floating_point() else 0
