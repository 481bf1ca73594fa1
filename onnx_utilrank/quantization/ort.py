"""The seam to onnxruntime.quantization: quiet, in a folder of its own, and with one-line errors."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import onnx
from google.protobuf.message import DecodeError, EncodeError

from onnx_utilrank.errors import ModelError
from onnx_utilrank.runtime.providers import ort_errors

__all__ = ["calling", "tools"]

# What its modules raise on models they do not foresee: they check little, and share no base class.
_ERRORS = (
    *ort_errors(),
    *(LookupError, ArithmeticError, AttributeError, AssertionError, ImportError, OSError),
    *(onnx.shape_inference.InferenceError, onnx.checker.ValidationError, EncodeError, DecodeError),
)


def tools() -> ModuleType:
    """`onnxruntime.quantization`; imported when it is used, for it takes half a second.

    It puts a folder of scripts on the module search path, which goes again.
    """
    path = list(sys.path)
    try:
        import onnxruntime.quantization as quantization
    finally:
        sys.path[:] = path
    found: ModuleType = quantization
    return found


@contextlib.contextmanager
def calling(label: str, scheme: str) -> Iterator[None]:
    """Keep what it prints and logs from the user, and turn what it raises into one line.

    Advice to pre-process a model goes to the root logger and to stdout, which belongs to results.

    Args:
        label: How messages name the model.
        scheme: What is being made of it.

    Raises:
        ModelError: It failed.
    """
    root = logging.getLogger()
    holder = logging.NullHandler()  # without any handler, the root logger would get one for good

    def silence(record: logging.LogRecord) -> bool:
        del record
        return False

    root.addHandler(holder)
    root.addFilter(silence)  # of what is logged to the root itself; ours has loggers by name
    try:
        with contextlib.redirect_stdout(None):
            yield
    except _ERRORS as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ModelError(f"{label}: {scheme}: onnxruntime.quantization: {reason}") from e
    finally:
        root.removeFilter(silence)
        root.removeHandler(holder)
