"""What the error of each quantized weight costs the outputs, and the branch that takes it back.

A branch adds B A x to the output Q(W) x of a quantized layer. With D = W - Q(W), the best one of
rank r is the best approximation of D in the metric of the data. LQER (Zhang et al., arXiv
2402.02446, section 3) scales D by the mean size of each input before its singular value
decomposition; EoRA (Liu et al., arXiv 2410.21271) takes the eigenspace of the inputs' second
moment, which is the optimum of E‖(D - B A) x‖². Here the gradients of the outputs count as well:
the loss is that of `ranking.two_sided`, with D in the place of W, so that one number tells what a
rank is worth at any layer. SVDQuant (Li et al., arXiv 2411.05007) has the same branch, but takes it
out of W before that is quantized.
"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_utilrank.calibration.collect import SUM_BYTES, collect, in_passes
from onnx_utilrank.config import CompressConfig
from onnx_utilrank.engine.engine import EngineUse
from onnx_utilrank.errors import ModelError
from onnx_utilrank.job import Job
from onnx_utilrank.measurement import Gradients, losses_note, rows_notes, variations_note
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.ranking.two_sided import TwoSidedSite, two_sided_site
from onnx_utilrank.repairing.match import Pair
from onnx_utilrank.sensitivity.measure import measure_sensitivity
from onnx_utilrank.sensitivity.side import Changes
from onnx_utilrank.sites.find import site_matrix
from onnx_utilrank.sites.site import BiasSlot, Site
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.statistics.factorize import Factors, feature_scale
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.sensitivity import Sensitivity
from onnx_utilrank.statistics.spill import spilled

__all__ = ["Lost", "Residual", "measure_residuals"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """The error D = W - Q(W) of one weight, decomposed.

    Attributes:
        pair: The weight and the layers that apply it quantized.
        matrix: D, float64 [m, d].
        found: Its decomposition, with D in the place of the weight.
    """

    pair: Pair
    matrix: np.ndarray
    found: TwoSidedSite

    @property
    def untouched(self) -> float:
        """Predicted loss of the model where nothing is done."""
        if not self.pair.centred:
            return float(self.found.errors[0])
        # The decomposition is about the mean, which a bias would take.
        mean = self.found.moment.mean
        return float(self.found.errors[0] + mean @ self.found.gamma @ mean / 2)

    def predicted(self, rank: int) -> float:
        """Predicted loss of the model with a branch of this rank, and the mean added back."""
        return float(self.found.errors[rank])

    def factors(self, rank: int) -> Factors:
        """B [m, r] and A [r, d] of the branch, balanced."""
        return self.found.factors_of(self.matrix, rank)

    def lost_mean(self, rank: int) -> np.ndarray | None:
        """(D - B A) E[x], float64 [m], for a bias to take; None where there is none to."""
        return self.found.lost_of(self.matrix, rank) if self.pair.centred else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """What quantization lost, layer by layer.

    Attributes:
        residuals: One a weight.
        unmeasured: Pairs on which no output depends.
        losses: What counts at the outputs, where gradients had to know.
        notes: Sentences on what the statistics rest on.
        engine: Who collected them, where it was not this process alone.
    """

    residuals: tuple[Residual, ...]
    unmeasured: tuple[Pair, ...]
    losses: tuple[OutputLoss, ...]
    notes: tuple[str, ...]
    engine: EngineUse | None = None


def measure_residuals(
    job: Job,
    quantized: GraphIndex,
    pairs: Sequence[Pair],
    samples: Sequence[int],
    config: CompressConfig,
    gradients: Gradients | None = None,
) -> Lost:
    """Decompose the error of every weight in what it costs the reference's outputs.

    Where gradients cannot be had, each error counts by what it changes at the layer's own output,
    relative to the variance there.

    Args:
        job: The reference, with its data.
        quantized: The quantized model.
        pairs: What belongs together.
        samples: Calibration samples.
        config: Options.
        gradients: What gradients are taken with, where the reference was measured before.

    Raises:
        ModelError: The reference does not run, or a value is not finite.
    """
    if not pairs:
        return Lost(residuals=(), unmeasured=(), losses=(), notes=())
    errors = {pair.key: spilled(pair.residual(job.index, quantized)) for pair in pairs}
    sites = {pair.key: _beside(pair) for pair in pairs}
    with job.engine:
        lost = _measured(job, quantized, pairs, sites, errors, samples, config, gradients)
    return replace(lost, engine=job.engine.use)


def _measured(
    job: Job,
    quantized: GraphIndex,
    pairs: Sequence[Pair],
    sites: Mapping[str, Site],
    errors: Mapping[str, np.ndarray],
    samples: Sequence[int],
    config: CompressConfig,
    gradients: Gradients | None,
) -> Lost:
    try:
        gradients = gradients or job.gradients(samples, config)
    except ModelError as e:
        reason = f"gradients cannot be had ({e}); errors count by what they do at their own layer"
        logger.warning("%s", reason)
        found, notes = _by_layer(job, list(sites.values()), errors, samples, config)
        return _lost(pairs, errors, found, (), (*notes, f"{reason}."))
    measured, passes = measure_sensitivity(
        gradients.graph,
        job.index,
        list(sites.values()),
        (),
        gradients.losses,
        gradients.data,
        gradients.samples,
        gradients.effort,
        moves=(),
        seed=config.seed,
        progress=job.progress,
        cache=job.cache(gradients.data, gradients.samples, config),
        changes=Changes(
            matrices=errors,
            fingerprint=quantized.source.fingerprint(),
        ),
        engine=job.engine,
    )
    rows = {m.site.key: (m.moment.rows, m.moment.enough_rows) for m in measured}
    notes = (
        *variations_note(gradients.data),
        *rows_notes(rows, passes=passes),
        losses_note(gradients.losses),
    )
    return _lost(pairs, errors, measured, gradients.losses, notes)


def _beside(pair: Pair) -> Site:
    """The reference's site as it is with a branch: with a new bias, or none."""
    slot = BiasSlot(kind="new" if pair.centred else "none", shape=(pair.site.m,))
    uses = tuple(replace(use, bias=slot) for use in pair.site.uses)
    return replace(pair.site, uses=uses, tied=None)


def _lost(
    pairs: Sequence[Pair],
    errors: Mapping[str, np.ndarray],
    found: Sequence[TwoSidedSite],
    losses: tuple[OutputLoss, ...],
    notes: tuple[str, ...],
) -> Lost:
    by_key = {each.site.key: each for each in found}
    return Lost(
        residuals=tuple(
            Residual(pair=pair, matrix=errors[pair.key], found=by_key[pair.key])
            for pair in pairs
            if pair.key in by_key
        ),
        unmeasured=tuple(pair for pair in pairs if pair.key not in by_key),
        losses=losses,
        notes=notes,
    )


def _by_layer(
    job: Job,
    sites: Sequence[Site],
    errors: Mapping[str, np.ndarray],
    samples: Sequence[int],
    config: CompressConfig,
) -> tuple[list[TwoSidedSite], tuple[str, ...]]:
    """Each error by what it does to the layer's output, relative to the variance of W x."""

    def sums(site: Site) -> dict[Hashable, int]:
        return {use.inputs: SUM_BYTES * use.inputs.width**2 for use in site.uses}

    found: list[TwoSidedSite] = []
    passes = list(in_passes([[site] for site in sites], sums, job.room(config) // 2))
    for group in passes:
        collected = collect(
            job.index,
            [use.inputs for site in group for use in site.uses],
            job.data,
            samples,
            job.provider,
            batch=job.batch,
            progress=job.progress,
            cache=job.cache(job.data, samples, config),
            engine=job.engine,
        )
        for site in group:
            moment = sum(
                (collected.moments[use.inputs] for use in site.uses), SecondMoment.zero(site.d)
            )
            if moment.rows:
                weight = site_matrix(job.index, site)
                found.append(spilled(_of_outputs(site, weight, errors[site.key], moment)))
    rows = {each.site.key: (each.moment.rows, each.moment.enough_rows) for each in found}
    return found, rows_notes(rows, passes=len(passes))


def _of_outputs(
    site: Site, weight: np.ndarray, error: np.ndarray, inputs: SecondMoment
) -> TwoSidedSite:
    """The decomposition of D in the metric of `ranking.one_sided`, of the layer's own output."""
    energies = np.einsum("ij,ij->i", weight @ inputs.covariance, weight)
    scale = feature_scale(energies)
    metric = 1 / scale**2
    metric /= max(float(energies @ metric), float(np.finfo(np.float64).tiny))
    if site.wide:
        gamma, moment = np.diag(metric), _mapped(inputs, error)
    else:
        gamma, moment = error.T @ (metric[:, None] * error), inputs
    # As sure as can be: nothing of it is estimated from few decisions.
    known = Sensitivity(moment=moment, gamma=gamma, samples=1, decisions=inputs.rows)
    return two_sided_site(site, error, known, 0)


def _mapped(moment: SecondMoment, matrix: np.ndarray) -> SecondMoment:
    """The moment of the rows D x, from that of x."""
    return SecondMoment(
        total=matrix @ moment.total, outer=matrix @ moment.outer @ matrix.T, rows=moment.rows
    )
