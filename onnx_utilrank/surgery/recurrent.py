"""Put products back into the recurrent layers that they were taken out of.

Where L (K x) has taken the place of W x before a layer, L becomes its input weight, and K x stays
before it; see `model.plain_recurrent`.
"""

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex, attributes
from onnx_utilrank.model.plain_recurrent import is_recurrent
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.model.surgeon import Surgeon

__all__ = ["layers_again"]


def layers_again(index: GraphIndex, result: ModelStore) -> ModelStore:
    """A model made from a plain one, with products put back into the recurrent layers behind them.

    Layers of which nothing was changed are whole already.

    Args:
        index: The plain model.
        result: What became of it.
    """
    choices = {
        index.node(k).input[1]
        for span in index.spans
        if is_recurrent(span.origin)
        for k in span.nodes
        if is_recurrent(index.node(k))
    }
    after = GraphIndex.build(result) if choices else index
    nodes = enumerate(result.proto.graph.node)
    found = [k for k, node in nodes if is_recurrent(node) and choices & {*node.input[1:2]}]
    if not found:
        return result
    surgeon = Surgeon(after)
    for k in found:
        _put_back(surgeon, k)
    return surgeon.finish()


def _put_back(surgeon: Surgeon, k: int) -> None:
    index = surgeon.index
    node = index.node(k)
    total = index.node(index.producers[node.input[0]])
    product = index.node(index.producers[total.input[0]])
    x, second = product.input
    weight, bias, behind = (index.constant(n) for n in (second, total.input[1], node.input[3]))
    assert weight is not None
    assert bias is not None
    assert behind is not None
    directions, both = behind.shape
    own = np.concatenate([bias.reshape(directions, both // 2), behind[:, both // 2 :]], axis=1)
    turned = weight.T.reshape(directions, both // 2, -1)
    names = [x, surgeon.constant(second, turned), node.input[2]]
    names += [surgeon.constant(node.input[3], own), *node.input[4:]]
    layer = gs.Node(
        op=node.op_type,
        name=node.name,
        attrs=attributes(node),
        inputs=[surgeon.tensor(name) for name in names],
        outputs=[surgeon.tensor(name) for name in node.output],
    )
    surgeon.replace(k, [layer])
