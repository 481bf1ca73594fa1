"""What a factorable node looks like to the rest of the pipeline.

A *use* is one node with a constant weight, seen as y = W x + b over rows x in R^d, y in R^m. A
*site* is one weight with all the uses that see it the same way: it is factored once.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.statistics.factorize import Factors

__all__ = [
    "FLOAT_TYPES",
    "BiasSlot",
    "Patches",
    "RowView",
    "Side",
    "Site",
    "SiteKind",
    "Skip",
    "Use",
]


Side = Literal["inputs", "outputs"]

FLOAT_TYPES = frozenset({"float16", "bfloat16", "float32", "float64"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """The attributes of a Conv or ConvTranspose that decide what one output position sees.

    Attributes:
        channels: Input channels.
        kernel: Extent of the kernel along each spatial axis.
        strides: Steps between output positions.
        dilations: Steps between kernel taps.
        pads: Zeros before each spatial axis, then after each (ONNX Conv, `pads`).
        auto_pad: NOTSET where `pads` counts, else SAME_UPPER, SAME_LOWER or VALID.
        transposed: Whether it is a ConvTranspose: strides are between input positions then, and
            pads are taken off the output.
        output_padding: What a ConvTranspose adds at the end of each axis, if anything.
        output_shape: The extents that a ConvTranspose pads for, where it states them.
    """

    channels: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()

    @property
    def pointwise(self) -> bool:
        """Whether each position sees just its own channels, so that there is nothing to unfold."""
        alone = not any((*self.pads, *self.output_padding, *self.output_shape))
        return {*self.kernel, *self.strides} == {1} and alone

    def along(self, axes: Collection[int], channels: int) -> "Patches":
        """What a Conv sees that goes along some of the spatial axes only.

        Args:
            axes: Those that it goes along; each position sees just itself on the others.
            channels: Its input channels.
        """
        spatial = len(self.kernel)

        def part(values: tuple[int, ...], otherwise: int) -> tuple[int, ...]:
            return tuple(v if k % spatial in axes else otherwise for k, v in enumerate(values))

        return replace(
            self,
            channels=channels,
            kernel=part(self.kernel, 1),
            strides=part(self.strides, 1),
            dilations=part(self.dilations, 1),
            pads=part(self.pads, 0),
        )

    @property
    def density(self) -> float:
        """Share of what a position sees that is a value, and not a zero between two."""
        return 1 / math.prod(self.strides) if self.transposed else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowView:
    """How to see a tensor as rows of features.

    Attributes:
        tensor: The ONNX value.
        axis: The feature axis; negative axes count from the end.
        width: Features in a row.
        patches: Set where the rows are the unfolded patches (im2col) of a Conv's input.
        one_hot: Whether each row is all 0 but for a 1, and the tensor holds integers: the places of
            those, in [-width, width). The rows themselves are never formed.
        positions_first: Whether the first axis counts positions and the second one samples, as
            recurrent layers and torch's attention have them inside; see `sites.order`.
    """

    tensor: str
    axis: int
    width: int
    patches: Patches | None = None
    one_hot: bool = False
    positions_first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasSlot:
    """Where the mean of what a truncation loses can go.

    Attributes:
        kind: `input`: the node's own bias input holds a constant. `add`: the only reader of the
            node's output, an Add or a node that begins with one, adds a constant vector. `new`:
            there is none, and one can be added. `none`: the bias is computed at run time, or a
            shape would change.
        node: Index of the node that adds (`add` only).
        place: Which of its inputs the bias is (`add` only): others may be the same constant.
        name: The constant that holds the bias (`input` and `add`).
        shape: The shape in which a corrected bias is stored.
        scale: Factor the operator applies to it (Gemm's beta).
    """

    kind: Literal["input", "add", "new", "none"]
    node: int = -1
    place: int = -1
    name: str = ""
    shape: tuple[int, ...] = ()
    scale: float = 1.0

    def values(self, index: GraphIndex, width: int) -> np.ndarray:
        """The bias as a float64 vector [width], zero where there is none."""
        if self.kind not in ("input", "add"):
            return np.zeros(width)
        held = index.constant(self.name)
        assert held is not None, self.name
        return np.broadcast_to(self.scale * held.astype(np.float64).reshape(-1), (width,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A node that has a weight, or looks as if it had, and cannot be factored.

    Attributes:
        node: How messages name the node.
        op_type: Its operator.
        reason: Why it is left alone, in words for the report.
    """

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One node that applies a constant weight.

    Attributes:
        node: Index of the node in the main graph.
        label: How messages name it.
        op_type: Its operator, which names its `SiteKind`.
        weight: The value that holds the weight.
        layout: How the operator sees the weight as a matrix; uses of one weight share factors
            only where this is equal.
        m: Output features.
        d: Input features.
        inputs: The rows x.
        result: The rows of the node's output.
        affine: Whether those are W x + b with a constant b, and not also scaled (Gemm's alpha) or
            with a computed bias, so that their moments say something about W x.
        bias: The slot for the lost mean.
        gain: Factor the operator applies to W x (Gemm's alpha).
    """

    node: int
    label: str
    op_type: str
    weight: str
    layout: str
    m: int
    d: int
    inputs: RowView
    result: RowView
    affine: bool
    bias: BiasSlot
    gain: float = 1.0

    @property
    def outputs(self) -> RowView | None:
        """The rows y = W x + b; None where the node's output is something else."""
        return self.result if self.affine else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One weight and all the nodes that apply it the same way.

    Attributes:
        key: What plans and reports call it; unique in the model.
        op_type: The operator of all its uses.
        weight: The value that holds the weight.
        uses: The nodes, in graph order.
        m: Output features.
        d: Input features.
        dtype: Element type of the weight, which the factors keep.
        stored: Element type that the file holds it in: another one where a Cast lies between.
        freed: Whether the weight goes from the file once the uses are rewritten; False where
            something else reads it too, so that factors would come on top of it.
        tied: Key of another site whose weight is this one transposed: both are factored, as one, or
            neither. The weight and its factors are put down to the one that has it `freed`.
    """

    key: str
    op_type: str
    weight: str
    uses: tuple[Use, ...]
    m: int
    d: int
    dtype: np.dtype[np.generic]
    stored: np.dtype[np.generic]
    freed: bool
    tied: str | None = None

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return self.m * self.d

    @property
    def density(self) -> float:
        """Share of a row x that has to be multiplied; see `Patches.density`."""
        patches = self.uses[0].inputs.patches
        return patches.density if patches else 1.0

    @property
    def one_hot(self) -> bool:
        """Whether its outputs are columns of W, picked by number: W is an embedding's table."""
        return self.uses[0].inputs.one_hot

    @property
    def multiplications(self) -> float:
        """Multiply-accumulates that a row of the output takes."""
        return 0 if self.one_hot else self.parameters * self.density

    @property
    def full_rank(self) -> int:
        """The largest rank the weight can have."""
        return min(self.m, self.d)

    @property
    def wide(self) -> bool:
        """Whether W has no more rows (outputs) than columns (inputs)."""
        return self.m <= self.d

    @property
    def smaller_side(self) -> Side:
        """Whose moment says all at the least cost; the inputs where both are equal.

        Siblings share their inputs, and only W x + b with a constant b tells W x.
        """
        if self.m < self.d and all(use.affine for use in self.uses):
            return "outputs"
        return "inputs"

    @property
    def break_even_rank(self) -> int:
        """The largest rank r whose factors are smaller than the weight: r (m + d) < m d."""
        return (self.m * self.d - 1) // (self.m + self.d)

    @property
    def bias(self) -> Literal["input", "add", "new", "none"]:
        """What holds for the bias of every use: the least that any of them allows."""
        order = ("none", "new", "add", "input")
        return min((u.bias.kind for u in self.uses), key=order.index)


class SiteKind(Protocol):
    """How one operator takes part: the one thing to write, and list in `SITE_KINDS`, for an op."""

    op_type: str
    listed: bool
    """Whether a node without a constant weight is worth a line in a report: not a Gather, most of
    which have to do with shapes."""

    def match(self, index: GraphIndex, k: int) -> Use | Skip | None:
        """See node `k` as a use of a weight; None where it has no constant operand at all."""
        ...

    def matrix(self, use: Use, weight: np.ndarray) -> np.ndarray:
        """The weight as W [m, d], in its own dtype."""
        ...

    def stored(self, use: Use, weight: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """A matrix [m', d'] in the place of W as the operator stores it: undoes `matrix`."""
        ...

    def tensors(self, use: Use, weight: np.ndarray, factors: Factors) -> tuple[np.ndarray, ...]:
        """The factors as the operator stores them, in the order they are applied."""
        ...

    def product(
        self, surgeon: Surgeon, use: Use, first: str, second: str, y: gs.Variable
    ) -> list[gs.Node]:
        """The two low-rank nodes without bias or gain.

        Args:
            surgeon: The graph under the knife.
            use: The node they stand for.
            first: Initializer applied to the node's input.
            second: Initializer applied to the hidden value.
            y: Output of the last of them; the node before it makes the hidden value.
        """
        ...

    def chain(
        self, surgeon: Surgeon, use: Use, first: str, second: str, bias: str | None
    ) -> list[gs.Node]:
        """The nodes that take the place of the node: `product`, bias and gain.

        Args:
            surgeon: The graph under the knife.
            use: The node.
            first: Initializer applied to the node's input.
            second: Initializer applied to the hidden value.
            bias: Initializer that is the new bias; None keeps the bias as it is.
        """
        ...
