"""Find every quantized layer of a model, and the reason for every quantized node that is none."""

from onnx_utilrank.model.graph import GraphIndex, node_label, qualified
from onnx_utilrank.repairing.integers import INTEGERS
from onnx_utilrank.repairing.layer import Layer, Reader
from onnx_utilrank.repairing.nbits import NBITS
from onnx_utilrank.repairing.qdq import QDQ
from onnx_utilrank.sites.left import QUANTIZED, REASONS, left_alone
from onnx_utilrank.sites.site import Skip

__all__ = ["READERS", "read_layers"]

# Adding a form is one file beside this one and one entry here.
READERS: tuple[Reader, ...] = (QDQ, INTEGERS, NBITS)


def read_layers(index: GraphIndex) -> tuple[tuple[Layer, ...], tuple[Skip, ...]]:
    """See every node of a quantized model.

    Args:
        index: The model, as `model.quantized.index_quantized` sees it.

    Returns:
        The layers in graph order, and every node with a quantized weight that is none.
    """
    layers: list[Layer] = []
    skips: list[Skip] = []
    for k, node in enumerate(index.store.proto.graph.node):
        seen = (reader.read(index, k) for reader in READERS)
        found = next((each for each in seen if each is not None), None)
        if isinstance(found, Layer):
            layers.append(found)
        elif found is not None:
            skips.append(found)
        elif REASONS.get(qualified(node)) == QUANTIZED and left_alone(index, node):
            reason = "a quantized weight in a form that is not read"
            skips.append(Skip(node=node_label(node), op_type=node.op_type, reason=reason))
    return tuple(layers), tuple(skips)
