"""Inputs made from what a model says of them, where there are no data."""

import math
from collections.abc import Mapping

import numpy as np

from onnx_utilrank.errors import DataError
from onnx_utilrank.model.graph import GraphIndex, attributes, qualified
from onnx_utilrank.model.store import ModelStore, TensorSpec

__all__ = ["looked_up_rows", "synthetic_feed"]

# Operators whose first input goes on as it is, but for its shape and type.
_PASSING = frozenset(
    {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)

# Elements of an input that is made up, at most: as much as fills 2 GiB.
LARGEST = 2**28

# Inputs that look up rows, and the table of each, by domain and operator.
_LOOKUPS: Mapping[tuple[str, str], tuple[tuple[int, int], ...]] = {
    ("", "Gather"): ((1, 0),),
    ("com.microsoft", "EmbedLayerNormalization"): ((0, 2), (1, 4)),
}


def looked_up_rows(index: GraphIndex) -> dict[str, int]:
    """For each input that looks up rows of a constant table, how many rows that has.

    Of several tables the smallest counts. Inputs are followed through changes of shape and type.
    """
    found = {}
    for spec in index.store.inputs:
        sizes = _tables(index, spec.name)
        if sizes:
            found[spec.name] = min(sizes)
    return found


def _tables(index: GraphIndex, name: str) -> list[int]:
    sizes, open_names, seen = [], [name], {name}
    while open_names:
        value = open_names.pop()
        for k in index.consumers.get(value, []):
            node = index.node(k)
            for indices, table in _LOOKUPS.get(qualified(node), ()):
                if len(node.input) > max(indices, table) and node.input[indices] == value:
                    stored = index.constant_type(node.input[table])
                    if stored is not None:
                        axis = attributes(node).get("axis", 0)
                        sizes.append(stored[0][axis if isinstance(axis, int) else 0])
            if node.op_type in _PASSING and node.input[0] == value and node.output[0] not in seen:
                seen.add(node.output[0])
                open_names.append(node.output[0])
    return sizes


def synthetic_feed(
    model: ModelStore,
    shapes: Mapping[str, tuple[int, ...]],
    rows: Mapping[str, int],
    seed: int,
) -> dict[str, np.ndarray]:
    """One feed of the model's input types.

    Floats are drawn from a standard normal distribution, integers uniformly among the rows that
    they look up; other integers and booleans, which are masks more often than not, are 1.

    Args:
        model: The model.
        shapes: The shape of each input.
        rows: See `looked_up_rows`.
        seed: Of what is drawn.

    Raises:
        DataError: An input is of a type that cannot be made up, or too large.
    """
    rng = np.random.default_rng(seed)
    return {s.name: _values(model, s, shapes[s.name], rows, rng) for s in model.inputs}


def _values(
    model: ModelStore,
    spec: TensorSpec,
    shape: tuple[int, ...],
    rows: Mapping[str, int],
    rng: np.random.Generator,
) -> np.ndarray:
    if math.prod(shape) > LARGEST:
        raise DataError(f"{model.label}: input {spec} is too large to be made up at {shape}")
    if spec.dtype is not None and spec.dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape), dtype=spec.dtype)
    if spec.dtype is not None and spec.dtype.kind in "iub":
        if spec.name in rows:
            return np.asarray(rng.integers(rows[spec.name], size=shape), dtype=spec.dtype)
        return np.ones(shape, dtype=spec.dtype)
    raise DataError(f"{model.label}: input {spec} cannot be made up; data are needed")
