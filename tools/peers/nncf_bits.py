"""NNCF on ONNX: int8 of weights and activations after training, or weights in 4 bits.

    python nncf_bits.py MODEL.onnx SAMPLES.npz OUT.onnx {int8,int4}

Its user has to say whether a model is a transformer, which is told here from several Softmax nodes.
int4 is symmetric in blocks of 32, smaller where those do not divide a matrix, and needs opset 21:
older models are converted. Only matrices of MatMul are stored so: ONNX Runtime does not run the
scales that NNCF writes for the others.
"""

import sys

import nncf
import numpy as np
import onnx
from nncf import AdvancedCompressionParameters, GroupSizeFallbackMode
from onnx import version_converter

INT4_OPSET = 21


def main() -> None:
    """Quantize as the command line says."""
    path, samples, out, bits = sys.argv[1:]
    model = onnx.load(path)
    held = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in held]
    with np.load(samples) as arrays:
        given = {name: arrays[name] for name in names}
    count = len(given[names[0]])
    feeds = [{name: x[k : k + 1] for name, x in given.items()} for k in range(count)]
    if bits == "int8":
        attention = sum(node.op_type == "Softmax" for node in model.graph.node) > 1
        made = nncf.quantize(
            model,
            nncf.Dataset(feeds),
            subset_size=count,
            model_type=nncf.ModelType.TRANSFORMER if attention else None,
        )
    else:
        made = nncf.compress_weights(
            version_converter.convert_version(model, INT4_OPSET),
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=32,
            all_layers=True,
            ignored_scope=nncf.IgnoredScope(types=["Conv", "Gather", "Gemm"], validate=False),
            advanced_parameters=AdvancedCompressionParameters(
                group_size_fallback_mode=GroupSizeFallbackMode.ADJUST
            ),
        )
        if not any(node.op_type == "DequantizeLinear" for node in made.graph.node):
            sys.exit("no MatMul with a constant: nothing is stored in 4 bits")
    onnx.save(made, out)


if __name__ == "__main__":
    main()
