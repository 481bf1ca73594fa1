"""Measure what moves cost beside their multiply-accumulates.

Ordering outputs, in multiply-accumulates that a product does meanwhile:

A pivot stores some outputs of a weight as they are and makes the others of them; a Gather then puts
them in order. `onnx_utilrank/moves/pivot.py` rates an element that it moves, and the nodes that it
adds, by the multiply-accumulates that a matrix product does in the same time. This prints them for
the machine it runs on: features on the last axis, as after MatMul, and on axis 1, as after Conv.

And two Convs with some of the channels between them left out, in the time of all of them:
`onnx_utilrank/moves/shrink.py` keeps channels in multiples of as many as Convs are fast on.

Each model is timed by turns with the product that it is compared with, in one process; the figures
are medians over pairs.
"""

import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np
import onnx
import onnx.parser
from command_line import new_parser
from tables import command, markdown

from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import PROVIDERS, Provider, find_provider
from onnx_utilrank.runtime.sessions import Feed, Session, open_session

__all__ = ["main"]

COLUMNS = ("features", "on", "elements", "Gather, ns an element", "MACs an element", "start, MACs")
LEFT_OUT = (0, 1, 2, 4, 8, 16, 32)
PAIRS = ("outer channels", "channels between", "extent", "between them")
# Channels around and between two Convs, their extent, and whether a depthwise Conv lies between.
CONVS = ((32, 192, 28, True), (96, 576, 14, True), (64, 64, 80, False))
# Rows and features of a text or image transformer; channels and extent of a convolution.
MATRICES = ((197, 768), (128, 384), (50, 192))
MAPS = ((256, 14), (128, 28), (64, 56))
TINY = 8


def _model(body: str, signature: str, **constants: np.ndarray) -> ModelStore:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g {signature} {{ {body} }}'
    )
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in constants.items()
    )
    return ModelStore.load(proto)


def _seconds(session: Session, feed: Feed) -> float:
    start = time.perf_counter()
    session.run(feed)
    return time.perf_counter() - start


def _medians(sessions: Sequence[tuple[Session, Feed]], pairs: int) -> list[float]:
    for session, feed in sessions:
        session.run(feed)
    rounds = [[_seconds(session, feed) for session, feed in sessions] for _ in range(pairs)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def _gather(shape: tuple[int, ...], axis: int, provider: Provider) -> tuple[Session, Feed]:
    """A model that only orders features (twice, so that the copy of the output weighs less)."""
    rng = np.random.default_rng(0)
    dims = ",".join(map(str, shape))
    order = rng.permutation(shape[axis]).astype(np.int32)
    store = _model(
        f"h = Gather<axis={axis}>(x, order) y = Gather<axis={axis}>(h, order)",
        f"(float[{dims}] x) => (float[{dims}] y)",
        order=order,
    )
    return open_session(store, provider), {"x": rng.standard_normal(shape, dtype=np.float32)}


def _product(provider: Provider) -> tuple[Session, Feed, int]:
    n = 512
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((n, n), dtype=np.float32)
    store = _model("y = MatMul(x, w)", f"(float[{n},{n}] x) => (float[{n},{n}] y)", w=weight)
    return open_session(store, provider), {"x": weight}, n**3


def _row(shape: tuple[int, ...], axis: int, provider: Provider, pairs: int) -> tuple[str, ...]:
    product, x, macs = _product(provider)
    tiny = tuple(n if k == axis % len(shape) else 1 for k, n in enumerate(shape))
    small = tuple(min(n, TINY) for n in tiny)
    timed = [(product, x), _gather(shape, axis, provider), _gather(small, axis, provider)]
    multiplying, ordering, starting = _medians(timed, pairs)
    elements = 2 * int(np.prod(shape))
    each = max(ordering - starting, 0.0) / elements
    return (
        str(shape[axis]),
        "the last axis" if axis == -1 else f"axis {axis}",
        f"{elements // 2:,}",
        f"{1e9 * each:.2f}",
        f"{each * macs / multiplying:.0f}",
        f"{starting / 2 * macs / multiplying:,.0f}",
    )


def _convs(
    outer: int, inner: int, extent: int, depthwise: bool, provider: Provider
) -> tuple[Session, Feed]:
    """Two Convs with so many channels between them."""
    rng = np.random.default_rng(0)
    size = 1 if depthwise else 3
    shapes = {"v": (inner, outer, size, size), "w": (outer, inner, size, size)}
    pads = f"pads=[{','.join([str(size // 2)] * 4)}]"
    body = f"a = Conv<{pads}>(x, v) r = Relu(a) "
    if depthwise:
        shapes["d"] = (inner, 1, 3, 3)
        body += f"b = Conv<group={inner}, pads=[1,1,1,1]>(r, d) s = Relu(b) y = Conv(s, w)"
    else:
        body += f"y = Conv<{pads}>(r, w)"
    dims = f"float[1,{outer},{extent},{extent}]"
    held = {name: rng.standard_normal(s, dtype=np.float32) for name, s in shapes.items()}
    store = _model(body, f"({dims} x) => ({dims} y)", **held)
    x = rng.standard_normal((1, outer, extent, extent), dtype=np.float32)
    return open_session(store, provider), {"x": x}


def _channels(
    outer: int, inner: int, extent: int, depthwise: bool, provider: Provider, pairs: int
) -> tuple[str, ...]:
    kept = [inner - n for n in LEFT_OUT]
    timed = [_convs(outer, n, extent, depthwise, provider) for n in kept]
    whole, *others = _medians(timed, pairs)
    return (
        *(str(outer), str(inner), str(extent), "depthwise Conv" if depthwise else "–"),
        *(f"{seconds / whole:.2f}" for seconds in others),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = new_parser("move_costs.py", __doc__)
    parser.add_argument("--pairs", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--provider", choices=[p.key for p in PROVIDERS], default="cpu", help="default: %(default)s"
    )
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    provider = find_provider(options.provider)
    rows = [_row((1, n, m), -1, provider, options.pairs) for n, m in MATRICES]
    rows += [_row((1, c, n, n), 1, provider, options.pairs) for c, n in MAPS]
    print(f"{command(parser.prog, given)}\n")
    print(f"{markdown(COLUMNS, rows, COLUMNS[1:2])}\n")
    rows = [_channels(*each, provider, options.pairs) for each in CONVS]
    print(markdown([*PAIRS, *(f"−{n}" for n in LEFT_OUT[1:])], rows, PAIRS[3:4]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
