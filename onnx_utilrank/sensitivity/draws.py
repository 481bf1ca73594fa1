"""Random directions at the outputs whose back-propagation gives label-free Fisher information."""

from collections.abc import Mapping

import numpy as np
import torch

from onnx_utilrank.model.heads import softmax_head
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.statistics.divergence import OutputLoss

__all__ = ["Draw"]


class Draw:
    """Draws v with E[v v^T] = the Hessian of an output's loss where nothing is changed yet.

    For `softmax` v = √p∘ε − p (√p^T ε) with ε ~ N(0, I) has the covariance diag(p) − p p^T, the
    Fisher information of the logits (Martens, "New insights and perspectives on the natural
    gradient method", JMLR 21(146), 2020, section 9). For `values` v ~ N(0, I / variance), over
    their scales if they have any; for `logits` the same, less its mean over the classes. The loss
    of a sample is the mean over its positions, so that v is divided by the root of their number;
    padding gets none.

    Attributes:
        loss: The loss.
        value: Name of the value that v belongs to: the logits where the output is a softmax.
        axis: Where its classes or features lie.
    """

    def __init__(self, store: ModelStore, loss: OutputLoss) -> None:
        self.loss = loss
        head = softmax_head(store, loss.output) if loss.probabilities else None
        self.value = head.logits if head else loss.output
        self.axis = head.axis if head else loss.axis

    def __call__(
        self,
        z: torch.Tensor,
        feed: Mapping[str, np.ndarray],
        samples: int,
        generator: torch.Generator,
        *,
        smooth: bool,
    ) -> tuple[torch.Tensor, int]:
        """v for a value z, and for how many rows of z it was drawn.

        Args:
            z: The value.
            feed: The graph inputs, among them the padding mask.
            samples: Samples in the run.
            generator: Source of ε.
            smooth: For `softmax`, mix in as much of what `logits` would draw. The Fisher
                information alone hangs on the few samples that the model is unsure of; with the
                mixture every sample has a say, and the factors it leads to are better on samples
                held back.
        """
        z = z.detach()
        lined = z.movedim(self.axis, -1) if z.ndim > 1 else z
        turned = self.loss.positions_first and z.ndim > 2
        if turned:
            lined = lined.transpose(0, 1)
        width = lined.shape[-1] if z.ndim else 1
        first = samples if z.ndim > 1 and lined.shape[0] % samples == 0 else 1
        rows = lined.reshape(first, -1, width)
        noise = self._noise(rows, generator)
        if self.loss.weighting == "softmax":
            p = rows.softmax(-1)
            v = p.sqrt() * noise
            v = v - p * v.sum(-1, keepdim=True)
            if smooth:
                other = self._noise(rows, generator)
                other = other - other.mean(-1, keepdim=True)
                v = (v + other * (self.loss.sharpness / max(width - 1, 1)) ** 0.5) / 2**0.5
        else:
            v = noise / self.loss.variance**0.5
            if self.loss.scales is not None:
                v = v / torch.tensor(self.loss.scales, dtype=v.dtype, device=v.device)
            if self.loss.weighting == "logits":
                v = v - v.mean(-1, keepdim=True)
        weights = torch.ones(rows.shape[:2], dtype=z.dtype, device=z.device)
        kept = self.loss.padding.kept(feed) if self.loss.padding else None
        if kept is not None and kept.size == weights.numel():
            weights = torch.from_numpy(kept).reshape(weights.shape).to(weights)
        share = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        v = (v * share.sqrt()[..., None]).reshape(lined.shape)
        if turned:
            v = v.transpose(0, 1)
        return v.movedim(-1, self.axis) if z.ndim > 1 else v, int(weights.sum())

    def skip(
        self, numbers: int, dtype: torch.dtype, generator: torch.Generator, *, smooth: bool
    ) -> None:
        """Draw what a call draws for a value of so many numbers, for nobody."""
        for _ in range(2 if smooth and self.loss.weighting == "softmax" else 1):
            torch.randn(numbers, generator=generator, dtype=dtype)

    @staticmethod
    def _noise(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        # Drawn on the CPU, so that every device gets the same.
        return torch.randn(rows.shape, generator=generator, dtype=rows.dtype).to(rows.device)
