"""Small ONNX models as ONNX text, and what their nodes compute, in plain numpy.

A `Form` is one way to write y = W x + b in ONNX. The tests of sites, taps and surgery run over all
of `FORMS`; a new operator is covered by adding its forms here.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.plain import index_model
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.statistics.factorize import feature_scale
from onnx_utilrank.training.loop import Batch

DTYPES = {
    "float": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "double": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

Feed = dict[str, np.ndarray]
Shape = tuple[int, ...]


def model(
    signature: str,
    body: str,
    *,
    opset: int = 17,
    ir: int = 10,
    domains: str = "",
    functions: str = "",
    **initializers: np.ndarray,
) -> onnx.ModelProto:
    """A model of one graph; keyword arguments that are arrays become its initializers.

    Up to IR version 3 initializers are inputs too.
    """
    header = f'<ir_version: {ir}, opset_import: ["" : {opset}{domains}]>'
    proto = onnx.parser.parse_model(f"{header} g {signature} {{ {body} }} {functions}")
    for name, values in initializers.items():
        tensor = numpy_helper.from_array(np.asarray(values), name)
        proto.graph.initializer.append(tensor)
        if ir <= 3:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
            )
    return proto


def index(proto: onnx.ModelProto) -> GraphIndex:
    return index_model(ModelStore.load(proto))


def run(proto: onnx.ModelProto | ModelStore, feed: Feed) -> Feed:
    """Outputs by name, with ONNX Runtime's graph optimizations disabled."""
    return open_session(ModelStore.load(proto), CPU, optimize=False, threads=1).run(feed)


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def root_error(lost: np.ndarray, outputs: np.ndarray) -> float:
    """Root of the squared error relative to the outputs, [n, m] both, as the default counts it."""
    scale = feature_scale(outputs.var(0))
    return float(np.linalg.norm(lost / scale) / np.linalg.norm(outputs / scale))


def noise(seed: int, *shape: int) -> np.ndarray:
    """Normal values, float64."""
    return np.random.default_rng(seed).normal(size=shape)


def smooth(seed: int, *shape: int) -> np.ndarray:
    """Samples of which neighbours are alike along every axis but the first."""
    waves = (
        np.sin(np.arange(n) / 3 + 1).reshape(-1, *(1,) * k)
        for k, n in enumerate(reversed(shape[1:]))
    )
    return 3 * sum(waves, np.zeros(1)) + noise(seed, *shape)


def activations(seed: int, *shape: int) -> np.ndarray:
    """Values with a mean that a bias has to care for, float64."""
    return 0.7 + noise(seed, *shape)


# --- forms --------------------------------------------------------------------------------------


class Fixed:
    """The same run at each step."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def at(self, step: int) -> list[Batch]:
        del step
        return [self.batch]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to write y = α W x + b, the only site of its model.

    Attributes:
        name: Name of the form.
        proto: The model.
        inputs: Shape of each input in one feed.
        feeds: How many feeds there are; together they hold rows enough for any width here.
        weight: W [m, d], float64.
        rows: The rows x [n, d] of one feed.
        axis: Axis of the features in the output; a vector has only one.
        exact: Operators of the model when W is factored at full rank.
        corrected: The same when the lost mean goes into the bias; empty where it cannot.
        alpha: α.
        dtype: Element type of everything but ids.
        ids: Element type of inputs that hold ids of d tokens; None where they hold values.
    """

    name: str
    proto: onnx.ModelProto
    inputs: dict[str, Shape]
    feeds: int
    weight: np.ndarray
    rows: Callable[[Feed], np.ndarray]
    axis: int
    exact: list[str]
    corrected: list[str]
    alpha: float
    dtype: np.dtype[np.generic]
    ids: np.dtype[np.generic] | None = None

    def __str__(self) -> str:
        return self.name

    def data(self) -> list[Feed]:
        return [
            {
                name: self._given(1000 * k + j, shape)
                for j, (name, shape) in enumerate(self.inputs.items())
            }
            for k in range(self.feeds)
        ]

    def _given(self, seed: int, shape: Shape) -> np.ndarray:
        if self.ids is None:
            return activations(seed, *shape).astype(self.dtype)
        d = self.weight.shape[1]
        return np.random.default_rng(seed).integers(-d, d, shape, self.ids)  # also from the end

    def all_rows(self, feeds: Sequence[Feed]) -> np.ndarray:
        return np.concatenate([self.rows(feed) for feed in feeds]).astype(np.float64)

    def output_rows(self, y: np.ndarray) -> np.ndarray:
        """The output as rows [n, m], float64."""
        moved = y if y.ndim == 1 else np.moveaxis(y, self.axis, -1)
        return moved.reshape(-1, len(self.weight)).astype(np.float64)

    def rounding(self, feeds: Sequence[Feed]) -> tuple[float, float]:
        """What rounding may do to one value of the outputs, and to the norm of all together.

        Both factors have the norm √‖W‖_*, and errors of a sum of k products are independent: they
        grow with √k. Single values may be 4 deviations off.
        """
        m, d = self.weight.shape
        x = self.all_rows(feeds)
        y = np.concatenate([v.ravel() for f in feeds for v in run(self.proto, f).values()])
        w = abs(self.alpha) * float(np.linalg.norm(self.weight, "nuc")) * math.sqrt(d + min(m, d))
        eps = float(np.finfo(self.dtype).eps)
        one = np.linalg.norm(x, axis=1).max() * w + np.abs(y).max()
        together = np.linalg.norm(x) * w + np.linalg.norm(y.astype(np.float64))
        return 4 * eps * float(one), eps * float(together)


def last_axis(feed: Feed) -> np.ndarray:
    x = feed["x"]
    return x.reshape(-1, x.shape[-1])


def second_last_axis(feed: Feed) -> np.ndarray:
    x = feed["x"]
    return x[None] if x.ndim == 1 else np.moveaxis(x, -2, -1).reshape(-1, x.shape[-2])


M, D = 5, 7
W = noise(1, M, D) / math.sqrt(D)
TALL = noise(2, D, M) / math.sqrt(M)
B = noise(3, M)


def form(
    name: str,
    inputs: dict[str, Shape],
    outputs: str,
    body: str,
    *,
    exact: str,
    corrected: str | None = None,
    weight: np.ndarray = W,
    rows: Callable[[Feed], np.ndarray] = last_axis,
    axis: int = -1,
    alpha: float = 1.0,
    dtype: str = "float",
    ids: str | None = None,
    fixed: bool = False,
    feeds: int = 10,
    opset: int = 17,
    ir: int = 10,
    domains: str = "",
    **initializers: np.ndarray | None,
) -> Form:
    """A form; inputs have dynamic sizes unless `fixed`; floating initializers get its dtype."""
    dims = {
        key: [str(n) if fixed or k >= len(shape) - 1 else f"{key}{k}" for k, n in enumerate(shape)]
        for key, shape in inputs.items()
    }
    kinds = {key: f"[{','.join(shape)}]" if shape else "" for key, shape in dims.items()}
    given = ", ".join(f"{ids or dtype}{shape} {key}" for key, shape in kinds.items())
    cast = {
        key: a.astype(DTYPES[dtype]) if a.dtype == np.float64 else a
        for key, a in initializers.items()
        if a is not None
    }
    held = weight.astype(DTYPES[dtype])
    return Form(
        name=name,
        proto=model(
            f"({given}) => ({dtype}{outputs} y)", body, opset=opset, ir=ir, domains=domains, **cast
        ),
        inputs=inputs,
        feeds=feeds,
        weight=held.astype(np.float64),
        rows=rows,
        axis=axis,
        exact=exact.split(),
        corrected=(exact if corrected is None else corrected).split(),
        alpha=alpha,
        dtype=DTYPES[dtype],
        ids=None if ids is None else np.dtype(ids),
    )


# --- MatMul -------------------------------------------------------------------------------------

CHAIN = "MatMul MatMul"
WITH_BIAS = "MatMul MatMul Add"
DIMS = ("", "[a]", "[a,b]", "[a,b,c]", "[a,b,c,e]", "[a,b,c,e,f]")
X_SHAPES = ((), (D,), (12, D), (3, 4, D), (2, 2, 3, D))
LEFT_SHAPES = ((), (D,), (D, 12), (3, D, 4), (2, 2, D, 3))


def right(rank: int, **changes: object) -> Form:
    given = {
        "name": f"matmul_right_x{rank}",
        "inputs": {"x": X_SHAPES[rank]},
        "outputs": DIMS[rank],
        "body": "y = MatMul(x, W)",
        "exact": CHAIN,
        "corrected": WITH_BIAS,
        "feeds": 64 if rank == 1 else 10,
        "W": W.T,
    }
    return form(**given | changes)  # type: ignore[arg-type]


def left(rank: int, **changes: object) -> Form:
    # Without an Add there is no bias to correct: it would have to be a column.
    given = {
        "name": f"matmul_left_x{rank}",
        "inputs": {"x": LEFT_SHAPES[rank]},
        "outputs": DIMS[rank],
        "body": "y = MatMul(W, x)",
        "exact": CHAIN,
        "corrected": "",
        "rows": second_last_axis,
        "axis": -2,
        "fixed": True,
        "feeds": 64 if rank == 1 else 10,
        "W": W,
    }
    return form(**given | changes)  # type: ignore[arg-type]


def added(name: str, bias: np.ndarray, body: str = "h = MatMul(x, W) y = Add(h, b)") -> Form:
    return right(2, name=name, body=body, exact=WITH_BIAS, corrected=WITH_BIAS, b=bias)


MATMULS = [
    *(right(rank) for rank in (1, 2, 3, 4)),
    *(left(rank) for rank in (1, 2, 3, 4)),
    right(2, name="matmul_right_tall", weight=TALL, inputs={"x": (12, M)}, W=TALL.T),
    left(2, name="matmul_left_tall", weight=TALL, inputs={"x": (M, 12)}, W=TALL),
    right(2, name="matmul_right_w3", outputs=DIMS[3], W=W.T[None]),
    right(3, name="matmul_right_w4", outputs=DIMS[4], W=W.T[None, None]),
    left(2, name="matmul_left_w3", outputs=DIMS[3], W=W[None]),
    left(3, name="matmul_left_w4", outputs=DIMS[4], W=W[None, None]),
    added("add_m", B),
    added("add_1m", B[None]),
    added("add_before", B, "h = MatMul(x, W) y = Add(b, h)"),
    right(
        2,
        name="add_11m_raises_the_rank",
        body="h = MatMul(x, W) y = Add(h, b)",
        outputs=DIMS[3],
        exact=WITH_BIAS,
        corrected=WITH_BIAS,
        b=B[None, None],
    ),
    right(
        2,
        name="add_scalar_is_no_bias",
        body="h = MatMul(x, W) y = Add(h, b)",
        exact=WITH_BIAS,
        corrected="MatMul MatMul Add Add",
        b=B[:1],
    ),
    right(
        2,
        name="add_of_a_row_each_is_no_bias",
        body="h = MatMul(x, W) y = Add(h, b)",
        exact=WITH_BIAS,
        corrected="MatMul MatMul Add Add",
        b=noise(4, 12, M),
    ),
    right(
        2,
        name="add_of_another_value_is_no_bias",
        inputs={"x": (12, D), "z": (12, M)},
        body="h = MatMul(x, W) y = Add(h, z)",
        exact=WITH_BIAS,
        corrected="MatMul MatMul Add Add",
    ),
    right(
        2,
        name="add_with_a_second_reader_is_no_bias",
        body="h = MatMul(x, W) y = Add(h, b) z = Neg(h)",
        exact="MatMul MatMul Add Neg",
        corrected="MatMul MatMul Add Add Neg",
        b=B,
    ),
    left(
        2,
        name="add_m1_left",
        body="h = MatMul(W, x) y = Add(h, b)",
        exact=WITH_BIAS,
        corrected=WITH_BIAS,
        b=B[:, None],
    ),
]

# --- Gemm ---------------------------------------------------------------------------------------

ROWS = 12


def gemm(name: str, c: np.ndarray | None = None, **changes: object) -> Form:
    """Y = x W^T + C, or W x + C where `side` is left."""
    options = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0, "side": "right"}
    trans_a, trans_b, alpha, beta, side = (changes.pop(k, v) for k, v in options.items())
    on_right = side == "right"
    x_turned, w_turned = (trans_a, trans_b) if on_right else (trans_b, trans_a)
    weight = W.T if on_right else W
    x_last = on_right != bool(x_turned)
    attrs = f"transA={trans_a}, transB={trans_b}, alpha={alpha}, beta={beta}"
    operands = ("x, W" if on_right else "W, x") + ("" if c is None else ", C")
    plain = c is None and alpha == 1.0
    turn = "Transpose " if x_turned else ""
    given = {
        "inputs": {"x": (ROWS, D) if x_last else (D, ROWS)},
        "outputs": "[a,b]",
        "body": f"y = Gemm<{attrs}>({operands})",
        "exact": f"{turn}MatMul {'MatMul' if plain else 'Gemm'}",
        "corrected": f"{turn}MatMul Gemm",
        "rows": last_axis if x_last else second_last_axis,
        "axis": -1 if on_right else -2,
        "alpha": alpha,
        "fixed": True,
        "W": weight.T if w_turned else weight,
        **({} if c is None else {"C": c}),
    }
    return form(name, **given | changes)  # type: ignore[arg-type]


def gemm_turned(side: str, trans_a: int, trans_b: int) -> Form:
    return gemm(
        f"gemm_{side}_{trans_a}{trans_b}",
        B if side == "right" else B[:, None],
        side=side,
        transA=trans_a,
        transB=trans_b,
        alpha=0.5,
        beta=2.0,
    )


GEMMS = [
    *(gemm_turned(*form) for form in itertools.product(("right", "left"), (0, 1), (0, 1))),
    gemm("gemm_no_c"),
    gemm("gemm_no_c_alpha", alpha=-1.5),
    gemm("gemm_no_c_left", side="left"),
    gemm("gemm_no_c_alpha_left", side="left", alpha=-1.5),
    gemm("gemm_c_scalar", B[0]),
    gemm("gemm_c_1", B[:1]),
    gemm("gemm_c_1m", B[None]),
    gemm("gemm_c_n1", noise(4, ROWS, 1), corrected=""),
    gemm("gemm_c_nm", noise(4, ROWS, M), corrected=""),
    gemm("gemm_c_scalar_left", B[0], side="left"),
    gemm("gemm_c_n_left", noise(4, ROWS), side="left", corrected=""),
    gemm("gemm_c_mn_left", noise(4, M, ROWS), side="left", corrected=""),
    gemm("gemm_beta_0_ignores_c", B, beta=0.0),
    gemm(
        "gemm_c_computed",
        inputs={"x": (ROWS, D), "z": (M,)},
        body="c = Neg(z) y = Gemm<alpha=2.0>(x, W, c)",
        alpha=2.0,
        exact="Neg MatMul Gemm",
        corrected="",
    ),
    gemm(
        "gemm_beta_0_frees_computed_c",
        inputs={"x": (ROWS, D), "z": (ROWS, 2 * M)},
        body="c, rest = Split<axis=1>(z, sizes) y = Gemm<beta=0.0>(x, W, c)",
        exact="Split MatMul Gemm",
        corrected="MatMul Gemm",
        sizes=np.array([M, M]),
    ),
    gemm(
        "gemm_alpha_then_add",
        alpha=3.0,
        body="h = Gemm<alpha=3.0>(x, W) y = Add(h, b)",
        exact="MatMul Gemm Add",
        corrected="MatMul Gemm Add",
        b=B,
    ),
    gemm("gemm_tall", weight=TALL, inputs={"x": (ROWS, M)}, c=noise(5, D), W=TALL.T),
]

# --- Conv ---------------------------------------------------------------------------------------


def unfold(
    x: np.ndarray,
    kernel: Shape,
    strides: Shape,
    dilations: Shape,
    before: Shape,
    after: Shape,
) -> np.ndarray:
    """im2col by plain loops: the rows that a Conv's outputs see, padding zeros included."""
    padded = np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    positions = [
        (n - (k - 1) * step - 1) // s + 1
        for n, k, step, s in zip(padded.shape[2:], kernel, dilations, strides, strict=True)
    ]
    rows = []
    for image in padded:
        for position in itertools.product(*map(range, positions)):
            row = []
            for channel in image:
                for tap in itertools.product(*map(range, kernel)):
                    at = zip(position, strides, tap, dilations, strict=True)
                    row.append(channel[tuple(p * s + t * step for p, s, t, step in at)])
            rows.append(row)
    return np.array(rows)


def same_pads(
    sizes: Sequence[int], kernel: Shape, strides: Shape, dilations: Shape, *, upper: bool
) -> tuple[Shape, Shape]:
    """Padding of auto_pad SAME_UPPER and SAME_LOWER: ⌈n / stride⌉ positions."""
    totals = [
        max((-(-n // s) - 1) * s + (k - 1) * step + 1 - n, 0)
        for n, k, s, step in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    return (less, more) if upper else (more, less)


def conv(name: str, sizes: Shape, kernel: Shape, **changes: object) -> Form:
    """A Conv over an input [2, C, *sizes] with a kernel [5, C, *kernel]."""
    spatial, channels = len(kernel), 6 if math.prod(kernel) == 1 else 2
    ones, zeros = (1,) * spatial, (0,) * spatial
    given: dict[str, object] = {}
    strides = changes.pop("strides", ones)
    dilations = changes.pop("dilations", ones)
    before, after = changes.pop("pads", (zeros, zeros))  # type: ignore[misc]
    auto_pad = changes.pop("auto_pad", None)
    bias = changes.pop("bias", None)
    attrs = [
        f"{key}={list(value)}"  # type: ignore[call-overload]
        for key, value, default in (
            ("strides", strides, ones),
            ("dilations", dilations, ones),
            ("pads", (*before, *after), (*zeros, *zeros)),
        )
        if value != default
    ]
    if auto_pad:
        attrs.append(f'auto_pad="{auto_pad}"')
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        upper = auto_pad == "SAME_UPPER"
        before, after = same_pads(sizes, kernel, strides, dilations, upper=upper)  # type: ignore
    weight = noise(6, M, channels, *kernel) / math.sqrt(channels * math.prod(kernel))

    def rows(feed: Feed) -> np.ndarray:
        return unfold(feed["x"], kernel, strides, dilations, before, after)  # type: ignore

    given = {
        "inputs": {"x": (2, channels, *sizes)},
        "outputs": DIMS[spatial + 2],
        "body": f"y = Conv<{', '.join(attrs)}>(x, W{'' if bias is None else ', b'})".replace(
            "<>", ""
        ),
        "exact": "Conv Conv",
        "weight": weight.reshape(M, -1),
        "rows": rows,
        "axis": 1,
        "fixed": True,
        "W": weight,
        **({} if bias is None else {"b": bias}),
    }
    return form(name, **given | changes)  # type: ignore[arg-type]


PLANE, THREE = (6, 7), (3, 3)
CONV_ADD = {"body": "h = Conv(x, W) y = Add(h, b)", "exact": "Conv Conv Add"}

CONVS = [
    conv("conv1d", (20,), (3,), pads=((1,), (1,))),
    conv("conv2d", PLANE, THREE, pads=((1, 1), (1, 1))),
    conv("conv3d", (3, 4, 5), (2, 2, 2)),
    conv("conv2d_bias", PLANE, THREE, bias=B),
    conv("conv2d_strides", (9, 12), THREE, strides=(2, 3), pads=((1, 1), (1, 1))),
    conv("conv2d_uneven_pads", PLANE, THREE, pads=((2, 0), (1, 3)), bias=B),
    conv("conv2d_dilations", (9, 9), THREE, dilations=(2, 3), pads=((1, 1), (1, 1))),
    conv("conv2d_rectangle", PLANE, (1, 5)),
    conv("conv2d_same_upper", (9, 8), (2, 3), auto_pad="SAME_UPPER", strides=(2, 2)),
    conv("conv2d_same_lower", (9, 8), (2, 3), auto_pad="SAME_LOWER", strides=(2, 2), bias=B),
    conv("conv2d_valid_dilated", (9, 8), (2, 3), auto_pad="VALID", dilations=(2, 1)),
    conv("conv2d_valid", PLANE, THREE, auto_pad="VALID"),
    conv("conv3d_strides", (4, 5, 6), (2, 1, 2), strides=(1, 2, 2), bias=B),
    conv("conv1d_pointwise", (20,), (1,)),
    conv("conv2d_pointwise", PLANE, (1, 1), bias=B),
    conv("conv3d_pointwise", (2, 3, 4), (1, 1, 1)),
    conv("conv2d_pointwise_strides", (9, 9), (1, 1), strides=(2, 2)),
    conv("conv2d_pointwise_pads", PLANE, (1, 1), pads=((1, 0), (0, 1))),
    conv(
        "conv2d_computed_bias",
        PLANE,
        THREE,
        inputs={"x": (2, 2, *PLANE), "z": (M,)},
        body="b = Neg(z) y = Conv(x, W, b)",
        exact="Neg Conv Conv",
        corrected="",
    ),
    conv("conv2d_add_m11", PLANE, THREE, **CONV_ADD, b=B[:, None, None]),
    conv("conv2d_add_1m11", PLANE, THREE, **CONV_ADD, b=B[None, :, None, None]),
    conv("conv2d_add_a_row_is_no_bias", PLANE, THREE, **CONV_ADD, b=noise(7, 5)),
    conv("conv1d_add_m1", (20,), (3,), **CONV_ADD, b=B[:, None]),
]

# --- ConvTranspose ------------------------------------------------------------------------------


def spread(
    x: np.ndarray, kernel: Shape, strides: Shape, dilations: Shape, before: Shape, sizes: Shape
) -> np.ndarray:
    """What each output position of a ConvTranspose sees, by plain loops: mostly zeros."""
    taps = list(itertools.product(*map(range, kernel)))
    rows = np.zeros((len(x), *sizes, x.shape[1], len(taps)))
    for position in itertools.product(*map(range, x.shape[2:])):
        for t, tap in enumerate(taps):
            at = zip(position, strides, tap, dilations, before, strict=True)
            to = tuple(p * s + k * step - cut for p, s, k, step, cut in at)
            if all(0 <= p < n for p, n in zip(to, sizes, strict=True)):
                rows[(slice(None), *to, slice(None), t)] = x[(slice(None), slice(None), *position)]
    return rows.reshape(-1, x.shape[1] * len(taps))


def conv_transpose(name: str, sizes: Shape, kernel: Shape, **changes: object) -> Form:
    """A ConvTranspose over an input [2, 2, *sizes] with a kernel [2, m, *kernel]."""
    spatial, channels = len(kernel), 6 if math.prod(kernel) == 1 else 2
    m: int = changes.pop("m", M)  # type: ignore[assignment]
    ones, zeros = (1,) * spatial, (0,) * spatial
    strides: Shape = changes.pop("strides", ones)  # type: ignore[assignment]
    dilations: Shape = changes.pop("dilations", ones)  # type: ignore[assignment]
    before, after = changes.pop("pads", (zeros, zeros))  # type: ignore[misc]
    extra: Shape = changes.pop("output_padding", zeros)  # type: ignore[assignment]
    stated = changes.pop("output_shape", None)
    auto_pad = changes.pop("auto_pad", None)
    bias = changes.pop("bias", None)
    attrs = [
        f"{key}={list(value)}"
        for key, value, default in (
            ("strides", strides, ones),
            ("dilations", dilations, ones),
            ("pads", (*before, *after), (*zeros, *zeros)),
            ("output_padding", extra, zeros),
            ("output_shape", stated or (), ()),
        )
        if tuple(value) != default
    ]
    full = [
        (n - 1) * s + (k - 1) * step + 1 + e
        for n, k, s, step, e in zip(sizes, kernel, strides, dilations, extra, strict=True)
    ]
    made = tuple(f - b - a for f, b, a in zip(full, before, after, strict=True))
    if auto_pad:
        attrs.append(f'auto_pad="{auto_pad}"')
    if stated or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        made = stated or tuple(n * s for n, s in zip(sizes, strides, strict=True))
        totals = [f - n for f, n in zip(full, made, strict=True)]
        upper = auto_pad == "SAME_UPPER"
        before = tuple(t // 2 if upper else t - t // 2 for t in totals)
    weight = noise(6, channels, m, *kernel) / math.sqrt(channels * math.prod(kernel))
    operands = "x, W" if bias is None else "x, W, b"
    given = {
        "inputs": {"x": (2, channels, *sizes)},
        "outputs": DIMS[spatial + 2],
        "body": f"y = ConvTranspose<{', '.join(attrs)}>({operands})".replace("<>", ""),
        "exact": "ConvTranspose Conv",
        "weight": np.moveaxis(weight, 1, 0).reshape(m, -1),
        "rows": lambda feed: spread(feed["x"], kernel, strides, dilations, before, made),
        "axis": 1,
        "fixed": True,
        "W": weight,
        **({} if bias is None else {"b": bias}),
    }
    return form(f"conv_transpose{name}", **given | changes)  # type: ignore[arg-type]


SMALL = (4, 5)
CONV_TRANSPOSES = [
    conv_transpose("1d", (12,), (3,), strides=(2,)),
    conv_transpose("2d", SMALL, THREE),
    conv_transpose("3d", (2, 3, 3), (2, 2, 2), strides=(1, 2, 1), bias=B),
    conv_transpose("_bias", SMALL, THREE, strides=(2, 2), pads=((1, 1), (1, 1)), bias=B),
    conv_transpose(
        "_output_padding",
        SMALL,
        THREE,
        strides=(2, 3),
        pads=((1, 0), (1, 1)),
        output_padding=(1, 2),
        bias=B,
    ),
    conv_transpose("_dilations", SMALL, (2, 3), strides=(2, 1), dilations=(3, 2)),
    conv_transpose("_same_upper", SMALL, THREE, strides=(2, 2), auto_pad="SAME_UPPER"),
    conv_transpose("_same_lower", SMALL, THREE, strides=(2, 2), auto_pad="SAME_LOWER", bias=B),
    conv_transpose("_valid", SMALL, THREE, strides=(2, 2), auto_pad="VALID"),
    conv_transpose("_output_shape", SMALL, THREE, strides=(2, 2), output_shape=(8, 10), bias=B),
    conv_transpose("_tall", SMALL, (1, 2), m=7, strides=(1, 2), bias=noise(5, 7)),
    conv_transpose("_pointwise", SMALL, (1, 1), bias=B),
    conv_transpose(
        "_add",
        SMALL,
        THREE,
        body="h = ConvTranspose(x, W) y = Add(h, b)",
        exact="ConvTranspose Conv Add",
        b=B[:, None, None],
    ),
]


# --- Gather --------------------------------------------------------------------------------------


def one_hot(feed: Feed) -> np.ndarray:
    return np.eye(D)[feed["x"].reshape(-1)]


def gathered(name: str, shape: Shape = (3, 4), **changes: object) -> Form:
    """Tokens of a vocabulary of D looked up in a table of M features; ids may be negative."""
    given = {
        "inputs": {"x": shape},
        "outputs": DIMS[len(shape) + 1],
        "body": "y = Gather(T, x)",
        "exact": "Gather MatMul",
        "corrected": "Gather MatMul Add",
        "rows": one_hot,
        "ids": "int64",
        "T": W.T,
        **({} if shape else {"feeds": 64}),
    }
    return form(f"gather_{name}", **given | changes)  # type: ignore[arg-type]


TABLE_BEHIND = {"T": None, "U": W}
GATHERS = [
    gathered("scalar", ()),
    gathered("ids1", (12,)),
    gathered("ids2"),
    gathered("ids3", (2, 3, 4)),
    gathered("int32", ids="int32"),
    gathered("axis_from_the_end", body="y = Gather<axis=-2>(T, x)"),
    gathered("opset7", opset=7),
    gathered("opset11", opset=11),
    gathered(
        "ids_computed",
        body="i = Cast<to=7>(x) y = Gather(T, i)",
        ids="int32",
        exact="Cast Gather MatMul",
        corrected="Cast Gather MatMul Add",
    ),
    gathered("transposed", body="T = Transpose(U) y = Gather(T, x)", **TABLE_BEHIND),
    gathered(
        "add",
        body="h = Gather(T, x) y = Add(h, b)",
        exact="Gather MatMul Add",
        b=B,
    ),
    gathered("float16", dtype="float16"),
    gathered("double", dtype="double"),
]

# --- where the weight comes from, versions, types -----------------------------------------------

TEXT = f"float[{D},{M}] {{{', '.join(f'{w:.9g}' for w in W.T.astype(np.float32).flat)}}}"
HALF = W.astype(np.float16)


def behind(name: str, body: str, **changes: object) -> Form:
    return right(2, name=f"weight_{name}", body=body, **changes)


def chained(dtype: str) -> Form:
    """Every layout operator in a row, in one type."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(DTYPES[dtype])
    return behind(
        f"chained_{dtype}",
        f"A = Identity(W) B = Cast<to={kind}>(A) F = Flatten<axis=1>(B) E = Unsqueeze(F, a) "
        "S = Squeeze(E, a) T = Transpose(S) G = Reshape(T, s) V = Identity(G) y = MatMul(x, V)",
        dtype=dtype,
        W=W,
        a=np.array([0]),
        s=np.array([D, -1]),
    )


STORED = [
    behind("constant", f"V = Constant<value = {TEXT}>() y = MatMul(x, V)", W=None),
    behind(
        "constant_transposed_twice",
        f"U = Constant<value = {TEXT}>() T = Transpose(U) V = Transpose(T) y = MatMul(x, V)",
        W=None,
    ),
    behind("transpose", "V = Transpose<perm=[1,0]>(W) y = MatMul(x, V)", W=W),
    behind(
        "reshape",
        "V = Reshape(W, s) y = MatMul(x, V)",
        W=W.T.reshape(-1),
        s=np.array([D, -1]),
    ),
    behind("identity", "V = Identity(W) y = MatMul(x, V)"),
    behind("cast", "V = Cast<to=1>(W) y = MatMul(x, V)", weight=HALF, W=HALF.T),
    behind("squeeze", "V = Squeeze(W, a) y = MatMul(x, V)", W=W.T[None], a=np.array([0])),
    behind("squeeze_attribute", "V = Squeeze<axes=[0]>(W) y = MatMul(x, V)", opset=11, W=W.T[None]),
    behind("unsqueeze", "V = Unsqueeze(W, a) y = MatMul(x, V)", outputs="[a,b,c]", a=np.array([0])),
    behind(
        "unsqueeze_attribute",
        "V = Unsqueeze<axes=[0, 1]>(W) y = MatMul(x, V)",
        outputs=DIMS[4],
        opset=11,
    ),
    conv(
        "conv_bias_unsqueeze_attribute",
        PLANE,
        THREE,
        body="h = Conv(x, W) c = Unsqueeze<axes=[1, 2]>(b) y = Add(h, c)",
        exact="Conv Conv Unsqueeze Add",
        corrected="Conv Conv Add",
        opset=9,
        b=B,
    ),
    *(chained(kind) for kind in DTYPES if kind != "bfloat16"),
    behind(
        "cast_down",
        "V = Cast<to=10>(W) y = MatMul(x, V)",
        dtype="float16",
        weight=HALF,
        # Values that the cast keeps, in the wider type.
        W=HALF.T.astype(np.float32),
    ),
    conv(
        "weight_conv_chained",
        PLANE,
        THREE,
        body="A = Squeeze(W, a) F = Reshape(A, s) I = Identity(F) V = Transpose<perm=[1,0,2,3]>(I) "
        "y = Conv(x, V)",
        W=np.moveaxis(conv("", PLANE, THREE).weight.reshape(M, 2, *THREE), 1, 0)[None],
        a=np.array([0]),
        s=np.array([2, M, *THREE]),
    ),
    behind("flatten", "V = Flatten(W) y = MatMul(x, V)", W=W.T[:, None]),
    gemm(
        "weight_gemm_identity",
        B,
        body="V = Identity(W) c = Identity(C) y = Gemm(x, V, c)",
        exact="Identity MatMul Gemm",
        corrected="MatMul Gemm",
    ),
    conv(
        "weight_conv_reshape",
        PLANE,
        THREE,
        body="V = Reshape(W, s) y = Conv(x, V)",
        W=conv("", PLANE, THREE).weight,
        s=np.array([M, 2, *THREE]),
    ),
]
AFFINE = "t = Transpose(V) h = MatMul(x, t) y = Add(h, b)"


def versions() -> list[Form]:
    made = []
    for opset in (7, 9, 11, 13, 17, 21):
        made += [
            right(2, name=f"matmul_opset{opset}", opset=opset),
            right(
                2,
                name=f"transpose_add_opset{opset}",
                opset=opset,
                body=AFFINE,
                exact=WITH_BIAS,
                corrected=WITH_BIAS,
                W=None,
                V=W,
                b=B,
            ),
            gemm(f"gemm_opset{opset}", B, transB=1, alpha=2.0, opset=opset),
            conv(f"conv_opset{opset}", PLANE, THREE, opset=opset, bias=B),
        ]
    for opset in (7, 8):
        made += [
            right(2, name=f"matmul_ir3_opset{opset}", opset=opset, ir=3),
            gemm(f"gemm_ir3_opset{opset}", B, opset=opset, ir=3),
            conv(f"conv_ir3_opset{opset}", PLANE, THREE, opset=opset, ir=3, bias=B),
        ]
    return made


TYPES = [
    right(3, name="matmul_float16", dtype="float16"),
    left(2, name="matmul_left_float16", dtype="float16"),
    gemm("gemm_float16", B, dtype="float16"),
    conv("conv_float16", PLANE, THREE, dtype="float16", bias=B),
    right(3, name="matmul_double", dtype="double"),
    left(3, name="matmul_left_double", dtype="double"),
    gemm("gemm_double", B, dtype="double", transA=1),
]

# --- products within other operators ------------------------------------------------------------

MICROSOFT = ', "com.microsoft" : 1'
# A LeakyRelu of slope 1, and a Clip of far limits, let everything pass.
OPEN = 'activation="LeakyRelu", activation_alpha=1.0'
OPEN_CONV = 'activation="LeakyRelu", activation_params=[1.0]'


def fused_matmul(name: str, body: str, exact: str, **changes: object) -> Form:
    corrected = exact.replace("MatMul MatMul", "MatMul MatMul Add")
    given = {"exact": exact, "corrected": corrected, "body": body, "domains": MICROSOFT}
    return right(2, **given | {"name": f"fused_matmul{name}"} | changes)


def fused_conv(
    name: str, attrs: str, exact: str, operands: str = "x, W, b", **more: object
) -> Form:
    body = f"y = com.microsoft.FusedConv<{attrs}>({operands})".replace("<>", "")
    given = {"body": body, "exact": exact, "domains": MICROSOFT, "b": B}
    return conv(f"fused_conv{name}", PLANE, THREE, **given | more)


SCALED = "MatMul MatMul Constant Mul"
FUSED = [
    fused_matmul("", "y = com.microsoft.FusedMatMul(x, W)", CHAIN),
    fused_matmul("_alpha", "y = com.microsoft.FusedMatMul<alpha=0.5>(x, W)", SCALED, alpha=0.5),
    fused_matmul(
        "_turned_weight",
        "y = com.microsoft.FusedMatMul<transB=1, alpha=-2.0>(x, W)",
        SCALED,
        alpha=-2.0,
        W=W,
    ),
    fused_matmul(
        "_turned_input",
        "y = com.microsoft.FusedMatMul<transA=1>(x, W)",
        "Transpose MatMul MatMul",
        inputs={"x": (D, 12)},
        rows=second_last_axis,
        fixed=True,
    ),
    fused_matmul(
        "_float16",
        "y = com.microsoft.FusedMatMul<alpha=0.5>(x, W)",
        SCALED,
        alpha=0.5,
        dtype="float16",
    ),
    left(
        2,
        name="fused_matmul_left",
        body="y = com.microsoft.FusedMatMul<transA=1, alpha=3.0>(W, x)",
        exact=SCALED,
        alpha=3.0,
        domains=MICROSOFT,
        W=W.T,
    ),
    gemm(
        "fused_gemm",
        body=f"y = com.microsoft.FusedGemm<{OPEN}, alpha=0.5, transB=1>(x, W, C)",
        exact="MatMul Gemm LeakyRelu",
        corrected="MatMul Gemm LeakyRelu",
        alpha=0.5,
        domains=MICROSOFT,
        W=W,
        c=B,
    ),
    fused_conv("", "", "Conv Conv"),
    fused_conv(
        "_activation",
        f"pads=[1, 1, 1, 1], {OPEN_CONV}",
        "Conv Conv LeakyRelu",
        pads=((1, 1), (1, 1)),
    ),
    fused_conv(
        "_clip",
        'activation="Clip", activation_params=[-1000.0, 1000.0]',
        "Conv Conv Constant Constant Clip",
    ),
    fused_conv(
        "_clip_opset10",
        'activation="Clip", activation_params=[-1000.0, 1000.0]',
        "Conv Conv Clip",
        opset=10,
    ),
    fused_conv(
        "_sum",
        OPEN_CONV,
        "Conv Conv Add LeakyRelu",
        "x, W, b, z",
        inputs={"x": (2, 2, *PLANE), "z": (2, M, 4, 5)},
    ),
]


def einsum(
    name: str, equation: str, exact: str, x: Shape, held: np.ndarray, **more: object
) -> Form:
    given = {
        "inputs": {"x": x},
        "outputs": DIMS[len(equation.split("->")[1])],
        "body": f'y = Einsum<equation="{equation}">(x, W)',
        "exact": exact,
        "corrected": exact.replace("MatMul MatMul", "MatMul MatMul Add"),
        "fixed": True,
        "W": held,
    }
    return form(f"einsum_{name}", **given | more)


SIX = noise(8, 6, 11) / math.sqrt(11)  # six outputs, as heads of three
JOINED = noise(9, M, 6) / math.sqrt(6)  # six inputs, as heads of three
EINSUMS = [
    einsum("plain", "bsd,dh->bsh", CHAIN, (3, 4, D), W.T),
    einsum("turned", "bsd,hd->bsh", CHAIN, (3, 4, D), W),
    einsum(
        "heads_made",
        "bsd,dnh->bsnh",
        "MatMul MatMul Constant Reshape",
        (3, 4, 11),
        SIX.T.reshape(11, 2, 3),
        weight=SIX,
    ),
    einsum(
        "heads_read",
        "bsnh,nhd->bsd",
        "Constant Reshape MatMul MatMul",
        (3, 4, 2, 3),
        JOINED.T.reshape(2, 3, M),
        weight=JOINED,
        rows=lambda feed: feed["x"].reshape(-1, 6),
    ),
    einsum(
        "channels",
        "bchw,oc->bohw",
        "Transpose MatMul MatMul Transpose",
        (2, D, 3, 4),
        W,
        rows=lambda feed: np.moveaxis(feed["x"], 1, -1).reshape(-1, D),
        axis=1,
    ),
    einsum(
        "first",
        "hd,bsd->bsh",
        CHAIN,
        (3, 4, D),
        W,
        body='y = Einsum<equation=" hd, bsd -> bsh ">(W, x)',
    ),
    einsum(
        "implicit", "bsd,dt->bst", CHAIN, (3, 4, D), W.T, body='y = Einsum<equation="bsd,dt">(x, W)'
    ),
]

FORMS = [*MATMULS, *GEMMS, *CONVS, *CONV_TRANSPOSES, *FUSED, *EINSUMS, *STORED, *versions(), *TYPES]

# ONNX Runtime has no CPU kernels for these: they are rewritten, not run.
UNRUNNABLE = [
    right(2, name="matmul_bfloat16", dtype="bfloat16"),
    chained("bfloat16"),
    gemm("gemm_bfloat16", B, dtype="bfloat16", alpha=2.0),
    conv("conv_bfloat16", PLANE, THREE, dtype="bfloat16", opset=22, bias=B),
    conv("conv_double", PLANE, THREE, dtype="double", bias=B),
]

assert len({f.name for f in (*FORMS, *UNRUNNABLE)}) == len(FORMS) + len(UNRUNNABLE)
