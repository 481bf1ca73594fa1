"""Where torch runs a model, and in which type."""

import torch
from onnx import TensorProto

from onnx_utilrank.model.store import ModelStore

__all__ = ["device_beside", "gpu_name", "gradient_type"]


def gradient_type(store: ModelStore) -> torch.dtype | None:
    """Float32 for models in half precision, whose gradients and sums would leave its range."""
    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return torch.float32 if any(t.data_type in half for t in store.tensors()) else None


def device_beside(cuda_device: int | None) -> str:
    """Where torch runs what an execution provider runs on that CUDA device, or on none.

    The CPU, where the provider uses no such device or this build of torch cannot.
    """
    if cuda_device is None or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{cuda_device}"


def gpu_name(cuda_device: int | None) -> str:
    """The name of a CUDA device; empty where there is none, or torch cannot use it."""
    device = device_beside(cuda_device)
    return "" if device == "cpu" else str(torch.cuda.get_device_name(device))
