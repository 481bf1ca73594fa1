"""Which nodes hold weights that can be stored in fewer bits, and why others cannot."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx

from onnx_utilrank.model.graph import GraphIndex, node_label, qualified, subgraphs
from onnx_utilrank.model.scopes import all_nodes
from onnx_utilrank.sites.left import QUANTIZED, REASONS, quantized_operand
from onnx_utilrank.sites.site import Skip

__all__ = ["TURNED", "Weighted", "gemm_factors", "is_turned", "weighted_nodes"]

# The operand that holds the weight.
OPERANDS = {"MatMul": 1, "Gemm": 1, "Conv": 1, "ConvTranspose": 1, "Gather": 0}

TURNED = "its input is transposed"

# Elements from which a weight is worth the scales and nodes that come along.
SMALLEST = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """A node with a weight.

    Attributes:
        place: Which node of the main graph.
        label: How messages name it.
        op_type: Its operator.
        weight: The constant.
        shape: Its shape.
    """

    place: int
    label: str
    op_type: str
    weight: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def weighted_nodes(
    index: GraphIndex, op_types: Collection[str], why_not: str
) -> tuple[list[Weighted], list[Skip]]:
    """Nodes with weights of float32 that operators of a scheme hold, and those that are left.

    Args:
        index: The model.
        op_types: Operators of the scheme.
        why_not: What to say of the others that hold weights.
    """
    chosen: list[Weighted] = []
    left: list[Skip] = []
    local = {(function.domain, function.name) for function in index.store.proto.functions}
    for k, node in enumerate(index.store.proto.graph.node):
        found = _weighted(index, k, op_types, why_not, local)
        if isinstance(found, Weighted):
            chosen.append(found)
        elif found is not None:
            left.append(Skip(node=node_label(node), op_type=node.op_type, reason=found))
        left.extend(_inside(node))
    return chosen, left


def _weighted(
    index: GraphIndex,
    k: int,
    op_types: Collection[str],
    why_not: str,
    local: Collection[tuple[str, str]],
) -> Weighted | str | None:
    """A weight, why it is left, or None where there is none."""
    node = index.node(k)
    held = [name for name in node.input if _is_matrix(index, name)]
    if qualified(node) in local:
        return "its weight is read by a function of the model" if held else None
    if quantized_operand(index, node) or REASONS.get(qualified(node)) == QUANTIZED:
        return "its weight is quantized already"
    operand = OPERANDS.get(node.op_type) if qualified(node)[0] == "" else None
    if operand is None:
        if not held or qualified(node) not in REASONS:
            return None  # tables that are added or scaled with are no matrices
        return why_not
    name = node.input[operand] if len(node.input) > operand else ""
    if not _is_matrix(index, name):
        if node.op_type == "MatMul" and held:
            return "its weight is the left operand"
        computed = node.op_type == "MatMul" and name not in index.constants
        return "both of its operands are computed: it holds no weight" if computed else None
    if node.op_type not in op_types:
        return why_not
    kind = index.constant_type(name)
    assert kind is not None
    shape, dtype = kind
    if dtype.name != "float32":
        return f"its weight is of {dtype.name}"
    if math.prod(shape) < SMALLEST:
        return "its weight is so small that scales and nodes would take more than is saved"
    if node.op_type in ("MatMul", "Gather") and math.prod(shape[:-2]) != 1:
        return "its weight is a stack of different matrices"
    if node.op_type == "Gather" and _axis(node) not in (0, -len(shape)):
        return "it takes columns of its table"
    added = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    if gemm_factors(node)[1] != 1.0 and added and added not in index.constants:
        return "what it adds is computed, and scaled"
    if not index.is_finite(name):
        return "its weight holds NaN or infinity"
    return Weighted(place=k, label=node_label(node), op_type=node.op_type, weight=name, shape=shape)


def gemm_factors(node: onnx.NodeProto) -> tuple[float, float]:
    """Alpha and beta of a Gemm; 1 of any other node."""
    given = {a.name: float(a.f) for a in node.attribute} if node.op_type == "Gemm" else {}
    return given.get("alpha", 1.0), given.get("beta", 1.0)


def is_turned(node: onnx.NodeProto) -> bool:
    """Whether a Gemm transposes its input."""
    return any(a.name == "transA" and a.i for a in node.attribute)


def _is_matrix(index: GraphIndex, name: str) -> bool:
    kind = index.constant_type(name) if name in index.constants else None
    if kind is None or len(kind[0]) < 2:
        return False
    return kind[1].kind == "f" or kind[1].name == "bfloat16"


def _axis(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)


def _inside(node: onnx.NodeProto) -> Iterator[Skip]:
    for graph in subgraphs(node):
        for inner in all_nodes(graph):
            if inner.op_type in OPERANDS and inner.op_type != "Gather":
                reason = "it lies inside a subgraph"
                yield Skip(node=node_label(inner), op_type=inner.op_type, reason=reason)
