"""One model with its sites and data: the stages that every verb strings together."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from onnx import TensorProto

from onnx_utilrank.calibration.collect import Collected, Progress, collect, usable_batch
from onnx_utilrank.calibration.data import Dataset, DataSource, open_data
from onnx_utilrank.calibration.survey import linear_flops, survey
from onnx_utilrank.config import CompressConfig, SiteFilter, ValidateConfig
from onnx_utilrank.errors import ModelError
from onnx_utilrank.measurement import Gradients, Measurement, losses_note, rows_notes
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelSource, ModelStore, TensorSpec
from onnx_utilrank.moves.channels import CHANNELS
from onnx_utilrank.moves.shrink import SHRINK
from onnx_utilrank.ranking.cost import Ledger, Unit, bias_cost, count_parameters
from onnx_utilrank.ranking.method import Method, MomentMethod, site_moment, use_view
from onnx_utilrank.ranking.methods import find_method
from onnx_utilrank.ranking.one_sided import ONE_SIDED
from onnx_utilrank.ranking.two_sided import TWO_SIDED
from onnx_utilrank.runtime.providers import Provider, find_provider
from onnx_utilrank.runtime.sessions import Feed, open_session
from onnx_utilrank.sensitivity.effort import choose_effort
from onnx_utilrank.sensitivity.measure import measure_sensitivity
from onnx_utilrank.sites.find import find_sites, site_matrix
from onnx_utilrank.sites.find_hidden import find_hidden
from onnx_utilrank.sites.follow_units import values_followed
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Side, Site, Skip
from onnx_utilrank.statistics.divergence import rows_of
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.tokens import TokenCounts
from onnx_utilrank.torch_graph.footprint import footprint
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.validation.divergence import find_losses
from onnx_utilrank.validation.report import ModelFigures, ValidationReport
from onnx_utilrank.validation.report import validate as compare_models

__all__ = ["Job", "chosen_samples", "compare"]

logger = logging.getLogger(__name__)

# Samples that are looked at to tell what the outputs are.
SAMPLES_LOOKED_AT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One model with its sites and data, on one provider."""

    index: GraphIndex
    sites: tuple[Site, ...]
    skips: tuple[Skip, ...]
    data: Dataset
    provider: Provider
    progress: Progress
    _batch: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        model: ModelSource,
        data: DataSource,
        config: SiteFilter,
        provider: str,
        progress: Progress,
        *,
        labels: str | None = None,
    ) -> "Job":
        """Read the model, find its sites and open the data.

        Args:
            model: The model.
            data: The samples.
            config: Which sites count.
            provider: Key of the execution provider.
            progress: Called as work goes on.
            labels: Array of the data, int64 [samples], that is no input: feeds hold it too.

        Raises:
            UtilrankError: One of its children, by what is wrong: options, model, data, provider.
        """
        found = find_provider(provider)
        store = ModelStore.load(model)
        index = GraphIndex.build(store)
        sites, skips = find_sites(
            index, op_types=config.op_types, include=config.include, exclude=config.exclude
        )
        wanted = list(store.inputs)
        if labels is not None:
            wanted.append(TensorSpec(name=labels, dtype=np.dtype(np.int64), shape=(None,)))
        return cls(
            index=index,
            sites=sites,
            skips=skips,
            data=open_data(data, wanted),
            provider=found,
            progress=progress,
        )

    @property
    def store(self) -> ModelStore:
        """The model."""
        return self.index.store

    def batch(self, samples: Sequence[int]) -> int:
        """Samples that one run may take."""
        if "batch" not in self._batch:
            self._batch["batch"] = usable_batch(self.index, self.data, samples, self.provider)
        return self._batch["batch"]

    def feeds(self, samples: Sequence[int]) -> list[Feed]:
        """The samples in runs."""
        return list(self.data.feeds(samples, batch=self.batch(samples)))

    def collect(self, method: Method, sites: Sequence[Site], samples: Sequence[int]) -> Collected:
        """Moments of every tensor that the method wants to know of."""
        sides = [(site, method.side(site)) for site in sites]
        views = [use_view(use, side) for site, side in sides if side for use in site.uses]
        return collect(
            self.index,
            views,
            self.data,
            samples,
            self.provider,
            batch=self.batch(samples),
            progress=self.progress,
        )

    def measure(
        self,
        key: str | None,
        sites: Sequence[Site],
        samples: Sequence[int],
        config: CompressConfig,
        hidden: tuple[Hidden, ...] | None = None,
    ) -> Measurement:
        """Decompose every site by a method; None takes the best that the model allows.

        Args:
            key: The method.
            sites: The sites.
            samples: Calibration samples.
            config: Options.
            hidden: Features that are to shrink, as a plan says; None looks for all that may.

        Raises:
            ModelError: The model does not run, or cannot be run in torch though the method that
                was asked for needs gradients.
        """
        if key not in (None, TWO_SIDED.key):
            method = find_method(key or "")
            assert isinstance(method, MomentMethod)
            return self._measure_moments(method, sites, samples)
        try:
            return self._measure_gradients(sites, samples, config, hidden)
        except ModelError as e:
            if key is not None:
                raise
            reason = f"gradients cannot be had ({e}); the factors rest on one-sided statistics"
            logger.warning("%s", reason)
            found = self._measure_moments(ONE_SIDED, sites, samples)
            return Measurement(
                method=found.method, sites=found.sites, notes=(*found.notes, f"{reason}.")
            )

    def _measure_gradients(
        self,
        sites: Sequence[Site],
        samples: Sequence[int],
        config: CompressConfig,
        hidden: tuple[Hidden, ...] | None,
    ) -> Measurement:
        gradients = self._gradients(samples, config)
        if hidden is None and (config.moves is None or SHRINK in config.moves):
            hidden = self._affordable(self.hidden(sites, samples), config.memory_budget)
        measured = measure_sensitivity(
            gradients.graph,
            self.index,
            sites,
            hidden or (),
            gradients.losses,
            self.data,
            samples,
            gradients.effort,
            channels=config.moves is None or CHANNELS.key in config.moves,
            seed=config.seed,
            progress=self.progress,
        )
        seen = {m.site.key for m in measured}
        skips = tuple(
            Skip(
                node=use.label,
                op_type=site.op_type,
                reason="no output depends on it on the calibration data: its gradient is zero",
            )
            for site in sites
            if site.key not in seen
            for use in site.uses
        )
        rows = {m.site.key: (m.moment.rows, m.moment.enough_rows) for m in measured}
        return Measurement(
            method=TWO_SIDED,
            sites=list(measured),
            hidden=hidden or (),
            skips=skips,
            notes=(*rows_notes(rows), losses_note(gradients.losses)),
            gradients=gradients,
        )

    def hidden(self, sites: Sequence[Site], samples: Sequence[int]) -> tuple[Hidden, ...]:
        """Features between sites that may shrink."""
        single = next(self.data.feeds(samples, batch=1))
        values = survey(self.store, values_followed(self.index), single, self.provider)
        return find_hidden(self.index, sites, values)

    def _affordable(self, hidden: Sequence[Hidden], budget: int) -> tuple[Hidden, ...]:
        """Those whose decompositions may be held at once; of n units one takes n² numbers."""
        held, kept = 0, []
        for each in hidden:
            need = 8 * each.size**2 if each.units else 0
            if held + need <= budget // 4:
                held += need
                kept.append(each)
        if len(kept) < len(hidden):
            logger.warning(
                "%s: the memory budget leaves no room to look at the hidden units of %d layers",
                self.store.label,
                len(hidden) - len(kept),
            )
        return tuple(kept)

    def _gradients(self, samples: Sequence[int], config: CompressConfig) -> Gradients:
        session = open_session(self.store, self.provider)
        looked_at = self.feeds(samples[: max(SAMPLES_LOOKED_AT, self.data.run or 1)])
        losses = find_losses(self.store, session, looked_at, config.weighting)
        if not losses:
            raise ModelError(f"{self.store.label}: no output holds floating values to follow")
        single = next(self.data.feeds(samples, batch=1))
        graph = TorchGraph.build(
            self.store, device=_device(self.provider), dtype=_gradient_type(self.store)
        )
        taken = footprint(graph, single)
        shown = session.run(single, [loss.output for loss in losses])
        decisions = sum(rows_of(shown[o.output], 1, o.axis).shape[1] for o in losses)
        room = config.memory_budget
        if taken.kept > room:
            raise ModelError(
                f"{self.store.label}: the values of one sample take {taken.kept:,} bytes with "
                f"gradients, more than the memory budget of {room:,}"
            )
        effort = choose_effort(
            samples=len(samples),
            flops=linear_flops(self.store, single, self.provider),
            decisions=decisions,
            footprint=taken,
            batch=self.batch(samples),
            budget=room,
            run=self.data.run or 1,
        )
        return Gradients(graph=graph, losses=losses, effort=effort, footprint=taken)

    def _measure_moments(
        self, method: MomentMethod, sites: Sequence[Site], samples: Sequence[int]
    ) -> Measurement:
        collected = self.collect(method, sites, samples)
        found = []
        for k, site in enumerate(sites):
            self.progress("decomposing", k, len(sites))
            side = method.side(site)
            moment, weight = None, site_matrix(self.index, site)
            if side:
                moment = self.moment(site, side, collected, weight)
            found.append(method.measure(site, weight, moment, bias_cost(self.index, site)))
        self.progress("decomposing", len(sites), len(sites))
        rows = {
            m.site.key: (m.moment.rows, m.moment.enough_rows) for m in found if m.moment is not None
        }
        return Measurement(method=method, sites=found, notes=rows_notes(rows, collected))

    def moment(
        self, site: Site, side: Side, collected: Collected, weight: np.ndarray
    ) -> SecondMoment:
        """The moment of x, or of W x, over all uses of a site; of a table that of W x."""
        if not site.one_hot:
            return site_moment(site, side, collected.moments, self.own_biases(site))
        tokens = (collected.tokens[use.inputs] for use in site.uses)
        return sum(tokens, TokenCounts.zero(site.d)).moment(weight)

    def own_biases(self, site: Site) -> dict[int, np.ndarray]:
        """What the nodes themselves add to W x; an Add behind a node is not part of it."""
        return {
            use.node: use.bias.values(self.index, site.m)
            if use.bias.kind == "input"
            else np.zeros(site.m)
            for use in site.uses
        }

    def ledger(self, unit: Unit, sites: Sequence[Site], samples: Sequence[int]) -> Ledger:
        """What the model and its sites cost in a unit."""
        single = next(self.data.feeds(samples, batch=1))
        names = {use.result.tensor for site in sites for use in site.uses}
        sizes = {n: v.size for n, v in survey(self.store, names, single, self.provider).items()}
        rows = {s.key: sum(sizes[u.result.tensor] for u in s.uses) / s.m for s in sites}
        if unit == "parameters":
            total = float(count_parameters(self.store))
        elif unit == "bytes":
            total = float(self.store.file_bytes)
        else:
            total = linear_flops(self.store, single, self.provider) / 2
        return Ledger(unit=unit, total=total, rows=rows)

    def validate(self, candidate: ModelStore, samples: Sequence[int]) -> ValidationReport:
        """Compare with the source on the given samples."""
        self.progress("validating", 0, 0)
        config = ValidateConfig(providers=(self.provider.key,))
        return compare(
            self.store, candidate, self.data, samples, self.batch(samples), [self.provider], config
        )


def compare(
    reference: ModelStore,
    candidate: ModelStore,
    data: Dataset,
    samples: Sequence[int],
    batch: int,
    providers: Sequence[Provider],
    config: ValidateConfig,
) -> ValidationReport:
    """Compare two models on the given samples of a data set."""
    single = next(data.feeds(samples, batch=1))
    feeds = list(data.feeds(samples, batch=batch))
    return compare_models(
        reference,
        candidate,
        feeds,
        samples=len(samples),
        providers=providers,
        figures=(
            _figures(reference, single, providers[0]),
            _figures(candidate, single, providers[0]),
        ),
        max_error=config.max_error,
        min_agreement=config.min_agreement,
    )


def _figures(store: ModelStore, feed: Feed, provider: Provider) -> ModelFigures:
    return ModelFigures(
        parameters=count_parameters(store),
        file_bytes=store.file_bytes,
        flops=linear_flops(store, feed, provider),
    )


def chosen_samples(data: Dataset, samples: int | None, seed: int) -> list[int]:
    """All samples, or so many of them chosen at random, in order."""
    n = len(data)
    if samples is None or samples >= n:
        return list(range(n))
    return sorted(random.Random(seed).sample(range(n), samples))


def _gradient_type(store: ModelStore) -> torch.dtype | None:
    """Float32 for models in half precision, whose gradients and sums would leave its range."""
    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return torch.float32 if any(t.data_type in half for t in store.tensors()) else None


def _device(provider: Provider) -> str:
    """Where torch runs: beside the execution provider, if this build of torch can."""
    return "cuda" if provider.key != "cpu" and torch.cuda.is_available() else "cpu"
