"""Make an ONNX Runtime session on a provider, or tell the provider's fault from the model's."""

import contextlib
import importlib
import re
from dataclasses import replace
from functools import cache

import onnxruntime as ort
from onnx.parser import parse_model

from onnx_utilrank.errors import ConfigError, ModelError, ProviderUnavailableError, UtilrankError
from onnx_utilrank.runtime.diagnosis import diagnose
from onnx_utilrank.runtime.provider import Provider
from onnx_utilrank.runtime.providers import CPU, load_library, ort_errors

__all__ = ["InferenceError", "create_session", "one_line", "provider_fault", "session_options"]

_FATAL = 4

# Bytes of a model from which ONNX Runtime may not copy weights into an order of its own: copies
# take as much memory again, where weights are mapped from their file.
PREPACKED_LIMIT = 2**30

# Where in ONNX Runtime's sources an exception was raised; the reason comes after it.
_ORIGIN = re.compile(r"^\S+\.(?:cc|h):\d+ .*?\) (?=\S)")


class InferenceError(ModelError):
    """ONNX Runtime loaded the model but could not run it on a feed."""


def session_options(
    provider: Provider,
    *,
    file_bytes: int,
    folder: str = "",
    optimize: bool = True,
    threads: int = 0,
) -> ort.SessionOptions:
    """The options that every session has.

    Args:
        provider: Where it will run; its libraries of operators are loaded.
        file_bytes: Size of the model with its external data.
        folder: Where external data lie.
        optimize: False keeps the graph as it is written (no fusion, no folding).
        threads: Threads within an operator; 0 leaves it to ONNX Runtime.

    Raises:
        ConfigError: A library of operators cannot be loaded.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Threads spin on for more work when a run is over. Where several models run by turns in one
    # process, those of one then take the cores of the next: on two cores, a model took up to three
    # times its time beside a copy of itself.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", folder
        )
    if file_bytes > PREPACKED_LIMIT:
        options.add_session_config_entry("session.disable_prepacking", "1")
    for library in provider.custom_op_libraries:
        load_library(options, library)
    return options


def create_session(
    model: bytes | str, provider: Provider, options: ort.SessionOptions
) -> ort.InferenceSession:
    """Load a serialized model, or the file of one, on a provider with its fallbacks.

    Raises:
        Exception: One of `ort_errors`.
    """
    given = dict(provider.options)
    # Both have to mean the same GPU.
    shared = {k: v for k, v in given.items() if k == "device_id"} if provider.nvidia else {}
    providers = [
        (provider.name, given),
        *((name, {} if name == CPU.name else shared) for name in provider.fallback),
    ]
    # What ONNX Runtime prints would go to stdout, which belongs to results.
    with contextlib.redirect_stdout(None):
        if provider.nvidia:
            ort.preload_dlls()
        for package in provider.brings:
            with contextlib.suppress(ImportError, OSError):
                importlib.import_module(package)
        # Without its own fallback, which would hide what the provider has to say.
        return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)


def provider_fault(provider: Provider) -> UtilrankError | None:
    """What is wrong with a provider or its options, tried on a model of one node; None if nothing.

    The error is for the caller to raise.
    """
    if provider.key == CPU.key:
        return None
    refusal = _refusal(provider)
    if refusal is None:
        return None
    bare = replace(provider, options=())
    if not provider.options or _refusal(bare) is not None:
        return ProviderUnavailableError(f"provider {provider.key}: {diagnose(bare, refusal)}")
    each = (replace(provider, options=(option,)) for option in provider.options)
    refused = [p.options[0] for p in each if _refusal(p) is not None] or provider.options
    named = ", ".join(f"{key}={value}" for key, value in refused)
    return ConfigError(
        f"provider {provider.key}: refuses option {named}"
        + (f" ({refusal})" if refusal else ", though it works without")
    )


def _refusal(provider: Provider) -> str | None:
    """What ONNX Runtime says against a provider, which may be nothing; None if it has it."""
    options = session_options(replace(provider, custom_op_libraries=()), file_bytes=0)
    try:
        session = create_session(_one_node(), provider, options)
    except ort_errors() as e:
        return _ORIGIN.sub("", one_line(e)).rstrip(".")
    return None if provider.name in session.get_providers() else ""


@cache
def _one_node() -> bytes:
    model = parse_model(
        '<ir_version: 8, opset_import: ["": 13]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
    )
    return bytes(model.SerializeToString())


def one_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split())
