"""All that can be repaired in one model: ranks are chosen for its layers, and the model is made."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from onnx_utilrank.calibration.survey import survey
from onnx_utilrank.config import CompressConfig
from onnx_utilrank.job import Job
from onnx_utilrank.measurement import Gradients
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.plain import index_model
from onnx_utilrank.model.quantized import index_quantized
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.budget import allocate
from onnx_utilrank.ranking.cost import NODE_BYTES
from onnx_utilrank.repairing.branch import Branch, with_branches
from onnx_utilrank.repairing.match import Pair, match_layers, with_inputs
from onnx_utilrank.repairing.measure import Lost, Residual, measure_residuals
from onnx_utilrank.repairing.readers import read_layers
from onnx_utilrank.sites.find import find_sites
from onnx_utilrank.sites.site import Skip
from onnx_utilrank.surgery.rewrite import check_contract

__all__ = ["Choice", "Repairs", "repaired"]

# Models that are made, at most, for the file to have no more bytes than may be added.
FITS = 8
# Nodes of a branch: two products and a sum.
NODES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is done about one weight.

    Attributes:
        residual: Its error.
        rank: Of the branch; 0 where only the mean is added back; None where nothing is done.
        cost: Bytes that it adds to the file, about.
        error: Predicted loss of the model by what is left of the error.
    """

    residual: Residual
    rank: int | None
    cost: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    moves: tuple[Choice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repairs:
    """The layers of a quantized model whose error was measured.

    Attributes:
        index: The quantized model.
        lost: Their errors.
        skips: Quantized nodes that are left alone, and why.
    """

    index: GraphIndex
    lost: Lost
    skips: tuple[Skip, ...]

    @classmethod
    def measure(
        cls,
        job: Job,
        quantized: ModelStore,
        samples: Sequence[int],
        config: CompressConfig,
        gradients: Gradients | None = None,
    ) -> "Repairs":
        """Match the layers of a quantized model with its reference, and measure their errors.

        Args:
            job: The reference, with its data.
            quantized: The same model with weights quantized.
            samples: Calibration samples.
            config: How it is measured: provider, budget, cache, weighting, variations.
            gradients: What gradients of the reference are taken with, where it was measured before.

        Raises:
            ModelError: A model does not run, or a value is not finite.
        """
        index = index_quantized(quantized)
        layers, unread = read_layers(index)
        pairs, unmatched = match_layers(job.index, job.sites, index, layers)
        feed = next(job.data.feeds(samples, batch=1))
        given = {use.inputs.tensor for pair in pairs for use in pair.site.uses}
        expected = survey(job.index.store, given, feed, job.provider)
        sources = {name for pair in pairs for layer in pair.layers for name in layer.sources}
        values = survey(index.store, sources, feed, job.provider)
        pairs, unlike = with_inputs(pairs, expected, values)
        exact = [pair for pair in pairs if not pair.distance]
        pairs = [pair for pair in pairs if pair.distance]
        lost = measure_residuals(job, index, pairs, samples, config, gradients)
        return cls(
            index=index,
            lost=lost,
            skips=(
                *(*unread, *unmatched, *unlike),
                *_skipped(exact, "it holds the reference's weight without an error"),
                *_skipped(lost.unmeasured, "no output depends on it on the calibration data"),
            ),
        )

    @property
    def quantized(self) -> ModelStore:
        """The model as it was given."""
        return self.index.source

    @property
    def offers(self) -> tuple[_Offer, ...]:
        """What may be done about each weight."""
        return tuple(_Offer(moves=_choices(residual)) for residual in self.lost.residuals)

    @property
    def nothing(self) -> tuple[Choice, ...]:
        """To do nothing, at any layer."""
        return tuple(offer.moves[0] for offer in self.offers)

    def of_rank(self, rank: int) -> tuple[Choice, ...]:
        """The same rank at every layer that is predicted to gain by it; of 0, nothing at all."""
        chosen = []
        for offer in self.offers:
            nothing, *others = offer.moves
            fitting = [c for c in others if rank and c.rank is not None and c.rank <= rank]
            best = fitting[-1] if fitting else nothing
            chosen.append(best if best.error < nothing.error else nothing)
        return tuple(chosen)

    def of_bytes(self, extra: float) -> tuple[Choice, ...]:
        """The least predicted loss by what adds at most so many bytes."""
        chosen = allocate(self.offers, extra)
        assert chosen is not None  # to do nothing costs nothing
        return tuple(chosen)

    def make(self, choices: Sequence[Choice]) -> ModelStore:
        """The model with these branches; the quantized model itself where there are none.

        Raises:
            ModelError: A factor does not fit the type of its layer.
        """
        branches = [
            Branch(
                pair=c.residual.pair,
                factors=c.residual.factors(c.rank),
                lost_mean=c.residual.lost_mean(c.rank),
            )
            for c in choices
            if c.rank is not None
        ]
        made = with_branches(self.index, branches)
        if branches:
            check_contract(self.quantized, made)
        return made

    def fit(self, extra: int) -> tuple[tuple[Choice, ...], ModelStore]:
        """The best model whose file has at most so many bytes more.

        What nodes and names take is known when the file is made: where the first one is too large,
        the next ones aim lower by what was too much.

        Raises:
            ModelError: A factor does not fit the type of its layer.
        """
        aim = float(extra)
        for _ in range(FITS):
            choices = self.of_bytes(max(aim, 0.0))
            made = self.make(choices)
            excess = made.file_bytes - self.quantized.file_bytes - extra
            if excess <= 0:
                return choices, made
            aim -= excess + NODE_BYTES
        return self.nothing, self.quantized


def _skipped(pairs: Iterable[Pair], reason: str) -> Iterator[Skip]:
    """Every node of some pairs, left alone for one reason."""
    for pair in pairs:
        for layer in pair.layers:
            yield Skip(node=layer.use.label, op_type=layer.use.op_type, reason=reason)


def _choices(residual: Residual) -> tuple[Choice, ...]:
    """To do nothing, to add the mean back, and every rank at which a branch is worth having."""
    pair = residual.pair
    site, itemsize = pair.site, pair.layers[0].dtype.itemsize
    slots = {layer.use.bias.kind for layer in pair.layers}
    choices = [Choice(residual=residual, rank=None, cost=0.0, error=residual.untouched)]
    for rank in range(site.full_rank + 1):
        if rank * (site.m + site.d) >= site.parameters:
            break  # the float weight itself would be no larger
        if not rank and not slots <= {"add", "input"}:
            continue
        nodes = NODES * NODE_BYTES * len(pair.layers) if rank else 0
        numbers = rank * (site.m + site.d) + (site.m if "new" in slots and rank else 0)
        choices.append(
            Choice(
                residual=residual,
                rank=rank,
                cost=float(numbers * itemsize + nodes),
                error=residual.predicted(rank),
            )
        )
    return tuple(choices)


def repaired(
    job: Job,
    reference: ModelStore,
    quantized: ModelStore,
    samples: Sequence[int],
    config: CompressConfig,
    rank: int,
) -> ModelStore:
    """A quantized model with branches, as one stage of several: nothing is validated.

    Args:
        job: Where the data are, and what they run on.
        reference: What was quantized: the job's model, or what was made of it.
        quantized: The same with weights quantized.
        samples: Calibration samples.
        config: How it is measured.
        rank: Of the branch at each layer that is predicted to gain by it.

    Returns:
        A new model, or `quantized` itself where nothing is predicted to gain.

    Raises:
        ModelError: A model does not run, a value is not finite, or a factor does not fit its type.
    """
    index = index_model(reference)
    sites, skips = find_sites(
        index, op_types=config.op_types, include=config.include, exclude=config.exclude
    )
    own = replace(job, source=reference, index=index, sites=sites, skips=skips)
    repairs = Repairs.measure(own, quantized, samples, config)
    return repairs.make(repairs.of_rank(rank))
