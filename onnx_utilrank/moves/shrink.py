"""Shrink features that lie between weights: every matrix gets smaller in its place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import attributes
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.moves.stored import corrected_bias, store
from onnx_utilrank.sites.find import site_kind
from onnx_utilrank.sites.hidden import Hidden, Part, Repair, Vector
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.factorize import Factors, factored

__all__ = ["FAST_CHANNELS", "SHRINK", "Basis", "Shrinking", "can_be_both", "shrink"]

SHRINK = "shrink"

# Convs are fast on blocks of channels: on CPUs, one of a few channels less is no faster but where
# their number is a multiple of a few, and may take nearly twice the time where it is odd (depthwise
# Convs; `tools/move_costs.py`).
FAST_CHANNELS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """y ≈ L K y for the n features of one group.

    Attributes:
        expand: L, float64 [n, k].
        reduce: K, float64 [k, n].
    """

    expand: np.ndarray
    reduce: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrinking:
    """What takes the place of the weights around some hidden features.

    Attributes:
        hidden: The features.
        sites: Its weights, by key.
        bases: One for each of its groups.
        weights: W [m, d] of each site, before it loses rows or columns.
        factors: In its place the factors of those that are of low rank too.
        biases: What is added to the features that each maker makes, [m], in the place of what is;
            sites that are not in it keep their bias, in its new basis.
        lost: What the bias of each reader has to take, [m]; None or absent leaves it.
    """

    hidden: Hidden
    sites: Mapping[str, Site]
    bases: Sequence[Basis]
    weights: Mapping[str, np.ndarray]
    factors: Mapping[str, Factors]
    biases: Mapping[str, np.ndarray]
    lost: Mapping[str, np.ndarray | None]


def can_be_both(hidden: Hidden, site: Site) -> bool:
    """Whether a site of features that shrink can be of low rank too.

    A weight that reads units is cut by its outputs, behind the choice of what it reads.
    """
    return site.wide or site.key not in hidden.readers


def shrink(surgeon: Surgeon, what: Shrinking) -> None:
    """Rewrite the weights, the constants between them and the nodes that name their extents.

    Raises:
        ModelError: A weight does not fit its dtype.
    """
    hidden = what.hidden
    kept = len(what.bases[0].reduce)
    if not hidden.units:
        what = replace(what, bases=_balanced(what))
    maps = _row_maps(what)
    for key, site in what.sites.items():
        _rewrite_site(surgeon, what, site, maps.get(key))
    for vector in hidden.vectors:
        _rewrite_vector(surgeon, what, vector, maps)
    for repair in hidden.depthwise:
        surgeon.restate(repair.node, "group", repair.extent // hidden.size * kept)
    for repair in hidden.attentions:
        if not attributes(surgeon.index.node(repair.node)).get("scale"):
            surgeon.restate(repair.node, "scale", hidden.size**-0.5)
    for repair in hidden.reshapes:
        _restate(surgeon, repair, hidden.size, kept)
    for node in hidden.splits:
        _split_anew(surgeon, node, hidden.size, kept)
    for repair in hidden.slices:
        _slice_anew(surgeon, repair, hidden.size, kept)
    surgeon.forget(hidden.values)
    for repair in hidden.shapes:
        _show_as_before(surgeon, repair, hidden.size, kept)


def _balanced(what: Shrinking) -> list[Basis]:
    """The bases with each feature scaled so that both of its sides are of one size.

    What makes a feature and what reads it share its scale as they like: L K is the same. Weights
    that differ in it by orders of magnitude do badly in half precision, quantized, or trained.
    """
    pairs = list(zip(what.hidden.groups, what.bases, strict=True))
    met: dict[Part, np.ndarray] = {}  # by what makes the features, wherever those are read
    for group, basis in pairs:
        squares = _squares_met(what, group.met, basis.expand)
        met[group.made] = met.get(group.made, 0.0) + squares
    bases = []
    for group, basis in pairs:
        rows = slice(group.made.start, group.made.start + what.hidden.size)
        made = np.square(_turned(what, group.made.site, rows, basis.reduce)).sum(1)
        sizes = met[group.made]
        ratios = np.divide(sizes, made, out=np.ones(len(made)), where=(made > 0) & (sizes > 0))
        scale = ratios**0.25
        bases.append(Basis(expand=basis.expand / scale, reduce=scale[:, None] * basis.reduce))
    return bases


def _squares_met(what: Shrinking, part: Part, expand: np.ndarray) -> np.ndarray:
    """Sum of squares of what reads or meets each kept feature, [k]."""
    n, pair = what.hidden.size, what.factors.get(part.site)
    if part.side == "rows":
        rows = slice(part.start, part.start + n)
        return np.asarray(np.square(_turned(what, part.site, rows, expand.T)).sum(1))
    columns = slice(part.start, part.start + n * part.taps)
    weight = (
        what.weights[part.site][:, columns] if pair is None else pair.left @ pair.right[:, columns]
    )
    read = weight.reshape(len(weight), n, part.taps)
    return np.asarray(np.square(np.tensordot(read, expand, axes=(1, 0))).sum((0, 1)))


def _turned(what: Shrinking, site: str, rows: slice, turn: np.ndarray) -> np.ndarray:
    """Some rows of a site's weight in another basis, [k, d]."""
    pair = what.factors.get(site)
    if pair is None:
        return np.asarray(turn @ what.weights[site][rows])
    return np.asarray((turn @ pair.left[rows]) @ pair.right)


def _row_maps(what: Shrinking) -> dict[str, dict[int, np.ndarray]]:
    """For each site, [k, n] by the start of its rows: K where it makes them, L^T where it meets.

    Units meet one by one, so that the same are kept on both sides.
    """
    maps: dict[str, dict[int, np.ndarray]] = {}
    for group, basis in zip(what.hidden.groups, what.bases, strict=True):
        maps.setdefault(group.made.site, {})[group.made.start] = basis.reduce
        if group.met.side == "rows":
            met = basis.reduce if what.hidden.units else basis.expand.T
            maps.setdefault(group.met.site, {})[group.met.start] = met
    return maps


def _rewrite_site(
    surgeon: Surgeon, what: Shrinking, site: Site, maps: Mapping[int, np.ndarray] | None
) -> None:
    (use,) = site.uses
    old, lost = surgeon.index.constant(use.weight), what.lost.get(site.key)
    assert old is not None
    kind = site_kind(site.op_type)
    bias = _own_bias(surgeon, what, site, maps)
    pair = what.factors.get(site.key)
    if pair is None:
        matrix = _fewer_columns(what, site, _fewer_rows(what, what.weights[site.key], maps))
        new = store(surgeon, site, f"{site.weight}/shrunk", kind.stored(use, old, matrix))
        surgeon.rewire(use.node, use.weight, new)
        if bias is not None:
            values = bias / use.bias.scale
            held = store(surgeon, site, f"{use.bias.name}/shrunk", values)
            surgeon.rewire(use.node, use.bias.name, held)
    else:
        left, right = _fewer_rows(what, pair.left, maps), _fewer_columns(what, site, pair.right)
        shape = np.empty((len(left), right.shape[1]), np.int8)  # of what they stand for
        shrunk = kind.stored(use, old, shape)
        parts = zip(
            ("right", "left"), kind.tensors(use, shrunk, factored(left, right)), strict=True
        )
        first, second = (store(surgeon, site, f"{site.weight}/{at}", v) for at, v in parts)
        hint = use.bias.name or f"{site.weight}/bias"
        name = None if bias is None else store(surgeon, site, f"{hint}/shrunk", bias)
        surgeon.replace(use.node, kind.chain(surgeon, use, first, second, name))
    if lost is not None and use.bias.kind == "add":
        corrected_bias(surgeon, site, use, lost)


def _fewer_rows(
    what: Shrinking, matrix: np.ndarray, maps: Mapping[int, np.ndarray] | None
) -> np.ndarray:
    if maps is None:
        return matrix
    n = what.hidden.size
    return np.concatenate([maps[at] @ matrix[at : at + n] for at in sorted(maps)])


def _fewer_columns(what: Shrinking, site: Site, matrix: np.ndarray) -> np.ndarray:
    n = what.hidden.size
    columns = {
        g.met.start: (b.expand, g.met.taps)
        for g, b in zip(what.hidden.groups, what.bases, strict=True)
        if g.met.side == "columns" and g.met.site == site.key
    }
    if not columns:
        return matrix
    parts = []
    for at in sorted(columns):
        expand, taps = columns[at]
        each = matrix[:, at : at + n * taps].reshape(len(matrix), n, taps)
        of_kept = np.tensordot(each, expand, axes=(1, 0)).swapaxes(1, 2)
        parts.append(of_kept.reshape(len(matrix), -1))
    return np.concatenate(parts, axis=1)


def _own_bias(
    surgeon: Surgeon, what: Shrinking, site: Site, maps: Mapping[int, np.ndarray] | None
) -> np.ndarray | None:
    """The bias that the node itself is to add; None where it adds what it did, or none.

    Only factors, whose nodes are new, can add one where there was none.
    """
    (use,), lost, made = site.uses, what.lost.get(site.key), what.biases.get(site.key)
    if use.bias.kind not in ("input", "new") or (maps is None and lost is None):
        return None
    if use.bias.kind == "new" and lost is None and made is None:
        return None
    bias = use.bias.values(surgeon.index, site.m) if made is None else made
    if maps is not None:
        bias = _fewer_rows(what, bias, maps)
    if lost is not None:  # of a weight that keeps its rows
        bias = bias + lost
    return bias.reshape([len(bias) if extent == site.m else extent for extent in use.bias.shape])


def _rewrite_vector(
    surgeon: Surgeon,
    what: Shrinking,
    vector: Vector,
    maps: Mapping[str, Mapping[int, np.ndarray]],
) -> None:
    n, name, parts = what.hidden.size, vector.name, vector.parts
    held = surgeon.index.constant(name)
    assert held is not None
    own = [what.sites[part.site].uses[0].bias for part in parts]
    fresh = [
        slot.kind == "add" and slot.node == vector.node and part.site in what.biases
        for part, slot in zip(parts, own, strict=True)
    ]
    # More than one column has the kernel of a depthwise Conv.
    lines = held.reshape(n * len(parts), -1)
    shape = list(held.shape)
    if what.hidden.units and not any(fresh):
        # Of any type and value: units may have met a Cast, or be limited by infinities.
        picks = np.flatnonzero(what.bases[0].reduce.any(0))
        values = lines[np.concatenate([k * n + picks for k in range(len(parts))])]
        shape[vector.axis] = shape[vector.axis] * len(values) // len(lines)
        new = surgeon.constant(f"{name}/shrunk", values.reshape(shape))
        surgeon.rewire(vector.node, name, new)
        return
    pieces = []
    for k, part in enumerate(parts):
        piece = lines[k * n : (k + 1) * n].astype(np.float64)
        if fresh[k]:
            piece = what.biases[part.site][part.start : part.start + n, None]
        pieces.append(maps[part.site][part.start] @ piece)
    values = np.concatenate(pieces)
    shape[vector.axis] = shape[vector.axis] * len(values) // len(lines)
    first = what.sites[parts[0].site]
    new = store(surgeon, first, f"{name}/shrunk", values.reshape(shape), held.dtype)
    surgeon.rewire(vector.node, name, new)


def _restate(surgeon: Surgeon, repair: Repair, size: int, kept: int) -> None:
    """Change the target of a Reshape, or what computes it."""
    name = surgeon.index.node(repair.node).input[1]
    change = repair.extent // size * (kept - size)
    held = surgeon.index.constant(name)
    if held is not None:
        target = held.copy()
        target[repair.place] += change
        surgeon.rewire(repair.node, name, surgeon.constant(f"{name}/shrunk", target))
        return
    made = surgeon.value(f"{name}/shrunk")
    surgeon.insert(repair.node, _added(surgeon, surgeon.tensor(name), repair, change, made))
    surgeon.rewire(repair.node, name, made.name)


def _split_anew(surgeon: Surgeon, node: int, size: int, kept: int) -> None:
    """Change how many features go where."""
    name = surgeon.index.node(node).input[1]
    held = surgeon.index.constant(name)
    assert held is not None
    surgeon.rewire(node, name, surgeon.constant(f"{name}/shrunk", held // size * kept))


def _slice_anew(surgeon: Surgeon, repair: Repair, size: int, kept: int) -> None:
    """Change between which features is cut; a bound beyond the last of them stays."""
    for place, name in enumerate(surgeon.index.node(repair.node).input[1:3], 1):
        held = surgeon.index.constant(name)
        if held is None:
            of_groups, new = surgeon.value(f"{name}/groups"), surgeon.value(f"{name}/shrunk")
            steps = (("Div", size, surgeon.tensor(name), of_groups), ("Mul", kept, of_groups, new))
            for op, number, bound, made in steps:
                factor = surgeon.constant(f"{made.name}/factor", np.array([number]))
                node = gs.Node(
                    op=op,
                    name=surgeon.unique(f"{made.name}/extent"),
                    inputs=[bound, surgeon.tensor(factor)],
                    outputs=[made],
                )
                surgeon.insert(repair.node, node)
            surgeon.rewire(repair.node, name, new.name, place)
        elif abs(int(held.flat[0])) < repair.extent:
            new_name = surgeon.constant(f"{name}/shrunk", held // size * kept)
            surgeon.rewire(repair.node, name, new_name, place)


def _show_as_before(surgeon: Surgeon, repair: Repair, size: int, kept: int) -> None:
    """Let those who read a shape compute with the extents that were: scales hang on them."""
    node = surgeon.index.node(repair.node)
    (shape,) = node.output
    now = surgeon.value(f"{shape}/shrunk")
    change = repair.extent // size * (size - kept)
    copy = gs.Node(
        op="Shape",
        name=surgeon.unique(node.name or shape),
        attrs=attributes(node),
        inputs=[surgeon.tensor(node.input[0])],
        outputs=[now],
    )
    surgeon.replace(
        repair.node, [copy, _added(surgeon, now, repair, change, surgeon.tensor(shape))]
    )


def _added(
    surgeon: Surgeon, shape: gs.Variable, repair: Repair, change: int, made: gs.Variable
) -> gs.Node:
    """A node that adds to one number of a shape."""
    difference = np.zeros(repair.length, dtype=np.int64)
    difference[repair.place] = change
    return gs.Node(
        op="Add",
        name=surgeon.unique(f"{made.name}/extent"),
        inputs=[shape, surgeon.tensor(surgeon.constant(f"{made.name}/change", difference))],
        outputs=[made],
    )
