"""Between the element types and arrays of ONNX and the tensors of torch."""

import ml_dtypes
import numpy as np
import onnx
import torch

__all__ = ["as_tensor", "torch_type"]

_TYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.COMPLEX64: torch.complex64,
    onnx.TensorProto.COMPLEX128: torch.complex128,
}

# Types that torch has no arithmetic for, in the next one that holds all their values.
_WIDER = {
    np.dtype(ml_dtypes.int4): np.int8,
    np.dtype(ml_dtypes.uint4): np.uint8,
}


def torch_type(kind: int) -> torch.dtype:
    """The torch type of an ONNX element type.

    Raises:
        TypeError: There is none.
    """
    if kind not in _TYPES:
        names = {number: name for name, number in onnx.TensorProto.DataType.items()}
        raise TypeError(f"tensors of type {names.get(kind, kind)} are not supported")
    return _TYPES[kind]


def as_tensor(
    values: np.ndarray | torch.Tensor, device: torch.device, dtype: torch.dtype | None
) -> torch.Tensor:
    """A value for the executor: floating ones go to `device`, in `dtype` where it is given.

    Integers stay on the CPU: most are shapes, axes and indices, which have to be read there.

    Raises:
        TypeError: Torch has no such element type.
    """
    tensor = values if isinstance(values, torch.Tensor) else _from_numpy(values)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    if not isinstance(array, np.ndarray | np.generic):
        raise TypeError(f"values of type {type(array).__name__} are not supported")
    if array.dtype.kind in "OSU":
        raise TypeError("strings are not supported")
    if array.dtype in _WIDER:
        array = array.astype(_WIDER[array.dtype])
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    # What a model file gives may be read-only, which torch does not know. What is mapped to memory
    # is not, and stays where it is: it may be all of a large model.
    if not (array.flags.writeable and array.flags.aligned and array.flags.c_contiguous):
        array = np.array(array, order="C")
    return torch.from_numpy(array)
