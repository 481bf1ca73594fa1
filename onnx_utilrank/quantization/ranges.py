"""The range of values over calibration samples, which decides their scale in int8."""

import math
from collections.abc import Iterable

import numpy as np
import onnx

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import all_names, new_name
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.quantization.scheme import Calibration
from onnx_utilrank.runtime.sessions import open_session

__all__ = ["Range", "ranges"]

# The least and the largest value.
Range = tuple[float, float]


def ranges(
    store: ModelStore, values: Iterable[str], calibration: Calibration, *, finite: bool = True
) -> dict[str, Range]:
    """The least and the largest element that values of the main graph take.

    The whole range counts, as with `CalibrationMethod.MinMax` of onnxruntime.quantization; what
    keeps 99.999 % of the elements or most of the entropy did no better on transformers and was
    worse on a CNN, at ten times the time. The extremes are taken in the graph, on any provider and
    with the user's operators, so that no activation is kept.

    Args:
        store: The model.
        values: Floating values that nodes make, and inputs.
        calibration: The samples.
        finite: Whether infinities, such as those of masks, are an error.

    Raises:
        ModelError: The model does not run, or a value is not finite.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(store.proto)
    taken = all_names(proto)
    taps: dict[str, tuple[str, str]] = {}
    for name in values:
        taps[name] = new_name(f"{name}/least", taken), new_name(f"{name}/largest", taken)
        for op_type, tap in zip(("ReduceMin", "ReduceMax"), taps[name], strict=True):
            proto.graph.node.append(onnx.helper.make_node(op_type, [name], [tap], keepdims=0))
            proto.graph.output.append(onnx.ValueInfoProto(name=tap))
    tapped = ModelStore(proto=proto, folder=store.folder, name=store.label)
    # Without optimization, for fused nodes would leave no trace of what is between.
    session = open_session(tapped, calibration.provider, optimize=False)
    found = dict.fromkeys(taps, (math.inf, -math.inf))
    wanted = [tap for pair in taps.values() for tap in pair]
    feeds = list(calibration.feeds())
    for k, feed in enumerate(feeds):
        calibration.progress("calibrating", k, len(feeds))
        seen = session.run(feed, wanted) if wanted else {}
        for name, (least, largest) in taps.items():
            low, high = float(seen[least]), float(seen[largest])
            if np.isnan([low, high]).any() or (finite and not np.isfinite([low, high]).all()):
                raise ModelError(
                    f"{store.label}: value {name!r} is not finite on the calibration data: it has "
                    "no range"
                )
            found[name] = min(found[name][0], low), max(found[name][1], high)
    calibration.progress("calibrating", len(feeds), len(feeds))
    return found
