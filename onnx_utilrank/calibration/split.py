"""Which samples calibrate, which ones judge, and which are held back until the end."""

import logging
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnx_utilrank.errors import ConfigError, DataError

if TYPE_CHECKING:
    from onnx_utilrank.calibration.data import Dataset

__all__ = [
    "HELD_MOST",
    "JUDGED_MOST",
    "SEARCHED",
    "UNNAMED",
    "chosen_samples",
    "counted",
    "hold_back",
    "parted",
]

logger = logging.getLogger(__name__)

# What samples are for where a target of quality is searched for.
SEARCHED = "to calibrate with, to search on and to validate"

# How messages name data that have no name of their own.
UNNAMED = "calibration data"

# A share of the samples is held back for validation, but never more than this many: beyond it the
# comparison gets slower, and a divergence hardly sharper. A target is searched for and judged on
# more where there are more: accuracy hangs on the few samples whose answer changes.
_HELD_SHARE = 5
HELD_MOST, JUDGED_MOST = 256, 1024


def hold_back(
    n: int,
    *,
    samples: int | None,
    seed: int,
    run: int = 1,
    label: str = UNNAMED,
    most: int = HELD_MOST,
) -> tuple[list[int], list[int]]:
    """Choose samples at random and hold a fifth of them back for validation.

    Args:
        n: Number of samples there are.
        samples: Number of samples to use at most; None for all.
        seed: What the choice depends on, and nothing else.
        run: Samples that one run of the model takes: both parts are multiples of it.
        label: How messages name the data.
        most: Samples to hold back at most.

    Returns:
        Numbers of the samples to calibrate with and of those held back (1 to `most` of them, or as
        many more as fill a run): sorted, disjoint, together min(`samples`, `n`) less what fills
        no run.

    Raises:
        DataError: There are too few for one run of each kind.
        ConfigError: `samples` is too small for that.
    """
    needed = "two are" if run == 1 else f"{2 * run} are"
    one = "one" if run == 1 else f"a run of {run}"
    why = f"{needed} needed, {one} to calibrate and one held back to validate"
    if n < 2 * run:
        raise DataError(f"{label}: holds {counted(n)}; {why}")
    if samples is not None and samples < 2 * run:
        raise ConfigError(f"samples: {samples} is too few; {why}")
    used = n if samples is None else min(samples, n)
    left = used % run
    if left:
        logger.warning("%s: %s left out, for they fill no run of %d", label, counted(left), run)
    chosen = random.Random(seed).sample(range(n), used - left)
    held = min(max(len(chosen) // _HELD_SHARE, 1), most)
    held = -(-held // run) * run
    return sorted(chosen[held:]), sorted(chosen[:held])


def parted(
    data: "Dataset", samples: Sequence[int], seed: int, uses: str, most: int = HELD_MOST
) -> tuple[list[int], list[int]]:
    """Part what is not held back: a fifth of it judges what is fitted to the rest (`hold_back`).

    Args:
        data: All samples.
        samples: Numbers of those that are not held back.
        seed: What the choice depends on, and nothing else.
        uses: What the three parts are for, as messages say it.
        most: Samples to judge on at most.

    Returns:
        Numbers of the samples to fit to, and of those to judge on.

    Raises:
        DataError: There are too few.
    """
    run = data.run or 1
    if len(samples) < 2 * run:
        raise DataError(f"{data.label}: holds {counted(len(data))}; {3 * run} are needed, {uses}")
    fitted, judged = hold_back(
        len(samples), samples=None, seed=seed, run=run, label=data.label, most=most
    )
    return [samples[k] for k in fitted], [samples[k] for k in judged]


def chosen_samples(data: "Dataset", samples: int | None, seed: int) -> list[int]:
    """All samples, or so many of them chosen at random, in order."""
    n = len(data)
    if samples is None or samples >= n:
        return list(range(n))
    return sorted(random.Random(seed).sample(range(n), samples))


def counted(samples: int) -> str:
    """So many samples, in words."""
    return f"{samples} sample{'' if samples == 1 else 's'}"
