"""One model with its sites and data: the stages that every verb strings together."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_utilrank.calibration.augment import Augmentation
from onnx_utilrank.calibration.cache import Cache
from onnx_utilrank.calibration.collect import Progress, usable_batch
from onnx_utilrank.calibration.data import Dataset, DataSource, open_data
from onnx_utilrank.calibration.labels import Labels
from onnx_utilrank.calibration.survey import linear_flops, survey
from onnx_utilrank.calibration.variations import with_variations
from onnx_utilrank.comparison import compare
from onnx_utilrank.config import CalibrationConfig, CompressConfig, RunConfig, ValidateConfig
from onnx_utilrank.engine.engine import Engine
from onnx_utilrank.engine.find import find_engine
from onnx_utilrank.errors import ModelError
from onnx_utilrank.measurement import (
    Gradients,
    Measurement,
    losses_note,
    measure_moments,
    rows_notes,
    unmeasured,
    variations_note,
)
from onnx_utilrank.model.functions import inlined
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.plain import index_model
from onnx_utilrank.model.store import ModelSource, ModelStore
from onnx_utilrank.moves.moves import MOVE_KEYS
from onnx_utilrank.moves.shrink import SHRINK
from onnx_utilrank.ranking.method import MomentMethod
from onnx_utilrank.ranking.methods import find_method
from onnx_utilrank.ranking.one_sided import ONE_SIDED
from onnx_utilrank.ranking.two_sided import TWO_SIDED
from onnx_utilrank.runtime.providers import Provider, find_provider
from onnx_utilrank.runtime.sessions import Feed, open_session
from onnx_utilrank.sensitivity.effort import choose_effort, choose_variants
from onnx_utilrank.sensitivity.measure import measure_sensitivity
from onnx_utilrank.sites.find import find_sites, has_sites_in_functions
from onnx_utilrank.sites.find_hidden import find_hidden
from onnx_utilrank.sites.follow_units import values_followed
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.order import with_order
from onnx_utilrank.sites.site import Site, Skip
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.torch_graph.footprint import footprint
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.torch_graph.placement import device_beside, gradient_type
from onnx_utilrank.validation.divergence import find_losses, open_judged
from onnx_utilrank.validation.report import ValidationReport

__all__ = ["Job"]

logger = logging.getLogger(__name__)

# How often weights that are no files beside the model are in memory: as they were read, in ONNX
# Runtime and in torch.
WEIGHT_COPIES = 3
# Rows of a weight without which its loss cannot be predicted.
FEWEST_ROWS = 2
# Samples that are looked at to tell what the outputs are.
SAMPLES_LOOKED_AT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One model with its sites and data, on one provider.

    Attributes:
        source: The model as it was given.
        index: What is worked on: the source in plain form, with functions inlined where they hold
            sites.
        sites: The sites.
        skips: Nodes that are left alone.
        data: The samples.
        provider: Where it runs.
        progress: Called as work goes on.
        batch: Samples that one run may take.
        engine: Who collects statistics and decomposes.
    """

    source: ModelStore
    index: GraphIndex
    sites: tuple[Site, ...]
    skips: tuple[Skip, ...]
    data: Dataset
    provider: Provider
    progress: Progress
    batch: int
    engine: Engine

    @classmethod
    def open(
        cls,
        model: ModelSource,
        data: DataSource,
        config: CalibrationConfig,
        progress: Progress,
        *,
        labels: str | None = None,
    ) -> "Job":
        """Read the model, find its sites and open the data.

        Args:
            model: The model.
            data: The samples.
            config: Which sites count, and where the model runs.
            progress: Called as work goes on.
            labels: Array of the data that is no input: feeds hold it too (`Labels`).

        Raises:
            UtilrankError: One of its children, by what is wrong: options, model, data, provider.
        """
        found = find_provider(config.provider, config.custom_op_libraries, config.provider_options)
        engine = find_engine(config.engine, found)
        source = ModelStore.load(model)
        # What ONNX Runtime refuses ends here, before anything rests on it.
        session = open_session(source, found)
        index = index_model(inlined(source) if has_sites_in_functions(source) else source)
        sites, skips = find_sites(
            index, op_types=config.op_types, include=config.include, exclude=config.exclude
        )
        wanted = list(source.inputs)
        if labels is not None:
            wanted.append(Labels.parse(labels).spec)
        dataset = open_data(data, wanted)
        return cls(
            source=source,
            index=index,
            sites=sites,
            skips=skips,
            data=dataset,
            provider=found,
            progress=progress,
            batch=usable_batch(session, dataset),
            engine=engine,
        )

    @property
    def store(self) -> ModelStore:
        """The model that is changed: the source, but for functions that were inlined."""
        return self.index.source

    def feeds(self, samples: Sequence[int]) -> list[Feed]:
        """The samples in runs."""
        return list(self.data.feeds(samples, batch=self.batch))

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
        with self.engine:
            found = self._measured(key, sites, samples, config, hidden)
        return replace(found, engine=self.engine.use)

    def _measured(
        self,
        key: str | None,
        sites: Sequence[Site],
        samples: Sequence[int],
        config: CompressConfig,
        hidden: tuple[Hidden, ...] | None,
    ) -> Measurement:
        if key not in (None, TWO_SIDED.key):
            method = find_method(key or "")
            assert isinstance(method, MomentMethod)
            return self.measure_moments(method, sites, samples, config)
        try:
            return self._measure_gradients(sites, samples, config, hidden)
        except ModelError as e:
            if key is not None:
                raise
            reason = f"gradients cannot be had ({e}); the factors rest on one-sided statistics"
            found = self.measure_moments(ONE_SIDED, sites, samples, config)
            logger.warning("%s", reason)
            return replace(found, notes=(*found.notes, f"{reason}."))

    def _measure_gradients(
        self,
        sites: Sequence[Site],
        samples: Sequence[int],
        config: CompressConfig,
        hidden: tuple[Hidden, ...] | None,
    ) -> Measurement:
        gradients = self.gradients(samples, config)
        if hidden is None and (config.moves is None or SHRINK in config.moves):
            hidden = self._affordable(self.hidden(sites, samples), config.memory_budget)
        measured, passes = measure_sensitivity(
            gradients.graph,
            self.index,
            self._ordered(sites, samples),
            hidden or (),
            gradients.losses,
            gradients.data,
            gradients.samples,
            gradients.effort,
            moves=MOVE_KEYS if config.moves is None else config.moves,
            seed=config.seed,
            progress=self.progress,
            cache=self.cache(gradients.data, gradients.samples, config),
            engine=self.engine,
        )
        # About its own mean one row is nothing, and no change of a weight would cost anything.
        few = {m.site.key for m in measured if m.moment.rows < FEWEST_ROWS}
        seen = {m.site.key for m in measured} - few
        measured = [m for m in measured if m.site.key in seen]
        single = "the calibration data give it a single row, which tells nothing of its inputs"
        unread = "no output depends on it on the calibration data: its gradient is zero"
        skips = tuple(
            skip
            for site in sites
            if site.key not in seen
            for skip in unmeasured(site, single if site.key in few else unread)
        )
        rows = {m.site.key: (m.moment.rows, m.moment.enough_rows) for m in measured}
        return Measurement(
            method=TWO_SIDED,
            sites=list(measured),
            hidden=hidden or (),
            skips=skips,
            notes=(
                *variations_note(gradients.data),
                *rows_notes(rows, passes=passes),
                losses_note(gradients.losses),
            ),
            gradients=gradients,
        )

    def room(self, config: RunConfig) -> int:
        """Bytes that the memory budget leaves beside the weights: half of it at the least.

        With less than that passes would become so many that it helps nobody.
        """
        held = WEIGHT_COPIES * int(self.store.proto.ByteSize())
        return max(config.memory_budget - held, config.memory_budget // 2)

    def _ordered(self, sites: Sequence[Site], samples: Sequence[int]) -> list[Site]:
        """The sites, told where what they read and make counts samples."""
        single = next(self.data.feeds(samples, batch=1))
        names = {v.tensor for s in sites for use in s.uses for v in (use.inputs, use.result)}
        known = [n for n in names if n in self.index.producers or n in single]
        values = survey(self.index.store, known, single, self.provider)
        return with_order(sites, values, samples_in(single))

    def hidden(self, sites: Sequence[Site], samples: Sequence[int]) -> tuple[Hidden, ...]:
        """Features between sites that may shrink."""
        single = next(self.data.feeds(samples, batch=1))
        values = survey(self.index.store, values_followed(self.index), single, self.provider)
        return find_hidden(self.index, sites, values)

    def _affordable(self, hidden: Sequence[Hidden], budget: int) -> tuple[Hidden, ...]:
        """Those whose decompositions may be held at once: n² numbers a reader of n units."""
        held, kept = 0, []
        for each in hidden:
            need = 8 * each.size**2 * len(each.readers)
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

    def gradients(self, samples: Sequence[int], config: CompressConfig) -> Gradients:
        """Prepare gradients on some samples; ModelError where they cannot be had."""
        # Of the model as it is given: what candidates are compared with has its names.
        session = open_judged(self.source, self.provider)
        looked_at = self.feeds(self.data.first(samples, SAMPLES_LOOKED_AT))
        losses = find_losses(self.store, session, looked_at, config.weighting)
        if not losses:
            raise ModelError(f"{self.store.label}: no output holds floating values to follow")
        single = next(self.data.feeds(samples, batch=1))
        graph = TorchGraph.build(
            self.index.store,
            device=device_beside(self.provider.cuda_device),
            dtype=gradient_type(self.store),
        )
        taken = footprint(graph, single)
        shown = session.run(single, [loss.output for loss in losses])
        decisions = sum(o.rows(shown[o.output], 1).shape[1] for o in losses)
        room = self.room(config)
        if taken.kept > room:
            raise ModelError(
                f"{self.store.label}: the values of one sample take {taken.kept:,} bytes with "
                f"gradients, more than the {room:,} that the memory budget leaves beside weights"
            )
        flops = linear_flops(self.store, single, self.provider)
        variants = choose_variants(len(samples), flops) if config.augment else 1
        padding = next((loss.padding for loss in losses if loss.padding), None)
        data, samples = with_variations(
            self.data, samples, Augmentation.of(looked_at, padding), variants, config.seed
        )
        effort = choose_effort(
            samples=len(samples),
            flops=flops,
            decisions=decisions,
            footprint=taken,
            batch=self.batch,
            budget=room,
            run=self.data.run or 1,
        )
        return Gradients(
            graph=graph, losses=losses, effort=effort, footprint=taken, data=data, samples=samples
        )

    def measure_moments(
        self,
        method: MomentMethod,
        sites: Sequence[Site],
        samples: Sequence[int],
        config: CalibrationConfig,
    ) -> Measurement:
        """Decompose every site by what taps in the graph say of the rows on its sides.

        Args:
            method: The method.
            sites: The sites.
            samples: Calibration samples.
            config: Options.

        Raises:
            ModelError: The model does not run, or a value is not finite.
        """
        return measure_moments(
            method,
            self.index,
            sites,
            self.data,
            samples,
            self.provider,
            batch=self.batch,
            memory_budget=self.room(config),
            progress=self.progress,
            cache=self.cache(self.data, samples, config),
            engine=self.engine,
        )

    def cache(self, data: Dataset, samples: Sequence[int], config: CalibrationConfig) -> Cache:
        """Where statistics of some samples are kept."""
        folder = None if config.cache is None else Path(config.cache)
        libraries = self.provider.custom_op_libraries
        return Cache.open(folder, self.store, data, samples, libraries=libraries)

    def validate(
        self, candidate: ModelStore, samples: Sequence[int], *, timed: int | None = None
    ) -> ValidationReport:
        """Compare with the source on the given samples, timed so many of them a run."""
        self.progress("validating", 0, 0)
        config = ValidateConfig(providers=(self.provider.key,))
        return compare(
            self.source,
            candidate,
            self.data,
            samples,
            self.batch,
            [self.provider],
            config,
            timed=timed,
        )
