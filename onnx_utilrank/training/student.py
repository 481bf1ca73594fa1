"""A graph whose weights are trained."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from onnx_utilrank.runtime.sessions import Feed
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.training.subspaces import Subspace
from onnx_utilrank.training.weights import Part

__all__ = ["Student"]


class Student:
    """A graph in torch with some of its initializers made of what is trained.

    Attributes:
        graph: The model.
        parts: What is trained.
        mixed: Whether products are computed in bfloat16, which only accelerators do fast.
    """

    def __init__(self, graph: TorchGraph, parts: Sequence[Part], *, mixed: bool = False) -> None:
        self.graph = graph
        self.parts = list(parts)
        self.mixed = mixed

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(t.numel() for part in self.parts for t in part.trained)

    @property
    def rank(self) -> int:
        """Sum of the ranks of the weights that are in bases."""
        return sum(part.rank for part in self.parts if isinstance(part, Subspace))

    def parameters(self) -> dict[str, torch.Tensor]:
        """What takes the place of initializers, with gradients."""
        return {name: value for part in self.parts for name, value in part.made().items()}

    def forward(self, feed: Feed, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The named values of one run, with gradients.

        Raises:
            ModelError: A node cannot be computed.
        """
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.mixed):
            made = self.graph.run(feed, names, parameters=self.parameters())
        return {name: value.float() if self.mixed else value for name, value in made.items()}

    def run(self, feed: Feed, outputs: Sequence[str]) -> Mapping[str, np.ndarray]:
        """The named values of one run as arrays: a `validation.divergence.Model`.

        Raises:
            ModelError: A node cannot be computed.
        """
        with torch.no_grad():
            return {k: v.cpu().numpy() for k, v in self.forward(feed, outputs).items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """The initializers as they are now."""
        with torch.no_grad():
            return {name: value.cpu().numpy() for name, value in self.parameters().items()}
