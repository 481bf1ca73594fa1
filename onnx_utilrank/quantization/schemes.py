"""All schemes; adding one is one entry here."""

from onnx_utilrank.errors import ConfigError
from onnx_utilrank.quantization.blockwise import INT4
from onnx_utilrank.quantization.floating import BF16, FP16
from onnx_utilrank.quantization.integer import INT8, INT8_DYNAMIC
from onnx_utilrank.quantization.scheme import Scheme

__all__ = ["SCHEMES", "find_scheme"]

SCHEMES: tuple[Scheme, ...] = (INT8, INT8_DYNAMIC, INT4, FP16, BF16)


def find_scheme(key: str) -> Scheme:
    """The scheme of that key.

    Raises:
        ConfigError: There is none.
    """
    found = next((scheme for scheme in SCHEMES if scheme.key == key), None)
    if found is None:
        raise ConfigError(f"scheme {key!r} is none of {', '.join(s.key for s in SCHEMES)}")
    return found
