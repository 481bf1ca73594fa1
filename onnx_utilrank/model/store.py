"""Load and save ONNX models without touching what is not ours to touch.

A `ModelStore` is a parsed model whose external weights stay in their files until they are asked
for. Nothing in the package mutates the proto of a store: a rewrite makes a new one.
"""

import contextlib
import hashlib
import itertools
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.atomic import atomic_write
from onnx_utilrank.model.check import model_fault, stored_bytes
from onnx_utilrank.model.external import (
    SMALLEST_OUTSIDE,
    ExternalWriter,
    Scratch,
    external_bytes,
    mapped_array,
)

__all__ = [
    "INLINE_LIMIT",
    "ModelSource",
    "ModelStore",
    "TensorSpec",
    "atomic_write",
    "data_files_of",
    "node_tensors",
]

# Protobuf refuses messages of 2 GiB and more; the margin is for everything that is not a weight.
INLINE_LIMIT = 2**31 - 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, element type and shape of a graph input or output.

    Attributes:
        name: The ONNX name.
        dtype: The numpy element type; `object` for strings; None where it is not a dense tensor.
        shape: One entry a dimension: an int where it is fixed, its symbolic name or None where it
            is free. None where the model does not say the rank.
    """

    name: str
    dtype: np.dtype[np.generic] | None
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        dims = (
            "?"
            if self.shape is None
            else ", ".join("?" if d is None else str(d) for d in self.shape)
        )
        return f"{self.name}: {'non-tensor' if self.dtype is None else self.dtype.name}[{dims}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStore:
    """One ONNX model, with its weights read on demand.

    Attributes:
        proto: The model as parsed; tensors with external data hold a reference, not the data.
        folder: Where external data lie; None where the model came as a `ModelProto`.
        path: The file that `proto` was read from, as it stands there; None for any other model.
        name: What messages call a working copy of another model: that model's label.
        scratch: The temporary folder that `folder` is, for a model that was made of one with
            external data.
    """

    proto: onnx.ModelProto
    folder: Path | None = None
    path: Path | None = None
    name: str | None = None
    scratch: Scratch | None = field(default=None, repr=False, compare=False)
    _maps: dict[Path, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, source: "ModelSource") -> "ModelStore":
        """Open a model file, or wrap a proto.

        Raises:
            ModelError: The file is missing, is not an ONNX model, or holds no graph; a name is not
                text; a tensor's shape and data disagree, or its data lie outside the model's
                folder or past the end of their file; a node reads what nothing makes, or nodes
                wait for each other.
        """
        if isinstance(source, ModelStore):
            return source
        if isinstance(source, onnx.ModelProto):
            store = cls(proto=source)
        else:
            path = Path(source)
            try:
                proto = onnx.load(str(path), format="protobuf", load_external_data=False)
            except OSError as e:
                raise ModelError(f"{path}: cannot be read ({e.strerror or e})") from e
            except DecodeError as e:
                raise ModelError(f"{path}: not an ONNX model") from e
            store = cls(proto=proto, folder=path.resolve().parent, path=path)
        if not store.proto.HasField("graph") or not store.proto.opset_import:
            raise ModelError(f"{store.label}: not an ONNX model (no graph or no opset)")
        fault = model_fault(store.proto, store.tensors(), store.folder)
        if fault:
            raise ModelError(f"{store.label}: {fault}")
        return store

    def __reduce__(self) -> tuple[object, ...]:
        # Maps and temporary files stay where they are. Another process reads the same files.
        outside = self.has_external_data
        return _reopened, (self.proto, self.folder if outside else None, self.label)

    @property
    def label(self) -> str:
        """How messages name this model: its file, or its graph."""
        return self.name or str(self.path or f"model {self.proto.graph.name!r}")

    @property
    def opset(self) -> int:
        """Version of the default ONNX operator set; 0 where the model imports none."""
        return next((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 0)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Graph inputs that a caller has to feed: those no initializer gives a value."""
        given = {t.name for t in self.proto.graph.initializer}
        given |= {t.values.name for t in self.proto.graph.sparse_initializer}
        return tuple(_spec(v) for v in self.proto.graph.input if v.name not in given)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Graph outputs, in order."""
        return tuple(_spec(v) for v in self.proto.graph.output)

    @property
    def file_bytes(self) -> int:
        """Bytes that the model takes as a file, external data included."""
        outside = (t for t in self.tensors() if uses_external_data(t))
        return int(self.proto.ByteSize()) + sum(map(_outside_length, outside))

    @property
    def has_external_data(self) -> bool:
        """Whether any tensor of the model, in any graph, lies outside the file."""
        return any(uses_external_data(t) for t in self.tensors())

    def tensors(self) -> Iterator[onnx.TensorProto]:
        """Every initializer and constant tensor, those of subgraphs and functions included."""
        yield from graph_tensors(self.proto.graph)
        for function in self.proto.functions:
            for node in function.node:
                yield from node_tensors(node)

    def array(self, tensor: onnx.TensorProto) -> np.ndarray:
        """Values of one tensor of this model, mapped to memory where they lie in a file outside.

        Raises:
            ModelError: The data are missing, leave the model's folder, or disagree with the shape.
        """
        try:
            if not uses_external_data(tensor):
                return numpy_helper.to_array(tensor)
            mapped = mapped_array(tensor, self._data_folder, self._maps)
            return numpy_helper.to_array(self.inlined(tensor)) if mapped is None else mapped
        except (OSError, ValueError, TypeError, onnx.checker.ValidationError) as e:
            raise self._unreadable(tensor, e) from e

    def whole(self) -> onnx.ModelProto:
        """The model with all of its weights in it; the very `proto` where they are already.

        Raises:
            ModelError: Data cannot be read, or come to more than protobuf takes.
        """
        if not self.has_external_data:
            return self.proto
        if self.file_bytes > INLINE_LIMIT:
            raise ModelError(
                f"{self.label}: {self.file_bytes:,} bytes are more than a ModelProto holds; save "
                "it as a file"
            )
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for tensor in ModelStore(proto=proto).tensors():
            if uses_external_data(tensor):
                tensor.CopyFrom(self.inlined(tensor))
        return proto

    def inlined(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """An external tensor of this model with its data in it, as they lie in their file.

        Raises:
            ModelError: See `array`.
        """
        held = onnx.TensorProto()
        held.CopyFrom(tensor)
        held.ClearField("external_data")
        held.data_location = onnx.TensorProto.DEFAULT
        held.raw_data = bytes(self.outside_bytes(tensor))
        return held

    def outside_bytes(self, tensor: onnx.TensorProto) -> memoryview:
        """Data of an external tensor as its file holds them: types below 8 bits stay packed.

        Raises:
            ModelError: See `array`.
        """
        try:
            return external_bytes(tensor, self._data_folder, self._maps).data
        except (OSError, ValueError, TypeError) as e:
            raise self._unreadable(tensor, e) from e

    @property
    def _data_folder(self) -> Path:
        if self.folder is None:
            raise ValueError("a model that is no file has no external data")
        return self.folder

    def _unreadable(self, tensor: onnx.TensorProto, error: Exception) -> ModelError:
        reason = " ".join(str(error).split())
        return ModelError(f"{self.label}: tensor {tensor.name!r}: {reason}")

    def fingerprint(self) -> str:
        """SHA-256 of the model, external data included, as hexadecimal digits."""
        digest = hashlib.sha256(self.proto.SerializeToString(deterministic=True))
        for tensor in self.tensors():
            if uses_external_data(tensor):
                digest.update(self.outside_bytes(tensor))  # mapped: no copy is made
        return digest.hexdigest()

    def save(self, target: str | os.PathLike[str], *, save_as_external_data: bool = False) -> None:
        """Write the model to `target`; a reader sees the old file or the whole new one.

        A store that is just as it was read is copied byte for byte. Weights go into one file
        `target.data` where the source kept its own outside, where the model passes protobuf's
        2 GiB, or where that is asked for; where there is such a file, into `target.1.data`: it may
        be that of the model that `target` held, whose pair is whole until the new one is, or that
        of another model.

        Args:
            target: The file.
            save_as_external_data: Put weights outside in any case.

        Raises:
            ModelError: The model cannot be serialized, or `target` cannot be written, or holds
                weights of this model.
        """
        path = Path(target)
        if self.folder == path.resolve().parent and path.name in _data_files(self):
            raise ModelError(f"{path}: holds weights of {self.label}, and is not overwritten")
        try:
            if save_as_external_data or self.proto.ByteSize() > INLINE_LIMIT:
                self._save_external(path, smallest=SMALLEST_OUTSIDE)
            elif self.has_external_data:
                self._save_external(path)
            else:
                # Parsing and serializing again may reorder a foreign writer's fields: an untouched
                # model is copied as it stands.
                raw = self.path.read_bytes() if self.path else self.proto.SerializeToString()
                with atomic_write(path) as f:
                    f.write(raw)
        except OSError as e:
            raise ModelError(f"{path}: cannot be written ({e.strerror or e})") from e
        except (EncodeError, ValueError) as e:
            raise ModelError(f"{path}: the model cannot be serialized ({e})") from e

    def _save_external(self, path: Path, smallest: int | None = None) -> None:
        """Write tensors that lie outside, and all of at least `smallest` bytes, beside `path`."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        # No pair may be mixed of two: the data go where nothing reads them yet, then the model is
        # renamed, and what only the old one read goes last.
        old, own = data_files_of(path), set()
        if self.folder == path.resolve().parent:
            own = _data_files(self)
        # A file that the model at `path` does not read may hold the weights of any other model.
        names = (f"{path.name}{f'.{k}' if k else ''}.data" for k in itertools.count())
        data = next(p for p in map(path.with_name, names) if not p.exists())
        with atomic_write(data) as f:
            writer = ExternalWriter(f, data.name)
            for tensor in ModelStore(proto=proto).tensors():
                if uses_external_data(tensor):
                    writer.put(tensor, self.outside_bytes(tensor))
                elif smallest is not None:
                    raw = _raw(tensor)
                    if len(raw) >= smallest:
                        writer.put(tensor, raw)
        with atomic_write(path) as f:
            f.write(proto.SerializeToString())
        if old - own:  # a copy of the old model may still read them
            others = (p for p in path.parent.glob("*.onnx") if p.name != path.name)
            own = own.union(*map(data_files_of, others))
        for name in old - own:
            if re.fullmatch(rf"{re.escape(path.name)}(\.\d+)?\.data", name):
                with contextlib.suppress(OSError):  # somebody still has it open
                    path.with_name(name).unlink()


def _reopened(proto: onnx.ModelProto, folder: Path | None, label: str) -> ModelStore:
    """A model that another process sent, which may be on another machine.

    Raises:
        ModelError: Its weights lie outside, and are not here.
    """
    store = ModelStore(proto=proto, folder=folder, name=label)
    fault = model_fault(proto, store.tensors(), folder) if folder else None
    if fault:
        raise ModelError(
            f"{label}: node {socket.gethostname()}: {folder}: {fault}; weights in files beside the "
            "model have to be where every worker finds them"
        )
    return store


# What the public functions take for a model.
ModelSource: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | ModelStore


def graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers and tensor attributes of a graph and of the graphs inside it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        yield from node_tensors(node)


def node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    """Tensor attributes of a node, and all tensors of the graphs inside it."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield from graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from graph_tensors(graph)


def _data_files(store: ModelStore) -> set[str]:
    """Names of the files beside a model that hold its external data."""
    outside = (t for t in store.tensors() if uses_external_data(t))
    return {e.value for t in outside for e in t.external_data if e.key == "location"}


def data_files_of(path: Path) -> set[str]:
    """Names of the files beside it that the model at a path reads; none where there is no model."""
    try:
        return _data_files(ModelStore.load(path))
    except ModelError:
        return set()  # no model, or one that nobody can read


def _raw(tensor: onnx.TensorProto) -> bytes:
    """Data that a tensor holds, also in a field of their type; none of strings."""
    if not tensor.HasField("raw_data") and stored_bytes(tensor):
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor))
    return bytes(tensor.raw_data)


def _outside_length(tensor: onnx.TensorProto) -> int:
    """Bytes of an external tensor; from its shape where its entry does not say."""
    stated = next((e.value for e in tensor.external_data if e.key == "length"), None)
    return int(stated) if stated is not None else stored_bytes(tensor) or 0


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    if not value.type.HasField("tensor_type"):
        return TensorSpec(name=value.name, dtype=None, shape=None)
    kind = value.type.tensor_type
    dtype = (
        np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)) if kind.elem_type else None
    )
    shape = tuple(_dimension(d) for d in kind.shape.dim) if kind.HasField("shape") else None
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value") and dim.dim_value >= 0:  # some exporters write -1 where it is free
        return int(dim.dim_value)
    return dim.dim_param or None
