"""An ONNX graph as a differentiable program in torch.

Each node is computed by a function of the table in `operators`. Floating tensors live on one
device; integers and booleans that are computed from shapes and constants stay on the CPU, so that
nothing waits for an accelerator to learn a shape. Tensors are never written to.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx
import torch

from onnx_utilrank.errors import DataError, ModelError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.torch_graph.block import Block, Settings, UnsupportedOperatorError, Values
from onnx_utilrank.torch_graph.prepare import prepared
from onnx_utilrank.torch_graph.tensors import as_tensor

__all__ = ["OLDEST_OPSET", "TorchGraph", "UnsupportedOperatorError"]

Visit = Callable[[str, torch.Tensor], torch.Tensor]

# Before it, operators broadcast by attributes.
OLDEST_OPSET = 7


class TorchGraph:
    """A model's main graph, computed node by node in torch.

    Attributes:
        store: The model. Where the one given has functions or nodes before what they read, this is
            a copy with functions inlined and nodes sorted.
        parameters: Every floating initializer of the main graph by its ONNX name.
        nodes: The main graph's nodes, in order.
        dead_after: For each node the values (not initializers) that no later node reads and that
            are no graph outputs.
    """

    def __init__(self, store: ModelStore, settings: Settings, block: Block) -> None:
        self.store = store
        self._settings = settings
        self._block = block
        self.nodes: tuple[onnx.NodeProto, ...] = tuple(store.proto.graph.node)
        self.dead_after = block.dead_after
        self.parameters = {n: t for n, t in block.constants.items() if t.is_floating_point()}

    @classmethod
    def build(
        cls, store: ModelStore, *, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> "TorchGraph":
        """Make a model ready to run; every node is checked, those of subgraphs too.

        Args:
            store: The model.
            device: Where floating tensors live, as torch names it.
            dtype: The type of all floating tensors, whatever the model says; None keeps the
                model's own types.

        Raises:
            UnsupportedOperatorError: The model has a node that torch cannot compute here.
            ModelError: The model's tensors cannot be read, or its opset is older than 7.
        """
        store = prepared(store)
        if 0 < store.opset < OLDEST_OPSET:
            raise ModelError(
                f"{store.label}: opset {store.opset} is older than {OLDEST_OPSET}, the first to "
                "run here"
            )
        settings = Settings(
            store=store,
            opsets={
                "" if o.domain == "ai.onnx" else o.domain: o.version
                for o in store.proto.opset_import
            },
            device=torch.device(device),
            dtype=dtype,
        )
        return cls(store, settings, Block.build(store.proto.graph, settings))

    def __reduce__(self) -> tuple[object, ...]:
        # Tensors are made anew where it gets to, on the device there.
        return _built, (self.store, str(self._settings.device), self._settings.dtype)

    def start(
        self,
        feed: Mapping[str, np.ndarray | torch.Tensor],
        parameters: Mapping[str, torch.Tensor] | None = None,
    ) -> Values:
        """The values before the first node: initializers and inputs.

        Args:
            feed: The graph inputs by name; entries of other names are passed over.
            parameters: Tensors that take the place of initializers, used as they are.

        Raises:
            DataError: An input is missing.
            ModelError: An input is of a type that torch does not have.
        """
        values = {**self._block.constants, **(parameters or {})}
        for name in self._block.inputs:
            if name not in feed:
                if name in values:
                    continue
                raise DataError(f"{self.store.label}: the data hold nothing for input {name!r}")
            try:
                value = as_tensor(feed[name], self._settings.device, self._settings.dtype)
            except TypeError as e:
                raise ModelError(f"{self.store.label}: input {name!r}: {e}") from e
            # Unlike constants, integer data (token ids, masks) meet floating tensors.
            values[name] = value.to(self._settings.device)
        return values

    def step(self, k: int, state: Values) -> tuple[str, ...]:
        """Compute the k-th node: its outputs are added to `state`, their names returned.

        Raises:
            ModelError: The node cannot be computed on these values.
        """
        return self._block.nodes[k].run(state)

    def run(
        self,
        feed: Mapping[str, np.ndarray | torch.Tensor],
        outputs: Sequence[str] | None = None,
        *,
        parameters: Mapping[str, torch.Tensor] | None = None,
        visit: Visit | None = None,
    ) -> Values:
        """Compute the whole graph; a value is freed after its last reader.

        Args:
            feed: The graph inputs by name.
            outputs: The values to give back, inner ones too; by default the graph's outputs.
            parameters: Tensors that take the place of initializers.
            visit: Is called with the name and tensor of each graph input and of each value that
                a node of the main graph makes; what it returns takes the value's place.

        Raises:
            ModelError: A node cannot be computed on these values, or no value has a name that
                `outputs` holds.
            DataError: An input is missing.
        """
        wanted = tuple(self._block.outputs if outputs is None else outputs)
        state = self.start(feed, parameters)

        def shown(names: Iterable[str]) -> None:
            if visit:
                state.update((name, visit(name, state[name])) for name in names)

        shown(n for n in self._block.inputs if n in feed)
        for k, dead in enumerate(self.dead_after):
            shown(self.step(k, state))
            for name in dead:
                if name not in wanted:
                    del state[name]
        unknown = [n for n in wanted if n not in state]
        if unknown:
            raise ModelError(f"{self.store.label}: no value is named {unknown[0]!r}")
        return {name: state[name] for name in wanted}


def _built(store: ModelStore, device: str, dtype: torch.dtype | None) -> TorchGraph:
    return TorchGraph.build(store, device=device, dtype=dtype)
