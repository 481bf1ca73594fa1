"""Put low-rank branches beside quantized nodes: y = Q(W) x + B (A x)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.moves.stored import corrected_bias, store
from onnx_utilrank.repairing.layer import Layer
from onnx_utilrank.repairing.match import Pair
from onnx_utilrank.sites.find import site_kind
from onnx_utilrank.statistics.factorize import Factors

__all__ = ["Branch", "with_branches"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What is added to the layers that apply one quantized weight.

    Attributes:
        pair: The weight and its layers.
        factors: B [m, r] and A [r, d]; of rank 0 where the mean alone is added.
        lost_mean: Added to a bias, float64 [m]; None where there is none that could take it.
    """

    pair: Pair
    factors: Factors
    lost_mean: np.ndarray | None


def with_branches(index: GraphIndex, branches: Sequence[Branch]) -> ModelStore:
    """A new model with every branch in it; the source itself where there are none.

    What the branches do not touch is the same to the byte. A node of ONNX Runtime's QOperator form
    that gets a branch is written in the QDQ form, where its output is in floats before it is
    rounded. Factors are of the type that the layer's scales have.

    Args:
        index: The quantized model, as `model.quantized.index_quantized` sees it.
        branches: The branches.

    Raises:
        ModelError: A factor does not fit that type.
    """
    if not branches:
        return index.source
    surgeon = Surgeon(index)
    for branch in branches:
        first = branch.pair.layers[0]
        names = _stored(surgeon, branch, first) if branch.factors.rank else None
        for layer, x in zip(branch.pair.layers, branch.pair.inputs, strict=True):
            bias = None
            if branch.lost_mean is not None:
                bias = _bias(surgeon, branch, layer)
            if names is not None:
                _beside(surgeon, layer, x, names, bias)
    return surgeon.finish()


def _stored(surgeon: Surgeon, branch: Branch, layer: Layer) -> list[str]:
    """Add the factors as initializers, in the order they are applied."""
    site, use = branch.pair.site, layer.use
    kind = site_kind(use.op_type)
    scaled = Factors(left=use.gain * branch.factors.left, right=branch.factors.right)
    tensors = kind.tensors(use, layer.weight(surgeon.index), scaled)
    return [
        store(surgeon, site, f"{site.weight}/{part}", values, layer.dtype)
        for part, values in zip(("branch_right", "branch_left"), tensors, strict=True)
    ]


def _bias(surgeon: Surgeon, branch: Branch, layer: Layer) -> str | None:
    """Add the lost mean to the bias that is there; or give the one that comes with the branch."""
    slot = layer.use.bias
    assert branch.lost_mean is not None
    if slot.kind == "new" and not branch.factors.rank:
        return None
    site = replace(branch.pair.site, dtype=layer.dtype)  # the reference may be finer
    name = corrected_bias(surgeon, site, layer.use, branch.lost_mean)
    if slot.kind == "input":
        surgeon.rewire(slot.node, slot.name, name)
    return name if slot.kind == "new" else None


def _beside(surgeon: Surgeon, layer: Layer, x: str, names: Sequence[str], bias: str | None) -> None:
    """Let a layer's output be the sum of what its node makes and what the branch does."""
    use, (first, second) = layer.use, names
    y = use.result.tensor
    inner, made = surgeon.unique(f"{y}/quantized"), surgeon.value(f"{y}/branch")
    seen = replace(use, inputs=replace(use.inputs, tensor=x))
    nodes = site_kind(use.op_type).product(surgeon, seen, first, second, made)
    if bias is not None:
        nodes[-1].inputs.append(surgeon.tensor(bias))
    total = gs.Node(
        op="Add",
        name=surgeon.unique(f"{surgeon.index.node(use.node).name or y}/repaired"),
        inputs=[surgeon.tensor(inner), made],
        outputs=[surgeon.tensor(y)],
    )
    surgeon.append(layer.maker, y, inner, [*nodes, total])
