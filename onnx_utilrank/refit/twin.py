"""Run the graph in torch as it will be when layers are replaced, without rewriting it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from onnx_utilrank.refit.layer import Layer, Refitted
from onnx_utilrank.sensitivity.rows import as_rows
from onnx_utilrank.sites.find import site_kind
from onnx_utilrank.sites.site import Use
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.statistics.spill import spilled
from onnx_utilrank.torch_graph.block import Values
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["Reweighted", "StandIn", "Twin", "layers_by_value"]


class Reweighted:
    """A node that is computed with another weight."""

    def __init__(self, weight: Callable[[], np.ndarray]) -> None:
        """Take what gives W [m, d]; it is asked once, when the node comes.

        All layers of a large model are prepared before the first is computed: their matrices in
        float64 are not to wait in memory.
        """
        self._matrix = weight
        self._stored: torch.Tensor | None = None

    def step(self, graph: TorchGraph, k: int, use: Use, state: Values) -> None:
        """Compute the node; whatever else reads its weight finds the one it has.

        Raises:
            ModelError: The node cannot be computed.
        """
        own = state[use.weight]
        if self._stored is None:
            kind = site_kind(use.op_type)
            stored = kind.stored(use, own.cpu().numpy(), self._matrix())
            self._stored = torch.from_numpy(spilled(_tensor(stored).to(own.dtype).numpy()))
        state[use.weight] = self._stored.to(own.device)
        graph.step(k, state)
        state[use.weight] = own


class StandIn:
    """What takes a layer's place, ready to be put into runs."""

    def __init__(self, layer: Layer, new: Refitted) -> None:
        self._layer, self._new = layer, new
        self._node = Reweighted(partial(new.whole, layer))
        self._lost = None if new.lost_mean is None else _tensor(new.lost_mean)
        self._heads = None
        if new.heads is not None:
            # The bias behind the node shrinks with the features.
            assert layer.kept is not None
            assert layer.measured.heads is not None
            projection = new.heads.kept(layer.kept) + np.diag(layer.measured.heads.met)
            self._heads = _tensor(projection.T)
            self._behind = _tensor(layer.behind)

    def step(self, graph: TorchGraph, k: int, use: Use, state: Values, samples: int) -> None:
        """Compute the node as it will be.

        Raises:
            ModelError: It cannot be computed.
        """
        self._node.step(graph, k, use, state)
        self._finish(use, state, samples)

    def turn(self, use: Use, state: Values, samples: int) -> None:
        """Make the new output of the one that the layer gave before it was fitted by that."""
        assert self._new.turn is not None
        y = state[use.result.tensor]
        own = _tensor(self._layer.biases[use.node]).to(y)
        rows = (as_rows(y, use.result, samples) - own) @ _tensor(self._new.turn.T).to(y) + own
        _put_rows(use, state, rows)
        self._finish(use, state, samples)

    def _finish(self, use: Use, state: Values, samples: int) -> None:
        """Add what the mean loses, and let heads lose their dimensions."""
        if self._lost is None and self._heads is None:
            return
        y = state[use.result.tensor]
        rows = as_rows(y, use.result, samples)
        if self._lost is not None:
            rows = rows + use.gain * self._lost.to(y)
        if self._heads is not None:
            behind = self._behind.to(y)
            rows = (rows + behind) @ self._heads.to(y) - behind
        _put_rows(use, state, rows)


class Twin:
    """The graph with layers replaced; with none, the graph itself."""

    def __init__(
        self,
        graph: TorchGraph,
        layers: Sequence[Layer] = (),
        made: Mapping[str, Refitted] | None = None,
    ) -> None:
        """Prepare the replacements.

        Args:
            graph: The model.
            layers: What is replaced.
            made: By key of their sites, what takes their place.
        """
        self._graph = graph
        self._at = layers_by_value(layers)
        keys = {layer.measured.site.key: layer for layer in layers}
        self._parts = {key: StandIn(layer, (made or {})[key]) for key, layer in keys.items()}

    def run(self, feed: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """The values of these names, inner ones too.

        Raises:
            ModelError: A node cannot be computed.
        """
        samples = samples_in(feed)
        with torch.no_grad():
            state = self._graph.start(feed)
            for k, node in enumerate(self._graph.nodes):
                found = self._at.get(node.output[0]) if node.output else None
                if found is None:
                    self._graph.step(k, state)
                else:
                    layer, use = found
                    part = self._parts[layer.measured.site.key]
                    part.step(self._graph, k, use, state, samples)
                for value in self._graph.dead_after[k]:
                    if value not in outputs:
                        state.pop(value, None)
        return {name: state[name].cpu().numpy() for name in outputs}


def layers_by_value(layers: Sequence[Layer]) -> dict[str, tuple[Layer, Use]]:
    """The layers and their uses by the value that each use makes."""
    return {u.result.tensor: (layer, u) for layer in layers for u in layer.measured.site.uses}


def _put_rows(use: Use, state: Values, rows: torch.Tensor) -> None:
    """Let a run hold these rows for the node's output: `as_rows` undone."""
    y, view = state[use.result.tensor], use.result
    if y.ndim > 1:
        moved = y.movedim(view.axis, -1)
        if view.positions_first:
            rows = rows.reshape(moved.transpose(0, 1).shape).transpose(0, 1)
        rows = rows.reshape(moved.shape).movedim(-1, view.axis)
    state[view.tensor] = rows.reshape(y.shape)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values, order="C"))
