"""Run the model forwards and backwards, and hand out the rows of every use of a weight."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch

from onnx_utilrank.errors import ModelError
from onnx_utilrank.moves.two_convs import Split
from onnx_utilrank.sensitivity.draws import Draw
from onnx_utilrank.sensitivity.rows import as_rows, split_rows
from onnx_utilrank.sites.site import Use
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["Drawn", "GradientPass", "Splits", "UseRows"]

# What is drawn for a run: of each loss that depends on the uses, its place among all, the numbers
# that its value has, and their type.
Drawn: TypeAlias = tuple[tuple[int, int, torch.dtype], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UseRows:
    """One use in one run.

    Attributes:
        inputs: The value that holds x, as the graph has it.
        outputs: The node's output as rows [samples, positions, m].
        gradients: For each draw, its gradient with respect to W x, [samples, positions, m].
        decisions: Rows of the model's outputs that directions were drawn for.
        inner: Of a Conv that may become two, by key of the move: what the first reads, as rows
            [samples, positions, features], and for each draw the gradient there.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    gradients: tuple[torch.Tensor, ...]
    decisions: int
    inner: Mapping[str, tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """A Conv that may become two.

    Attributes:
        kernel: Its weight, float32 [m, C, …].
        moves: What the two see, by key of the move.
    """

    kernel: np.ndarray
    moves: Mapping[str, Split]


class GradientPass:
    """Gradients of random directions at the outputs with respect to the output of every use.

    Attributes:
        graph: The model in torch.
        uses: The uses.
        draws: How many directions are drawn for each run.
        dropped: Samples of a run whose gradients were not finite and do not count, at most.
    """

    def __init__(
        self,
        graph: TorchGraph,
        uses: Sequence[Use],
        losses: Sequence[OutputLoss],
        *,
        draws: int,
        smooth: bool,
        seed: int,
        splits: Mapping[int, Splits] | None = None,
    ) -> None:
        """Prepare the passes.

        Args:
            graph: The model in torch.
            uses: The uses.
            losses: What counts at the outputs.
            draws: Directions for each run.
            smooth: See `Draw`.
            seed: Of the directions.
            splits: By node, of Convs that may become two.
        """
        self._splits = splits or {}
        self.dropped = 0
        self.graph = graph
        self.uses = tuple(uses)
        self.draws = draws
        self._smooth = smooth
        self._heads = [Draw(graph.store, loss) for loss in losses]
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def state(self) -> np.ndarray:
        """What the next draws depend on, uint8."""
        return self._generator.get_state().numpy()

    def restore(self, state: np.ndarray) -> None:
        """Draw as from where `state` was taken.

        Raises:
            RuntimeError: It is no such state.
        """
        self._generator.set_state(torch.from_numpy(state.copy()))

    def drawn(self, feed: Mapping[str, np.ndarray]) -> Drawn:
        """What `rows` draws for a feed.

        Raises:
            ModelError: A node cannot be computed.
        """
        held = self._forward(feed)
        return tuple(
            (k, held[h.value].numel(), held[h.value].dtype)
            for k, h in enumerate(self._heads)
            if h.value in held and held[h.value].requires_grad
        )

    def skip(self, drawn: Drawn) -> None:
        """Go on as if `rows` had been called on a feed of which this is drawn."""
        for _ in range(self.draws):
            for k, numbers, dtype in drawn:
                self._heads[k].skip(numbers, dtype, self._generator, smooth=self._smooth)

    def rows(self, feed: Mapping[str, np.ndarray], samples: int) -> Iterator[tuple[Use, UseRows]]:
        """Run one feed; give each use that the outputs depend on, with its rows and gradients.

        Raises:
            ModelError: A node cannot be computed.
        """
        held = self._forward(feed)
        # An output may be a constant or an input of the graph, which nothing computes.
        heads = [h for h in self._heads if h.value in held and held[h.value].requires_grad]
        made = list(dict.fromkeys(u.result.tensor for u in self.uses if u.result.tensor in held))
        gradients: dict[str, list[torch.Tensor]] = {name: [] for name in made}
        decisions = 0
        for k in range(self.draws if heads else 0):
            drawn = [
                h(held[h.value], feed, samples, self._generator, smooth=self._smooth) for h in heads
            ]
            decisions = sum(count for _, count in drawn)
            try:
                found = torch.autograd.grad(
                    [held[h.value] for h in heads],
                    [held[name] for name in made],
                    [v for v, _ in drawn],
                    retain_graph=k + 1 < self.draws,
                    allow_unused=True,
                )
            except RuntimeError as e:  # NotImplementedError is one
                reason = " ".join(str(e).split())
                raise ModelError(f"{self.graph.store.label}: no gradients: {reason}") from e
            for name, gradient in zip(made, found, strict=True):
                if gradient is not None:
                    gradients[name].append(self._finite(gradient, samples))
        for use in self.uses:
            of_use = gradients.get(use.result.tensor)
            if not of_use:
                continue
            rows = UseRows(
                inputs=held[use.inputs.tensor].detach(),
                outputs=as_rows(held[use.result.tensor].detach(), use.result, samples),
                gradients=tuple(use.gain * as_rows(g, use.result, samples) for g in of_use),
                decisions=decisions,
                inner=self._inner(use, held, of_use, samples),
            )
            yield use, rows

    def _finite(self, gradient: torch.Tensor, samples: int) -> torch.Tensor:
        """The gradient, zero at samples where it is not finite: a root of zero, say."""
        if torch.isfinite(gradient.sum()):  # one cheap pass, and what is not finite shows in it
            return gradient
        first = samples if gradient.ndim and gradient.shape[0] % samples == 0 else 1
        bad = ~torch.isfinite(gradient.reshape(first, -1)).all(1)
        if not bad.any():
            return gradient
        self.dropped = max(self.dropped, int(bad.sum()))
        kept = gradient.reshape(first, -1).masked_fill(bad[:, None], 0.0)
        return kept.reshape(gradient.shape)

    def _inner(
        self,
        use: Use,
        held: Mapping[str, torch.Tensor],
        gradients: Sequence[torch.Tensor],
        samples: int,
    ) -> dict[str, tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
        found = self._splits.get(use.node)
        if found is None:
            return {}
        x = held[use.inputs.tensor].detach()
        kernel = torch.from_numpy(found.kernel).to(x)
        return {
            move: split_rows(x, gradients, kernel, split, samples)
            for move, split in found.moves.items()
        }

    def _forward(self, feed: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The values that rows and gradients are taken of, the outputs of uses with gradients."""
        made = {use.result.tensor for use in self.uses}
        wanted = made | {use.inputs.tensor for use in self.uses}
        wanted |= {head.value for head in self._heads}
        held: dict[str, torch.Tensor] = {}

        def visit(name: str, value: torch.Tensor) -> torch.Tensor:
            if name in made and not value.requires_grad:
                value = value.detach().requires_grad_()
            if name in wanted:
                held[name] = value
            return value

        with torch.enable_grad():
            self.graph.run(feed, visit=visit)
        return held
