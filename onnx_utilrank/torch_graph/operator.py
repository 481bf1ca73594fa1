"""What an operator of the torch executor is, and what it is told about the node it computes."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from onnx_utilrank.torch_graph.tensors import torch_type

__all__ = ["Body", "Context", "Operator", "Result", "Table", "ints", "plain", "same_device"]

# What an operator gives: its one output, or all of them in the order of the ONNX specification.
# Outputs that it leaves out because nobody asked for them are None.
Result: TypeAlias = torch.Tensor | Sequence[torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Body:
    """A subgraph bound to the values around it.

    Attributes:
        run: Takes its inputs and gives its outputs.
        empty: Gives no tensors of the k-th output, stacked: a tensor of length 0.
    """

    run: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
    empty: Callable[[int], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What an operator knows besides its inputs.

    Attributes:
        attributes: The node's attributes; strings are decoded, tensors are torch tensors.
        opset: Version of the operator set that the node's domain is imported in.
        outputs: For each output of the node, whether it has a name, that is, is wanted.
        device: Where floating tensors live.
        dtype: The one floating type of everything; None where each tensor keeps its own.
        bodies: The node's subgraphs by attribute.
    """

    attributes: Mapping[str, object]
    opset: int
    outputs: tuple[bool, ...]
    device: torch.device
    dtype: torch.dtype | None
    bodies: Mapping[str, Body] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the node states this attribute."""
        return name in self.attributes

    def integer(self, name: str, default: int = 0) -> int:
        """An attribute of type INT."""
        value = self.attributes.get(name, default)
        assert isinstance(value, int)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """An attribute of type INT that says yes or no."""
        return bool(self.integer(name, int(default)))

    def number(self, name: str, default: float) -> float:
        """An attribute of type FLOAT."""
        value = self.attributes.get(name, default)
        assert isinstance(value, float | int)
        return float(value)

    def text(self, name: str, default: str) -> str:
        """An attribute of type STRING."""
        return str(self.attributes.get(name, default))

    def integers(self, name: str) -> list[int] | None:
        """An attribute of type INTS; None where it is not stated."""
        value = self.attributes.get(name)
        return None if value is None else [int(v) for v in self._several(value)]

    def numbers(self, name: str) -> list[float] | None:
        """An attribute of type FLOATS; None where it is not stated."""
        value = self.attributes.get(name)
        return None if value is None else [float(v) for v in self._several(value)]

    def texts(self, name: str) -> list[str] | None:
        """An attribute of type STRINGS; None where it is not stated."""
        value = self.attributes.get(name)
        return None if value is None else [str(v) for v in self._several(value)]

    def tensor(self, name: str) -> torch.Tensor | None:
        """An attribute of type TENSOR; None where it is not stated."""
        value = self.attributes.get(name)
        assert value is None or isinstance(value, torch.Tensor)
        return value

    def wants(self, k: int) -> bool:
        """Whether anybody may read the k-th output."""
        return k < len(self.outputs) and self.outputs[k]

    def torch_type(self, kind: int) -> torch.dtype:
        """The torch type of an ONNX element type, in the one floating type where there is one."""
        given = torch_type(kind)
        return self.dtype if self.dtype and given.is_floating_point else given

    @staticmethod
    def _several(value: object) -> Iterable[str | int | float]:
        assert isinstance(value, Sequence)
        return value


@dataclass(frozen=True, slots=True)
class Operator:
    """One entry of a table of operators.

    Attributes:
        function: Takes the context and the node's inputs, None where an optional one is missing.
        host: Inputs that the function reads as Python numbers, such as shapes: they stay where
            they are when the others are brought to one device.
    """

    function: Callable[..., Result]
    host: Container[int] = frozenset()


# Operators of one domain by name.
Table: TypeAlias = Mapping[str, Operator]


def plain(function: Callable[..., torch.Tensor], *host: int) -> Operator:
    """An operator that has no attributes."""
    return Operator(lambda _context, *tensors: function(*tensors), frozenset(host))


def ints(tensor: torch.Tensor) -> list[int]:
    """A tensor's values as Python integers, a scalar as a list of one."""
    return [int(v) for v in tensor.reshape(-1).tolist()]


def same_device(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Bring tensors to one device: what an accelerator holds stays there."""
    device = next((t.device for t in tensors if t is not None and t.device.type != "cpu"), None)
    return list(tensors) if device is None else [t if t is None else t.to(device) for t in tensors]
