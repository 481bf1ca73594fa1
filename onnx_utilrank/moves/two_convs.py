"""A Conv as two, of which the first makes r features: y = W' * (K * x) + b.

Where `low-rank` looks for few combinations of outputs, these look for few combinations of what the
weight reads. With m outputs,

`channels`
    A pointwise Conv, then all k² taps: r (C + m k²) parameters for C channels.
`separable`
    The taps of each column, then those along the row: r (C k + m k) parameters (Jaderberg et al.,
    https://arxiv.org/abs/1405.3866, scheme 2). It is `channels` on columns of taps.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex, attributes
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.moves.move import Matrix
from onnx_utilrank.moves.stored import corrected_bias, store
from onnx_utilrank.sites.site import Patches, Site
from onnx_utilrank.statistics.factorize import Factors

__all__ = ["CHANNELS", "SEPARABLE", "TWO_CONVS", "Split", "TwoConvs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What the two Convs see.

    Attributes:
        first: The first, of the input.
        second: The second, of all that a position of the first sees: its channels are those
            features, of which r combinations are kept.
    """

    first: Patches
    second: Patches

    @property
    def features(self) -> int:
        """What a position of the first Conv sees: its channels times its taps."""
        return self.second.channels

    @property
    def taps(self) -> int:
        """Those of the second Conv."""
        return math.prod(self.second.kernel)


class TwoConvs:
    """The strides, pads and dilations of an axis stay with the Conv that goes along it."""

    def __init__(self, key: str, first: str, second: str, *, columns: bool) -> None:
        """Name a move and what it makes.

        Args:
            key: What users type.
            first: What the first Conv is called in the graph, behind the name of the node.
            second: What the second is called.
            columns: Whether the first goes along all axes but the last; else it is pointwise.
        """
        self.key = key
        self._names = first, second
        self._columns = columns

    def split(self, site: Site) -> Split | None:
        """How the two Convs look at their input; None where the site is no Conv for it."""
        patches = site.uses[0].inputs.patches
        if patches is None or patches.transposed or len(site.uses) > 1 or patches.channels < 2:
            return None
        axes = range(len(patches.kernel))
        along = axes[:-1] if self._columns else ()
        first = patches.along(along, patches.channels)
        taps = math.prod(first.kernel)
        second = patches.along(set(axes) - set(along), patches.channels * taps)
        if (self._columns and taps == 1) or math.prod(second.kernel) == 1:
            return None
        return Split(first=first, second=second)

    def applies(self, index: GraphIndex, site: Site) -> bool:
        """See `MoveKind.applies`."""
        del index
        return self.split(site) is not None

    def top_rank(self, site: Site) -> int:
        """See `MoveKind.top_rank`."""
        features = self._split(site).features
        return min((site.parameters - 1) // self.parameters(site, 1), features - 1)

    def pays(self, site: Site, rank: int, rows: float) -> bool:
        """See `MoveKind.pays`: with strides the first Conv may cost more than is saved."""
        del rows
        return self.multiplications(site, rank) < site.parameters

    def parameters(self, site: Site, rank: int) -> int:
        """See `MoveKind.parameters`."""
        split = self._split(site)
        return rank * (split.features + site.m * split.taps)

    def matrices(self, site: Site, rank: int) -> tuple[Matrix, ...]:
        """See `MoveKind.matrices`."""
        split = self._split(site)
        return (site.op_type, rank, split.features), (site.op_type, site.m, rank * split.taps)

    def multiplications(self, site: Site, rank: int) -> float:
        """See `MoveKind.multiplications`; each output has as many inputs as the strides skip."""
        split = self._split(site)
        first = split.features * math.prod(split.second.strides)
        return rank * (first + site.m * split.taps)

    def replace(
        self, surgeon: Surgeon, site: Site, factors: Factors, lost_mean: np.ndarray | None
    ) -> None:
        """See `MoveKind.replace`; the factors are W' [m, r taps] and K [r, features]."""
        (use,) = site.uses
        node = surgeon.index.node(use.node)
        split = self._split(site)
        rank = len(factors.right)
        first_name, second_name = self._names
        kernel = factors.right.reshape(rank, split.first.channels, *split.first.kernel)
        first = store(surgeon, site, f"{site.weight}/{first_name}", kernel)
        kernel = factors.left.reshape(site.m, rank, *split.second.kernel)
        second = store(surgeon, site, f"{site.weight}/{second_name}", kernel)
        bias = list(node.input[2:3])
        if lost_mean is not None:
            corrected = corrected_bias(surgeon, site, use, lost_mean)
            bias = [corrected] if use.bias.kind in ("input", "new") else bias
        y = surgeon.tensor(use.result.tensor)
        hidden = surgeon.value(f"{y.name}/{first_name}")
        label = node.name or y.name
        given = attributes(node)
        surgeon.replace(
            use.node,
            [
                gs.Node(
                    op="Conv",
                    name=surgeon.unique(f"{label}/{first_name}"),
                    attrs=_attributes(split.first),
                    inputs=[surgeon.tensor(node.input[0]), surgeon.tensor(first)],
                    outputs=[hidden],
                ),
                gs.Node(
                    op="Conv",
                    name=surgeon.unique(f"{label}/{second_name}"),
                    attrs=_attributes(split.second) if self._columns else given,
                    inputs=[hidden, surgeon.tensor(second), *map(surgeon.tensor, bias)],
                    outputs=[y],
                ),
            ],
        )

    def _split(self, site: Site) -> Split:
        split = self.split(site)
        assert split is not None
        return split


def _attributes(seen: Patches) -> dict[str, object]:
    """Those of the Conv that sees this, as far as they are not what they are without."""
    made: dict[str, object] = {"kernel_shape": list(seen.kernel)}
    if math.prod(seen.kernel) > 1 and seen.auto_pad != "NOTSET":
        made["auto_pad"] = seen.auto_pad
    elif any(seen.pads):
        made["pads"] = list(seen.pads)
    for name, values in (("strides", seen.strides), ("dilations", seen.dilations)):
        if set(values) != {1}:
            made[name] = list(values)
    return made


CHANNELS = TwoConvs("channels", "channels", "taps", columns=False)
SEPARABLE = TwoConvs("separable", "columns", "rows", columns=True)
TWO_CONVS = (CHANNELS, SEPARABLE)
