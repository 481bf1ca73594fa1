"""Open a model in ONNX Runtime on the provider that was asked for, or fail saying why."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from google.protobuf.message import EncodeError

from onnx_utilrank.errors import ModelError, ProviderUnavailableError
from onnx_utilrank.model.scopes import all_nodes, node_label
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import Provider, load_library, ort_errors

__all__ = ["Feed", "InferenceError", "Session", "open_session"]

# One array (or nested list, for sequences) per graph input, by name.
Feed = Mapping[str, np.ndarray]

_FATAL = 4

# Bytes of a model from which ONNX Runtime may not copy weights into an order of its own: copies
# take as much memory again, where weights are mapped from their file.
PREPACKED_LIMIT = 2**30
# How ONNX Runtime says that it has no such operator, or not in that version.
_UNKNOWN_OPERATOR = re.compile(
    r"Fatal error: (?P<domain>\S*):(?P<function>\S+)\(-?\d+\) is not a registered function/op"
    r"|No Op registered for (?P<op>\S+) with domain_version of"
)


class InferenceError(ModelError):
    """ONNX Runtime loaded the model but could not run it on a feed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A loaded model.

    Attributes:
        label: How messages name the model.
        provider: The execution provider that was asked for and is in use.
        inputs: Names of the inputs that a feed may hold.
        outputs: Names of all outputs, in order.
        raw: The ONNX Runtime session itself.
    """

    label: str
    provider: Provider
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    raw: ort.InferenceSession

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Run one feed; give the named outputs (default: all) by name.

        Entries of `feed` that the model has no input for are passed over.

        Raises:
            InferenceError: ONNX Runtime refuses the feed or a node fails.
        """
        names = self.outputs if outputs is None else tuple(outputs)
        given = {k: v for k, v in feed.items() if k in self.inputs}
        try:
            return dict(zip(names, self.raw.run(list(names), given), strict=True))
        except ort_errors() as e:
            raise InferenceError(f"{self.label}: ONNX Runtime: {_one_line(e)}") from e


def open_session(
    model: ModelStore, provider: Provider, *, optimize: bool = True, threads: int = 0
) -> Session:
    """Load a model for inference.

    Args:
        model: The model; external weights are read by ONNX Runtime from the model's folder.
        provider: Where it has to run. Nodes it has no kernel for go to its fallbacks, but a
            session that does not hold the provider itself is an error, never the CPU in silence.
        optimize: False keeps the graph as it is written (no fusion, no folding).
        threads: Threads within an operator; 0 leaves it to ONNX Runtime.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
        ProviderUnavailableError: The session does not use the provider.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if model.folder:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(model.folder)
        )
    if model.file_bytes > PREPACKED_LIMIT:
        options.add_session_config_entry("session.disable_prepacking", "1")
    for library in provider.custom_op_libraries:
        load_library(options, library)
    names = [provider.name, *provider.fallback]
    try:
        # ONNX Runtime announces a fallback on stdout, which belongs to results.
        with contextlib.redirect_stdout(None):
            if provider.preload:
                ort.preload_dlls()
            raw = ort.InferenceSession(_serialized(model), options, providers=names)
    except ort_errors() as e:
        raise ModelError(_refusal(model, _one_line(e))) from e
    if provider.name not in raw.get_providers():
        raise ProviderUnavailableError(
            f"provider {provider.key}: ONNX Runtime fell back to "
            f"{', '.join(raw.get_providers())} for {model.label}; it needs {provider.needs}"
        )
    return Session(
        label=model.label,
        provider=provider,
        inputs=tuple(i.name for i in (*raw.get_inputs(), *raw.get_overridable_initializers())),
        outputs=tuple(o.name for o in raw.get_outputs()),
        raw=raw,
    )


def _serialized(model: ModelStore) -> bytes | str:
    # A file that is just what `proto` says needs no second copy in memory.
    if model.path:
        return str(model.path)
    try:
        return bytes(model.proto.SerializeToString())
    except (EncodeError, ValueError) as e:
        raise ModelError(f"{model.label}: the model cannot be serialized ({e})") from e


def _refusal(model: ModelStore, reason: str) -> str:
    """Why a model does not load; where that is an unknown operator, which node has it."""
    unknown = _UNKNOWN_OPERATOR.search(reason)
    if unknown is None:
        return f"{model.label}: ONNX Runtime cannot load it: {reason}"
    domain, op_type = unknown["domain"] or "", unknown["function"] or unknown["op"]
    node = next(
        (
            n
            for n in all_nodes(model.proto.graph)
            if n.op_type == op_type and domain in ("", n.domain)
        ),
        None,
    )
    where = repr(op_type) if node is None else node_label(node)
    domain = domain or (node.domain if node is not None else "")
    version = next((o.version for o in model.proto.opset_import if o.domain == domain), None)
    return (
        f"{model.label}: {where}: ONNX Runtime does not have this operator (domain "
        f"{domain or 'ai.onnx'!r}, version {version}); a library that does can be given with "
        "--custom-op-library"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
