"""Open a model in ONNX Runtime on the provider that was asked for, or fail saying why."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
from google.protobuf.message import EncodeError

from onnx_utilrank.errors import ModelError, ProviderUnavailableError
from onnx_utilrank.model.scopes import all_nodes, node_label
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.binding import Binding
from onnx_utilrank.runtime.creation import (
    InferenceError,
    create_session,
    one_line,
    provider_fault,
    session_options,
)
from onnx_utilrank.runtime.placement import Placement, read_placement
from onnx_utilrank.runtime.providers import Provider, ort_errors

__all__ = ["FLOAT_TYPES", "Feed", "InferenceError", "Session", "open_session", "wrapped"]

# One array (or nested list, for sequences) per graph input, by name.
Feed = Mapping[str, np.ndarray]

# How ONNX Runtime says that it has no such operator, or not in that version.
_UNKNOWN_OPERATOR = re.compile(
    r"Fatal error: (?P<domain>\S*):(?P<function>\S+)\(-?\d+\) is not a registered function/op"
    r"|No Op registered for (?P<op>\S+) with domain_version of"
)

# Float types of inputs and outputs that numpy can hold, as ONNX Runtime names them.
FLOAT_TYPES: Mapping[str, np.dtype[np.generic]] = {
    "tensor(float16)": np.dtype(np.float16),
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A loaded model.

    Attributes:
        label: How messages name the model.
        provider: The execution provider that was asked for and is in use.
        inputs: Names of the inputs that a feed may hold.
        outputs: Names of all outputs, in order.
        raw: The ONNX Runtime session itself.
        floats: The element types of inputs of float16, float32 and float64, by name.
    """

    label: str
    provider: Provider
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    raw: ort.InferenceSession
    floats: Mapping[str, np.dtype[np.generic]] = field(default_factory=dict)

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Run one feed; give the named outputs (default: all) by name.

        Entries of `feed` that the model has no input for are passed over. Arrays of floats are cast
        to the float type that the model takes.

        Raises:
            InferenceError: A value leaves the range of that type, ONNX Runtime refuses the feed, or
                a node fails.
        """
        names = self.outputs if outputs is None else tuple(outputs)
        given = self._taken(feed)
        try:
            return dict(zip(names, self.raw.run(list(names), given), strict=True))
        except ort_errors() as e:
            raise InferenceError(f"{self.label}: ONNX Runtime: {one_line(e)}") from e

    def bind(self, feed: Feed, outputs: Sequence[str] | None = None) -> Binding:
        """One feed, ready to be run any number of times for its time alone.

        Raises:
            InferenceError: A value leaves the range of the float type that the model takes, or
                ONNX Runtime refuses the feed.
        """
        names = self.outputs if outputs is None else tuple(outputs)
        return Binding(
            self.raw, self._taken(feed), names, nvidia=self.provider.nvidia, label=self.label
        )

    def placement(self) -> Placement:
        """Where its nodes run, read back from ONNX Runtime."""
        return read_placement(self.raw, self.provider.name)

    def _taken(self, feed: Feed) -> dict[str, np.ndarray]:
        return {k: self._cast(k, v) for k, v in feed.items() if k in self.inputs}

    def _cast(self, name: str, values: np.ndarray) -> np.ndarray:
        wanted = self.floats.get(name)
        if wanted is None or not isinstance(values, np.ndarray) or values.dtype.kind != "f":
            return values
        if values.dtype == wanted:
            return values
        with np.errstate(over="ignore"):
            cast = values.astype(wanted)
        if not np.array_equal(np.isfinite(cast), np.isfinite(values)):
            raise InferenceError(
                f"{self.label}: input {name!r}: the data leave the range of {wanted.name}"
            )
        return cast


def open_session(
    model: ModelStore,
    provider: Provider,
    *,
    optimize: bool = True,
    threads: int = 0,
    profile: Path | None = None,
) -> Session:
    """Load a model for inference.

    Args:
        model: The model; external weights are read by ONNX Runtime from the model's folder.
        provider: Where it has to run. Nodes it has no kernel for go to its fallbacks, but a
            session that runs no node on the provider itself is an error, never the CPU in silence.
        optimize: False keeps the graph as it is written (no fusion, no folding).
        threads: Threads within an operator; 0 leaves it to ONNX Runtime.
        profile: How the file begins that ONNX Runtime writes its times to; None for no such file.

    Raises:
        ConfigError: The provider refuses an option.
        ModelError: ONNX Runtime cannot load the model.
        ProviderUnavailableError: The session does not use the provider.
    """
    options = session_options(
        provider,
        file_bytes=model.file_bytes,
        folder=str(model.folder or ""),
        optimize=optimize,
        threads=threads,
    )
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        raw = create_session(_serialized(model), provider, options)
    except ort_errors() as e:
        fault = provider_fault(provider)
        raise fault or ModelError(_refusal(model, one_line(e))) from e
    _require_used(raw, provider, model.label)
    return wrapped(raw, provider, model.label)


def wrapped(raw: ort.InferenceSession, provider: Provider, label: str) -> Session:
    """What this package knows of an ONNX Runtime session.

    Args:
        raw: The session.
        provider: The provider that it was made for.
        label: How messages name the model.
    """
    return Session(
        label=label,
        provider=provider,
        inputs=tuple(i.name for i in (*raw.get_inputs(), *raw.get_overridable_initializers())),
        outputs=tuple(o.name for o in raw.get_outputs()),
        raw=raw,
        floats={i.name: FLOAT_TYPES[i.type] for i in raw.get_inputs() if i.type in FLOAT_TYPES},
    )


def _require_used(raw: ort.InferenceSession, provider: Provider, label: str) -> None:
    # A session may name a provider that has been given no node.
    if provider.name not in raw.get_providers():
        raise provider_fault(provider) or ProviderUnavailableError(
            f"provider {provider.key}: ONNX Runtime fell back to "
            f"{', '.join(raw.get_providers())} for {label}"
        )
    placement = read_placement(raw, provider.name)
    if placement.nodes and placement.nodes == len(placement.fallen):
        taken = ", ".join(name for name, _ in placement.counts)
        given = ", ".join(f"{key}={value}" for key, value in provider.options)
        asked = f"{provider.key} with {given}" if given else provider.key
        raise ProviderUnavailableError(
            f"provider {asked}: it takes none of the {placement.nodes} nodes of {label}; "
            f"ONNX Runtime gave all of them to {taken}"
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
