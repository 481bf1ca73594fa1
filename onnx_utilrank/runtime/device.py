"""What a time that was measured here holds for."""

import os
import platform
from pathlib import Path

import onnxruntime as ort

from onnx_utilrank.runtime.providers import Provider

__all__ = ["device_key"]


def device_key(provider: Provider) -> tuple[str, ...]:
    """Processor, cores, ONNX Runtime and provider: where these are equal, so are times."""
    return (
        _processor(),
        str(os.cpu_count()),
        ort.__version__,
        provider.name,
        *(f"{name}={value}" for name, value in provider.options),
        *provider.custom_op_libraries,
    )


def _processor() -> str:
    """Its model where the system tells (Linux), or else its family."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
