"""This package, with its defaults; or its factors, quantized then.

python ours.py MODEL.onnx SAMPLES.npz OUT.onnx KEEP [SCHEME]
"""

import sys

import onnx_utilrank


def main() -> None:
    """Compress as the command line says."""
    model, samples, out, keep, *scheme = sys.argv[1:]
    config = onnx_utilrank.CompressConfig(param_ratio=float(keep), then=next(iter(scheme), None))
    try:
        onnx_utilrank.compress(model, samples, config).save(out)
    except onnx_utilrank.UtilrankError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
