"""Conv with a constant kernel, in one to three spatial dimensions (ONNX operators, Conv)."""

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex, attributes, node_label
from onnx_utilrank.model.plain import MOST_GROUPS
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.sites.bias import added_bias
from onnx_utilrank.sites.site import BiasSlot, Patches, RowView, Skip, Use
from onnx_utilrank.statistics.factorize import Factors

__all__ = ["CONV", "Conv", "patches_of"]


class Conv:
    """A convolution seen as W [C_out, C_in k_1 k_2 …] over unfolded patches.

    It becomes the same convolution with r outputs, then one of extent 1 from r to C_out: strides,
    pads and dilations stay with the first.
    """

    op_type = "Conv"
    # Which groups are seen as Convs of their own, and never get here.
    exempt = (
        f"; up to {MOST_GROUPS}, with a constant bias or none and a weight that nothing else "
        "reads, are factored one by one"
    )
    listed = True

    def match(self, index: GraphIndex, k: int) -> Use | Skip | None:
        """See `SiteKind.match`."""
        node = index.node(k)
        kind = index.constant_type(node.input[1])
        if kind is None:
            return None
        shape = kind[0]
        label, given = node_label(node), attributes(node)
        if len(shape) < 3:
            reason = f"the kernel {list(shape)} has no spatial dimension"
            return Skip(node=label, op_type=self.op_type, reason=reason)
        group = given.get("group", 1)
        if group != 1:
            per_group = "depthwise" if shape[1] == 1 else f"{group} groups{self.exempt}"
            reason = f"grouped convolution ({per_group})"
            return Skip(node=label, op_type=self.op_type, reason=reason)
        m, patches = self.seen(shape, given)
        d = patches.channels * math.prod(patches.kernel)
        bias = _bias(index, node, m, 1 - len(shape))
        return Use(
            node=k,
            label=label,
            op_type=self.op_type,
            weight=node.input[1],
            layout="kernel",
            m=m,
            d=d,
            inputs=RowView(
                tensor=node.input[0],
                axis=1,
                width=d,
                patches=None if patches.pointwise else patches,
            ),
            result=RowView(tensor=node.output[0], axis=1, width=m),
            affine=bias.kind != "none",
            bias=bias,
        )

    def seen(self, shape: tuple[int, ...], given: dict[str, object]) -> tuple[int, Patches]:
        """Outputs of a kernel of this shape, and what each position of them sees."""
        m, channels, *kernel = shape
        return m, patches_of(given, channels, tuple(kernel))

    def matrix(self, use: Use, weight: np.ndarray) -> np.ndarray:
        """See `SiteKind.matrix`."""
        return weight.reshape(use.m, use.d)

    def stored(self, use: Use, weight: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """See `SiteKind.stored`."""
        del use
        return matrix.reshape(len(matrix), -1, *weight.shape[2:])

    def tensors(self, use: Use, weight: np.ndarray, factors: Factors) -> tuple[np.ndarray, ...]:
        """See `SiteKind.tensors`."""
        del use
        ones = (1,) * (weight.ndim - 2)
        return (
            factors.right.reshape(-1, *weight.shape[1:]),
            factors.left.reshape(len(factors.left), -1, *ones),
        )

    def product(
        self, surgeon: Surgeon, use: Use, first: str, second: str, y: gs.Variable
    ) -> list[gs.Node]:
        """See `SiteKind.product`."""
        node = surgeon.index.node(use.node)
        hidden = surgeon.value(f"{use.result.tensor}/hidden")
        name = node.name or use.result.tensor
        weight = surgeon.index.constant_type(use.weight)
        assert weight is not None
        return [
            gs.Node(
                op=self.op_type,
                name=surgeon.unique(f"{name}/low_rank"),
                attrs=attributes(node),
                inputs=[surgeon.tensor(use.inputs.tensor), surgeon.tensor(first)],
                outputs=[hidden],
            ),
            gs.Node(
                op="Conv",
                name=surgeon.unique(f"{name}/low_rank"),
                attrs={"kernel_shape": [1] * (len(weight[0]) - 2)},
                inputs=[hidden, surgeon.tensor(second)],
                outputs=[y],
            ),
        ]

    def chain(
        self, surgeon: Surgeon, use: Use, first: str, second: str, bias: str | None
    ) -> list[gs.Node]:
        """See `SiteKind.chain`."""
        node = surgeon.index.node(use.node)
        chain = self.product(surgeon, use, first, second, surgeon.tensor(use.result.tensor))
        if bias is not None and use.bias.kind in ("input", "new"):
            chain[-1].inputs.append(surgeon.tensor(bias))
        else:
            chain[-1].inputs.extend(surgeon.tensor(b) for b in node.input[2:3] if b)
        return chain


def _bias(index: GraphIndex, node: onnx.NodeProto, m: int, axis: int) -> BiasSlot:
    if len(node.input) < 3 or not node.input[2]:
        found = added_bias(index, node.output[0], m, axis)
        return found or BiasSlot(kind="new", shape=(m,))
    if index.constant_type(node.input[2]) is None or not index.is_finite(node.input[2]):
        return BiasSlot(kind="none")
    return BiasSlot(kind="input", name=node.input[2], shape=(m,))


def patches_of(given: dict[str, object], channels: int, kernel: tuple[int, ...]) -> Patches:
    """What a Conv of these attributes sees."""

    def ints(key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = given.get(key)
        return tuple(value) if isinstance(value, list) and value else default

    auto_pad = given.get("auto_pad", b"NOTSET")
    assert isinstance(auto_pad, bytes)
    return Patches(
        channels=channels,
        kernel=kernel,
        strides=ints("strides", (1,) * len(kernel)),
        dilations=ints("dilations", (1,) * len(kernel)),
        pads=ints("pads", (0,) * (2 * len(kernel))),
        auto_pad=auto_pad.decode(),
    )


CONV = Conv()
