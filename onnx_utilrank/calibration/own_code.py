"""Functions of the user's own, by name: data, and metrics."""

import contextlib
import importlib
import operator
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onnx_utilrank.errors import DataError

__all__ = ["import_function", "importable", "names_function"]

_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_FUNCTION = re.compile(f"({_DOTTED}):({_DOTTED})")


def names_function(source: str) -> bool:
    """Whether a text is 'package.module:function' and no file."""
    # On Windows `c:name` is a path of drive C; nothing else there has a drive and matches.
    return bool(
        _FUNCTION.fullmatch(source) and not Path(source).drive and not Path(source).exists()
    )


def import_function(source: str) -> Callable[..., Any]:
    """The function that 'package.module:function' names, with the current folder on the path.

    Raises:
        DataError: There is none.
    """
    if not _FUNCTION.fullmatch(source):
        raise DataError(f"{source}: is not of the form package.module:function")
    with importable(Path.cwd()):
        return _import_function(source)


def _import_function(source: str) -> Callable[..., Any]:
    module, _, name = source.partition(":")
    try:
        function = operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError) as e:
        reason = " ".join(str(e).split())
        raise DataError(f"{source}: cannot be imported ({reason})") from e
    if not callable(function):
        raise DataError(f"{source}: {type(function).__name__} is not a function")
    return function  # type: ignore[no-any-return]


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Put `folder` first on Python's module path for the time of the block."""
    entry = str(folder)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()  # the module may be younger than the last look at its folder
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # imported code may have changed the path itself
            sys.path.remove(entry)
