"""What others do, stated as methods of this package, so that all are planned and made alike.

All of them leave biases alone, store two factors a weight, and give every weight the same share of
its elements (`UniformRatio`) or the same score (`GreedySvd`). A share of `ratio` is the rank
r = floor(ratio · m·d / (m + d)), and 1 where that is 0; a weight stays dense where no rank saves.

- `WHITENED_SVD`: Wang et al., "SVD-LLM", arXiv 2403.07378: the SVD of W M^{1/2}, M = E[x x^T].
- `ACTIVATION_SVD`: Yuan et al., "ASVD", arXiv 2312.05821: the SVD of W diag(s), with s from the
  magnitudes of the inputs. Its search for a ratio a layer is not part of this.
- `GREEDY_SVD`: the weight SVD of AIMET (Siddegowda et al., arXiv 2201.08442), which gives each
  layer the ratio that costs the model as much as any other layer's ratio does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import TargetMissedError
from onnx_utilrank.job import Job
from onnx_utilrank.measurement import Measurement
from onnx_utilrank.ranking.method import Choice, Measured, Move
from onnx_utilrank.ranking.plain_svd import PlainSvdSite
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sites.find import site_matrix
from onnx_utilrank.sites.site import Side, Site
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.statistics.factorize import Decomposition, plain_svd
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.surgery.rewrite import Replacement, rewrite
from onnx_utilrank.validation.divergence import OutputRecorder

__all__ = [
    "ACTIVATION_SVD",
    "GREEDY_SVD",
    "WHITENED_SVD",
    "GreedySite",
    "GreedySvd",
    "UniformRatio",
    "activation_svd",
    "measure_greedy",
    "measure_rival",
    "ratio_at",
    "whitened_svd",
]

BISECTIONS = 60

# ASVD's exponent α of the magnitudes.
ALPHA = 0.5

# Ratios that AIMET's search tries at each layer; its own default is 0.1, 0.2 … 0.9.
CANDIDATES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
# Samples that it measures each of them on.
GREEDY_SAMPLES = 32
# Stands for the divergence of outputs that are not finite, which no interpolation can take.
WORST = 1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedySite(PlainSvdSite):
    """One weight with what the model loses when it alone is cut.

    Attributes:
        lost: Divergence of the outputs at each of `CANDIDATES`, [len(CANDIDATES)], non-increasing;
            empty where no rank saves.
    """

    lost: np.ndarray


def _projections(scaled: np.ndarray) -> Decomposition:
    """The SVD U S V^T of W A for an invertible A.

    Its truncation times A^{-1} is U_r U_r^T W, so that A^{-1} is never needed, and a singular A is
    no worry.
    """
    u, s, _ = np.linalg.svd(scaled, full_matrices=False)
    spectrum = s * s
    errors = np.append(np.cumsum(spectrum[::-1])[::-1], 0.0)
    return Decomposition(expand=u, reduce=u.T, errors=errors, energy=float(spectrum.sum()))


def whitened_svd(weight: np.ndarray, moment: SecondMoment) -> Decomposition:
    """SVD-LLM: the least E‖(W − Ŵ) x‖² of every rank, by the SVD of W M^{1/2}.

    Args:
        weight: W [m, d].
        moment: Of the inputs, [d]; uncentred, and not shrunk however few its rows are.
    """
    values, vectors = np.linalg.eigh(moment.uncentred)
    return _projections((weight @ vectors) * np.sqrt(np.maximum(values, 0.0)))


def activation_svd(weight: np.ndarray, moment: SecondMoment) -> Decomposition:
    """ASVD: the SVD of W diag(s), s = (E x²)^{α/2}.

    The paper takes s = (E|x|)^α. Second moments do not hold E|x|; the root of E x² takes its place,
    which is proportional to it where the inputs are distributed alike up to their scale.

    Args:
        weight: W [m, d].
        moment: Of the inputs, [d].
    """
    return _projections(weight * np.maximum(np.diag(moment.uncentred), 0.0) ** (ALPHA / 2))


def _at_ratio(choice: Choice, ratio: float) -> Move:
    """The move that leaves a weight this share of its elements; dense where it saves nothing."""
    site = choice.measured.site
    dense = next(m for m in choice.moves if m.rank is None)
    if ratio >= 1:
        return dense
    share = ratio * site.m * site.d / (site.m + site.d)
    rank = max(1, math.floor(share + 1e-9))
    move = next((m for m in choice.moves if m.rank == rank), dense)
    return move if move.cost < dense.cost else dense


def _spent(moves: Sequence[Move]) -> float:
    return sum(m.cost for m in moves)


class UniformRatio:
    """A decomposition from the moments of the inputs, cut to the same ratio at each weight."""

    moves: tuple[str, ...] | None = ("low-rank",)

    def __init__(
        self, key: str, decompose: Callable[[np.ndarray, SecondMoment], Decomposition]
    ) -> None:
        self.key = key
        self.decompose = decompose

    def side(self, site: Site) -> Side:
        """The inputs."""
        del site
        return "inputs"

    def measure(
        self, site: Site, weight: np.ndarray, moment: SecondMoment | None, bias_cost: int
    ) -> PlainSvdSite:
        """See `MomentMethod.measure`."""
        del bias_cost
        assert moment is not None
        return PlainSvdSite(site=site, moment=moment, found=self.decompose(weight, moment))

    def allocate(self, choices: Sequence[Choice], budget: float) -> list[Move] | None:
        """The largest ratio, the same at each weight, that fits the budget."""
        taken = [_at_ratio(choice, 1.0) for choice in choices]
        if _spent(taken) <= budget:
            return taken
        taken = [_at_ratio(choice, 0.0) for choice in choices]
        if _spent(taken) > budget:
            return None
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            ratio = (low + high) / 2
            moves = [_at_ratio(choice, ratio) for choice in choices]
            if _spent(moves) <= budget:
                low, taken = ratio, moves
            else:
                high = ratio
        return taken


WHITENED_SVD = UniformRatio("whitened-svd", whitened_svd)
ACTIVATION_SVD = UniformRatio("asvd", activation_svd)


def _layers(job: Job) -> list[Site]:
    """The sites but for tables of embeddings, which these methods know nothing of."""
    return [site for site in job.sites if not site.one_hot]


def measure_rival(job: Job, rival: UniformRatio, samples: Sequence[int]) -> Measurement:
    """Decompose every site by a method of one ratio."""
    return job.measure_moments(rival, _layers(job), samples, CompressConfig())


def ratio_at(lost: np.ndarray, allowed: float) -> float:
    """The least ratio at which a weight alone costs the model no more than `allowed`.

    Straight lines join the candidates. (AIMET takes the next candidate itself; its steps of 0.1
    are finer than ours.) Where the largest costs more, the weight stays as it is, as in AIMET:
    that is no limit of larger ratios, for the rank that just saves nothing is far below full.

    Args:
        lost: Divergence at each of `CANDIDATES`, non-increasing.
        allowed: At least 0.
    """
    ratios, curve = (*CANDIDATES, 1.0), (*map(float, lost), 0.0)
    k = next(k for k, value in enumerate(curve) if value <= allowed)
    if k in (0, len(CANDIDATES)):
        return ratios[k]
    share = (allowed - curve[k]) / (curve[k - 1] - curve[k])
    return ratios[k] - share * (ratios[k] - ratios[k - 1])


class GreedySvd:
    """Plain SVD, at ratios that each cost the model the same when they are made alone."""

    key = "greedy-svd"
    moves: tuple[str, ...] | None = ("low-rank",)

    def side(self, site: Site) -> Side | None:
        """No moments."""
        del site
        return None

    def allocate(self, choices: Sequence[Choice], budget: float) -> list[Move]:
        """The least divergence, the same for each weight, whose ratios fit the budget.

        Raises:
            TargetMissedError: The least candidates together take more.
        """

        def at(allowed: float) -> list[Move]:
            return [_at_divergence(choice, allowed) for choice in choices]

        taken = at(0.0)
        if _spent(taken) <= budget:
            return taken
        worst = max((float(s.lost[0]) for c in choices if len((s := _greedy(c)).lost)), default=0.0)
        taken = at(worst)
        if _spent(taken) > budget:
            raise TargetMissedError(
                f"cannot be reached with each weight at {CANDIDATES[0]:g} of its elements, the "
                "least ratio that was tried"
            )
        # Divergences are bisected by their order of magnitude.
        low, high = 1e-15, max(worst, 1e-15)
        for _ in range(BISECTIONS):
            allowed = math.sqrt(low * high)
            moves = at(allowed)
            if _spent(moves) <= budget:
                high, taken = allowed, moves
            else:
                low = allowed
        return taken


def _greedy(choice: Choice) -> GreedySite:
    assert isinstance(choice.measured, GreedySite)
    return choice.measured


def _at_divergence(choice: Choice, allowed: float) -> Move:
    lost = _greedy(choice).lost
    return _at_ratio(choice, ratio_at(lost, allowed) if len(lost) else 1.0)


GREEDY_SVD = GreedySvd()


def measure_greedy(job: Job, losses: Sequence[OutputLoss], samples: Sequence[int]) -> Measurement:
    """Cut each weight alone to each of `CANDIDATES`, and measure what the outputs lose.

    AIMET asks its user for an evaluation; the divergence from the original's outputs on the first
    `GREEDY_SAMPLES` calibration samples takes its place, as no method here is given labels.
    """
    few = samples[: max(GREEDY_SAMPLES, job.data.run or 1)]
    recorder = OutputRecorder(open_session(job.store, job.provider), losses, job.feeds(few))
    sites: list[Measured] = []
    layers = _layers(job)
    for k, site in enumerate(layers):
        job.progress("cutting each weight alone", k, len(layers))
        weight = site_matrix(job.index, site)
        found = plain_svd(weight)
        lost = np.array(_lost_alone(job, recorder, site, weight, found))
        # A smaller ratio costs no less: the curve is made monotonic from the large ratios down.
        lost = np.maximum.accumulate(lost[::-1])[::-1]
        sites.append(GreedySite(site=site, moment=None, found=found, lost=lost))
    return Measurement(method=GREEDY_SVD, sites=sites)


def _lost_alone(
    job: Job, recorder: OutputRecorder, site: Site, weight: np.ndarray, found: Decomposition
) -> list[float]:
    if not site.freed or site.break_even_rank < 1:
        return []
    by_rank: dict[int, float] = {}
    lost = []
    for ratio in CANDIDATES:
        rank = max(1, math.floor(ratio * site.m * site.d / (site.m + site.d) + 1e-9))
        if rank not in by_rank:
            factors = found.factors(weight, rank)
            cut = rewrite(job.index, [Replacement(site=site, factors=factors, lost_mean=None)])
            mean = recorder.compare(open_session(cut, job.provider)).mean
            by_rank[rank] = min(max(mean, 0.0), WORST)
        lost.append(by_rank[rank])
    return lost
