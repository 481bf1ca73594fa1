"""Models quantized by `onnxruntime.quantization`, as files that users have."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

__all__ = ["nbits", "quantized"]


def _reader(data: Mapping[str, np.ndarray], samples: int) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.place = 0

        def get_next(self) -> dict[str, np.ndarray] | None:
            if self.place == samples:
                return None
            self.place += 1
            return {name: values[self.place - 1 : self.place] for name, values in data.items()}

    return Reader()


def quantized(
    proto: onnx.ModelProto,
    form: str,
    folder: Path,
    data: Mapping[str, np.ndarray],
    *,
    per_channel: bool = False,
    samples: int = 16,
    **options: Any,
) -> onnx.ModelProto:
    """A model in the form `QDQ`, `QOperator` or `dynamic`."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    source, target = folder / "source.onnx", folder / f"{form}.onnx"
    source.write_bytes(proto.SerializeToString())
    common = {"per_channel": per_channel, "weight_type": quantization.QuantType.QInt8, **options}
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # what the quantizer warns of is not what is tested
        if form == "dynamic":
            kinds = ["MatMul", "Gemm", "Conv"]
            quantization.quantize_dynamic(source, target, op_types_to_quantize=kinds, **common)
        else:
            quantization.quantize_static(
                source,
                target,
                _reader(data, samples),
                quant_format=quantization.QuantFormat[form],
                **common,
            )
    return onnx.load(target)


def nbits(
    proto: onnx.ModelProto, *, block: int = 32, symmetric: bool = True, qdq: bool = False
) -> onnx.ModelProto:
    """A model with weights of 4 bits: MatMulNBits, or DequantizeLinear in blocks."""
    module = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    formats = pytest.importorskip("onnxruntime.quantization.quant_utils").QuantFormat
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        quantizer = module.MatMulNBitsQuantizer(
            copy,
            block_size=block,
            is_symmetric=symmetric,
            quant_format=formats.QDQ if qdq else formats.QOperator,
        )
        quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    return made


class _quiet:
    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)
