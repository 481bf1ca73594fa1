"""One way of data: a model's calibration samples by number, wherever they come from."""

import bisect
import itertools
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from onnx_utilrank.calibration.own_code import import_function, importable, names_function
from onnx_utilrank.calibration.readers import (
    Block,
    Feeds,
    fixed_batch,
    read_arrays,
    read_path,
    read_samples,
)
from onnx_utilrank.calibration.split import HELD_MOST, UNNAMED, counted, hold_back
from onnx_utilrank.errors import ConfigError, DataError
from onnx_utilrank.model.store import TensorSpec

__all__ = [
    "DYNAMIC_BATCH",
    "DataSource",
    "Dataset",
    "SampleReader",
    "open_data",
]

logger = logging.getLogger(__name__)

# Rows of one run where the model leaves the number open.
DYNAMIC_BATCH = 32

# One run: the blocks that it takes rows of, in order, with the numbers of the rows.
_Run: TypeAlias = list[tuple[Block, list[int]]]


class SampleReader(Protocol):
    """What is used of `onnxruntime.quantization.CalibrationDataReader`."""

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        """The next feed; None after the last."""


Samples: TypeAlias = SampleReader | Iterable[Mapping[str, np.ndarray]] | Mapping[str, np.ndarray]

# Where samples may come from; `open_data` says what each form means.
DataSource: TypeAlias = str | os.PathLike[str] | Samples | Callable[[], Samples]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """Samples of a model's inputs, addressable by number, checked against the model.

    Attributes:
        label: How messages name it: a path, 'module:function', or 'calibration data'.
        run: Samples that one run of the model takes: its fixed batch where samples are rows, 1
            where they are whole feeds; None where the model takes any number of rows.
        blocks: The samples themselves, in order.
        variants: How many there are of each sample that was given: itself, and variations of it.
            Where there are any, what stems from the same samples is one block.
    """

    label: str
    run: int | None
    blocks: tuple[Block, ...] = field(repr=False)
    variants: int = 1

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    def feeds(
        self, samples: Sequence[int], *, batch: int = DYNAMIC_BATCH
    ) -> Iterator[dict[str, np.ndarray]]:
        """Feeds that run over the given samples, in the order given.

        Arrays are views of the data where the rows of a run are neighbours; do not write to them.

        Args:
            samples: Numbers of the samples. Rows of different shape never share a run.
            batch: Rows of a run where the model takes any number; the last run may be shorter.

        Returns:
            An iterator of feeds, each an array [rows, ...] an input by name. Where the model fixes
            the number of rows, those that do not fill a run are dropped with a warning.

        Raises:
            ConfigError: `batch` is not positive.
            DataError: The samples do not fill one run of the model's fixed batch.
            IndexError: There is no sample of such a number.
        """
        runs, dropped = self._plan(samples, batch)
        if dropped:
            logger.warning(
                "%s: %s dropped, for they fill no run of %d", self.label, counted(dropped), self.run
            )
        return map(_take, runs)

    def first(self, samples: Sequence[int], count: int) -> Sequence[int]:
        """The first of the samples, in whole runs: about so many, and one run at least."""
        run = self.run or 1
        return samples[: max(count // run, 1) * run]

    def shuffled(
        self, samples: Sequence[int], *, batch: int = DYNAMIC_BATCH, seed: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """Feeds over the samples in an order that the seed alone decides; see `feeds`.

        Rows of one shape come together in a run however the samples lie.
        """
        chance = random.Random(seed)
        order = chance.sample(list(samples), len(samples))
        starts = list(itertools.accumulate(map(len, self.blocks), initial=0))
        kinds: list[Block] = []

        def kind(sample: int) -> int:
            block = self.blocks[bisect.bisect_right(starts, sample) - 1]
            for k, known in enumerate(kinds):
                if _share_run(known, block):
                    return k
            kinds.append(block)
            return len(kinds) - 1

        runs, _ = self._plan(sorted(order, key=kind), batch)
        chance.shuffle(runs)
        return map(_take, runs)

    def count_feeds(self, samples: Sequence[int], *, batch: int = DYNAMIC_BATCH) -> int:
        """How many feeds `feeds` gives for the same arguments, and raises as it does."""
        runs, _ = self._plan(samples, batch)
        return len(runs)

    def apart(self, samples: Sequence[int]) -> list[list[int]]:
        """Cut samples, in order, into parts that may be told apart.

        What is learned from one part says nothing of what another one holds: none cuts a run of
        the model, nor what stems from the same samples.
        """
        if len(self.given(samples)) == len(samples):
            run = self.run or 1
            return [list(samples[k : k + run]) for k in range(0, len(samples), run)]
        starts = list(itertools.accumulate(map(len, self.blocks), initial=0))
        blocks = itertools.groupby(samples, lambda s: bisect.bisect_right(starts, s))
        return [list(part) for _, part in blocks]

    def given(self, samples: Sequence[int]) -> list[int]:
        """Those of the samples that are no variations."""
        if self.variants == 1:
            return list(samples)
        starts = list(itertools.accumulate(map(len, self.blocks), initial=0))

        def is_given(sample: int) -> bool:
            number = bisect.bisect_right(starts, sample) - 1
            return sample - starts[number] < len(self.blocks[number]) // self.variants

        return [sample for sample in samples if is_given(sample)]

    def split(
        self, *, samples: int | None = None, seed: int = 0, most: int = HELD_MOST
    ) -> tuple[list[int], list[int]]:
        """Choose samples to calibrate and to validate with; see `hold_back`.

        Where the model fixes its batch, both parts are whole runs.
        """
        run = self.run or 1
        return hold_back(
            len(self), samples=samples, seed=seed, run=run, label=self.label, most=most
        )

    def _plan(self, samples: Sequence[int], batch: int) -> tuple[list[_Run], int]:
        """Cut samples into runs; also count those that fill no run of a fixed batch."""
        if batch < 1:
            raise ConfigError(f"batch: {batch} is not a positive number of rows")
        starts = list(itertools.accumulate(map(len, self.blocks), initial=0))
        runs: list[_Run] = []
        room = 0  # rows that the last run still takes
        for sample in samples:
            if not 0 <= sample < starts[-1]:
                raise IndexError(f"{self.label}: no sample {sample} among {starts[-1]}")
            number = bisect.bisect_right(starts, sample) - 1
            block = self.blocks[number]
            if not room or not _share_run(runs[-1][-1][0], block):
                runs.append([])
                room = self.run or batch
            if not runs[-1] or runs[-1][-1][0] is not block:
                runs[-1].append((block, []))
            runs[-1][-1][1].append(sample - starts[number])
            room -= 1
        if self.run is None:
            return runs, 0
        full = [run for run in runs if sum(len(rows) for _, rows in run) == self.run]
        dropped = len(samples) - len(full) * self.run
        if dropped and not full:
            raise DataError(f"{self.label}: {counted(dropped)} fill no run of {self.run}")
        return full, dropped


def open_data(source: DataSource, inputs: Sequence[TensorSpec]) -> Dataset:
    """Open calibration data and check all of it against the model's inputs.

    Args:
        source: One of

            - a `.npz` file, or a mapping of arrays by name: an array a model input, with samples
              along the first axis. Arrays of the input's own rank are rows, which are split to the
              model's batch; where any has one rank more, each item is a whole feed. A rank-0 array
              for a rank-0 input is the same for all samples.
            - a folder of `.npz` files, in natural order (2 before 10), each as above; or of `.npy`
              files: one an input, named after it, or for a model of one input any number, which
              hold rows, whole feeds (one rank more) or single samples (one rank less).
            - a folder of `test_data_set_*/input_k.pb`, the ONNX test layout: a feed a set.
            - 'package.module:function', imported with the current folder on the path; or any
              callable. Called without arguments, it gives one of the forms that are not paths.
            - an iterable of dicts, or a `CalibrationDataReader`: a whole feed each. What can be
              read only once is read into memory.
        inputs: The model's inputs.

    Returns:
        The samples. Arrays that the model has no input for are passed over with a warning.

    Raises:
        DataError: The data are missing, unreadable, pickled or empty, or they do not fit the model
            in names, element types, ranks, fixed dimensions or finiteness. What the user's own
            code raises when it is called is not caught.
    """
    label = str(source) if isinstance(source, str | os.PathLike) else UNNAMED
    if not inputs:
        raise DataError(f"{label}: the model has no inputs to give data for")
    if isinstance(source, str) and names_function(source):
        # The function may import what lies beside it as late as in its last sample.
        with importable(Path.cwd()):
            blocks = [_read_memory(label, import_function(source)(), inputs)]
    elif isinstance(source, str | os.PathLike):
        blocks = read_path(Path(source), inputs)
    elif callable(source) and not _is_data(source):
        blocks = [_read_memory(label, source(), inputs)]
    else:
        blocks = [_read_memory(label, source, inputs)]
    blocks = [block for block in blocks if len(block)]
    if not blocks:
        raise DataError(f"{label}: holds no samples")
    whole = [isinstance(block, Feeds) for block in blocks]
    if any(whole) and not all(whole):
        raise DataError(
            f"{label}: some files hold rows and others, of one rank more, whole feeds; use one form"
        )
    dataset = Dataset(
        label=label, run=1 if all(whole) else fixed_batch(label, inputs), blocks=tuple(blocks)
    )
    if dataset.run and len(dataset) < dataset.run:
        raise DataError(
            f"{label}: holds {counted(len(dataset))}; one run of the model takes {dataset.run}"
        )
    return dataset


def _read_memory(label: str, data: object, inputs: Sequence[TensorSpec]) -> Block:
    if isinstance(data, Mapping):
        return read_arrays(label, data, inputs)
    get_next = getattr(data, "get_next", None)
    if get_next is not None:
        return read_samples(label, iter(get_next, None), inputs)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes):
        return read_samples(label, data, inputs)
    raise DataError(
        f"{label}: got {type(data).__name__}; wanted dicts of arrays, a CalibrationDataReader or "
        "a mapping of stacked arrays"
    )


def _is_data(source: object) -> bool:
    """Whether an object is data, though it can be called too; a class is not, its objects are."""
    return not isinstance(source, type) and (
        isinstance(source, Iterable) or hasattr(source, "get_next")
    )


def _share_run(one: Block, other: Block) -> bool:
    """Whether rows of both blocks can go into one feed: their shapes and constants agree."""
    if one is other or isinstance(one, Feeds) or isinstance(other, Feeds):
        return one is other
    return (
        one.arrays.keys() == other.arrays.keys()
        and all(a.shape[1:] == other.arrays[name].shape[1:] for name, a in one.arrays.items())
        and all(bool(c == other.constants[name]) for name, c in one.constants.items())
    )


def _take(run: _Run) -> dict[str, np.ndarray]:
    """The feed of a run. Only blocks that share their constants share a run."""
    first, *rest = [block.take(rows) for block, rows in run]
    if not rest:
        return first
    return {
        name: np.concatenate([array, *(part[name] for part in rest)]) if array.ndim else array
        for name, array in first.items()
    }
