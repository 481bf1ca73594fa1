"""What a plan says of the quantization that comes after the factors."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from onnx_utilrank.config import SCHEME_KEYS, SchemeKey
from onnx_utilrank.errors import ModelError

__all__ = ["ThenEntry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThenEntry:
    """How the model is quantized in the end.

    Attributes:
        scheme: Key of the scheme.
        in_float: Nodes that stay in float for what they would lose, each by the first value that
            it makes; None where that is not decided yet.
    """

    scheme: SchemeKey
    in_float: tuple[str, ...] | None = None

    @classmethod
    def from_json(cls, raw: object, label: str) -> "ThenEntry | None":
        """The entry of a plan as JSON types; None where there is none.

        Raises:
            ModelError: It is not of this form, or names no scheme.
        """
        if raw is None:
            return None
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(raw, Mapping) or set(raw) != names:
            raise ModelError(f"{label}: 'then' does not have the keys {', '.join(sorted(names))}")
        scheme, in_float = raw["scheme"], raw["in_float"]
        if scheme not in SCHEME_KEYS:
            raise ModelError(f"{label}: 'then' names scheme {scheme!r}, which is not known")
        if in_float is None:
            return cls(scheme=scheme)
        if not isinstance(in_float, list) or not all(isinstance(n, str) for n in in_float):
            raise ModelError(f"{label}: 'in_float' of 'then' is not a list of names")
        return cls(scheme=scheme, in_float=tuple(in_float))
