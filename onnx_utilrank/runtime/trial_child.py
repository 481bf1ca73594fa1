"""The process that tries ONNX Runtime: it prints what it found as one line of JSON."""

import json
import sys

import numpy as np
import onnxruntime as ort
from onnx.parser import parse_model

from onnx_utilrank.errors import ProviderUnavailableError, UtilrankError
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import find_provider
from onnx_utilrank.runtime.sessions import open_session

__all__ = ["main"]

# What this package is about, of fixed shape, as some providers want it.
MODEL = """<ir_version: 8, opset_import: ["" : 13]>
g (float[2,4] x) => (float[2,4] y)
<float[4,4] w = {1, 0, 2, 0, 0, 1, 0, 2, -1, 0, 1, 0, 0, -1, 0, 1}>
{ h = MatMul(x, w) y = Relu(h) }"""


def main() -> None:
    """Tell the names of providers; or try the one that is named as the argument."""
    ort.set_default_logger_severity(4)  # what it says comes in the fault
    if not sys.argv[1:]:
        found: dict[str, object] = {
            "version": ort.__version__,
            "known": ort.get_all_providers(),
            "built": ort.get_available_providers(),
        }
        print(json.dumps(found))
        return
    key = sys.argv[1]
    try:
        _try(key)
        fault = None
    except UtilrankError as e:
        fault = str(e).removeprefix(f"provider {key}: ")
    print(json.dumps({"fault": fault}))


def _try(key: str) -> None:
    """Run a model of two nodes on a provider.

    Raises:
        UtilrankError: It cannot be had, takes no node, or computes something else.
    """
    provider = find_provider(key)
    proto = parse_model(MODEL)
    session = open_session(ModelStore(proto=proto, name="a model of two nodes"), provider)
    # Small integers, which every float type holds: what comes out is exact.
    x = np.arange(-4, 4, dtype=np.float32).reshape(2, 4)
    (w,) = (ModelStore(proto=proto).array(t) for t in proto.graph.initializer)
    found = session.run({"x": x})["y"]
    if not np.array_equal(found, np.maximum(x @ w, 0)):
        raise ProviderUnavailableError(
            f"provider {provider.key}: it runs a model of two nodes and gives wrong numbers"
        )


if __name__ == "__main__":
    main()
