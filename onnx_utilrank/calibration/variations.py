"""More samples to calibrate with: each one that there is, with variations of it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnx_utilrank.calibration.augment import Augmentation
from onnx_utilrank.calibration.data import Dataset
from onnx_utilrank.calibration.readers import Feeds, Rows
from onnx_utilrank.statistics.spill import spilled

__all__ = ["with_variations"]

# Samples that are varied, and mixed, among themselves. What stems from them is in one part
# wherever samples are told apart, so that there should be few; and as many parts at least.
TOGETHER = 4


def with_variations(
    data: Dataset, samples: Sequence[int], augmentation: Augmentation, variants: int, seed: int
) -> tuple[Dataset, Sequence[int]]:
    """A data set of the given samples, each with variations of it.

    Samples that are whole feeds are left as they are: what their axes mean is not known. So are
    texts, which with other tokens in them are no longer what the model is used for, and features
    of which none is like its neighbours.

    Args:
        data: The samples.
        samples: Their numbers.
        augmentation: What may be done to them; maybe nothing.
        variants: How many there are to be of each, itself counted.
        seed: Of all choices.

    Returns:
        Another data set, of which each block is a few samples and all that stems from them, and
        the numbers of all of its samples. Where nothing can be varied, both are as given.
    """
    whole = any(isinstance(block, Feeds) for block in data.blocks)
    moved = any(augmentation.moved.values())
    if variants < 2 or whole or augmentation.tokens or not moved:
        return data, samples
    # Rows of a model that takes one at once can be mixed, too.
    rows = replace(data, run=None) if data.run == 1 else data
    together = max(1, min(TOGETHER, len(samples) // TOGETHER))
    blocks = []
    for k, feed in enumerate(rows.feeds(samples, batch=together)):
        made = [feed]
        for variant in range(1, variants):
            chance = np.random.SeedSequence([seed, k, variant])
            made.append(augmentation(feed, int(chance.generate_state(1)[0])))
        blocks.append(
            Rows(
                arrays={
                    name: spilled(np.concatenate([m[name] for m in made]))
                    for name, value in feed.items()
                    if value.ndim
                },
                constants={name: value for name, value in feed.items() if not value.ndim},
            )
        )
    varied = replace(data, blocks=tuple(blocks), variants=variants)
    return varied, range(len(varied))
