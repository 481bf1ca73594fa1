"""Which packages bring ONNX Runtime; told without loading it."""

import importlib.metadata

__all__ = ["runtime_packages"]


def runtime_packages() -> tuple[str, ...]:
    """Installed packages that bring the module `onnxruntime`; there must not be two of them."""
    owners = importlib.metadata.packages_distributions().get("onnxruntime", [])
    return tuple(sorted(set(owners)))
