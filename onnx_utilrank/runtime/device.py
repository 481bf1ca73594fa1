"""What a time that was measured here holds for."""

import os

import onnxruntime as ort

from onnx_utilrank.runtime.machine import processor
from onnx_utilrank.runtime.providers import Provider

__all__ = ["device_key"]


def device_key(provider: Provider) -> tuple[str, ...]:
    """Processor, cores, ONNX Runtime and provider: where these are equal, so are times."""
    return (
        processor(),
        str(os.cpu_count()),
        ort.__version__,
        provider.name,
        *(f"{name}={value}" for name, value in provider.options),
        *provider.custom_op_libraries,
    )
