"""What a model makes of samples whose right classes are known."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from onnx_utilrank.runtime.sessions import Feed, Session
from onnx_utilrank.statistics.divergence import samples_in
from onnx_utilrank.training.objective import Objective
from onnx_utilrank.training.student import Student

__all__ = ["LabelledSamples"]


class LabelledSamples:
    """Samples that nothing is trained on, with what is wanted of a model there."""

    def __init__(
        self, objective: Objective, feeds: Sequence[Feed], original: Session | None = None
    ) -> None:
        """Prepare.

        Args:
            objective: With labels. What counts between blocks does not count here.
            feeds: The samples, labels among them.
            original: Whose outputs count too; None where labels alone do.
        """
        self._objective = replace(objective, blocks={})
        self._feeds = tuple(feeds)
        wanted = self._objective.wanted
        self._wanted = [original.run(feed, wanted) if original else {} for feed in self._feeds]

    def loss(self, model: Session | Student) -> float:
        """Mean over the samples of what training makes small.

        Raises:
            DataError: The output has no row of scores for each label.
            ModelError: A node cannot be computed.
        """
        total = count = 0.0
        for feed, wanted in zip(self._feeds, self._wanted, strict=True):
            made = model.run(feed, self._objective.values)
            # In float16 a small probability would be 0, and its logarithm infinite.
            tensors = {k: torch.from_numpy(np.array(v, np.float64)) for k, v in made.items()}
            n = samples_in(feed)
            total += n * float(self._objective(feed, tensors, wanted))
            count += n
        return total / count

    def accuracy(self, session: Session) -> float:
        """Share of the labels that a model is right on, in per cent."""
        labels, classes = self._objective.labels, self._objective.classes
        assert labels is not None
        assert classes is not None
        return labels.answers(session, classes, self._feeds).accuracy
