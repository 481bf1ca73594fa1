"""Transposes of the batch axis in front of a product, which ONNX Runtime 1.24 to 1.31 dies of.

On x86 CPUs it takes such a Transpose into the MatMul behind it. Where the product is of float16,
for which the CPU has no kernel, its next optimizer reads a pointer that is not set: the process
ends by signal 11 as the model is loaded (https://github.com/microsoft/onnxruntime/issues/28392).
"""

import onnx

from onnx_utilrank.model.graph import GraphIndex, attributes, qualified

__all__ = ["rotates", "rotating"]

# What it takes away, or looks through, before it looks for such a Transpose.
_PASSED = frozenset({("", "Identity"), ("", "Dropout"), ("", "Cast")})


def rotates(node: onnx.NodeProto) -> bool:
    """Whether a node is a Transpose that moves the first axis to the last or the last but one."""
    perm = attributes(node).get("perm")
    if qualified(node) != ("", "Transpose") or not isinstance(perm, list | tuple) or len(perm) < 3:
        return False
    rest = [*range(1, len(perm))]
    return [*perm] in ([*rest[:-1], 0, rest[-1]], [*rest, 0])


def rotating(index: GraphIndex, product_input: str) -> int | None:
    """The place of such a Transpose in front of a product's first operand; None without one."""
    name = product_input
    while name in index.producers:
        node = index.node(index.producers[name])
        if rotates(node):
            return index.producers[name]
        if qualified(node) not in _PASSED:
            return None
        name = node.input[0]
    return None
