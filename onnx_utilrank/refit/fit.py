"""Fit one layer to what it gets behind compressed layers."""

import numpy as np

from onnx_utilrank.ranking.two_sided import forgiven
from onnx_utilrank.refit.layer import Layer, Refitted
from onnx_utilrank.refit.regression import CrossMoment, regression
from onnx_utilrank.statistics.factorize import Decomposition, Metric, grouped, optimal
from onnx_utilrank.statistics.moments import SecondMoment

__all__ = ["can_fit", "fit_layer"]


def can_fit(layer: Layer) -> bool:
    """Whether a layer has one use, and a bias that takes what its mean output loses."""
    site = layer.measured.site
    # A new bias can be added to factors; a weight that only shrinks keeps the nodes it has.
    fitted = ("input", "add") if layer.rank is None else ("input", "add", "new")
    return site.bias in fitted and len(site.uses) == 1


def fit_layer(layer: Layer, halves: tuple[CrossMoment, CrossMoment], shift: np.ndarray) -> Refitted:
    """The layer as its inputs behind compressed layers want it; see `propagate`.

    Args:
        layer: The layer.
        halves: Of two sets of samples, pairs of what the layer gets in the original and what it
            gets now: x and x', or where it is fitted by its outputs W x and W x'.
        shift: What was taken off both.
    """
    measured, weight, gamma = layer.measured, layer.weight, layer.measured.gamma
    outputs = layer.outputs
    fit = regression(halves, gamma if outputs else weight.T @ gamma @ weight)
    whole = halves[0] + halves[1]
    mean = whole.targets / max(whole.rows, 1) + shift
    mean_now = whole.regressors / max(whole.rows, 1) + shift
    _, covariance = whole.centred()
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
        Metric.of(gamma),
        inputs=None if outputs else rows,
        outputs=rows if outputs else None,
        centred=True,
    )
    factors = best.factors(weight, layer.rank)
    turn = best.kept(layer.rank) @ fit if outputs else None
    now = turn @ mean_now if turn is not None else factors.product @ mean_now
    return Refitted(weight=factors.product, lost_mean=mean - now, turn=turn, factors=factors)


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
