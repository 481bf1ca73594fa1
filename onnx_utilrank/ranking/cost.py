"""What things cost in parameters: the one meaning of "ratio" in this tool."""

import math

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.sites.site import Site

__all__ = ["bias_cost", "count_parameters"]


def count_parameters(store: ModelStore) -> int:
    """Elements of every initializer and every constant tensor of the model, in all its graphs."""
    return sum(math.prod(tensor.dims) for tensor in store.tensors())


def bias_cost(index: GraphIndex, site: Site) -> int:
    """Elements that a corrected bias adds to the model, over all uses of a site."""
    total = 0
    for use in site.uses:
        slot = use.bias
        if slot.kind in ("input", "add"):
            kind = index.constant_type(slot.name)
            assert kind is not None
            reader = use.node if slot.kind == "input" else slot.node
            replaced = math.prod(kind[0]) if index.freed_by(slot.name, frozenset({reader})) else 0
            total += math.prod(slot.shape) - replaced
        elif slot.kind == "new":
            total += site.m
    return total
