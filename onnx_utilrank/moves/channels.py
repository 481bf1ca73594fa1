"""Fewer input channels first: y = W' * (K x) + b, a pointwise Conv, then a Conv on r channels.

Where `low-rank` looks for few combinations of outputs, this looks for few combinations of inputs
(scheme 1 x 1, then k x k): it costs r (C + m k²) for C channels, m outputs and k² taps.
"""

import math

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex, attributes
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.moves.move import Matrix
from onnx_utilrank.moves.stored import corrected_bias, store
from onnx_utilrank.sites.site import Patches, Site
from onnx_utilrank.statistics.factorize import Factors

__all__ = ["CHANNELS", "Channels", "channel_patches"]


def channel_patches(site: Site) -> Patches | None:
    """How a site looks at its input, where that is a Conv of more than one tap and channel."""
    patches = site.uses[0].inputs.patches
    if patches is None or patches.transposed or len(site.uses) > 1 or patches.channels < 2:
        return None
    return patches if math.prod(patches.kernel) > 1 else None


class Channels:
    """A pointwise Conv before the Conv; strides, pads and dilations stay with the latter."""

    key = "channels"

    def applies(self, index: GraphIndex, site: Site) -> bool:
        """See `MoveKind.applies`."""
        del index
        return channel_patches(site) is not None

    def top_rank(self, site: Site) -> int:
        """See `MoveKind.top_rank`."""
        patches = channel_patches(site)
        assert patches is not None
        return min((site.parameters - 1) // self.parameters(site, 1), patches.channels - 1)

    def pays(self, site: Site, rank: int, rows: float) -> bool:
        """See `MoveKind.pays`: with strides the first Conv may cost more than is saved."""
        del rows
        return self.multiplications(site, rank) < site.parameters

    def parameters(self, site: Site, rank: int) -> int:
        """See `MoveKind.parameters`."""
        patches = channel_patches(site)
        assert patches is not None
        return rank * (patches.channels + site.m * math.prod(patches.kernel))

    def matrices(self, site: Site, rank: int) -> tuple[Matrix, ...]:
        """See `MoveKind.matrices`."""
        patches = channel_patches(site)
        assert patches is not None
        taps = math.prod(patches.kernel)
        return (site.op_type, rank, patches.channels), (site.op_type, site.m, rank * taps)

    def multiplications(self, site: Site, rank: int) -> float:
        """See `MoveKind.multiplications`; each output has as many inputs as the strides skip."""
        patches = channel_patches(site)
        assert patches is not None
        first = patches.channels * math.prod(patches.strides)
        return rank * (first + site.m * math.prod(patches.kernel))

    def replace(
        self, surgeon: Surgeon, site: Site, factors: Factors, lost_mean: np.ndarray | None
    ) -> None:
        """See `MoveKind.replace`; the factors are W' [m, r k²] and K [r, C]."""
        (use,) = site.uses
        node = surgeon.index.node(use.node)
        old = surgeon.index.constant(use.weight)
        assert old is not None
        ones = (1,) * (old.ndim - 2)
        rank = len(factors.right)
        pointwise = factors.right.reshape(rank, -1, *ones)
        first = store(surgeon, site, f"{site.weight}/channels", pointwise)
        second = store(
            surgeon, site, f"{site.weight}/taps", factors.left.reshape(site.m, rank, *old.shape[2:])
        )
        bias = list(node.input[2:3])
        if lost_mean is not None:
            corrected = corrected_bias(surgeon, site, use, lost_mean)
            bias = [corrected] if use.bias.kind in ("input", "new") else bias
        y = surgeon.tensor(use.result.tensor)
        hidden = surgeon.value(f"{y.name}/channels")
        label = node.name or y.name
        surgeon.replace(
            use.node,
            [
                gs.Node(
                    op="Conv",
                    name=surgeon.unique(f"{label}/channels"),
                    attrs={"kernel_shape": [1] * len(ones)},
                    inputs=[surgeon.tensor(node.input[0]), surgeon.tensor(first)],
                    outputs=[hidden],
                ),
                gs.Node(
                    op="Conv",
                    name=surgeon.unique(f"{label}/taps"),
                    attrs=attributes(node),
                    inputs=[hidden, surgeon.tensor(second), *map(surgeon.tensor, bias)],
                    outputs=[y],
                ),
            ],
        )


CHANNELS = Channels()
