"""Walk through the graph once, the original beside its compressed twin, and refit layer by layer.

All runs are taken through one node before the next one: each node is computed once for either
graph and run, so that the work is linear in the number of layers. What no later node reads is
dropped at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onnx_utilrank.model.graph import captured_names
from onnx_utilrank.ranking.two_sided import TwoSidedSite, forgiven
from onnx_utilrank.refit.regression import CrossMoment, regression
from onnx_utilrank.sensitivity.rows import as_rows, convolved
from onnx_utilrank.sites.site import Use
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.statistics.factorize import Decomposition, Factors, Metric, grouped, optimal
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["Layer", "Refitted", "as_measured", "propagate"]

# Rows of one run that a layer is fitted to, at most.
ROWS_OF_RUN = 4096

State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One site that is to be factored, or that shrinks with hidden features.

    Attributes:
        measured: Its decomposition.
        weight: W, float64 [m, d].
        rank: The rank of its factors; None where it shrinks.
        biases: What the node of each use adds to W x itself, [m], by node.
        behind: What an Add behind it adds, [m] (of a site that shrinks).
        channels: Whether the factors are of its input channels.
        kept: Columns of `measured.heads` that are kept; None where it makes no hidden features
            that shrink, and only meets or reads them.
    """

    measured: TwoSidedSite
    weight: np.ndarray
    rank: int | None
    biases: Mapping[int, np.ndarray]
    behind: np.ndarray
    channels: bool = False
    kept: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refitted:
    """What a layer became.

    Attributes:
        weight: What takes the place of W, [m, d], hidden features as they were.
        lost_mean: What the bias has to take, [m]; None where it can take nothing.
        turn: A [m, m] with Ŵ = A W, where the outputs are the smaller side: the new output comes
            from the old one, and no patch has to be unfolded.
        factors: Of `weight`, where it is factored.
        heads: How the hidden features that it makes are to shrink.
    """

    weight: np.ndarray
    lost_mean: np.ndarray | None
    turn: np.ndarray | None
    factors: Factors | None = None
    heads: Decomposition | None = None


@dataclass(slots=True, kw_only=True)
class _Run:
    """One feed on its way through both graphs."""

    samples: int
    mask: torch.Tensor | None
    original: State
    compressed: State


def propagate(
    graph: TorchGraph,
    layers: Sequence[Layer],
    feeds: Sequence[Mapping[str, np.ndarray]],
    mask: str | None,
    progress: Callable[[int, int], None],
) -> dict[str, Refitted]:
    """Factors for every layer, fitted to what it gets from the compressed layers before it.

    With x the input of a layer in the original and x' the one behind compressed layers,
    W* = argmin E‖R^T (W x − V x')‖² is cut to its rank by the optimum of
    `statistics.factorize.optimal` for the rows x' (Garg et al. and SVD-LLM fit to x). The smaller
    side is used here too: where m < d, W* is M W with M a regression of W x on W x'.

    Args:
        graph: The model.
        layers: What is to be factored or shrinks. Weights with several uses, and ones whose bias
            cannot take a mean, stay as they were measured.
        feeds: Calibration samples.
        mask: Graph input that is 0 at padded positions.
        progress: Called with how many nodes are done and how many there are.

    Returns:
        By key of the site.

    Raises:
        ModelError: A node cannot be computed.
    """
    at = {u.result.tensor: (layer, u) for layer in layers for u in layer.measured.site.uses}
    runs = [
        _Run(
            samples=samples_in(feed),
            mask=torch.from_numpy(np.array(feed[mask]) != 0) if mask and mask in feed else None,
            original=graph.start(feed),
            compressed=graph.start(feed),
        )
        for feed in feeds
    ]
    done: dict[str, Refitted] = {}
    changed: set[str] = set()
    with torch.no_grad():
        for k, node in enumerate(graph.nodes):
            found = at.get(node.output[0]) if node.output else None
            reads = {*node.input, *captured_names(node)}
            fresh = found is not None or not changed.isdisjoint(reads)
            for run in runs:
                made = graph.step(k, run.original)
                if fresh:
                    graph.step(k, run.compressed)
                else:
                    run.compressed.update((name, run.original[name]) for name in made)
                if fresh:
                    changed.update(made)
            if found is not None:
                layer, use = found
                key = layer.measured.site.key
                if layer.channels:
                    _project_channels(layer, use, runs)
                if key not in done:
                    done[key] = _refit(layer, use, runs)
                for run in runs:
                    _replace(layer, use, done[key], run)
            for run in runs:
                for name in graph.dead_after[k]:
                    run.original.pop(name, None)
                    run.compressed.pop(name, None)
            progress(k + 1, len(graph.nodes))
    return done


def _refit(layer: Layer, use: Use, runs: Sequence[_Run]) -> Refitted:
    measured, weight = layer.measured, layer.weight
    # A new bias can be added to factors; a weight that only shrinks keeps the nodes it has.
    fitted = ("input", "add") if layer.rank is None else ("input", "add", "new")
    if measured.site.bias not in fitted or len(measured.site.uses) > 1:
        return as_measured(layer)
    metric = Metric.of(measured.gamma)
    outputs = measured.side == "outputs" or layer.channels
    halves, shift = _moments(layer, use, runs, outputs)
    fit = regression(halves, metric.root_t if outputs else metric.root_t @ weight)
    whole = halves[0] + halves[1]
    mean = whole.targets / max(whole.rows, 1) + shift
    mean_now = whole.regressors / max(whole.rows, 1) + shift
    covariance = whole.centred()[1]
    if outputs:
        weight, covariance = fit @ weight, fit @ covariance @ fit.T
    else:
        weight, mean = weight @ fit, layer.weight @ mean
    if layer.channels:
        assert measured.channels is not None
        assert layer.rank is not None
        return Refitted(
            weight=layer.weight,
            lost_mean=mean - fit @ mean_now,
            turn=fit,
            factors=measured.channels.factors(weight, layer.rank),
        )
    if layer.rank is None:
        heads = None
        if layer.kept is not None:
            heads = _heads(layer, mean, covariance if outputs else weight @ covariance @ weight.T)
        now = fit @ mean_now if outputs else weight @ mean_now
        return Refitted(
            weight=weight, lost_mean=mean - now, turn=fit if outputs else None, heads=heads
        )
    rows = SecondMoment(total=np.zeros(len(shift)), outer=covariance * whole.rows, rows=whole.rows)
    best = optimal(
        weight,
        metric,
        inputs=None if outputs else rows,
        outputs=rows if outputs else None,
        centred=True,
    )
    factors = best.factors(weight, layer.rank)
    turn = _kept(best, layer.rank) @ fit if outputs else None
    now = turn @ mean_now if turn is not None else factors.product @ mean_now
    return Refitted(weight=factors.product, lost_mean=mean - now, turn=turn, factors=factors)


def as_measured(layer: Layer) -> Refitted:
    """The layer as it is without a refit."""
    measured = layer.measured
    if layer.rank is None:
        heads = None if measured.heads is None or layer.kept is None else measured.heads.found
        return Refitted(weight=layer.weight, lost_mean=None, turn=None, heads=heads)
    if layer.channels:
        assert measured.channels is not None
        return Refitted(
            weight=layer.weight,
            lost_mean=measured.channels.lost(layer.weight, layer.rank)
            if measured.centred
            else None,
            turn=np.eye(measured.site.m),  # the run holds what comes of the channels already
            factors=measured.channels.factors(layer.weight, layer.rank),
        )
    lost = None
    if measured.centred:
        lost = measured.found.lost(measured.mean_output(layer.weight), layer.rank)
    factors = measured.found.factors(layer.weight, layer.rank)
    return Refitted(
        weight=factors.product,
        lost_mean=lost,
        turn=_kept(measured.found, layer.rank) if measured.side == "outputs" else None,
        factors=factors,
    )


def _project_channels(layer: Layer, use: Use, runs: Sequence[_Run]) -> None:
    """Let every compressed run hold what the node makes of its projected input channels."""
    channels, patches = layer.measured.channels, use.inputs.patches
    assert channels is not None
    assert patches is not None
    assert layer.rank is not None
    projection = _kept(channels.found, layer.rank)
    for run in runs:
        x = run.compressed[use.inputs.tensor]
        kernel = torch.from_numpy(
            layer.weight.reshape(len(layer.weight), patches.channels, *patches.kernel)
        ).to(x)
        kept = (x.movedim(1, -1) @ torch.from_numpy(projection.T.copy()).to(x)).movedim(-1, 1)
        # The difference alone: whatever the node adds to it, computed or not, stays.
        y = run.compressed[use.result.tensor]
        run.compressed[use.result.tensor] = y + convolved(kept - x, kernel, patches)


def _heads(layer: Layer, mean: np.ndarray, covariance: np.ndarray) -> Decomposition:
    """The hidden features of a fitted weight, whose W x has this mean and covariance."""
    heads = layer.measured.heads
    assert heads is not None
    (own,) = layer.biases.values()
    total = mean + own + layer.behind
    rest = total - forgiven(heads.groups, total)
    return grouped(
        layer.measured.gamma, covariance + np.outer(rest, rest), [rows for rows, _ in heads.groups]
    )


def _kept(found: Decomposition, rank: int) -> np.ndarray:
    """L_r K_r [m, m]."""
    return np.asarray(found.expand[:, :rank] @ found.reduce[:rank])


def _moments(
    layer: Layer, use: Use, runs: Sequence[_Run], outputs: bool
) -> tuple[tuple[CrossMoment, CrossMoment], np.ndarray]:
    """Sums over pairs of rows, of every other sample each, and the shift they are about."""
    view = use.result if outputs else use.inputs
    bias = torch.from_numpy(np.array(layer.biases[use.node])) if outputs else torch.zeros(1)
    halves = (CrossMoment.zero(view.width), CrossMoment.zero(view.width))
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
        stride = max(1, int(live.sum()) // ROWS_OF_RUN)
        # Every other sample: rows of one sample are too alike to predict each other.
        for half in range(2):
            chosen = live.clone()
            chosen[(half + samples) % 2 :: 2] = False
            y, x = target[chosen] - bias.to(target), rows[chosen] - bias.to(rows)
            y, x = y[k % stride :: stride], x[k % stride :: stride]
            if not len(x):
                continue
            if shift is None:
                shift = y.mean(0)
            halves[half].add((y - shift).cpu().numpy(), (x - shift).cpu().numpy())
        samples += len(target)
    mean = np.zeros(view.width) if shift is None else shift.double().cpu().numpy()
    return halves, mean


def _replace(layer: Layer, use: Use, new: Refitted, run: _Run) -> None:
    """Put the layer's new output in the place of the one that its own weight gives."""
    y = run.compressed[use.result.tensor]
    rows = as_rows(y, use.result, run.samples)
    own = torch.from_numpy(np.array(layer.biases[use.node])).to(y)
    if new.turn is not None:
        rows = (rows - own) @ torch.from_numpy(new.turn.T.copy()).to(y) + own
    else:
        x = as_rows(run.compressed[use.inputs.tensor], use.inputs, run.samples)
        change = torch.from_numpy((new.weight - layer.weight).T.copy()).to(y)
        rows = rows + use.gain * (x @ change).reshape(rows.shape)
    if new.lost_mean is not None:
        rows = rows + use.gain * torch.from_numpy(new.lost_mean).to(y)
    if new.heads is not None:
        # The bias behind the node shrinks with the features.
        assert layer.kept is not None
        assert layer.measured.heads is not None
        projection = _kept(new.heads, layer.kept)
        projection += np.diag(layer.measured.heads.met)
        kept = torch.from_numpy(projection.T.copy()).to(y)
        behind = torch.from_numpy(np.array(layer.behind)).to(y)
        rows = (rows + behind) @ kept - behind
    if y.ndim > 1:
        rows = rows.reshape(y.movedim(use.result.axis, -1).shape).movedim(-1, use.result.axis)
    run.compressed[use.result.tensor] = rows.reshape(y.shape)
