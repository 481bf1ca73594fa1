"""What models are timed on: each batch size with each combination of lengths."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.benchmarking.config import BenchmarkConfig
from onnx_utilrank.benchmarking.synthetic import looked_up_rows, synthetic_feed
from onnx_utilrank.calibration.data import Dataset, DataSource, open_data
from onnx_utilrank.calibration.readers import Feeds
from onnx_utilrank.calibration.split import chosen_samples
from onnx_utilrank.errors import ConfigError, DataError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore, TensorSpec
from onnx_utilrank.runtime.sessions import Feed

__all__ = ["Inputs", "cases_of_data", "free_axes", "synthetic_cases"]

# Feeds of data that a case goes round over; more of them take memory and tell no more.
MOST_FEEDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What one case runs on.

    Attributes:
        batch: Samples of a run; None where the data hold whole runs of any size.
        dims: Lengths that were given to other free axes.
        feeds: The runs.
        single: A run of one sample, or of the fewest that the model takes.
    """

    batch: int | None
    dims: tuple[tuple[str, int], ...] = ()
    feeds: tuple[Feed, ...]
    single: Feed


def cases_of_data(
    model: ModelStore, data: DataSource, config: BenchmarkConfig
) -> tuple[list[Inputs], list[str]]:
    """One case for each batch size, and sentences on what a reader has to know of them.

    Samples are taken again where there are fewer than a run takes.

    Raises:
        ConfigError: Lengths are given, which data have of their own.
        DataError: The data do not fit the model, or hold no run of a size.
    """
    if config.dims:
        raise ConfigError("lengths of axes are for inputs that are generated: data have their own")
    dataset = open_data(data, model.inputs)
    samples = chosen_samples(dataset, config.samples, config.seed)
    if any(isinstance(block, Feeds) for block in dataset.blocks):
        feeds = tuple(itertools.islice(dataset.feeds(samples), MOST_FEEDS))
        note = "The data hold whole runs: batch sizes are theirs."
        return [Inputs(batch=None, feeds=feeds, single=feeds[0])], [note]
    batches, notes = _batches(config, dataset.run)
    single = next(dataset.feeds(list(itertools.islice(itertools.cycle(samples), dataset.run or 1))))
    return [
        Inputs(batch=b, feeds=_runs(dataset, samples, b), single=single) for b in batches
    ], notes


def _runs(dataset: Dataset, samples: Sequence[int], batch: int) -> tuple[Feed, ...]:
    runs = min(-(-len(samples) // batch), MOST_FEEDS)
    numbers = list(itertools.islice(itertools.cycle(samples), runs * batch))
    feeds = [f for f in dataset.feeds(numbers, batch=batch) if _rows(f) == batch]
    if not feeds:
        raise DataError(f"{dataset.label}: no {batch} samples of one shape come in a row")
    return tuple(feeds)


def _rows(feed: Feed) -> int:
    return next((len(a) for a in feed.values() if np.ndim(a)), 1)


def synthetic_cases(model: ModelStore, config: BenchmarkConfig) -> tuple[list[Inputs], list[str]]:
    """One case for each batch size and combination of lengths, of inputs that are generated.

    The first axis of an input, where it is free, is the batch; so is any of the same name. Other
    free axes need a length: by their name, or 'INPUT.AXIS' where they have none.

    Returns:
        The cases, and sentences on what a reader has to know of them.

    Raises:
        ConfigError: A length is given to what is no free axis, or none to one that is.
        DataError: An input has no known rank, or is of a type that cannot be made up.
    """
    free = free_axes(model)
    unknown = [name for name in config.dims if name not in free]
    if unknown:
        has = ", ".join(map(repr, free)) or "none"
        raise ConfigError(f"{model.label}: no free axis {unknown[0]!r}; its free axes are: {has}")
    batch_axes = {name for name, is_batch in free.items() if is_batch and name not in config.dims}
    missing = [name for name in free if name not in config.dims and name not in batch_axes]
    if missing:
        raise ConfigError(
            f"{model.label}: lengths of free axes are not known: {', '.join(map(repr, missing))}; "
            f"give them, as in {' '.join(f'--dim {name}=64' for name in missing)}, or data"
        )
    fixed = None if batch_axes else _fixed_batch(model)
    batches, notes = _batches(config, fixed)
    rows = looked_up_rows(GraphIndex.build(model))
    cases = []
    for lengths in itertools.product(*config.dims.values()):
        dims = dict(zip(config.dims, lengths, strict=True))
        runs = {
            batch: synthetic_feed(
                model, _shapes(model, dims | dict.fromkeys(batch_axes, batch)), rows, config.seed
            )
            for batch in (fixed or 1, *batches)
        }
        cases += [
            Inputs(
                batch=batch,
                dims=tuple(dims.items()),
                feeds=(runs[batch],),
                single=runs[fixed or 1],
            )
            for batch in batches
        ]
    return cases, [*notes, _synthetic_note(config, rows)]


def _batches(config: BenchmarkConfig, fixed: int | None) -> tuple[list[int], list[str]]:
    """Batch sizes that can be run, and which cannot."""
    wanted = list(dict.fromkeys(config.batches))
    if fixed is None or wanted == [fixed]:
        return wanted, []
    others = ", ".join(str(b) for b in wanted if b != fixed)
    return [fixed], [f"The batch is fixed at {fixed} by the model; not run: {others}."]


def free_axes(model: ModelStore) -> dict[str, bool]:
    """Names of all free axes of a model's inputs, and whether they are the batch.

    Raises:
        DataError: An input has no known rank.
    """
    free: dict[str, bool] = {}
    for spec in model.inputs:
        if spec.shape is None:
            raise DataError(f"{model.label}: input {spec} has no known rank; data are needed")
        for axis, dim in enumerate(spec.shape):
            if not isinstance(dim, int):
                name = _axis_name(spec, axis)
                free[name] = free.get(name, False) or axis == 0
    return free


def _fixed_batch(model: ModelStore) -> int:
    """The first axis of the first input that has one."""
    sizes = (s.shape[0] for s in model.inputs if s.shape)
    return next((size for size in sizes if isinstance(size, int)), 1)


def _axis_name(spec: TensorSpec, axis: int) -> str:
    dim = spec.shape[axis] if spec.shape else None
    return dim if isinstance(dim, str) else f"{spec.name}.{axis}"


def _shapes(model: ModelStore, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs with these lengths of their free axes."""
    return {
        spec.name: tuple(
            dim if isinstance(dim, int) else lengths[_axis_name(spec, axis)]
            for axis, dim in enumerate(spec.shape or ())
        )
        for spec in model.inputs
    }


def _synthetic_note(config: BenchmarkConfig, rows: Mapping[str, int]) -> str:
    bounds = "".join(
        f"; {name!r} is below {n}, the rows that it looks up" for name, n in rows.items()
    )
    return (
        f"Inputs are synthetic (seed {config.seed}): floats are standard normal, integers and "
        f"booleans 1{bounds}."
    )
