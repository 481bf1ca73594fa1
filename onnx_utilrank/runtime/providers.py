"""Execution providers by the names users type, and the check that this ONNX Runtime has them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort

from onnx_utilrank.errors import ConfigError, ProviderUnavailableError
from onnx_utilrank.runtime.diagnosis import diagnose
from onnx_utilrank.runtime.provider import Provider

__all__ = [
    "CPU",
    "PROVIDERS",
    "Provider",
    "find_provider",
    "find_providers",
    "load_library",
    "ort_errors",
]

_SUFFIX = "ExecutionProvider"

CPU = Provider(key="cpu", name="CPUExecutionProvider")
CUDA = Provider(
    key="cuda",
    name="CUDAExecutionProvider",
    fallback=(CPU.name,),
    package="onnxruntime-gpu",
    nvidia=True,
)
TENSORRT = Provider(
    key="tensorrt",
    name="TensorrtExecutionProvider",
    fallback=(CUDA.name, CPU.name),
    package="onnxruntime-gpu",
    nvidia=True,
    brings=("tensorrt",),
)

# Of these more is known than their names. Any other that ONNX Runtime names is offered too; what is
# known of a new one is an entry here.
PROVIDERS = (CPU, CUDA, TENSORRT)

# Packages of ONNX Runtime that hold one of the others, by its key.
_PACKAGES = {
    "cann": "onnxruntime-cann",
    "dml": "onnxruntime-directml",
    "migraphx": "onnxruntime-migraphx",
    "nvtensorrtrtx": "onnxruntime-trt-rtx",
    "openvino": "onnxruntime-openvino",
    "qnn": "onnxruntime-qnn",
    "webgpu": "onnxruntime-webgpu",
}


def find_provider(
    key: str,
    custom_op_libraries: Sequence[str] = (),
    options: Mapping[str, object] | None = None,
) -> Provider:
    """The provider that `key` names, if this ONNX Runtime was built with it.

    Args:
        key: ONNX Runtime's name, or that without 'ExecutionProvider'; case does not matter.
        custom_op_libraries: Files of operators that its sessions load too.
        options: Its options, by the names that ONNX Runtime has for them.

    Raises:
        ConfigError: ONNX Runtime knows no provider of that name, it takes no options, or a library
            cannot be loaded.
        ProviderUnavailableError: The installed ONNX Runtime does not have it.
    """
    available = ort.get_available_providers()
    named = {_key(name): name for name in (*ort.get_all_providers(), *available)}
    wanted = _key(key)
    if wanted not in named:
        offered = ", ".join(_key(name) for name in available)
        raise ConfigError(f"provider {key!r} is not known; this ONNX Runtime has: {offered}")
    provider = next((p for p in PROVIDERS if p.key == wanted), None) or Provider(
        key=wanted, name=named[wanted], fallback=(CPU.name,), package=_PACKAGES.get(wanted)
    )
    given = tuple((str(k), str(v)) for k, v in (options or {}).items())
    if given and provider is CPU:
        raise ConfigError(
            f"provider cpu: option {given[0][0]!r}: it takes none, ONNX Runtime passes over them"
        )
    if provider.name not in available:
        raise ProviderUnavailableError(f"provider {provider.key}: {diagnose(provider)}")
    for library in custom_op_libraries:
        load_library(ort.SessionOptions(), library)
    return replace(provider, options=given, custom_op_libraries=tuple(custom_op_libraries))


def find_providers(
    keys: Sequence[str],
    custom_op_libraries: Sequence[str] = (),
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> tuple[Provider, ...]:
    """The providers that `keys` name, each once, in their order.

    Args:
        keys: See `find_provider`.
        custom_op_libraries: See `find_provider`.
        options: Options of each, by its key.

    Raises:
        ConfigError: A provider is asked for under two names with different options; and see
            `find_provider`.
        ProviderUnavailableError: See `find_provider`.
    """
    found: dict[str, Provider] = {}
    for key in keys:
        provider = find_provider(key, custom_op_libraries, (options or {}).get(key))
        if found.setdefault(provider.key, provider) != provider:
            raise ConfigError(f"provider {provider.key}: is asked for twice, with other options")
    return tuple(found.values())


def _key(name: str) -> str:
    return name.lower().removesuffix(_SUFFIX.lower())


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
