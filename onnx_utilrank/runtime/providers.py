"""Execution providers by the names users type, and the check that one is really there."""

from dataclasses import dataclass

import onnxruntime as ort

from onnx_utilrank.errors import ConfigError, ProviderUnavailableError

__all__ = ["CPU", "PROVIDERS", "Provider", "find_provider"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One execution provider that the tool offers.

    Attributes:
        key: What users type, as in `--provider cuda`.
        name: ONNX Runtime's name.
        fallback: Providers that may take the nodes this one has no kernel for, in order.
        needs: What has to be installed, for the message when it is not there.
        preload: Whether CUDA's and cuDNN's libraries of other Python packages are loaded first.
    """

    key: str
    name: str
    fallback: tuple[str, ...] = ()
    needs: str = ""
    preload: bool = False


CPU = Provider(key="cpu", name="CPUExecutionProvider")
CUDA = Provider(
    key="cuda",
    name="CUDAExecutionProvider",
    fallback=(CPU.name,),
    needs="the package onnxruntime-gpu, an NVIDIA GPU with its driver, CUDA and cuDNN",
    preload=True,
)
TENSORRT = Provider(
    key="tensorrt",
    name="TensorrtExecutionProvider",
    fallback=(CUDA.name, CPU.name),
    needs="the package onnxruntime-gpu, an NVIDIA GPU with its driver, CUDA, cuDNN and TensorRT",
    preload=True,
)

# Adding a provider is one entry here.
PROVIDERS = (CPU, CUDA, TENSORRT)


def find_provider(key: str) -> Provider:
    """The provider that `key` names, if this ONNX Runtime was built with it.

    Raises:
        ConfigError: No provider of that name is offered.
        ProviderUnavailableError: The installed ONNX Runtime does not have it.
    """
    provider = next((p for p in PROVIDERS if p.key == key.lower()), None)
    if provider is None:
        offered = ", ".join(p.key for p in PROVIDERS)
        raise ConfigError(f"provider {key!r} is not known; choose one of: {offered}")
    if provider.name not in ort.get_available_providers():
        raise ProviderUnavailableError(
            f"provider {provider.key}: this ONNX Runtime has no {provider.name}; "
            f"it needs {provider.needs}"
        )
    return provider
