"""Constants that a model puts together from pieces of others, as exporters write gates in order."""

from dataclasses import dataclass

import numpy as np

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import LAYOUT_OPS, GraphIndex

__all__ = ["Assembled", "assembled"]

PUTTING_TOGETHER = LAYOUT_OPS | {"Concat", "Slice", "Split"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A constant value.

    Attributes:
        values: What it holds.
        names: The values that hold its data, which are no integers: itself, pieces of it, and what
            those are pieces of.
        nodes: The nodes that put it together.
    """

    values: np.ndarray
    names: frozenset[str]
    nodes: frozenset[int]

    def freed_by(self, index: GraphIndex, reader: int) -> bool:
        """Whether all of its data could go if node `reader` stopped reading it."""
        readers = {k for name in self.names for k in index.consumers.get(name, ())}
        return self.names.isdisjoint(index.pinned) and readers <= self.nodes | {reader}


def assembled(index: GraphIndex, name: str) -> Assembled | None:
    """A value that is constant, or made of constants by layout, Slice, Split and Concat; else None.

    Raises:
        ModelError: Data cannot be read.
    """
    names, nodes, leaves = {name}, set[int](), set[str]()
    ways = [name]
    while ways:
        each = ways.pop()
        k = index.producers.get(each)
        node = None if k is None else index.node(k)
        if node is None or node.op_type == "Constant":
            leaves.add(each)
            if each not in index.constants:
                return None
            continue
        if node.domain not in ("", "ai.onnx") or node.op_type not in PUTTING_TOGETHER:
            return None
        assert k is not None
        nodes.add(k)
        ways += [given for given in node.input if given and given not in names]
        names.update(filter(None, (*node.input, *node.output)))
    held = {leaf: np.asarray(index.constant(leaf)) for leaf in leaves}
    # Where to cut is not the data.
    data = {n for n in names if n not in held or not np.issubdtype(held[n].dtype, np.integer)}
    for k in sorted(nodes):
        node = index.node(k)
        try:
            made = index.evaluated(node, held)
        except ModelError:
            return None  # what cannot be put together is no weight
        held |= zip(node.output, made, strict=False)
    return Assembled(values=held[name], names=frozenset(data), nodes=frozenset(nodes))
