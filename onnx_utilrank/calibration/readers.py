"""Read a user's files and arrays into checked blocks of samples.

Every reader gives `Rows` (arrays with samples along the first axis, which may share a run) or
`Feeds` (one whole feed a sample, which may not). Nothing leaves this module unchecked: after it,
names, element types, ranks and fixed dimensions are the model's, and floats are finite.
"""

import copy
import itertools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from onnx_utilrank.calibration.limits import UNREADABLE, check_archive, check_count
from onnx_utilrank.errors import DataError
from onnx_utilrank.model.store import TensorSpec

__all__ = ["Block", "Feeds", "Rows", "fixed_batch", "read_arrays", "read_path", "read_samples"]

logger = logging.getLogger(__name__)

# Values looked at together in the search for NaN: bounds the memory that the answer takes.
_CHUNK = 2**22

_WHOLE_FEEDS = "give arrays of one rank more, [samples, ...], whose items are whole feeds"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Samples that are rows of arrays.

    Attributes:
        arrays: An array [rows, ...] an input.
        constants: Rank-0 inputs whose one value goes with every row.
    """

    arrays: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def take(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """One feed of the given rows; a view of the arrays where the rows are neighbours."""
        index: slice | list[int] = list(rows)
        if index == list(range(rows[0], rows[0] + len(rows))):
            index = slice(rows[0], rows[0] + len(rows))
        return {name: a[index] for name, a in self.arrays.items()} | self.constants


@dataclass(frozen=True, slots=True, eq=False)
class Feeds:
    """Samples that are whole feeds."""

    feeds: Sequence[dict[str, np.ndarray]]

    def __len__(self) -> int:
        return len(self.feeds)

    def take(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The feed of the one sample in `rows`."""
        (row,) = rows
        return dict(self.feeds[row])


Block: TypeAlias = Rows | Feeds


def read_path(path: Path, inputs: Sequence[TensorSpec]) -> list[Block]:
    """Read a `.npz` or `.npy` file, or a folder of them or of ONNX test data sets.

    Raises:
        DataError: Something is missing or cannot be read, or does not fit the model.
    """
    try:
        if path.is_dir():
            return _read_folder(path, inputs)
        if not path.exists():
            hint = ", nor a 'package.module:function'" if ":" in path.name else ""
            raise DataError(f"{path}: no such file or folder{hint}")
        match path.suffix.lower():
            case ".npz":
                return [_read_npz(path, inputs)]
            case ".npy":
                return _read_npy([path], inputs, where=path)
    except OSError as e:
        raise DataError(f"{e.filename or path}: cannot be read ({_reason(e)})") from e
    raise DataError(f"{path}: not a .npz or .npy file or a folder of them")


def read_arrays(where: str, given: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Block:
    """Read one array a model input, with samples along the first axis.

    Arrays of an input's own rank are rows. Where any array has one rank more, each of its items is
    a whole feed, and arrays of the input's own rank give each feed one row. A rank-0 array for a
    rank-0 input is a constant; a set of nothing else is one feed.

    Args:
        where: How messages name the set.
        given: The arrays by input name, at most read once each; others are passed over.
        inputs: The model's inputs.

    Raises:
        DataError: An array is missing, unreadable, or does not fit model, other arrays or memory.
    """
    _require(where, given, inputs)
    _warn_unused(where, given, inputs)
    found = [(spec, _read_member(where, given, spec)) for spec in inputs]
    constants = {s.name: a for s, a in found if a.ndim == 0 and not s.shape}
    arrays = {s.name: a for s, a in found if s.name not in constants}
    for spec, array in found:
        if spec.shape is not None and array.ndim - len(spec.shape) not in (0, 1):
            raise _misfit(where, spec, array, array.shape)
    whole = {s.name for s, a in found if s.shape is not None and a.ndim > len(s.shape)}
    if not whole:
        fixed_batch(where, inputs)
    for (a, one), (b, other) in itertools.pairwise(arrays.items()):
        if len(one) != len(other):
            hint = "" if whole else f"; where axis 0 is not a batch, {_WHOLE_FEEDS}"
            raise DataError(
                f"{where}: input {a!r} has {len(one)} samples and input {b!r} {len(other)}{hint}"
            )
    for spec, array in found:
        if spec.name in whole:
            _check_fit(where, spec, array, array.shape[1:])
        elif spec.name in constants:
            _check_fit(where, spec, array, ())
        elif whole:
            _check_fit(where, spec, array, (1, *array.shape[1:]))
        else:
            _check_fit(where, spec, array, array.shape, rows=True)
        bad = _first_not_finite(array if spec.name in arrays else array[None])
        if bad is not None:
            raise DataError(f"{where}: sample {bad}: input {spec.name!r} holds NaN or infinity")
    check_count(where, count := max(map(len, arrays.values()), default=1))
    if arrays and not whole:
        return Rows(arrays=arrays, constants=constants)
    items = {name: a if name in whole else a[:, None] for name, a in arrays.items()}
    # `...` keeps an item of a vector an array, where a bare number would make it a scalar.
    return Feeds([{name: a[i, ...] for name, a in items.items()} | constants for i in range(count)])


def read_samples(where: str, samples: Iterable[object], inputs: Sequence[TensorSpec]) -> Feeds:
    """Read whole feeds, each a mapping of input names to arrays, in the order they come.

    A one-shot iterator is copied sample by sample, because whoever fills it may use one buffer for
    all; arrays of a container are kept as they are.

    Raises:
        DataError: A sample is not a mapping, misses an input or does not fit the model.
    """
    # Any: what an iterable holds is up to its author, and is checked here.
    feeds: list[dict[str, Any]] = []
    unused: dict[str, None] = {}
    once = iter(samples) is samples
    for i, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            kind = type(sample).__name__
            raise DataError(f"{where}: sample {i} is {kind}, not a dict of arrays by input name")
        feed = _read_feed(f"{where}: sample {i}", sample, inputs)
        feeds.append(copy.deepcopy(feed) if once else feed)
        unused |= dict.fromkeys(sample)
    _warn_unused(where, unused, inputs)
    return Feeds(feeds)


def fixed_batch(where: str, inputs: Sequence[TensorSpec]) -> int | None:
    """Rows that the model takes in one run; None where it takes any number.

    Raises:
        DataError: Inputs differ in it, so that the first axis cannot be a batch for all.
    """
    fixed = {s.name: s.shape[0] for s in inputs if s.shape and _is_fixed(s.shape[0])}
    for (a, one), (b, other) in itertools.pairwise(fixed.items()):
        if one != other:
            raise DataError(
                f"{where}: rows cannot be split into runs, for the first dimension of input {a!r} "
                f"is {one} and that of input {b!r} {other}; {_WHOLE_FEEDS}"
            )
    # A first dimension of 0 says nothing of how many rows to run.
    return next((int(d) for d in fixed.values() if d), None)


def _read_folder(path: Path, inputs: Sequence[TensorSpec]) -> list[Block]:
    entries = sorted((p for p in path.iterdir() if not p.name.startswith(".")), key=_natural)
    sets = [p for p in entries if p.name.startswith("test_data_set_") and p.is_dir()]
    npz = [p for p in entries if p.suffix.lower() == ".npz" and p.is_file()]
    npy = [p for p in entries if p.suffix.lower() == ".npy" and p.is_file()]
    if sets:
        return [Feeds([_read_test_set(p, inputs) for p in sets])]
    if npz and npy:
        raise DataError(f"{path}: holds both .npz ({npz[0].name}) and .npy ({npy[0].name}) files")
    if npz:
        return [_read_npz(p, inputs) for p in npz]
    if npy:
        return _read_npy(npy, inputs, where=path)
    raise DataError(f"{path}: holds no .npz or .npy file and no test_data_set_* folder")


def _read_npz(path: Path, inputs: Sequence[TensorSpec]) -> Block:
    with path.open("rb") as file:
        archive = _load(path, file)
        if isinstance(archive, np.ndarray):
            raise DataError(f"{path}: not an .npz archive but a single array")
        check_archive(path, archive.zip, (spec.name for spec in inputs))
        return read_arrays(str(path), archive, inputs)


def _read_npy(files: Sequence[Path], inputs: Sequence[TensorSpec], *, where: Path) -> list[Block]:
    """Read `.npy` files that are an array an input, or samples of a model's only input."""
    if len(inputs) == 1:
        return [_read_npy_samples(p, inputs[0]) for p in files]
    if {p.stem for p in files} == {s.name for s in inputs}:
        return [read_arrays(str(where), {p.stem: _load_npy(p) for p in files}, inputs)]
    raise DataError(
        f"{where}: the model has {len(inputs)} inputs: name the .npy files in a folder after them "
        f"({', '.join(f'{s.name}.npy' for s in inputs)}) or give .npz files"
    )


def _read_npy_samples(path: Path, spec: TensorSpec) -> Block:
    array = _load_npy(path)
    if spec.shape and array.ndim == len(spec.shape) - 1:
        array = array[None]
    return read_arrays(str(path), {spec.name: array}, [spec])


def _read_test_set(path: Path, inputs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Read one folder of the ONNX test layout, where input_k.pb is the k-th input's tensor."""
    files = [path / f"input_{k}.pb" for k in range(len(inputs))]
    unused = sorted({p.name for p in path.glob("input_*.pb")} - {p.name for p in files})
    if unused:
        logger.warning("%s: the model has no input for %s", path, ", ".join(unused))
    pairs = zip(inputs, files, strict=True)
    return _read_feed(str(path), {spec.name: _load_proto(p) for spec, p in pairs}, inputs)


def _read_feed(
    where: str, given: Mapping[str, Any], inputs: Sequence[TensorSpec]
) -> dict[str, Any]:
    """Check one whole feed and give what it has for the model, in the model's order."""
    _require(where, given, inputs)
    feed = {}
    for spec in inputs:
        value = given[spec.name]
        # Sequences, maps and optionals are ONNX Runtime's to judge.
        if spec.dtype is not None:
            value = _as_array(where, spec, value)
            _check_fit(where, spec, value, value.shape)
            if _first_not_finite(value[None]) is not None:
                raise DataError(f"{where}: input {spec.name!r} holds NaN or infinity")
        feed[spec.name] = value
    return feed


def _load(path: Path, file: IO[bytes]) -> Any:
    # numpy leaves a damaged archive open that it opened itself.
    try:
        return np.load(file, allow_pickle=False)
    except UNREADABLE as e:
        raise DataError(f"{path}: cannot be read ({_reason(e)})") from e


def _load_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        array = _load(path, file)
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: not an .npy file but an .npz archive")
    return array


def _load_proto(path: Path) -> np.ndarray:
    try:
        proto = onnx.TensorProto.FromString(path.read_bytes())
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            raise DataError(f"{path}: its values are in another file; only raw tensors are read")
        return numpy_helper.to_array(proto)
    except (OSError, DecodeError, ValueError, TypeError, KeyError) as e:
        kind = "cannot be read" if isinstance(e, OSError) else "not a tensor"
        raise DataError(f"{path}: {kind} ({_reason(e)})") from e


def _read_member(where: str, given: Mapping[str, Any], spec: TensorSpec) -> np.ndarray:
    # Members of an archive are read as they are asked for, and fail then.
    try:
        value = given[spec.name]
    except UNREADABLE as e:
        raise DataError(f"{where}: {spec.name!r} cannot be read ({_reason(e)})") from e
    if spec.dtype is None:
        raise DataError(f"{where}: input {spec.name!r} is not a tensor; give whole feeds as dicts")
    return _as_array(where, spec, value)


def _require(where: str, given: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> None:
    missing = ", ".join(repr(s.name) for s in inputs if s.name not in given)
    if missing:
        wanted = ", ".join(repr(s.name) for s in inputs)
        found = ", ".join(map(repr, given)) or "nothing"
        raise DataError(f"{where}: no array {missing}; wanted are {wanted}, found {found}")


def _warn_unused(where: str, names: Iterable[str], inputs: Sequence[TensorSpec]) -> None:
    known = {s.name for s in inputs}
    unused = [repr(name) for name in names if name not in known]
    if unused:
        logger.warning("%s: the model has no input %s", where, ", ".join(unused))


def _as_array(where: str, spec: TensorSpec, value: object) -> np.ndarray:
    if not isinstance(value, np.ndarray | np.generic):
        raise DataError(
            f"{where}: input {spec.name!r} wants {_describe(spec)}, got {type(value).__name__}"
        )
    array = np.asarray(value)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _check_fit(
    where: str, spec: TensorSpec, array: np.ndarray, shape: tuple[int, ...], *, rows: bool = False
) -> None:
    """Compare the type of `array`, and the shape of what one run gets of it, with the input's."""
    want: Sequence[int | str | None] = shape if spec.shape is None else spec.shape
    skip = int(rows)  # how many rows there are is not how many a run gets
    if not (
        _is_type(array, spec.dtype)
        and len(want) == len(shape)
        and all(not _is_fixed(w) or w == h for w, h in zip(want[skip:], shape[skip:], strict=True))
    ):
        raise _misfit(where, spec, array, shape)


def _misfit(where: str, spec: TensorSpec, array: np.ndarray, shape: tuple[int, ...]) -> DataError:
    text = array.dtype.kind == "U"
    got = f"{'string' if text else array.dtype.name}[{', '.join(map(str, shape))}]"
    each = "" if shape == array.shape else " a sample"
    return DataError(f"{where}: input {spec.name!r} wants {_describe(spec)}, got {got}{each}")


def _is_type(array: np.ndarray, dtype: np.dtype[np.generic] | None) -> bool:
    if dtype is None or dtype.kind != "O":
        return dtype is None or array.dtype == dtype
    return array.dtype.kind == "U" or (
        array.dtype.kind == "O" and all(isinstance(item, str) for item in array.flat)
    )


def _is_fixed(dim: int | str | None) -> bool:
    # Some exporters write -1 for a free dimension; ONNX Runtime takes it so.
    return isinstance(dim, int) and dim >= 0


def _first_not_finite(array: np.ndarray) -> int | None:
    """Number of the first item [...] along axis 0 that holds NaN or infinity, if any does.

    A mask, of 0 and -infinity alone, may.
    """
    if array.dtype.kind in "biuUO":
        return None
    step = max(1, _CHUNK // max(1, array[:1].size))
    for start in range(0, len(array), step):
        part = array[start : start + step]
        finite = np.isfinite(part)
        if not finite.all():
            # Of a mask that is added to scores, -infinity hides a place.
            is_mask = np.isin(array, (0, -np.inf)).all()
            first = np.argmin(finite.reshape(len(part), -1).all(axis=1))
            return None if is_mask else start + int(first)
    return None


def _describe(spec: TensorSpec) -> str:
    if spec.dtype is None:
        return "a tensor"
    name = "string" if spec.dtype.kind == "O" else spec.dtype.name
    if spec.shape is None:
        return f"{name} of any shape"
    return f"{name}[{', '.join('?' if d is None else str(d) for d in spec.shape)}]"


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Sort key that puts 2 before 10."""
    parts = re.split(r"(\d+)", path.name)
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], path.name


def _reason(error: Exception) -> str:
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or " ".join(str(error).split()) or type(error).__name__
