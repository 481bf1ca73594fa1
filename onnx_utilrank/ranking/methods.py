"""The methods a user can choose from."""

from onnx_utilrank.errors import ConfigError
from onnx_utilrank.ranking.method import Method
from onnx_utilrank.ranking.one_sided import ONE_SIDED
from onnx_utilrank.ranking.plain_svd import PLAIN_SVD
from onnx_utilrank.ranking.two_sided import TWO_SIDED
from onnx_utilrank.ranking.utilized_rank import UTILIZED_RANK

__all__ = ["METHODS", "find_method"]

# Adding a method is one file beside this one and one entry here; the first is the default, where
# the model lets gradients be had.
METHODS: tuple[Method, ...] = (TWO_SIDED, ONE_SIDED, UTILIZED_RANK, PLAIN_SVD)


def find_method(key: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: There is none.
    """
    found = next((m for m in METHODS if m.key == key), None)
    if found is None:
        raise ConfigError(
            f"method {key!r} is not known; choose one of: {', '.join(m.key for m in METHODS)}"
        )
    return found
