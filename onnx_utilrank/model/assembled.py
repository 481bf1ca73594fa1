"""Constants that a model puts together from pieces of others, as exporters write gates in order."""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnx_utilrank.model.graph import LAYOUT_OPS, GraphIndex

__all__ = ["Assembled", "assembled"]

PUTTING_TOGETHER = LAYOUT_OPS | {"Concat", "Slice"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A constant value.

    Attributes:
        values: What it holds.
        names: The values that hold its data: itself, pieces of it, and what those are pieces of.
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
    """A value that is constant, or made of constants by layout, Slice and Concat; else None.

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
        names.update(filter(None, node.input))
    held = {leaf: index.constant(leaf) for leaf in leaves}
    # Where to cut is not the data.
    data = {n for n in names if n not in held or np.issubdtype(_kind(held[n]), np.inexact)}
    return Assembled(
        values=_made(index, name, nodes, held) if nodes else np.asarray(held[name]),
        names=frozenset(data),
        nodes=frozenset(nodes),
    )


def _kind(values: np.ndarray | None) -> np.dtype[np.generic]:
    assert values is not None
    return values.dtype


def _made(
    index: GraphIndex, name: str, nodes: set[int], held: dict[str, np.ndarray | None]
) -> np.ndarray:
    steps = [index.node(k) for k in sorted(nodes)]
    unknown = onnx.TypeProto()
    inputs = [helper.make_value_info(leaf, unknown) for leaf in held]
    graph = helper.make_graph(steps, "assembled", inputs, [helper.make_value_info(name, unknown)])
    version = helper.make_opsetid("", index.store.opset)
    run = ReferenceEvaluator(helper.make_model(graph, opset_imports=[version]))
    (made,) = run.run(None, dict(held))
    return np.asarray(made)
