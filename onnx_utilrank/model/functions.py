"""Model-local functions, and the bodies that take the place of their calls."""

import onnx
import onnx.inliner
from google.protobuf.message import EncodeError

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.store import ModelStore

__all__ = ["inlined"]


def inlined(store: ModelStore) -> ModelStore:
    """A copy of a model with its functions inlined; the model itself where it has none.

    Raises:
        ModelError: They cannot be inlined.
    """
    if not store.proto.functions:
        return store
    try:
        proto: onnx.ModelProto = onnx.inliner.inline_local_functions(store.proto)
    except (EncodeError, RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise ModelError(f"{store.label}: its functions cannot be inlined ({reason})") from e
    return ModelStore(proto=proto, folder=store.folder, name=store.label)
