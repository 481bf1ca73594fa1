"""A model with other values in some of its initializers."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.external import DATA_FILE, SMALLEST_OUTSIDE, ExternalWriter, Scratch
from onnx_utilrank.model.store import ModelStore

__all__ = ["with_arrays"]


def with_arrays(store: ModelStore, arrays: Mapping[str, np.ndarray]) -> ModelStore:
    """The model with the named initializers replaced, stored in the types that they had.

    What a model declares of values that a changed extent reaches no longer holds and goes.

    Args:
        store: The model; it is not changed.
        arrays: New values by name. Extents may differ from what they were where the graph allows.

    Raises:
        ModelError: No initializer has a name, or values do not fit its type.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(store.proto)
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    scratch = Scratch() if store.has_external_data else None
    resized = set()
    for name, values in arrays.items():
        if name not in held:
            raise ModelError(f"{store.label}: there is no initializer {name!r}")
        tensor = held[name]
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values, dtype=kind)
        if not np.isfinite(stored.astype(np.float64)).all():
            raise ModelError(f"{store.label}: tensor {name!r}: its new values overflow {kind.name}")
        if stored.shape != tuple(tensor.dims):
            resized.add(name)
        doc = tensor.doc_string
        if scratch is None or stored.nbytes < SMALLEST_OUTSIDE:
            tensor.CopyFrom(numpy_helper.from_array(stored, name))
        else:
            new = onnx.TensorProto(name=name, data_type=tensor.data_type, dims=stored.shape)
            with (scratch.path / DATA_FILE).open("ab") as f:
                ExternalWriter(f, DATA_FILE).put(new, stored.view(np.uint8).data)
            tensor.CopyFrom(new)
        tensor.doc_string = doc
    if resized:
        between = {o for n in proto.graph.node if resized & {*n.input} for o in n.output}
        declared = [v for v in proto.graph.value_info if v.name not in between]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(declared)
    if scratch is None:
        return ModelStore(proto=proto, folder=store.folder, name=store.label)
    with (scratch.path / DATA_FILE).open("ab") as f:
        writer = ExternalWriter(f, DATA_FILE)
        for tensor in ModelStore(proto=proto).tensors():
            if uses_external_data(tensor) and tensor.name not in arrays:
                writer.put(tensor, store.outside_bytes(tensor))
    return ModelStore(proto=proto, folder=scratch.path, name=store.label, scratch=scratch)
