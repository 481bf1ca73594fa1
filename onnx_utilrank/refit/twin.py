"""Run the graph in torch as it will be when layers are replaced, without rewriting it."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from onnx_utilrank.refit.layer import Layer, Refitted
from onnx_utilrank.sensitivity.rows import as_rows, convolved
from onnx_utilrank.sites.site import Use
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.torch_graph.block import Values
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["Projection", "StandIn", "Twin", "layers_by_value"]


class StandIn:
    """What takes a layer's place, ready to be put into runs."""

    def __init__(self, layer: Layer, new: Refitted) -> None:
        self._layer = layer
        self._change = self._turn = self._lost = self._heads = None
        if new.turn is not None:
            self._turn = _tensor(new.turn.T)
        elif new.weight is not layer.weight:
            self._change = _tensor((new.weight - layer.weight).T)
        if new.lost_mean is not None:
            self._lost = _tensor(new.lost_mean)
        if new.heads is not None:
            # The bias behind the node shrinks with the features.
            assert layer.kept is not None
            assert layer.measured.heads is not None
            projection = new.heads.kept(layer.kept) + np.diag(layer.measured.heads.met)
            self._heads = _tensor(projection.T)
            self._behind = _tensor(layer.behind)

    def put(self, use: Use, state: Values, samples: int) -> None:
        """Put the new output in the place of the one that the layer's own weight gives."""
        y = state[use.result.tensor]
        rows = as_rows(y, use.result, samples)
        if self._turn is not None:
            own = _tensor(self._layer.biases[use.node]).to(y)
            rows = (rows - own) @ self._turn.to(y) + own
        elif self._change is not None:
            x = as_rows(state[use.inputs.tensor], use.inputs, samples)
            rows = rows + use.gain * (x @ self._change.to(y)).reshape(rows.shape)
        if self._lost is not None:
            rows = rows + use.gain * self._lost.to(y)
        if self._heads is not None:
            behind = self._behind.to(y)
            rows = (rows + behind) @ self._heads.to(y) - behind
        _put_rows(use, state, rows)


class Projection:
    """What a layer whose inputs, or of a Conv input channels, are projected makes of them."""

    def __init__(self, layer: Layer) -> None:
        expand, reduce = layer.projection()
        weight, patches = layer.weight, layer.measured.site.uses[0].inputs.patches
        self._biases = layer.biases
        self._patches = patches if patches and math.prod(patches.kernel) > 1 else None
        self._picks = torch.from_numpy(reduce) if reduce.ndim == 1 else None
        self._reduce, self._expand = _tensor(reduce.T), _tensor(expand.T)
        if self._patches:
            weight = weight.reshape(len(weight), self._patches.channels, *self._patches.kernel)
            self._weight = _tensor(weight)
        else:
            self._weight, self._expand = _tensor(weight.T), _tensor((weight @ expand).T)

    def put(self, use: Use, state: Values, samples: int) -> None:
        """Put that in the place of what the run holds for the node."""
        x, y = state[use.inputs.tensor], state[use.result.tensor]
        if self._patches:
            rows = x.movedim(1, -1)
            change = (self._kept(rows) @ self._expand.to(x)).movedim(-1, 1) - x
            # The difference alone: whatever the node adds to it, computed or not, stays.
            more = convolved(change, self._weight.to(x), self._patches)
            state[use.result.tensor] = y + more
            return
        rows = as_rows(x, use.inputs, samples)
        product = use.gain * (self._kept(rows) @ self._expand.to(x))
        if use.affine:
            own = _tensor(self._biases[use.node]).to(x)
        else:
            own = as_rows(y, use.result, samples) - use.gain * (rows @ self._weight.to(x))
        _put_rows(use, state, product + own)

    def _kept(self, rows: torch.Tensor) -> torch.Tensor:
        if self._picks is not None:
            return rows.index_select(-1, self._picks.to(rows.device))
        return rows @ self._reduce.to(rows)


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
        self._parts: dict[str, list[Projection | StandIn]] = {}
        for layer in layers:
            key = layer.measured.site.key
            parts: list[Projection | StandIn] = [Projection(layer)] if layer.projected else []
            self._parts[key] = [*parts, StandIn(layer, (made or {})[key])]

    def run(self, feed: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """The outputs of these names.

        Raises:
            ModelError: A node cannot be computed.
        """
        samples = samples_in(feed)
        with torch.no_grad():
            state = self._graph.start(feed)
            for k, dead in enumerate(self._graph.dead_after):
                for value in self._graph.step(k, state):
                    if value in self._at:
                        layer, use = self._at[value]
                        for part in self._parts[layer.measured.site.key]:
                            part.put(use, state, samples)
                for value in dead:
                    state.pop(value, None)
        return {name: state[name].cpu().numpy() for name in outputs}


def layers_by_value(layers: Sequence[Layer]) -> dict[str, tuple[Layer, Use]]:
    """The layers and their uses by the value that each use makes."""
    return {u.result.tensor: (layer, u) for layer in layers for u in layer.measured.site.uses}


def _put_rows(use: Use, state: Values, rows: torch.Tensor) -> None:
    """Let a run hold these rows [samples, positions, m] for the node's output."""
    y, view = state[use.result.tensor], use.result
    if y.ndim > 1:
        rows = rows.reshape(y.movedim(view.axis, -1).shape).movedim(-1, view.axis)
    state[view.tensor] = rows.reshape(y.shape)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values, order="C"))
