"""This package, with its defaults; or its factors, quantized then.

python ours.py MODEL.onnx SAMPLES.npz OUT.onnx KEEP [SCHEME]
"""

import sys
from typing import Any

import onnx_utilrank


def main() -> None:
    """Compress as the command line says."""
    model, samples, out, keep, *scheme = sys.argv[1:]
    then: Any = scheme[0] if scheme else None
    config = onnx_utilrank.CompressConfig(param_ratio=float(keep), then=then)
    try:
        onnx_utilrank.compress(model, samples, config).save(out)
    except onnx_utilrank.UtilrankError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
