"""What training makes small: the divergence from the original's outputs, and the user's labels."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.nn import functional

from onnx_utilrank.calibration.labels import IGNORED, Labels
from onnx_utilrank.runtime.sessions import Feed
from onnx_utilrank.statistics.divergence import OutputLoss, samples_in

__all__ = ["Objective", "output_divergence"]

# What labels count beside the original's outputs.
LABEL_WEIGHT = 0.5
# What the values between blocks count beside the outputs.
BLOCK_WEIGHT = 0.1
# What probabilities are cut off at, as logarithms need it.
_LEAST = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A loss of the values that a graph makes.

    Attributes:
        losses: What counts of the original's outputs; empty where there is no original.
        blocks: Values between blocks that are to be as in the original, with the variance of each.
        labels: The right classes, if they count.
        classes: The output that those are classes of.
    """

    losses: tuple[OutputLoss, ...] = ()
    blocks: Mapping[str, float] = field(default_factory=dict)
    labels: Labels | None = None
    classes: OutputLoss | None = None

    @property
    def wanted(self) -> tuple[str, ...]:
        """What has to be known of the original, by name."""
        return tuple(dict.fromkeys((*(loss.output for loss in self.losses), *self.blocks)))

    @property
    def values(self) -> tuple[str, ...]:
        """What has to be known of the graph that is trained."""
        own = [self.classes.output] if self.classes else []
        return tuple(dict.fromkeys((*self.wanted, *own)))

    def __call__(
        self,
        feed: Feed,
        made: Mapping[str, torch.Tensor],
        wanted: Mapping[str, np.ndarray],
    ) -> torch.Tensor:
        """The loss of one run, a scalar with gradients.

        Args:
            feed: The run.
            made: The graph's `values`.
            wanted: The original's.

        Raises:
            DataError: The output has no row of scores for each label.
        """
        total: list[torch.Tensor] = []
        n = samples_in(feed)
        for loss in self.losses:
            y = made[loss.output]
            target = torch.from_numpy(np.array(wanted[loss.output])).to(y)
            kept = loss.padding.kept(feed) if loss.padding else None
            total.append(output_divergence(loss, target, y, n, kept))
            if loss.weighting == "values" and 1 < y.dim() < 4 and y.shape[-1] > 1:
                total.append(_turned_away(replace(loss, axis=-1), target, y, n, kept))
        for name, variance in self.blocks.items():
            target = torch.from_numpy(np.array(wanted[name])).to(made[name])
            lost = (made[name] - target).square().mean() / variance
            total.append(BLOCK_WEIGHT * lost / len(self.blocks))
        if self.labels is not None and self.classes is not None:
            weight = LABEL_WEIGHT if self.losses else 1.0
            total.append(weight * self._of_labels(feed, made[self.classes.output]))
        return torch.stack(total).sum()

    def _of_labels(self, feed: Feed, y: torch.Tensor) -> torch.Tensor:
        """Cross entropy; of an output with positions, all of them are of their sample's class."""
        assert self.classes is not None
        assert self.labels is not None
        labels = torch.from_numpy(self.labels.of(feed, self.classes)).to(y.device)
        log_p = _log_probabilities(self.classes, _rows(y, samples_in(feed), self.classes))
        each = self.labels.per_position(feed, tuple(log_p.shape))
        log_p = log_p.flatten(0, 1) if each else log_p.mean(1)
        # Of nothing that counts the mean would be none.
        count = (labels != IGNORED).sum().clamp_min(1)
        lost = functional.nll_loss(log_p, labels, ignore_index=IGNORED, reduction="sum")
        return lost / count


def output_divergence(
    loss: OutputLoss,
    expected: torch.Tensor,
    actual: torch.Tensor,
    samples: int,
    kept: np.ndarray | None = None,
) -> torch.Tensor:
    """Mean divergence over samples; `statistics.divergence.divergence` with gradients.

    Args:
        loss: What counts.
        expected: The original's output.
        actual: The trained graph's.
        samples: Samples in the run.
        kept: Positions [samples, positions] that count; None where all do.
    """
    y, z = (_rows(v, samples, loss) for v in (expected, actual))
    if loss.weighting == "softmax":
        log_p, log_q = _log_probabilities(loss, y), _log_probabilities(loss, z)
        each = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        if loss.weighting == "logits":
            y, z = (_centred(_log_probabilities(loss, v)) for v in (y, z))
        if loss.scales is not None:
            y, z = (v / torch.tensor(loss.scales, dtype=v.dtype, device=v.device) for v in (y, z))
        each = (z - y).square().sum(-1) / (2 * loss.variance)
    return _mean(each, kept)


def _turned_away(
    loss: OutputLoss,
    expected: torch.Tensor,
    actual: torch.Tensor,
    samples: int,
    kept: np.ndarray | None,
) -> torch.Tensor:
    """1 − cos of the angle between vectors such as embeddings, which are compared by that."""
    y, z = (_rows(v, samples, loss) for v in (expected, actual))
    return _mean(1 - functional.cosine_similarity(y, z, dim=-1), kept)


def _mean(each: torch.Tensor, kept: np.ndarray | None) -> torch.Tensor:
    """Mean over samples of what each position [samples, positions] that counts lost."""
    if kept is None or kept.size != each.numel():
        return each.mean()
    weights = torch.from_numpy(np.asarray(kept)).to(each).reshape(each.shape)
    return ((each * weights).sum(1) / weights.sum(1).clamp_min(1)).mean()


def _rows(values: torch.Tensor, samples: int, loss: OutputLoss) -> torch.Tensor:
    """[samples, positions, features], as `OutputLoss.rows` has them."""
    if values.dim() == 0:
        return values.reshape(1, 1, 1)
    if values.dim() == 1 and len(values) == samples:
        return values.reshape(samples, 1, 1)
    moved = values.movedim(loss.axis, -1)
    if loss.positions_first and moved.dim() > 2:
        moved = moved.transpose(0, 1)
    first = samples if moved.dim() > 1 and len(moved) % samples == 0 else 1
    return moved.reshape(first, -1, moved.shape[-1])


def _log_probabilities(loss: OutputLoss, y: torch.Tensor) -> torch.Tensor:
    return torch.log(y.clamp_min(_LEAST)) if loss.probabilities else torch.log_softmax(y, -1)


def _centred(z: torch.Tensor) -> torch.Tensor:
    return z - z.mean(-1, keepdim=True)
