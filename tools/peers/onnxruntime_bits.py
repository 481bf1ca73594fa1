"""ONNX Runtime's own quantization: int8 of weights and activations, or weights in 4 bits.

    python onnxruntime_bits.py MODEL.onnx SAMPLES.npz OUT.onnx {int8,int4}

int8 is static, in the QDQ form with a scale a channel, after the preparation that its documentation
asks for; int4 is MatMulNBits in blocks of 32.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process


class Samples(CalibrationDataReader):  # type: ignore[misc]
    """The samples one by one."""

    def __init__(self, model: str, samples: str) -> None:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        with np.load(samples) as arrays:
            held = {name: arrays[name] for name in names}
        count = len(held[names[0]])
        self.feeds: Iterator[dict[str, np.ndarray]] = iter(
            [{name: x[k : k + 1] for name, x in held.items()} for k in range(count)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next sample; None behind the last."""
        return next(self.feeds, None)


def main() -> None:
    """Quantize as the command line says."""
    model, samples, out, bits = sys.argv[1:]
    if bits == "int8":
        with tempfile.TemporaryDirectory() as folder:
            prepared = str(Path(folder) / "prepared.onnx")
            try:
                quant_pre_process(model, prepared)
            except Exception as e:  # it raises nothing narrower
                if "symbolic shape" not in str(e):
                    raise
                quant_pre_process(model, prepared, skip_symbolic_shape=True)
            quantize_static(prepared, out, Samples(model, samples), per_channel=True)
        return
    quantizer = MatMulNBitsQuantizer(onnx.load(model), bits=4, block_size=32)
    quantizer.process()
    if not any(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node):
        sys.exit("no MatMul with a constant: nothing is stored in 4 bits")
    onnx.save(quantizer.model.model, out)


if __name__ == "__main__":
    main()
