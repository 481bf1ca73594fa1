"""Fit one layer to what it gets behind compressed layers."""

import numpy as np

from onnx_utilrank.ranking.inner import forgiven
from onnx_utilrank.refit.layer import Layer, Refitted
from onnx_utilrank.refit.regression import CrossMoment, regression
from onnx_utilrank.statistics.factorize import Decomposition, Metric, factored, grouped, optimal
from onnx_utilrank.statistics.moments import SecondMoment

__all__ = ["can_fit", "fit_layer"]


def can_fit(layer: Layer) -> bool:
    """Whether a layer has one use, and a bias that takes what its mean output loses."""
    site = layer.measured.site
    if site.one_hot or site.tied:
        # Tokens come as they did, some of later ones not among the samples; and what is tied to
        # them stays so.
        return False
    if layer.projected and not site.wide:
        return False  # its outputs would be fitted, and the metric is of its inputs
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
    measured, weight, wide = layer.measured, layer.weight, layer.measured.site.wide
    fit = regression(halves, measured.gamma)
    whole = halves[0] + halves[1]
    mean = whole.targets / max(whole.rows, 1) + shift
    now = fit @ (whole.regressors / max(whole.rows, 1) + shift)  # of M z'
    _, covariance = whole.centred()
    covariance = fit @ covariance @ fit.T
    if layer.inner is not None:
        assert layer.rank is not None
        return Refitted(
            weight=weight,
            lost_mean=mean - now,
            turn=fit,
            factors=layer.inner_features.factors(fit @ weight, layer.rank),
        )
    fitted, heads = fit @ weight if wide else weight @ fit, None
    if layer.kept is not None:
        means = (mean, covariance) if wide else (weight @ mean, weight @ covariance @ weight.T)
        heads = _heads(layer, *means)
    if layer.rank is None:
        lost = mean - now
        return Refitted(
            weight=fitted,
            lost_mean=lost if wide else weight @ lost,
            turn=fit if wide else None,
            heads=heads,
        )
    rows = SecondMoment(total=np.zeros(len(shift)), outer=covariance * whole.rows, rows=whole.rows)
    best = optimal(
        fitted if wide else np.eye(len(fit)), Metric.of(measured.gamma), outputs=rows, centred=True
    )
    kept, reduce = best.kept(layer.rank), best.reduce[: layer.rank]
    lost = mean - kept @ now
    if wide:
        factors = best.factors(fitted, layer.rank)
        return Refitted(weight=None, lost_mean=lost, turn=kept @ fit, factors=factors, heads=heads)
    factors = factored(weight @ best.expand[:, : layer.rank], reduce @ fit)
    return Refitted(weight=None, lost_mean=weight @ lost, factors=factors, heads=heads)


def _heads(layer: Layer, mean: np.ndarray, covariance: np.ndarray) -> Decomposition:
    """The hidden features of a fitted weight, whose W x has this mean and covariance."""
    heads = layer.measured.heads
    assert heads is not None
    (own,) = layer.biases.values()
    total = mean + own + layer.behind
    rest = total - forgiven(heads.groups, total)
    return grouped(
        heads.gammas, covariance + np.outer(rest, rest), [rows for rows, _ in heads.groups]
    )
