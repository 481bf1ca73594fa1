"""Attention in one node: ONNX's own Attention, and ONNX Runtime's MultiHeadAttention."""

from typing import Final

import numpy as np
import onnx

from onnx_utilrank.model.graph import attributes, qualified

__all__ = ["attention_heads", "by_head", "is_attention", "over_heads"]

_MULTI_HEAD: Final = ("com.microsoft", "MultiHeadAttention")
_ATTENTION: Final = ("", "Attention")
# The inputs that hold keys and values of earlier steps, and for MultiHeadAttention its bias.
_STOP_AT = {_MULTI_HEAD: (3, 6, 7), _ATTENTION: (4, 5)}


def is_attention(node: onnx.NodeProto) -> bool:
    """Whether a node is one whose heads may lie between weights."""
    return qualified(node) in _STOP_AT


def attention_heads(node: onnx.NodeProto) -> int | None:
    """How many heads queries, keys and values have; None where that is not told, or they differ.

    Nodes that keep what they saw for later steps, and a bias of their own, are not followed.
    """
    operator = qualified(node)
    given = attributes(node)
    past = (node.input[k] for k in _STOP_AT[operator] if k < len(node.input))
    if any(past) or any(node.output[1:]) or not all(node.input[:3]) or len(node.input) < 3:
        return None
    if operator == _MULTI_HEAD:
        counts = [given.get("num_heads")]
    else:  # where the inputs have four axes they say it
        counts = [given.get("q_num_heads", 0), given.get("kv_num_heads", 0)]
    first = counts[0]
    return first if isinstance(first, int) and counts.count(first) == len(counts) else None


def by_head(numbers: np.ndarray, heads: int) -> np.ndarray | None:
    """The features of each head, [heads, n]; None where they are not the same everywhere.

    Args:
        numbers: Of an input, [batch, positions, heads * n] or [batch, heads, positions, n].
        heads: How many, where there are three axes.
    """
    if numbers.ndim == 4:
        first = numbers[:1, :, :1]
        return first[0, :, 0] if (numbers == first).all() else None
    if numbers.ndim != 3 or not heads or numbers.shape[2] % heads:
        return None
    first = numbers[:1, :1]
    return first.reshape(heads, -1) if (numbers == first).all() else None


def over_heads(lines: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """The numbers of the output, from those of its heads [heads, n]; None where they do not fit."""
    line = lines[None, :, None, :] if len(shape) == 4 else lines.reshape(1, 1, -1)
    fits = line.shape[-1] == shape[-1] and (len(shape) == 3 or line.shape[1] == shape[1])
    return np.broadcast_to(line, shape) if fits else None
