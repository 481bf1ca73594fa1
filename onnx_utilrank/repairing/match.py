"""Find the weight of the reference that each quantized weight was made of."""

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.repairing.layer import Layer
from onnx_utilrank.sites.find import site_matrix
from onnx_utilrank.sites.site import Site, Skip

__all__ = ["Pair", "match_layers", "with_inputs"]

# ‖W - Q(W)‖ / ‖W‖ up to which Q(W) is taken to be W quantized. Rounding to 2 bits comes to 0.6;
# weights that have nothing to do with each other are √2 apart.
CLOSE = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A weight of the reference, and the quantized layers that apply it.

    Attributes:
        site: The reference's weight.
        layers: Nodes of the quantized model that share one quantized weight.
        inputs: For each, the value that holds x.
        distance: ‖W - Q(W)‖ / ‖W‖, Frobenius norms.
    """

    site: Site
    layers: tuple[Layer, ...]
    inputs: tuple[str, ...]
    distance: float

    @property
    def key(self) -> str:
        """What reports call it: the reference's weight."""
        return self.site.key

    def residual(self, reference: GraphIndex, quantized: GraphIndex) -> np.ndarray:
        """W - Q(W), float64 [m, d]."""
        error: np.ndarray = site_matrix(reference, self.site) - self.layers[0].matrix(quantized)
        return error

    @property
    def centred(self) -> bool:
        """Whether a mean can be added for nothing, at each of the layers."""
        return all(layer.use.bias.kind != "none" for layer in self.layers)


def match_layers(
    reference: GraphIndex, sites: Sequence[Site], quantized: GraphIndex, layers: Sequence[Layer]
) -> tuple[list[Pair], list[Skip]]:
    """Pair quantized layers with the weights they were made of.

    Names tell first: quantizers keep those of a node's output, or put an ending to the weight's.
    Where they do not, all weights of the same shape are looked at. In either case the quantized
    weight has to be close to the float one: names alone prove nothing.

    Args:
        reference: The reference.
        sites: Its weights.
        quantized: The quantized model.
        layers: Its layers.

    Returns:
        Pairs in the order of the layers, whose `inputs` are still the first of their `sources`;
        and layers that belong to no weight.
    """
    groups: defaultdict[tuple[str, str, str], list[Layer]] = defaultdict(list)
    for layer in layers:
        root = _root(quantized, layer.use.weight)
        groups[root, layer.use.op_type, layer.use.layout].append(layer)
    shaped: defaultdict[tuple[int, int], list[Site]] = defaultdict(list)
    for site in sites:
        if not site.one_hot:
            shaped[site.m, site.d].append(site)
    pairs: dict[str, Pair] = {}
    skips: list[Skip] = []
    for group in groups.values():
        weight = group[0].matrix(quantized)
        alike = shaped[group[0].use.m, group[0].use.d]
        named = [site for site in alike if _same_name(quantized, site, group)]
        found = _closest(reference, named, weight, pairs)
        if found is None or found[1] > CLOSE:
            others = [site for site in alike if site not in named]
            found = _closest(reference, others, weight, pairs) or found
        reason = _refusal(found, group)
        if found is not None and reason is None:
            site, distance = found
            before = pairs.get(site.key)
            together = tuple(group) if before is None else (*before.layers, *group)
            if before is None or _alike(quantized, before.layers[0], group[0], weight):
                inputs = tuple(layer.sources[0] for layer in together)
                pair = Pair(site=site, layers=together, inputs=inputs, distance=distance)
                pairs[site.key] = pair
                continue
            reason = f"{before.layers[0].use.label} is made of the same weight {site.key!r}"
        skips += [_skip(layer, reason or "") for layer in group]
    return list(pairs.values()), skips


def with_inputs(
    pairs: Iterable[Pair], expected: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]
) -> tuple[list[Pair], list[Skip]]:
    """Choose for each layer the value that x is read from.

    Before it is rounded, x is finer; but a rounding may clip it too, and quantizers leave a Relu
    to that. So of the values that may be x, the one that is closest to the reference's counts.

    Args:
        pairs: The pairs.
        expected: Values of the reference on one feed, by name.
        values: Those of the quantized model.

    Returns:
        The pairs, and layers whose input is shaped otherwise than the reference's.
    """
    kept, skips = [], []
    for pair in pairs:
        x = expected[pair.site.uses[0].inputs.tensor]
        shapes = {expected[use.inputs.tensor].shape for use in pair.site.uses}
        layers, inputs = [], []
        for layer in pair.layers:
            fitting = [name for name in layer.sources if values[name].shape in shapes]
            if not fitting:
                there = list(values[layer.sources[-1]].shape)
                reason = f"its input is {there}, where that of the reference is {list(x.shape)}"
                skips.append(_skip(layer, reason))
                continue
            layers.append(layer)
            inputs.append(min(fitting, key=lambda name: _apart(pair.site, expected, values[name])))
        if layers:
            kept.append(
                Pair(
                    site=pair.site,
                    layers=tuple(layers),
                    inputs=tuple(inputs),
                    distance=pair.distance,
                )
            )
    return kept, skips


def _apart(site: Site, expected: Mapping[str, np.ndarray], value: np.ndarray) -> float:
    """How far a value is from the input of the nearest use of a weight."""
    uses = (expected[use.inputs.tensor] for use in site.uses)
    return min(
        float(np.linalg.norm(value.astype(np.float64) - x)) for x in uses if x.shape == value.shape
    )


def _same_name(index: GraphIndex, site: Site, group: Sequence[Layer]) -> bool:
    """Whether a layer makes a value that is called so in the reference, or its weight is."""
    outputs = {use.result.tensor for use in site.uses}
    if any(layer.use.result.tensor in outputs for layer in group):
        return True
    return _root(index, group[0].use.weight).startswith(site.weight)


def _root(index: GraphIndex, name: str) -> str:
    """The initializer, or the constant, that a weight begins as."""
    while name in index.producers and index.node(index.producers[name]).input:
        name = index.node(index.producers[name]).input[0]
    return name


def _alike(index: GraphIndex, one: Layer, other: Layer, weight: np.ndarray) -> bool:
    """Whether two layers can share a branch: the second applies `weight`."""
    forms = {(layer.use.op_type, layer.use.layout) for layer in (one, other)}
    return len(forms) == 1 and np.array_equal(one.matrix(index), weight)


def _closest(
    reference: GraphIndex, sites: Sequence[Site], weight: np.ndarray, taken: Container[str]
) -> tuple[Site, float] | None:
    """The site whose weight is closest; of equals one that is not taken yet."""
    best: tuple[Site, float] | None = None
    for site in sorted(sites, key=lambda each: each.key in taken):
        held = site_matrix(reference, site)
        norm = float(np.linalg.norm(held))
        distance = float(np.linalg.norm(held - weight)) / norm if norm else np.inf
        if best is None or distance < best[1]:
            best = site, distance
    return best


def _refusal(found: tuple[Site, float] | None, group: Sequence[Layer]) -> str | None:
    use = group[0].use
    if found is None:
        return f"no weight of the reference that counts has its shape, {use.m} x {use.d}"
    site, distance = found
    if not distance <= CLOSE:
        return (
            f"no weight of the reference is close to it: the nearest, {site.key!r}, is "
            f"{distance:.2f} of its norm away; was it fused or trained before it was quantized?"
        )
    if use.gain != site.uses[0].gain:
        return f"it scales its product by {use.gain:g}, the reference by {site.uses[0].gain:g}"
    return None


def _skip(layer: Layer, reason: str) -> Skip:
    return Skip(node=layer.use.label, op_type=layer.use.op_type, reason=reason)
