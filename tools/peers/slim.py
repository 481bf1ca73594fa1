"""OnnxSlim, with its defaults: the graph is simplified, and no weight is changed.

python slim.py MODEL.onnx SAMPLES.npz OUT.onnx
"""

import sys

import onnx
from onnxslim import slim


def main() -> None:
    """Simplify as the command line says; the samples are not needed."""
    model, _, out = sys.argv[1:]
    onnx.save(slim(model), out)


if __name__ == "__main__":
    main()
