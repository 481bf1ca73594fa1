"""Whether a refit is worth having: it is judged on samples that it was not made on."""

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_utilrank.refit.layer import Layer, Refitted
from onnx_utilrank.refit.twin import Twin
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.validation.divergence import OutputRecorder

__all__ = ["is_better"]


def is_better(
    graph: TorchGraph,
    layers: Sequence[Layer],
    plain: Mapping[str, Refitted],
    refitted: Mapping[str, Refitted],
    losses: Sequence[OutputLoss],
    feeds: Sequence[Mapping[str, np.ndarray]],
) -> bool:
    """Whether the outputs diverge less with the refitted layers than with the plain ones.

    A regression a layer can look right at every layer and be wrong together: in few samples, or
    where errors that one layer hides are what a later one needs.

    Args:
        graph: The model.
        layers: What changes.
        plain: By key of their sites, what they become without a refit.
        refitted: And with it.
        losses: What counts at the outputs.
        feeds: Samples that the refit has not seen.

    Raises:
        ModelError: A node cannot be computed.
    """
    recorder = OutputRecorder(Twin(graph), losses, feeds)
    lost = [recorder.compare(Twin(graph, layers, made)).mean for made in (plain, refitted)]
    return lost[1] < lost[0]
