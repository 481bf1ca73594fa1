"""Where torch runs a model, and in which type."""

import torch
from onnx import TensorProto

from onnx_utilrank.model.store import ModelStore

__all__ = ["device_beside", "gpu_name", "gradient_type"]


def gradient_type(store: ModelStore) -> torch.dtype | None:
    """Float32 for models in half precision, whose gradients and sums would leave its range."""
    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return torch.float32 if any(t.data_type in half for t in store.tensors()) else None


def device_beside(provider: str) -> str:
    """The device beside an execution provider, by its key, if this build of torch can use it."""
    return "cuda" if provider != "cpu" and torch.cuda.is_available() else "cpu"


def gpu_name(provider: str) -> str:
    """The GPU of an execution provider, by its key; empty where there is none."""
    return str(torch.cuda.get_device_name()) if device_beside(provider) == "cuda" else ""
