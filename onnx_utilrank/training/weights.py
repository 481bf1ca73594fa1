"""The tensors that training changes, and the initializers that they come to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import onnx
import torch

from onnx_utilrank.model.graph import LAYOUT_OPS
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["Part", "Plain", "changed_names", "plain_parts", "scale_of", "trainable_names"]

# Operands that are weights, biases, norms and embeddings, by operator; None takes every place.
TRAINABLE: dict[str, tuple[int, ...] | None] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "Einsum": None,
    "Gather": (0,),
    "Add": None,
    "Mul": None,
    "Concat": None,
    "PRelu": (1,),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3, 4),
    "SkipSimplifiedLayerNormalization": (2, 3),
    "EmbedLayerNormalization": (2, 3, 4, 5, 6),
    "LSTM": (1, 2, 3, 7),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
    "BiasGelu": (1,),
    "FastGelu": (1,),
}
# Biases that may have a long axis for each direction.
BIASES = {"LSTM": (3, 7), "GRU": (3,), "RNN": (3,)}
# Of these some operands are masks.
ELEMENTWISE = ("Add", "Mul", "Concat")
# Where nothing is known of a weight's size, as of a bias of zeros: a small share of 1.
LEAST_SCALE = 1e-2
# Values beyond it are no weights: masks hold them, in the place of infinities.
LARGEST_WEIGHT = 1e4


class Part(Protocol):
    """Some tensors that are trained, and what they make."""

    @property
    def trained(self) -> Sequence[torch.Tensor]:
        """The leaves that gradients are taken of."""
        ...

    def made(self) -> dict[str, torch.Tensor]:
        """Initializers of the graph by name, with gradients."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """All there is to it, by name: the tensors themselves, which training changes."""
        ...

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become what `state` was taken of, a part of the same kind."""
        ...


@dataclass(slots=True)
class Plain:
    """An initializer that is trained as it is."""

    name: str
    tensor: torch.Tensor

    @property
    def trained(self) -> Sequence[torch.Tensor]:
        """See `Part`."""
        return (self.tensor,)

    def made(self) -> dict[str, torch.Tensor]:
        """See `Part`."""
        return {self.name: self.tensor}

    def state(self) -> dict[str, torch.Tensor]:
        """See `Part`."""
        return {"tensor": self.tensor.detach()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Part`."""
        with torch.no_grad():
            self.tensor.copy_(state["tensor"])


def trainable_names(graph: TorchGraph, kind: Literal["all", "biases"] = "all") -> list[str]:
    """Initializers that are weights, biases, norms or embeddings; what else a graph holds stays.

    A constant of one element is a factor or a limit of some function, and one with huge values, or
    an operand of sums and products elementwise with two values alone, a mask: none is trained. What
    only moves data (a Transpose of a weight, say) is looked through. Names come in the order of the
    nodes that read them.

    Args:
        graph: The model.
        kind: `biases` takes biases and norms alone: those with no more than one long axis, and
            those of recurrent layers.
    """
    reads: dict[str, bool] = {}
    biases: set[str] = set()
    operands: set[str] = set()  # of other operators than elementwise ones
    roots = {name: name for name in graph.parameters}
    for node in graph.nodes:
        if node.op_type in LAYOUT_OPS and node.input[0] in roots:
            roots |= dict.fromkeys(node.output, roots[node.input[0]])
            continue
        places = TRAINABLE.get(node.op_type, ())
        for place, given in enumerate(node.input):
            if (name := roots.get(given)) is not None:
                reads[name] = reads.get(name, True) and (places is None or place in places)
                biases |= {name} if place in BIASES.get(node.op_type, ()) else set()
                if node.op_type not in ELEMENTWISE:
                    operands.add(name)
    found = []
    for name, fits in reads.items():
        tensor = graph.parameters[name]
        vector = tensor.numel() == max(tensor.shape, default=1)
        mask = not vector and name not in operands and len(torch.unique(tensor)) == 2
        small = bool((tensor.abs() < LARGEST_WEIGHT).all())
        if fits and tensor.numel() > 1 and small and not mask:
            found += [name] if kind == "all" or vector or name in biases else []
    return found


def plain_parts(graph: TorchGraph, names: Sequence[str]) -> list[Part]:
    """Initializers that are trained as they are."""
    return [Plain(name, graph.parameters[name].detach().clone().requires_grad_()) for name in names]


def changed_names(graph: TorchGraph, reference: ModelStore) -> set[str]:
    """Initializers that the reference does not have, or has with other values."""
    held: Mapping[str, onnx.TensorProto] = {
        tensor.name: tensor for tensor in reference.proto.graph.initializer
    }
    found = set()
    for name, tensor in graph.parameters.items():
        old = held.get(name)
        if (
            old is None
            or tuple(old.dims) != tuple(tensor.shape)
            or not np.array_equal(reference.array(old).astype(np.float32), tensor.float().cpu())
        ):
            found.add(name)
    return found


def scale_of(tensor: torch.Tensor) -> float:
    """Root mean square of a tensor: what a step of training is a share of.

    Weights of one model may differ in size by orders of magnitude (a spectral front end and its
    norms, say). Adam's steps are of one size whatever the gradients are, so that they have to be
    told how large the weights are.
    """
    size = float(tensor.detach().double().square().mean().sqrt())
    return max(size, LEAST_SCALE) if tensor.dim() < 2 else size or LEAST_SCALE
