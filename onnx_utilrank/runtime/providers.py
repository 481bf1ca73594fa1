"""Execution providers by the names users type, and the check that one is really there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnxruntime as ort

from onnx_utilrank.errors import ConfigError, ProviderUnavailableError

__all__ = ["CPU", "PROVIDERS", "Provider", "find_provider", "load_library", "ort_errors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One execution provider that the tool offers.

    Attributes:
        key: What users type, as in `--provider cuda`.
        name: ONNX Runtime's name.
        fallback: Providers that may take the nodes this one has no kernel for, in order.
        needs: What has to be installed, for the message when it is not there.
        preload: Whether CUDA's and cuDNN's libraries of other Python packages are loaded first.
        custom_op_libraries: Files of operators of the user's, which every session loads.
    """

    key: str
    name: str
    fallback: tuple[str, ...] = ()
    needs: str = ""
    preload: bool = False
    custom_op_libraries: tuple[str, ...] = ()


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


def find_provider(key: str, custom_op_libraries: Sequence[str] = ()) -> Provider:
    """The provider that `key` names, if this ONNX Runtime was built with it.

    Args:
        key: What users type.
        custom_op_libraries: Files of operators that its sessions load too.

    Raises:
        ConfigError: No provider of that name is offered, or a library cannot be loaded.
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
    for library in custom_op_libraries:
        load_library(ort.SessionOptions(), library)
    return replace(provider, custom_op_libraries=tuple(custom_op_libraries))


def load_library(options: ort.SessionOptions, library: str) -> None:
    """Add the operators of a library to a session that is to be opened.

    Raises:
        ConfigError: It is missing, or ONNX Runtime cannot load it.
    """
    # The loader looks up a bare name in the system's folders, and a user means the file.
    path = Path(library).resolve()
    if not path.is_file():
        raise ConfigError(f"custom op library {library}: no such file")
    try:
        options.register_custom_ops_library(str(path))
    except ort_errors() as e:
        reason = " ".join(str(e).split())
        raise ConfigError(f"custom op library {library}: cannot be loaded ({reason})") from e


def ort_errors() -> tuple[type[Exception], ...]:
    """The exceptions ONNX Runtime raises; they share no base class but `Exception`."""
    state = vars(ort.capi.onnxruntime_pybind11_state).values()
    own = [t for t in state if isinstance(t, type) and issubclass(t, Exception)]
    return (*own, ValueError, TypeError, RuntimeError)
