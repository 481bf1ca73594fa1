"""Operators on floats whose weight is behind a DequantizeLinear: the QDQ form, whoever wrote it."""

from dataclasses import replace

import numpy as np

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.repairing.layer import Layer
from onnx_utilrank.sites.bias import added_bias
from onnx_utilrank.sites.find import SITE_KINDS, site_kind
from onnx_utilrank.sites.left import is_quantized
from onnx_utilrank.sites.site import BiasSlot, Skip, Use

__all__ = ["QDQ", "before_rounding"]

_OPERATORS = frozenset(kind.op_type for kind in SITE_KINDS if kind.listed)


class Qdq:
    """DequantizeLinear of x and of W, and the operator (ONNX operators, DequantizeLinear).

    The weight may be of any type that DequantizeLinear takes, with one scale, one an axis or one a
    block; or a float that is rounded by a QuantizeLinear in the graph.
    """

    def read(self, index: GraphIndex, k: int) -> Layer | Skip | None:
        """See `Reader.read`."""
        node = index.node(k)
        if node.domain not in ("", "ai.onnx") or node.op_type not in _OPERATORS:
            return None
        if len(node.input) < 2 or not any(is_quantized(index, name) for name in node.input[:2]):
            return None
        found = site_kind(node.op_type).match(index, k)
        if not isinstance(found, Use):
            return found
        kind = index.constant_type(found.weight)
        if kind is None or not is_quantized(index, found.weight):
            return None
        found = replace(found, bias=_slot(index, found))
        x = found.inputs.tensor
        return Layer(
            use=found,
            maker=k,
            dtype=kind[1],
            sources=(*before_rounding(index, x), x),
            reader=self,
        )

    def weight(self, index: GraphIndex, k: int) -> np.ndarray:
        """See `Reader.weight`."""
        found = site_kind(index.node(k).op_type).match(index, k)
        assert isinstance(found, Use)
        held = index.constant(found.weight)
        assert held is not None
        return held


def before_rounding(index: GraphIndex, name: str) -> tuple[str, ...]:
    """The float that a value was before QuantizeLinear and DequantizeLinear, if it was."""
    for op_type in ("DequantizeLinear", "QuantizeLinear"):
        maker = index.producers.get(name)
        if maker is None or index.node(maker).op_type != op_type:
            return ()
        name = index.node(maker).input[0]
    return (name,)


def _slot(index: GraphIndex, use: Use) -> BiasSlot:
    """Where a mean can go; a bias that is quantized stays as it is."""
    added = added_bias(index, use.result.tensor, use.m, use.result.axis)
    if added is not None and not is_quantized(index, added.name):
        return added
    return BiasSlot(kind="new" if "Conv" in use.op_type else "none", shape=(use.m,))


QDQ = Qdq()
