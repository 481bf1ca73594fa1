"""Nodes that compute second moments inside the graph, so that only d x d matrices leave it.

For every distinct row view the tapped copy of a model gets

    [Cast] -> [Conv: unfold] -> Reshape to rows -> [Slice: every s-th row] -> Sub shift
        -> Transpose, MatMul: sum of z z^T
        -> ReduceSum:         sum of z
        -> Shape:             number of rows

The constants are Constant nodes: up to IR version 3 an initializer would have to be an input.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_utilrank.model.graph import all_names
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.sites.site import Patches, RowView

__all__ = ["Tap", "TappedModel", "insert_taps", "row_stride"]

# Opsets in which operators took over inputs from attributes.
SLICE_WITH_STEPS = 10
REDUCE_SUM_AXES_AS_INPUT = 13

# Rows a feature that a tensor's moment is formed from where the data have more, and rows at least.
# The covariance error falls with the root of this; its cost grows with it.
ROWS_PER_FEATURE_KEPT = 16
ROWS_KEPT = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """Where the moment of one row view comes out.

    Attributes:
        view: The rows.
        stride: Every how many-th row counts.
        outer: Output with Σ z z^T [d, d], z = x − shift.
        total: Output with Σ z [d].
        matrix: Output with the shape of the row matrix.
        row_axis: Axis of that shape which counts rows.
        shift: The shift, float64 [d].
    """

    view: RowView
    stride: int
    outer: str
    total: str
    matrix: str
    row_axis: int
    shift: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class TappedModel:
    """A model with taps.

    Attributes:
        store: The model; its outputs are the original ones, then those of the taps.
        taps: The taps.
        phases: Name of the extra input for each stride: int64 [1], the first row that counts. It
            moves from run to run, as rows of the same position would else count in every run.
    """

    store: ModelStore
    taps: tuple[Tap, ...]
    phases: dict[int, str]


def row_stride(rows: int, rows_per_run: int, width: int) -> int:
    """Every how many-th of `rows` rows is enough for a moment of the given width.

    At least 4 rows of each run count, so that every run has a say.
    """
    wanted = max(ROWS_PER_FEATURE_KEPT * width, ROWS_KEPT)
    return max(1, min(rows // wanted, rows_per_run // 4))


def view_rows(view: RowView, shape: Sequence[int]) -> int:
    """Number of rows that a tensor of the given shape holds.

    Rows of unfolded patches are counted as the input's positions over the strides, or times them.
    """
    if view.patches:
        steps = zip(shape[2:], view.patches.strides, strict=True)
        transposed = view.patches.transposed
        positions = [n * s if transposed else max(1, n // s) for n, s in steps]
        return shape[0] * math.prod(positions)
    return math.prod(shape) // view.width


def insert_taps(
    store: ModelStore,
    views: Sequence[RowView],
    observed: Mapping[str, np.ndarray],
    strides: Mapping[RowView, int],
) -> TappedModel:
    """Append taps to a copy of the model.

    Args:
        store: The model.
        views: Distinct row views.
        observed: The value of every viewed tensor on one feed: it gives rank, dtype and the shift.
        strides: Row stride of every view.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(store.proto)
    builder = _Builder(proto, store.opset)
    taps = tuple(
        builder.tap(view, np.asarray(observed[view.tensor]), strides[view]) for view in views
    )
    return TappedModel(
        store=ModelStore(proto=proto, folder=store.folder, name=store.label),
        taps=taps,
        phases=builder.phases,
    )


class _Builder:
    """Appends nodes to a model; each method returns the name of the value it makes."""

    def __init__(self, proto: onnx.ModelProto, opset: int) -> None:
        self.graph = proto.graph
        self.opset = opset
        self.taken = all_names(proto)
        self.phases: dict[int, str] = {}

    def name(self, hint: str) -> str:
        name = f"utilrank_{hint}_{len(self.taken)}"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def node(self, op: str, *inputs: str, **attrs: Any) -> str:
        out = self.name(op.lower())
        self.graph.node.append(helper.make_node(op, list(inputs), [out], name=out, **attrs))
        return out

    def constant(self, values: np.ndarray) -> str:
        return self.node("Constant", value=numpy_helper.from_array(values))

    def output(self, name: str) -> str:
        self.graph.output.append(onnx.ValueInfoProto(name=name))
        return name

    def tap(self, view: RowView, sample: np.ndarray, stride: int) -> Tap:
        x, shape = view.tensor, sample.shape
        dtype = np.dtype(np.float64 if sample.dtype == np.float64 else np.float32)
        if sample.dtype != dtype:
            # Half precision overflows in a sum of squares.
            x = self.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(dtype))
        axis = view.axis if view.axis >= 0 else len(shape) + view.axis
        thinned = 1
        if view.patches:
            x, thinned = self.unfolded(x, view.patches, dtype, stride)
            shape = (shape[0], view.width, -1)
        stride = max(1, stride // thinned) if self.opset >= SLICE_WITH_STEPS else 1
        features_first = axis < len(shape) - 1 and axis == (0 if len(shape) == 2 else 1)
        if features_first:
            rows = self.feature_rows(x, view.width, shape, stride)
            shift = np.zeros(view.width)
            if not view.patches:
                shift = _mean(sample, axis)
            z = self.node("Sub", rows, self.constant(shift[:, None].astype(dtype)))
            outer = self.node("MatMul", z, self.node("Transpose", z, perm=[1, 0]))
        else:
            # A left MatMul may have a vector for its right operand: its only axis is the feature.
            axis = max(axis, 0)
            if axis < len(shape) - 1:
                perm = [k for k in range(len(shape)) if k != axis]
                x = self.node("Transpose", x, perm=[*perm, axis])
            rows = self.node("Reshape", x, self.constant(np.array([-1, view.width])))
            rows = self.every(rows, stride, axis=0)
            shift = _mean(sample, axis)
            z = self.node("Sub", rows, self.constant(shift.astype(dtype)))
            outer = self.node("MatMul", self.node("Transpose", z, perm=[1, 0]), z)
        row_axis = 1 if features_first else 0
        return Tap(
            view=view,
            stride=thinned * stride,
            outer=self.output(outer),
            total=self.output(self.summed(z, row_axis)),
            matrix=self.output(self.node("Shape", z)),
            row_axis=row_axis,
            shift=shift.astype(dtype).astype(np.float64),
        )

    def feature_rows(self, x: str, width: int, shape: Sequence[int], stride: int) -> str:
        """[N, d, positions …] or [d, positions] as a matrix [d, rows]; copies whole runs only."""
        if len(shape) == 2:
            return self.every(x, stride, axis=1)
        x = self.node("Reshape", x, self.constant(np.array([0, 0, -1])))
        positions = math.prod(shape[2:])
        early = stride * 4 <= positions
        if early:  # fewer values to move
            x = self.every(x, stride, axis=2)
        x = self.node("Transpose", x, perm=[1, 0, 2])
        x = self.node("Reshape", x, self.constant(np.array([width, -1])))
        return x if early else self.every(x, stride, axis=1)

    def unfolded(
        self, x: str, patches: Patches, dtype: np.dtype[np.generic], stride: int
    ) -> tuple[str, int]:
        """im2col as a depthwise Conv or ConvTranspose with one-hot kernels: [N, C taps, …].

        Channel c, tap t comes out at c·taps + t, which is the order of a kernel
        [C_out, C, taps …] seen as a matrix. It honours strides, pads, auto_pad and dilations as
        the Conv itself does, and a row stride comes free as larger strides of this Conv.

        Returns:
            The value, and how many times fewer rows it has by such strides.
        """
        taps = math.prod(patches.kernel)
        kernel = np.tile(np.eye(taps, dtype=dtype), (patches.channels, 1))
        kernel = kernel.reshape(-1, 1, *patches.kernel)
        strides = list(patches.strides)
        attrs: dict[str, Any] = {"auto_pad": patches.auto_pad}
        if patches.auto_pad == "NOTSET" and not patches.output_shape:
            attrs = {"pads": list(patches.pads)}
        elif patches.auto_pad.startswith("SAME") and set(strides) == {1} and not patches.transposed:
            attrs = {"pads": _same_pads(patches)}
        each = 1
        if patches.transposed:
            kernel = kernel.reshape(patches.channels, taps, *patches.kernel)
            for key in ("output_padding", "output_shape"):
                if getattr(patches, key):
                    attrs[key] = list(getattr(patches, key))
        elif "pads" in attrs or patches.auto_pad == "VALID":  # else it depends on the strides
            each = int(stride ** (1 / len(strides)) + 1e-9)
            strides = [s * each for s in strides]
        x = self.node(
            "ConvTranspose" if patches.transposed else "Conv",
            x,
            self.constant(kernel),
            group=patches.channels,
            strides=strides,
            dilations=list(patches.dilations),
            kernel_shape=list(patches.kernel),
            **attrs,
        )
        return x, each ** len(strides)

    def every(self, x: str, stride: int, axis: int) -> str:
        if stride == 1:
            return x
        if stride not in self.phases:
            self.phases[stride] = self.name("phase")
            self.graph.input.append(
                helper.make_tensor_value_info(self.phases[stride], TensorProto.INT64, [1])
            )
        ends, axes, steps = (
            self.constant(np.array([n])) for n in (np.iinfo(np.int64).max, axis, stride)
        )
        return self.node("Slice", x, self.phases[stride], ends, axes, steps)

    def summed(self, x: str, axis: int) -> str:
        if self.opset >= REDUCE_SUM_AXES_AS_INPUT:
            return self.node("ReduceSum", x, self.constant(np.array([axis])), keepdims=0)
        return self.node("ReduceSum", x, axes=[axis], keepdims=0)


def _same_pads(patches: Patches) -> list[int]:
    """The pads that `auto_pad` SAME stands for at strides of 1, where no extent matters."""
    totals = [(k - 1) * by for k, by in zip(patches.kernel, patches.dilations, strict=True)]
    less, more = [n // 2 for n in totals], [n - n // 2 for n in totals]
    return [*less, *more] if patches.auto_pad == "SAME_UPPER" else [*more, *less]


def _mean(sample: np.ndarray, axis: int) -> np.ndarray:
    """Mean of each feature of one tensor, float64 [d]."""
    others = tuple(k for k in range(sample.ndim) if k != axis)
    if not sample.size:
        return np.zeros(sample.shape[axis])
    return np.asarray(sample.astype(np.float64).mean(others))
