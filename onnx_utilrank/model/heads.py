"""What the outputs of a model are, read off the nodes that make them."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from onnx_utilrank.model.store import ModelStore

__all__ = [
    "SoftmaxHead",
    "channel_axis",
    "decided_outputs",
    "hidden_scores",
    "is_classification",
    "softmax_head",
]

_SOFTMAX = frozenset({"Softmax", "LogSoftmax"})
_LINEAR = frozenset({"Gemm", "MatMul", "Add", "Conv", "com.microsoft.FusedGemm"})
_SAME_SHAPE = frozenset({"Identity", "Cast"})
_LAYOUT = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
# What makes channels, on axis 1 by its specification, and what keeps axes where they are.
_CHANNELS = frozenset({"Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization"})
_SAME_AXES = _SAME_SHAPE | {
    *("Add", "Clip", "Concat", "DepthToSpace", "Div", "Elu", "HardSigmoid", "LeakyRelu", "Mul"),
    *("Pad", "Relu", "Resize", "Sigmoid", "Slice", "Softplus", "Sub", "Tanh", "Upsample"),
}


def is_classification(
    model: ModelStore, output: str, shape: Sequence[int | str | None] | None = None
) -> bool:
    """Whether the last axis of an output holds scores of classes, so that its arg-max decides.

    The rule: the output is a float tensor whose last axis is not known to be shorter than 2, and
    the node that makes it, found in the main graph by going back over Identity, Cast, Reshape,
    Flatten, Squeeze and Unsqueeze, is

    * Softmax or LogSoftmax over the last axis, at any rank. That is an axis of -1, or of rank - 1
      where no reshaping lies between. Over another axis it still counts where reshaping lies
      between and the output has rank 2 (a softmax over the channels of 1 x 1 maps);
    * or Gemm, MatMul, Add, Conv or FusedGemm (logits), and the output has rank 2. A Conv therefore
      counts only through a Flatten or its like.

    The rule cannot see what an output is for. An embedding or a regression of several targets that
    ends in a linear layer matches too; its arg-max agreement is then reported and means little.

    Args:
        model: The model.
        output: Name of one of its outputs.
        shape: The output's shape where a run has shown it; default: the shape the model declares.
            A rank that is known from neither is not taken for 2.

    Returns:
        False also where the model has no such output.
    """
    spec = next((o for o in model.outputs if o.name == output), None)
    if spec is None or spec.dtype is None or spec.dtype.kind != "f":
        return False
    dims = spec.shape if shape is None else tuple(shape)
    rank = None if dims is None else len(dims)
    if dims is not None and (not dims or dims[-1] in (0, 1)):
        return False
    head, reshaped = _head(model.proto.graph, output)
    if head is None:
        return False
    if _operator(head) in _SOFTMAX:
        axis = _axis(model, head)
        if reshaped:
            return axis == -1 or rank == 2
        return axis == -1 or (rank is not None and axis == rank - 1)
    return _operator(head) in _LINEAR and rank == 2


def _operator(node: onnx.NodeProto) -> str:
    """Operator of a node, with its domain where that is not the default one."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _head(graph: onnx.GraphProto, output: str) -> tuple[onnx.NodeProto | None, bool]:
    """The node that computes the values of `output`, and whether they are reshaped after it."""
    producers = {name: node for node in graph.node for name in node.output}
    name, reshaped = output, False
    # No path is longer than the graph has nodes: a bound that holds for a broken, cyclic one too.
    for _ in graph.node:
        node = producers.get(name)
        if node is None or _operator(node) not in _SAME_SHAPE | _LAYOUT:
            return node, reshaped
        reshaped = reshaped or _operator(node) in _LAYOUT
        name = node.input[0]
    return None, reshaped


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxHead:
    """The Softmax that an output of probabilities comes from.

    Attributes:
        logits: What it reads.
        axis: Its axis, of the logits.
        reshaped: Whether the output has another shape than the logits.
    """

    logits: str
    axis: int
    reshaped: bool


def softmax_head(model: ModelStore, output: str) -> SoftmaxHead | None:
    """The Softmax behind an output, None without one."""
    head, reshaped = _head(model.proto.graph, output)
    if head is None or _operator(head) != "Softmax":
        return None
    return SoftmaxHead(logits=str(head.input[0]), axis=_axis(model, head), reshaped=reshaped)


def channel_axis(model: ModelStore, output: str) -> int | None:
    """The axis of an output that holds the channels of a convolution, None where none tells.

    Found by going back over what keeps axes where they are (the first computed operand counts) and
    over Transposes.
    """
    made = [node for node in model.proto.graph.node if node.op_type != "Constant"]
    producers = {name: node for node in made for name in node.output}
    name = output
    turned: list[list[int]] = []
    for _ in made:
        node = producers.get(name)
        if node is None:
            return None
        if _operator(node) in _CHANNELS:
            axis = 1
            for perm in reversed(turned):
                axis = perm.index(axis) if axis in perm else -1
            return axis if axis >= 0 else None
        if _operator(node) == "Transpose":
            turned.append(next((list(a.ints) for a in node.attribute if a.name == "perm"), []))
        elif _operator(node) not in _SAME_AXES:
            return None
        name = next((i for i in node.input if i in producers), "")
    return None


def decided_outputs(model: ModelStore) -> dict[str, tuple[str, int]]:
    """Outputs that are the classes which an ArgMax decides for.

    Of each the scores that it reads, and their axis. Nodes that cast or reshape the classes may lie
    between.
    """
    found = {}
    for output in model.outputs:
        head, _ = _head(model.proto.graph, output.name)
        if head is not None and _operator(head) == "ArgMax":
            axis = next((a.i for a in head.attribute if a.name == "axis"), 0)
            found[output.name] = str(head.input[0]), int(axis)
    return found


def hidden_scores(model: ModelStore) -> dict[str, int]:
    """Scores that outputs are decided by where no output tells of them, and their axis."""
    graph, decided = model.proto.graph, decided_outputs(model)
    told = {_origin(graph, output.name) for output in model.outputs if output.name not in decided}
    made = {name for node in graph.node if node.op_type != "Constant" for name in node.output}
    return {
        scores: axis
        for scores, axis in decided.values()
        if scores in made and _origin(graph, scores) not in told
    }


def _origin(graph: onnx.GraphProto, name: str) -> str:
    """The value that one tells of, by casting or reshaping it or by its softmax."""
    for _ in graph.node:
        node, _ = _head(graph, name)
        if node is None or _operator(node) not in _SOFTMAX:
            return name if node is None else str(node.output[0])
        name = str(node.input[0])
    return name


def _axis(model: ModelStore, softmax: onnx.NodeProto) -> int:
    # Operator set 13 changed the default axis from 1 to the last one.
    default = -1 if model.opset >= 13 else 1
    return int(next((a.i for a in softmax.attribute if a.name == "axis"), default))
