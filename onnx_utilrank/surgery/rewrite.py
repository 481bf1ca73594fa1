"""Put factors in the place of weights, and check what must not change."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data

from onnx_utilrank.errors import ModelError, UtilrankError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import INLINE_LIMIT, ModelStore
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.moves.low_rank import LOW_RANK
from onnx_utilrank.moves.moves import find_move
from onnx_utilrank.moves.shrink import Shrinking, shrink
from onnx_utilrank.moves.tied import replace_tied
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.factorize import Factors
from onnx_utilrank.surgery.recurrent import layers_again

__all__ = ["Replacement", "check_contract", "rewrite"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """What takes the place of one site's weight.

    Attributes:
        site: The site.
        move: Key of the move, which says how the factors are stored.
        factors: The factors.
        lost_mean: (W − Ŵ) E[x], float64 [m], to be added to the bias; None leaves the bias.
    """

    site: Site
    move: str = LOW_RANK.key
    factors: Factors
    lost_mean: np.ndarray | None


def rewrite(
    index: GraphIndex,
    replacements: Sequence[Replacement],
    shrinkings: Sequence[Shrinking] = (),
) -> ModelStore:
    """A new model with every replacement made; the source is not changed.

    Factors and biases are stored in the dtype of the weight.

    Args:
        index: The source.
        replacements: Weights that are factored.
        shrinkings: Features between other weights that shrink.

    Raises:
        ModelError: A factor does not fit the dtype of its weight, or sites that share one have
            factors of two ranks.
    """
    surgeon = Surgeon(index)
    by_key = {replacement.site.key: replacement for replacement in replacements}
    for replacement in replacements:
        site = replacement.site
        if site.tied is not None:
            if site.freed:
                _tied(surgeon, replacement, by_key[site.tied])
            continue
        find_move(replacement.move).replace(
            surgeon, site, replacement.factors, replacement.lost_mean
        )
    for shrinking in shrinkings:
        shrink(surgeon, shrinking)
    return layers_again(index, surgeon.finish())


def _tied(surgeon: Surgeon, table: Replacement, head: Replacement) -> None:
    if table.factors.rank != head.factors.rank:
        raise ModelError(
            f"{surgeon.index.store.label}: {table.site.key!r} and {head.site.key!r} share one "
            f"weight: it cannot be of rank {table.factors.rank} and {head.factors.rank}"
        )
    lost = table.lost_mean, head.lost_mean
    replace_tied(surgeon, table.site, head.site, table.factors, lost)


def check_contract(source: ModelStore, result: ModelStore) -> None:
    """Check what every rewrite has to keep: signature, opset, and validity.

    Raises:
        UtilrankError: A rewrite broke one of them; always a fault of this package.
    """
    before, after = source.proto, result.proto
    kept = (
        ("IR version", before.ir_version, after.ir_version),
        ("opset", list(before.opset_import), list(after.opset_import)),
        ("inputs", source.inputs, result.inputs),
        ("outputs", list(before.graph.output), list(after.graph.output)),
    )
    for what, old, new in kept:
        if old != new:
            raise UtilrankError(f"{source.label}: the rewrite changed the {what}; please report it")
    if after.ByteSize() > INLINE_LIMIT or not _valid(source):
        return
    try:
        onnx.checker.check_model(_checkable(result), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        reason = " ".join(str(e).split())
        raise UtilrankError(
            f"{source.label}: the rewritten model is not valid ONNX; please report it: {reason}"
        ) from e


def _valid(model: ModelStore) -> bool:
    """Whether the checker has no complaint; many models that run well do not pass it."""
    try:
        onnx.checker.check_model(_checkable(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def _checkable(model: ModelStore) -> onnx.ModelProto:
    """The model with weights that lie outside made inputs, as the checker cannot find their files.

    It looks for them in the working directory, not in the model's folder.
    """
    if not model.has_external_data:
        return model.proto
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    known = {i.name for i in graph.input}
    inside = [t for t in model.proto.graph.initializer if not uses_external_data(t)]
    outside = [t for t in model.proto.graph.initializer if uses_external_data(t)]
    del graph.initializer[:]
    graph.initializer.extend(inside)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in outside
        if t.name not in known
    )
    return proto
