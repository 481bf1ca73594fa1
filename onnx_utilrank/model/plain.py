"""See nodes that do several things at once as the plain nodes they stand for.

ONNX Runtime's own operators fuse a product with what follows it, an Einsum may be a product in
disguise, a Conv of several groups is several Convs, and a constant that is split is several
constants. Their weights are then ones of MatMul, Gemm and Conv like any other, and the value W x
has a name, at which it can be measured. What the surgery leaves alone goes back to the one node it
was.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_utilrank.model.einsum import BatchProduct, batch_product, matrix_product
from onnx_utilrank.model.graph import GraphIndex, all_names, attributes, qualified
from onnx_utilrank.model.parts import MICROSOFT, Parts, text, with_parts
from onnx_utilrank.model.plain_attention import attention, multi_head
from onnx_utilrank.model.plain_recurrent import RECURRENT, gates_put_together, recurrent
from onnx_utilrank.model.store import ModelStore

__all__ = ["MOST_GROUPS", "index_model", "is_fused", "plain_model"]

CAST_LIKE = 15  # since when there is one
# Groups of a Conv that are worth a node each; more of them are narrow, and slow one by one.
MOST_GROUPS = 8
CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def index_model(store: ModelStore) -> GraphIndex:
    """The index of a model in plain form.

    Only nodes with a constant operand are taken apart, and products of attention, which heads are
    followed through; where there are none, the index is of the model itself.

    Raises:
        ModelError: A constant cannot be read.
    """
    index = GraphIndex.build(store)
    plain = {}
    gates = gates_put_together(index)
    taken: set[str] | None = None
    local = {(function.domain, function.name) for function in store.proto.functions}
    for k, node in enumerate(store.proto.graph.node):
        operator = qualified(node)
        take_apart = _FUSED.get(operator) or _BETWEEN.get(operator)
        if take_apart is None or operator in local or not store.opset:
            continue  # without ONNX's own operators there are no plain ones
        # A recurrent layer may give its last state alone.
        made = any(node.output) if take_apart is recurrent else all(node.output[:1])
        if not all(node.input[:2]) or not made or not (node.input and node.output):
            continue
        if k in gates:
            continue  # what it makes is seen where it is put together
        weightless = take_apart in (_matmul, _einsum, recurrent) or operator in _BETWEEN
        if index.constants.isdisjoint(node.input[:2]) and not weightless:
            continue
        taken = all_names(store.proto) if taken is None else taken
        parts = Parts(index, k, taken)
        if take_apart(parts):
            plain[k] = parts.nodes
    if not plain:
        return index
    return with_parts(index, plain)


def is_fused(node: onnx.NodeProto) -> bool:
    """Whether nodes of this operator may stand for others, of which one has a weight."""
    return qualified(node) in _FUSED


def plain_model(store: ModelStore) -> ModelStore:
    """A model in plain form; the model itself where it is that already."""
    return index_model(store).store


def _gemm(parts: Parts) -> bool:
    """FusedGemm: Gemm, then an activation."""
    given = attributes(parts.node)
    own: dict[str, Any] = {k: given[k] for k in ("alpha", "beta", "transA", "transB") if k in given}
    kind = text(given, "activation")
    inputs, output = parts.node.input, parts.node.output[0]
    if not kind:
        parts.add("Gemm", inputs, [output], named=True, **own)
        return True
    product = parts.add("Gemm", inputs, [parts.value("product")], named=True, **own)
    prefix = "activation_"
    options = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
    parts.activated(product, kind, options)
    return True


# The attributes that the numbers in `activation_params` of a FusedConv are, in order.
PARAMETERS = {"LeakyRelu": ("alpha",), "Clip": ("min", "max"), "HardSigmoid": ("alpha", "beta")}


def _fused_conv(parts: Parts) -> bool:
    """FusedConv: Conv, perhaps plus a fourth input, then an activation."""
    given = attributes(parts.node)
    kind = text(given, "activation")
    params = given.get("activation_params", [])
    assert isinstance(params, list)
    names = PARAMETERS.get(kind, ())
    if len(params) < len(names):
        return False
    inputs, output = list(parts.node.input), parts.node.output[0]
    more = [name for name in inputs[3:4] if name]
    steps = 1 + len(more) + bool(kind)

    def made(step: int, hint: str) -> str:
        return output if step == steps else parts.value(hint)

    y = made(1, "product")
    if not _groups(parts, y):
        parts.add("Conv", inputs[:3], [y], named=True, **_conv_attributes(given))
    if more:
        y = parts.add("Add", [y, *more], [made(2, "sum")])
    if kind:
        parts.activated(y, kind, dict(zip(names, params, strict=False)))
    return True


def _conv(parts: Parts) -> bool:
    """Conv of a few groups: Split, a Conv each, and Concat."""
    return _groups(parts, parts.node.output[0])


def _groups(parts: Parts, output: str) -> bool:
    """Append the groups of a Conv, each with its own weight; False where there are none to see."""
    given = _conv_attributes(attributes(parts.node))
    groups = given.pop("group", 1)
    if not 1 < groups <= MOST_GROUPS:
        return False
    x, *operands = parts.node.input[:3]
    held = [parts.index.constant(name) for name in operands if name]
    whole = [v for v in held if v is not None and v.ndim and not len(v) % groups]
    if len(whole) < len(held):
        return False
    if not parts.index.freed_by(operands[0], frozenset({parts.place})):
        return False  # pieces would come on top of the whole, which is read elsewhere too
    pieces = [np.split(values, groups) for values in whole]
    shape = pieces[0][0].shape
    channels = shape[1] if len(shape) > 2 else 0
    if channels < 2:
        return False  # depthwise, or no kernel at all
    names = [parts.value(f"group_{g}_of_x") for g in range(groups)]
    parts.split(x, [channels] * groups, names, axis=1)
    made = []
    for g, name in enumerate(names):
        own = [
            parts.constant(values[g], f"{operand}/group_{g}")
            for operand, values in zip(filter(None, operands), pieces, strict=True)
        ]
        made.append(parts.add("Conv", [name, *own], [parts.value(f"group_{g}")], **given))
    parts.add("Concat", made, [output], axis=1)
    return True


def _conv_attributes(given: dict[str, object]) -> dict[str, Any]:
    return {key: given[key] for key in CONV_ATTRIBUTES if key in given}


def _matmul(parts: Parts) -> bool:
    """FusedMatMul: MatMul of operands that may be transposed, then a constant factor."""
    given = attributes(parts.node)
    if given.get("transBatchA", 0) or given.get("transBatchB", 0) or len(parts.node.input) != 2:
        return False
    operands = []
    for name, flag in zip(parts.node.input, ("transA", "transB"), strict=True):
        kind = parts.index.constant_type(name)
        rank = parts.index.rank(name) if kind is None else len(kind[0])
        if given.get(flag, 0) and rank != 1:  # a vector has nothing to transpose
            if rank is None:
                return False
            name = parts.turned(name, rank)
        operands.append(name)
    alpha, output = given.get("alpha", 1.0), parts.node.output[0]
    if alpha == 1.0:
        parts.add("MatMul", operands, [output], named=True)
        return True
    dtype = parts.dtype
    if dtype is None and parts.index.store.opset < CAST_LIKE:
        return False
    product = parts.add("MatMul", operands, [parts.value("product")], named=True)
    factor = parts.constant(np.array(alpha, dtype or np.float32))
    if dtype is None:
        factor = parts.add("CastLike", [factor, product], [parts.value("factor")])
    parts.add("Mul", [product, factor], [output])
    return True


def _einsum(parts: Parts) -> bool:
    """Einsum that is a product of matrices once axes are ordered and joined."""
    node, index = parts.node, parts.index
    kinds = [index.constant_type(name) for name in node.input]
    if len(kinds) != 2:
        return False
    equation = text(attributes(node), "equation")

    def moved(name: str, perm: Sequence[int], hint: str) -> str:
        if list(perm) == list(range(len(perm))):
            return name
        return parts.add("Transpose", [name], [parts.value(hint)], perm=list(perm))

    if kinds[0] is None and kinds[1] is None:
        stack = batch_product(equation)
        if stack is None or _repeats(parts, stack):
            return False
        left = moved(node.input[0], stack.left_order, "left")
        right = moved(node.input[1], stack.right_order, "right")
        y = parts.add("MatMul", [left, right], [parts.value("product")], named=True)
        moved(y, stack.output_order, "turned")
        parts.nodes[-1].output[0] = node.output[0]
        return True
    slot = 0 if kinds[0] is not None else 1
    shape = (kinds[slot] or ((), None))[0]
    form = None if kinds[1 - slot] is not None else matrix_product(equation, slot, shape)
    if form is None:
        return False
    x, weight = node.input[1 - slot], node.input[slot]

    def shaped(name: str, to: Sequence[int] | None, hint: str) -> str:
        if to is None:
            return name
        target = parts.constant(np.array(to, np.int64))
        return parts.add("Reshape", [name, target], [parts.value(hint)])

    weight = shaped(moved(weight, form.weight_order, "ordered"), form.weight_shape, "matrix")
    x = shaped(moved(x, form.input_order, "rows"), form.input_shape, "joined")
    y = parts.add("MatMul", [x, weight], [parts.value("product")], named=True)
    y = moved(shaped(y, form.output_shape, "apart"), form.output_order, "turned")
    # Whatever came last makes the output.
    parts.nodes[-1].output[0] = node.output[0]
    return True


def _split(parts: Parts) -> bool:
    """Split of a constant: a constant each."""
    node, index = parts.node, parts.index
    data = node.input[0]
    kind = index.constant_type(data)
    if kind is None or not np.issubdtype(kind[1], np.floating) or not all(node.output):
        return False
    # Pieces would come on top of a whole that something else reads; of biases that is next to none.
    if len(kind[0]) > 1 and not index.freed_by(data, frozenset({parts.place})):
        return False
    if not index.constants.issuperset(node.input):
        return False
    for name, values in zip(node.output, index.evaluated(node), strict=True):
        if name in index.consumers or name in index.pinned:
            parts.add("Constant", [], [name], value=numpy_helper.from_array(values, name))
    return True


def _repeats(parts: Parts, stack: BatchProduct) -> bool:
    """Whether one value of an operand meets many of the other in the sum, which MatMul refuses."""
    left, right = (parts.index.extents(name) for name in parts.node.input)
    one = None if left is None else left[stack.left_order[-1]]
    other = None if right is None else right[stack.right_order[-2]]
    return one != other and 1 in (one, other)


# What takes a node of each domain and operator apart; False where it is of a form it does not know.
_FUSED: dict[tuple[str, str], Callable[[Parts], bool]] = {
    ("", "Conv"): _conv,
    ("", "Einsum"): _einsum,
    ("", "Split"): _split,
    **{("", op): recurrent for op in RECURRENT},
    (MICROSOFT, "Attention"): attention,
    (MICROSOFT, "FusedConv"): _fused_conv,
    (MICROSOFT, "FusedGemm"): _gemm,
    (MICROSOFT, "FusedMatMul"): _matmul,
}
# And those that are seen apart for features to be followed through them: they have no weight.
_BETWEEN: dict[tuple[str, str], Callable[[Parts], bool]] = {
    (MICROSOFT, "MultiHeadAttention"): multi_head,
}
