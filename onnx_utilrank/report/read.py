"""A report in JSON, which may come from anywhere, held to the schema."""

import json
import math
import os
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
from jsonschema.exceptions import best_match

from onnx_utilrank.errors import ModelError

__all__ = ["read_content"]

# No figure of a report is as large: it is a sign of another file, and nothing can draw it.
LARGEST = 1e18


def read_content(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a report.

    Raises:
        ModelError: It cannot be read, or is not what `--report` writes in this version.
    """
    try:
        text = Path(path).read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as e:
        raise ModelError(f"{path}: cannot be read ({e})") from e
    try:
        content = json.loads(text, parse_constant=_refuse, parse_float=_float, parse_int=_int)
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path}: not JSON ({e})") from e
    whole = json.loads(files("onnx_utilrank.report").joinpath("schema.json").read_text("utf8"))
    verb = _verb(content)
    if verb not in whole["$defs"]["RunRecord"]["properties"]["verb"]["enum"]:
        raise ModelError(f"{path}: not a report that --report wrote: it names no verb")
    schema = {"$ref": f"#/$defs/{verb}", "$defs": whole["$defs"]}
    try:
        fault = best_match(jsonschema.Draft202012Validator(schema).iter_errors(content))
    except RecursionError as e:
        raise ModelError(f"{path}: not a report: it is nested too deeply") from e
    if fault is not None:
        said = fault.message if len(fault.message) < 200 else f"{fault.message[:200]}…"
        raise ModelError(
            f"{path}: not a report of `{verb}` in this version: {fault.json_path}: {said}"
        )
    assert isinstance(content, dict)
    return content


def _verb(content: object) -> object:
    run = content.get("run") if isinstance(content, dict) else None
    return run.get("verb") if isinstance(run, dict) else None


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise ValueError(f"{text[:20]} is too large")
    return value


def _int(text: str) -> int:
    value = int(text)
    if abs(value) > LARGEST:
        raise ValueError(f"{text[:20]} is too large")
    return value
