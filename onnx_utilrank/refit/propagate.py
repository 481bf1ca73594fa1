"""Walk through the graph once, the original beside its compressed twin, and refit layer by layer.

All runs are taken through one node before the next one: each node is computed once for either
graph and run, so that the work is linear in the number of layers. What no later node reads is
dropped at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from onnx_utilrank.model.graph import captured_names
from onnx_utilrank.refit.fit import can_fit, fit_layer
from onnx_utilrank.refit.layer import Layer, Refitted, as_measured
from onnx_utilrank.refit.regression import CrossMoment
from onnx_utilrank.refit.twin import Reweighted, StandIn, layers_by_value
from onnx_utilrank.sensitivity.rows import as_rows
from onnx_utilrank.sites.site import Use
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.statistics.padding import Padding
from onnx_utilrank.statistics.spill import spilled
from onnx_utilrank.torch_graph.block import Values
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["propagate"]

# Rows that a layer is fitted to, at most, unless it is so wide that it needs more a feature.
ROWS_FITTED, ROWS_PER_FEATURE_FITTED = 65536, 16
# Rows whose products are formed at once.
ROWS_AT_ONCE = 4096


@dataclass(slots=True, kw_only=True)
class _Run:
    """One feed on its way through both graphs."""

    samples: int
    mask: torch.Tensor | None
    original: Values
    compressed: Values


def _mask(padding: Padding | None, feed: Mapping[str, np.ndarray]) -> torch.Tensor | None:
    kept = padding.kept(feed) if padding else None
    return None if kept is None else torch.from_numpy(kept)


def propagate(
    graph: TorchGraph,
    layers: Sequence[Layer],
    feeds: Sequence[Mapping[str, np.ndarray]],
    padding: Padding | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, Refitted]:
    """Factors for every layer, fitted to what it gets from the compressed layers before it.

    With x the input of a layer in the original and x' the one behind compressed layers, the
    smaller side z (x, or W x where W is wide) is regressed on what there is of it now, z ≈ M z',
    in the metric of the outputs; the optimum of `statistics.factorize.optimal` for the rows M z'
    then cuts W M, or M W, to its rank (Garg et al. and SVD-LLM fit to x).

    Args:
        graph: The model.
        layers: What is to be factored or shrinks. Weights with several uses, and ones whose bias
            cannot take a mean, stay as they were measured.
        feeds: Calibration samples.
        padding: What says which positions are padding, whose rows do not count.
        progress: Called with "refitting" and how many nodes are done, and "solving" and how many
            layers are, of how many there are.

    Returns:
        By key of the site.

    Raises:
        ModelError: A node cannot be computed.
    """
    at = layers_by_value(layers)
    runs = [
        _Run(
            samples=samples_in(feed),
            mask=_mask(padding, feed),
            original=graph.start(feed),
            compressed=graph.start(feed),
        )
        for feed in feeds
    ]
    done: dict[str, Refitted] = {}
    changed: set[str] = set()
    with torch.no_grad():
        for k, node in enumerate(graph.nodes):
            progress("refitting", k, len(graph.nodes))
            found = at.get(node.output[0]) if node.output else None
            made: tuple[str, ...] = ()
            for run in runs:
                made = graph.step(k, run.original)
            if found is not None:
                layer, use = found
                key = layer.measured.site.key
                by_outputs = key not in done and layer.outputs and can_fit(layer)
                if by_outputs:
                    node_now = Reweighted(partial(getattr, layer, "projected_weight"))
                    for run in runs:
                        node_now.step(graph, k, use, run.compressed)
                if key not in done:
                    pairs = _moments(layer, use, runs) if can_fit(layer) else None
                    progress("solving", len(done), len(layers))
                    done[key] = spilled(fit_layer(layer, *pairs) if pairs else as_measured(layer))
                    progress("refitting", k, len(graph.nodes))
                stand_in = StandIn(layer, done[key])
                for run in runs:
                    if by_outputs:
                        stand_in.turn(use, run.compressed, run.samples)
                    else:
                        stand_in.step(graph, k, use, run.compressed, run.samples)
            elif changed.isdisjoint({*node.input, *captured_names(node)}):
                for run in runs:
                    run.compressed.update((name, run.original[name]) for name in made)
                made = ()
            else:
                for run in runs:
                    graph.step(k, run.compressed)
            changed.update(made)
            for run in runs:
                for name in graph.dead_after[k]:
                    run.original.pop(name, None)
                    run.compressed.pop(name, None)
    progress("solving", len(done), len(layers))
    progress("refitting", len(graph.nodes), len(graph.nodes))
    return done


def _moments(
    layer: Layer, use: Use, runs: Sequence[_Run]
) -> tuple[tuple[CrossMoment, CrossMoment], np.ndarray]:
    """Sums over pairs of rows, of every other sample each, and the shift they are about."""
    view = use.result if layer.outputs else use.inputs
    own = torch.from_numpy(np.array(layer.biases[use.node])) if layer.outputs else torch.zeros(1)
    gain = use.gain if layer.outputs else 1.0
    halves = (CrossMoment.zero(view.width), CrossMoment.zero(view.width))
    waiting: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])  # y and x side by side
    wanted = max(ROWS_PER_FEATURE_FITTED * view.width, ROWS_FITTED) / len(runs)
    shift: torch.Tensor | None = None
    samples = 0
    for k, run in enumerate(runs):
        target, rows = (
            as_rows(state[view.tensor], view, run.samples)
            for state in (run.original, run.compressed)
        )
        live = torch.ones(target.shape[:2], dtype=torch.bool)
        if run.mask is not None and run.mask.shape == live.shape:
            live = run.mask
        stride = max(1, int(int(live.sum()) / wanted))
        # Every other sample: rows of one sample are too alike to predict each other.
        for half in range(2):
            chosen = live.clone()
            chosen[(half + samples) % 2 :: 2] = False
            y, x = ((v[chosen][k % stride :: stride] - own.to(v)) / gain for v in (target, rows))
            if not len(x):
                continue
            if shift is None:
                shift = y.mean(0)
            waiting[half].append(torch.cat([y - shift, x - shift], 1))
            if sum(map(len, waiting[half])) >= ROWS_AT_ONCE:
                _count(halves[half], waiting[half])
        samples += len(target)
    for half in range(2):
        _count(halves[half], waiting[half])
    mean = np.zeros(view.width) if shift is None else shift.double().cpu().numpy()
    return halves, mean


def _count(moment: CrossMoment, waiting: list[torch.Tensor]) -> None:
    """Add the pairs that wait, of which none wait any longer."""
    if waiting:
        pairs = torch.cat(waiting).cpu().numpy()
        moment.add(*np.split(pairs, 2, axis=1))
        waiting.clear()
