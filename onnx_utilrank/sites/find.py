"""Find every site of a model, and the reason for every node that is not one."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import onnx

from onnx_utilrank.errors import ConfigError, ModelError
from onnx_utilrank.model.assembled import assembled
from onnx_utilrank.model.graph import (
    GraphIndex,
    node_label,
    qualified,
    subgraphs,
    tensor_type,
)
from onnx_utilrank.model.plain import is_fused
from onnx_utilrank.model.plain_recurrent import is_recurrent
from onnx_utilrank.model.scopes import all_nodes
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.sites.conv import CONV
from onnx_utilrank.sites.conv_transpose import CONV_TRANSPOSE
from onnx_utilrank.sites.gather import GATHER, is_table
from onnx_utilrank.sites.gemm import GEMM
from onnx_utilrank.sites.left import REASONS, left_alone, quantized_operand
from onnx_utilrank.sites.matmul import MATMUL
from onnx_utilrank.sites.site import FLOAT_TYPES, Site, SiteKind, Skip, Use

__all__ = [
    "SITE_KINDS",
    "find_sites",
    "has_sites_in_functions",
    "site_kind",
    "site_matrix",
    "site_weight",
]

# Adding an operator is one file beside this one and one entry here.
SITE_KINDS: tuple[SiteKind, ...] = (MATMUL, GEMM, CONV, CONV_TRANSPOSE, GATHER)

# By domain and operator, what multiplies with weights, but for what is taken apart.
_MULTIPLY = frozenset({*REASONS, *(("", kind.op_type) for kind in SITE_KINDS if kind.listed)})

# Before it, Add and Gemm broadcast by attributes that later operators do not have.
FIRST_OPSET = 7


def site_kind(op_type: str) -> SiteKind:
    """The kind that handles an operator; KeyError where there is none."""
    return {kind.op_type: kind for kind in SITE_KINDS}[op_type]


def site_weight(index: GraphIndex, site: Site) -> np.ndarray:
    """The weight of a site as W [m, d], of its own type, where the model has it."""
    weight = index.constant(site.weight)
    assert weight is not None, site.key
    return site_kind(site.op_type).matrix(site.uses[0], weight)


def site_matrix(index: GraphIndex, site: Site) -> np.ndarray:
    """The weight of a site as W [m, d], float64, all of it finite."""
    return site_weight(index, site).astype(np.float64)


def find_sites(
    index: GraphIndex,
    *,
    op_types: Sequence[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[tuple[Site, ...], tuple[Skip, ...]]:
    """Match every node of the model.

    Args:
        index: The model's main graph.
        op_types: Operators to factor; None for all that `SITE_KINDS` knows.
        include: Shell patterns over node and weight names; if any are given, only nodes that
            match one are factored.
        exclude: Shell patterns of nodes and weights to leave alone; wins over `include`.

    Returns:
        The sites in graph order, and every node that is left alone though its operator is handled
        (of Gather those that look like an embedding) or it holds a weight.

    Raises:
        ConfigError: `op_types` names an operator that is not handled.
    """
    known = [kind.op_type for kind in SITE_KINDS]
    unknown = sorted(set(op_types or ()) - set(known))
    if unknown:
        raise ConfigError(f"op type {unknown[0]!r} cannot be factored; choose from {known}")
    listed = [kind.op_type for kind in SITE_KINDS if kind.listed]
    groups: defaultdict[tuple[str, str, str], list[Use]] = defaultdict(list)
    skips: list[Skip] = []
    for k, node in enumerate(index.store.proto.graph.node):
        skips.extend(_nested(index, node, {}))
        if node.domain not in ("", "ai.onnx") or node.op_type not in known:
            left = left_alone(index, node)
            skips.extend([left] if left else [])
            continue
        found: Use | Skip | None = None
        if len(node.input) >= 2 and all(node.input[:2]) and node.output:
            found = site_kind(node.op_type).match(index, k)
        if found is not None and index.store.opset < FIRST_OPSET:
            reason = f"opset {index.store.opset} is older than {FIRST_OPSET}"
            found = Skip(node=node_label(node), op_type=node.op_type, reason=reason)
        found = found or quantized_operand(index, node)
        if found is None and node.op_type in listed:
            reason = "no operand is a constant weight"
            found = Skip(node=node_label(node), op_type=node.op_type, reason=reason)
        if found is not None and index.spans:
            found = _relabelled(found, node_label(index.origin(k)))
        if isinstance(found, Use):
            found = _refused(index, found, op_types, include, exclude) or found
        if isinstance(found, Skip):
            skips.append(found)
        elif found is not None:
            root = index.root(found.weight)
            groups[root, found.op_type, found.layout].append(found)
    skips.extend(
        Skip(
            node=f"{node_label(node)} in function {function.name!r}",
            op_type=node.op_type,
            reason="inside a model-local function",
        )
        for function in index.store.proto.functions
        for node in all_nodes(function)
        if _multiplies(node)
    )
    # Parts of one node say the same.
    unique = dict.fromkeys(skips) if index.spans else skips
    sites = tuple(_site(index, root, uses) for (root, _, _), uses in groups.items())
    return sites, tuple(unique)


def _relabelled(found: Use | Skip, label: str) -> Use | Skip:
    """Messages name the node of the given model."""
    if isinstance(found, Use):
        return replace(found, label=label)
    return replace(found, node=label)


def has_sites_in_functions(store: ModelStore) -> bool:
    """Whether a model-local function holds a node of an operator that can be factored."""
    known = {("", kind.op_type) for kind in SITE_KINDS}
    # Functions may hide operators of their names.
    own = {(f.domain, f.name) for f in store.proto.functions}
    return any(
        qualified(node) in known or is_fused(node)
        for function in store.proto.functions
        for node in function.node
        if qualified(node) not in own
    )


def _multiplies(node: onnx.NodeProto) -> bool:
    """Whether a node is of an operator that multiplies with weights, factored elsewhere or not."""
    return qualified(node) in _MULTIPLY or is_fused(node)


def _refused(
    index: GraphIndex,
    use: Use,
    op_types: Sequence[str] | None,
    include: Sequence[str],
    exclude: Sequence[str],
) -> Skip | None:
    node = index.node(use.node)
    origin = index.origin(use.node)
    names = [node.name, use.weight, index.root(use.weight), node.output[0]]
    names += [origin.name, *origin.output]
    names += [n for n in origin.input if n in index.constants and n not in node.input]
    if is_recurrent(origin):  # whose weight may be made of others
        whole = assembled(index, origin.input[1])
        names += [] if whole is None else whole.names

    def named(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    kind = index.constant_type(use.weight)
    assert kind is not None
    reason = None
    if op_types and use.op_type not in op_types:
        reason = f"operator {use.op_type} is not among the op types asked for"
    elif named(exclude):
        reason = "excluded by a pattern"
    elif include and not named(include):
        reason = "not included by any pattern"
    elif kind[1].name not in FLOAT_TYPES:
        reason = f"the weight is {kind[1].name}, not a floating-point type"
    elif use.m * use.d == 0:
        reason = "the weight is empty"
    elif not index.is_finite(use.weight):
        reason = "the weight holds NaN or infinity"
    return Skip(node=use.label, op_type=use.op_type, reason=reason) if reason else None


def _site(index: GraphIndex, weight: str, uses: list[Use]) -> Site:
    first = uses[0]
    kind = index.constant_type(weight)
    assert kind is not None
    if any((u.m, u.d) != (first.m, first.d) for u in uses):
        raise ModelError(f"{index.store.label}: weight {weight!r} has two shapes")
    # Nodes through which other names of the weight come are readers of it too.
    names, through = index.aliases(weight)
    readers = frozenset(u.node for u in uses) | through
    # A weight that two layouts see gets a key for each.
    alone = all(k in readers for name in names for k in index.consumers.get(name, ()))
    return Site(
        key=weight if alone else f"{weight}@{index.node(first.node).output[0]}",
        op_type=first.op_type,
        weight=weight,
        uses=tuple(uses),
        m=first.m,
        d=first.d,
        dtype=kind[1],
        stored=index.stored_type(weight),
        freed=alone and names.isdisjoint(index.pinned) and index.freed_by(weight, readers),
    )


def _nested(
    index: GraphIndex, node: onnx.NodeProto, outer: Mapping[str, onnx.TensorProto]
) -> list[Skip]:
    """What the subgraphs of a node hold of weights, with the initializers of those around it."""
    skips = []
    for graph in subgraphs(node):
        held = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
        for inner in graph.node:
            if _multiplies(inner) or _looks_up(index, inner, held):
                reason = f"inside a subgraph of {node_label(node)}"
                skips.append(Skip(node=node_label(inner), op_type=inner.op_type, reason=reason))
            skips.extend(_nested(index, inner, held))
    return skips


def _looks_up(
    index: GraphIndex, node: onnx.NodeProto, held: Mapping[str, onnx.TensorProto]
) -> bool:
    """Whether a node of a subgraph picks rows of a table, other ones from run to run."""
    if qualified(node) != ("", GATHER.op_type) or len(node.input) < 2:
        return False
    if node.input[1] in held or node.input[1] in index.constants:
        return False
    tensor = held.get(node.input[0])
    kind = index.constant_type(node.input[0]) if tensor is None else tensor_type(tensor)
    return kind is not None and is_table(*kind)
