"""Files: what is read, what is refused, and what lies on disk afterwards."""

import gc
import os
import stat
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from builders import activations, index, model, noise, right, run
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data, uses_external_data

from onnx_utilrank import CompressConfig, ModelError, UtilrankError, compress
from onnx_utilrank.model import external
from onnx_utilrank.model import store as store_module
from onnx_utilrank.model.store import ModelStore, TensorSpec, atomic_write
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.surgery.rewrite import check_contract

SMALLER = CompressConfig(param_ratio=0.8, moves=("low-rank",))
NOTHING = CompressConfig(param_ratio=1.0, exclude=("*",))
SIZE = 60


def two_layers() -> onnx.ModelProto:
    """Two MatMuls of low rank, large enough that factors save bytes too."""
    weights = {
        name: (noise(k, SIZE, 8) @ noise(k + 1, 8, SIZE) / SIZE).astype(np.float32)
        for k, name in enumerate(("U", "D"))
    }
    signature = f"(float[n,{SIZE}] x) => (float[n,{SIZE}] y)"
    proto = model(signature, "h = MatMul(x, U) g = Add(h, b) y = MatMul(g, D)", **weights)
    proto.graph.initializer.append(numpy_helper.from_array(noise(9, SIZE).astype(np.float32), "b"))
    return proto


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": activations(k, 128, SIZE).astype(np.float32)} for k in range(6)]


def outside(folder: Path, proto: onnx.ModelProto | None = None) -> Path:
    """A model with its weights in a file beside it."""
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    copy = onnx.ModelProto()
    copy.CopyFrom(proto or two_layers())
    onnx.save_model(copy, path, **options)
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def arrays(store: ModelStore) -> list[np.ndarray]:
    return [store.array(tensor) for tensor in store.tensors()]


def one_line(message: str, *parts: object) -> None:
    assert "\n" not in message
    assert all(str(part) in message for part in parts)


# --- loading ------------------------------------------------------------------------------------

RAW = right(2).proto.SerializeToString()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.onnx", None, "cannot be read"),
        ("empty.onnx", b"", "not an ONNX model"),
        ("cut.onnx", RAW[: len(RAW) // 2], "not an ONNX model"),
        ("text.onnx", b"not a model at all", "not an ONNX model"),
        ("page.onnx", b"<!DOCTYPE html><html></html>", "not an ONNX model"),
        ("list.json", b"[1, 2, 3]", "not an ONNX model"),
        ("model.onnxtxt", b"agraph (float[N] x) => (float[N] y) {", "not an ONNX model"),
        ("head.onnx", onnx.ModelProto(ir_version=10).SerializeToString(), "no graph"),
    ],
)
@pytest.mark.parametrize("verb", ["load", "compress"])
def test_what_is_no_model_is_an_error_that_names_the_file(
    tmp_path: Path, name: str, content: bytes | None, reason: str, verb: str
):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        ModelStore.load(path) if verb == "load" else compress(path, feeds(), SMALLER)
    one_line(str(caught.value), path, reason)


def test_folder_is_no_model(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot be read") as caught:
        ModelStore.load(tmp_path)
    one_line(str(caught.value), tmp_path)


def test_models_without_operator_sets_are_refused():
    proto = right(2).proto
    del proto.opset_import[:]
    with pytest.raises(ModelError, match=r"model 'g': .*no opset"):
        ModelStore.load(proto)


def test_value_that_is_made_twice_is_an_error_that_names_both_nodes():
    proto = model("(float[n] x) => (float[n] y)", "y = Neg(x) [twin] y = Abs(x)")
    with pytest.raises(ModelError, match="'y' is made twice, by Neg 'y' and Abs 'twin'"):
        index(proto)


@pytest.mark.parametrize("suffix", [".onnx", ".json", ".onnxtxt", ""])
def test_models_load_whatever_they_are_called(tmp_path: Path, suffix: str):
    path = tmp_path / f"a model é{suffix}"
    path.write_bytes(RAW)
    store = ModelStore.load(str(path))
    assert store.proto.SerializeToString() == RAW
    assert store.label == str(path)
    assert ModelStore.load(store) is store


def test_inputs_and_outputs_are_those_a_caller_sees():
    signature = "(float[n,3] x, seq(int64) s, float k) => (float[n,3] y, float16[m,?] z, string t)"
    body = "y = Mul(x, W) z = Cast<to=10>(y) t = Cast<to=8>(k)"
    store = ModelStore.load(model(signature, body, opset=8, ir=3, W=np.ones(3, np.float32)))
    given, made = (", ".join(map(str, specs)) for specs in (store.inputs, store.outputs))
    assert given == "x: float32[n, 3], s: non-tensor[?], k: float32[]"
    assert made == "y: float32[n, 3], z: float16[m, ?], t: object[]"
    assert store.inputs[0] == TensorSpec(name="x", dtype=np.dtype(np.float32), shape=("n", 3))


def test_every_tensor_counts_wherever_it_is():
    body = """
        c = Constant<value = float[2] {1, 2}>()
        h = Add(x, c)
        y = If (flag) <
            then_branch = one () => (float[2] a) {
                k = Constant<value = float[2] {3, 4}>()
                a = Add(h, k)
            },
            else_branch = two () => (float[2] b) <float[2] w = {5, 6}> { b = local.f(w) }
        >
    """
    functions = (
        '<opset_import: ["" : 17], domain: "local"> f (p) => (q)'
        " { v = Constant<value = float[2] {7, 8}>() q = Add(p, v) }"
    )
    proto = model(
        "(float[2] x, bool flag) => (float[2] y)",
        body,
        domains=', "local" : 1',
        functions=functions,
        unused=np.float32([9, 10]),
    )
    values = numpy_helper.from_array(np.float32([11]), "sparse")
    at = numpy_helper.from_array(np.array([1]), "at")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [2]))
    store = ModelStore.load(proto)
    held = sorted(float(v) for a in arrays(store) for v in a.flat)
    assert held == sorted([*range(1, 12), 1])
    assert count_parameters(store) == len(held)


# --- external data ------------------------------------------------------------------------------


@pytest.mark.parametrize(("large", "alignment"), [(0, 4096), (2**20, 64)])
def test_external_data_stay_external(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int, alignment: int
):
    monkeypatch.setattr("onnx_utilrank.model.external.LARGE", large)
    path = outside(tmp_path / "in")
    result = compress(path, feeds(), SMALLER)
    assert {e.rank for e in result.plan.entries} != {None}
    (out := tmp_path / "out").mkdir()
    result.save(out / "small.onnx")
    assert files(out) == ["small.onnx", "small.onnx.data"]
    saved = ModelStore.load(out / "small.onnx")
    outside_now = [t for t in saved.tensors() if uses_external_data(t)]
    assert outside_now
    places = [{e.key: e.value for e in t.external_data} for t in outside_now]
    assert {place["location"] for place in places} == {"small.onnx.data"}
    assert {int(place["offset"]) % alignment for place in places} == {0}  # can be mapped
    onnx.checker.check_model(out / "small.onnx", full_check=True)
    inline = compress(two_layers(), feeds(), SMALLER)
    feed = feeds()[0]
    np.testing.assert_array_equal(run(saved, feed)["y"], run(inline.model, feed)["y"])


def test_external_data_give_the_same_plan_as_inline_ones(tmp_path: Path):
    one = compress(outside(tmp_path / "in"), feeds(), SMALLER).plan
    other = compress(two_layers(), feeds(), SMALLER).plan
    assert one.entries == other.entries
    assert one.parameters_after == other.parameters_after


def test_rewritten_model_with_external_data_is_checked_too(tmp_path: Path):
    source = ModelStore.load(outside(tmp_path))
    result = compress(source, feeds(), SMALLER).store
    assert result is not None
    check_contract(source, result)
    result.proto.graph.initializer.pop()
    with pytest.raises(UtilrankError, match="not valid ONNX"):
        check_contract(source, result)


def test_model_with_external_data_may_be_overwritten(tmp_path: Path):
    path = outside(tmp_path / "in")
    result = compress(path, feeds(), SMALLER)
    feed = feeds()[0]
    expected = run(result.store, feed)["y"]
    # Never into the file that the model there reads, which goes when the new pair is whole.
    for name in ("model.onnx.data", "model.onnx.1.data", "model.onnx.data"):
        result.save(path)
        assert files(path.parent) == sorted(["model.onnx", name, "weights.bin"])
        np.testing.assert_array_equal(run(ModelStore.load(path), feed)["y"], expected)


def test_data_that_the_model_itself_reads_are_not_overwritten(tmp_path: Path):
    path = outside(tmp_path / "in")
    (path.parent / "weights.bin").rename(path.parent / "out.onnx.data")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = "out.onnx.data"
    onnx.save_model(proto, path)
    before = arrays(ModelStore.load(path))
    ModelStore.load(path).save(path.parent / "out.onnx")
    for name in ("model.onnx", "out.onnx"):
        for old, new in zip(before, arrays(ModelStore.load(path.parent / name)), strict=True):
            np.testing.assert_array_equal(new, old)


def test_copy_with_external_data_holds_the_same_values(tmp_path: Path):
    path = outside(tmp_path / "in")
    source = ModelStore.load(path)
    result = compress(path, feeds(), NOTHING)
    assert result.store is not None
    result.save(tmp_path / "copy.onnx")
    copy = ModelStore.load(tmp_path / "copy.onnx")
    for before, after in zip(arrays(source), arrays(copy), strict=True):
        np.testing.assert_array_equal(after, before)
    assert [t.name for t in copy.tensors() if uses_external_data(t)] == ["U", "D", "b"]


def test_models_made_of_one_with_data_outside_wait_in_a_folder_that_goes_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    result = compress(outside(tmp_path / "in"), feeds(), SMALLER)
    (made,) = temporary.iterdir()
    assert result.store is not None
    assert result.store.folder == made
    feed = feeds()[0]
    expected = run(result.store, feed)["y"]
    whole = result.model  # which needs no folder any more
    del result
    gc.collect()
    assert not made.exists()
    assert not ModelStore.load(whole).has_external_data
    np.testing.assert_array_equal(run(whole, feed)["y"], expected)


@pytest.mark.parametrize("when", ["folder", "file"])
def test_no_room_for_weights_that_wait_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
):
    monkeypatch.setattr(external.tempfile, "tempdir", str(tmp_path))
    source = outside(tmp_path / "in")
    if when == "folder":
        monkeypatch.setattr(external.tempfile, "tempdir", str(tmp_path / "gone"))
    else:
        monkeypatch.setattr(external, "DATA_FILE", "no/such/folder")
    with pytest.raises(UtilrankError, match="TMPDIR names another folder"):
        compress(source, feeds(), SMALLER)


def test_no_proto_holds_what_is_beyond_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    result = compress(outside(tmp_path / "in"), feeds(), SMALLER)
    monkeypatch.setattr(store_module, "INLINE_LIMIT", 20_000)
    with pytest.raises(ModelError, match="save it as a file"):
        _ = result.model
    result.save(tmp_path / "out.onnx")
    assert files(tmp_path) == ["in", "out.onnx", "out.onnx.data"]


def test_external_arrays_are_mapped_and_never_written_back(tmp_path: Path):
    path = outside(tmp_path / "in")
    store = ModelStore.load(path)
    data = (tmp_path / "in" / "weights.bin").read_bytes()
    arrays_of = [store.array(tensor) for tensor in store.proto.graph.initializer]
    bases = []
    for array in arrays_of:
        base = array
        while not isinstance(base, np.memmap):
            assert base.base is not None
            base = base.base
        bases.append(id(base))
    assert len(set(bases)) == 1  # however many tensors, one file is open
    arrays_of[0][:] = 0
    assert (tmp_path / "in" / "weights.bin").read_bytes() == data
    assert ModelStore.load(path).array(store.proto.graph.initializer[0]).any()


def test_tensors_without_elements_may_lie_in_an_empty_file(tmp_path: Path):
    proto = model("(float[n] x) => (float[m] y)", "y = Concat<axis=0>(x, e)")
    proto.graph.initializer.append(numpy_helper.from_array(np.empty(0, np.float32), "e"))
    store = ModelStore.load(outside(tmp_path / "in", proto))
    (tensor,) = store.proto.graph.initializer
    assert uses_external_data(tensor)
    assert (tmp_path / "in" / "weights.bin").stat().st_size == 0
    assert store.array(tensor).shape == (0,)


@pytest.mark.parametrize("external", [False, True])
def test_weights_go_outside_where_that_is_asked_for(tmp_path: Path, external: bool):
    source = outside(tmp_path / "in") if external else two_layers()
    result = compress(source, feeds(), SMALLER)
    for _ in range(2):  # nothing is appended to what is there
        result.save(tmp_path / "out.onnx", save_as_external_data=True)
    assert len([name for name in files(tmp_path) if name.startswith("out.onnx.")]) == 1
    saved = ModelStore.load(tmp_path / "out.onnx")
    large = [t.name for t in saved.tensors() if np.prod(t.dims) >= 256]
    assert large
    assert set(large) <= {t.name for t in saved.tensors() if uses_external_data(t)}
    assert result.store is not None
    assert saved.file_bytes == pytest.approx(result.store.file_bytes, rel=0.05)
    feed = feeds()[0]
    np.testing.assert_array_equal(run(saved, feed)["y"], run(result.store, feed)["y"])


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float4_e2m1fn", "bfloat16", "int8"])
def test_types_of_any_width_survive_outside(tmp_path: Path, dtype: str):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = np.array([0, 1, 2, 1, 0, 2, 1], np.float32).astype(kind)
    tensor = numpy_helper.from_array(values, "packed")
    raw = tensor.raw_data
    proto = right(2, ir=11, opset=23).proto
    proto.graph.initializer.append(tensor)
    store = ModelStore.load(outside(tmp_path / "in", proto))
    assert store.has_external_data
    store.save(tmp_path / "out.onnx")
    copy = onnx.load(tmp_path / "out.onnx")
    held = next(t for t in copy.graph.initializer if t.name == "packed")
    assert held.raw_data == raw
    np.testing.assert_array_equal(numpy_helper.to_array(held), values)


TYPED = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
    "int64": TensorProto.INT64,
    "uint64": TensorProto.UINT64,
    "bool": TensorProto.BOOL,
    "complex64": TensorProto.COMPLEX64,
}


@pytest.mark.parametrize("dtype", TYPED)
def test_weights_that_are_kept_by_type_go_outside_too(tmp_path: Path, dtype: str):
    values = np.random.default_rng(3).integers(0, 7, 64 * 63).tolist()
    tensor = helper.make_tensor("held", TYPED[dtype], [64, 63], values)
    assert not tensor.HasField("raw_data")
    proto = right(2, ir=11, opset=23).proto
    proto.graph.initializer.append(tensor)
    expected = numpy_helper.to_array(tensor)
    ModelStore.load(proto).save(tmp_path / "out.onnx", save_as_external_data=True)
    saved = ModelStore.load(tmp_path / "out.onnx")
    (found,) = (t for t in saved.proto.graph.initializer if t.name == "held")
    assert uses_external_data(found)
    assert saved.proto.ByteSize() < 2000
    assert saved.array(found).dtype == expected.dtype
    np.testing.assert_array_equal(saved.array(found), expected)


def test_strings_stay_in_the_file(tmp_path: Path):
    proto = right(2).proto
    proto.graph.initializer.append(
        helper.make_tensor("words", TensorProto.STRING, [500], [b"word"] * 500)
    )
    ModelStore.load(proto).save(tmp_path / "out.onnx", save_as_external_data=True)
    saved = ModelStore.load(tmp_path / "out.onnx")
    (words,) = (t for t in saved.proto.graph.initializer if t.name == "words")
    assert list(words.string_data) == [b"word"] * 500


def test_tensors_of_nodes_may_lie_outside_too(tmp_path: Path):
    body = "c = Constant<value = float[2] {1, 2}>() y = Add(x, c)"
    proto = model("(float[2] x) => (float[2] y)", body)
    proto.graph.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(np.float32([1, 2]), "c"))
    path = tmp_path / "model.onnx"
    onnx.save_model(
        proto, path, save_as_external_data=True, size_threshold=0, convert_attribute=True
    )
    store = ModelStore.load(path)
    assert store.has_external_data
    store.save(tmp_path / "copy.onnx")
    (copied,) = arrays(ModelStore.load(tmp_path / "copy.onnx"))
    assert copied.tolist() == [1, 2]


def relocated(folder: Path, **changes: str | None) -> Path:
    """A model whose first weight states another place for its data."""
    path = outside(folder)
    proto = onnx.load(path, load_external_data=False)
    tensor = proto.graph.initializer[0]
    entries = {e.key: e.value for e in tensor.external_data} | changes
    del tensor.external_data[:]
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    onnx.save_model(proto, path)
    return path


@pytest.mark.parametrize("location", ["../secret.bin", "{folder}/secret.bin", "gone.bin", "", "."])
def test_data_outside_the_folder_or_missing_are_errors_that_name_the_tensor(
    tmp_path: Path, location: str
):
    (tmp_path / "secret.bin").write_bytes(bytes(4 * SIZE * SIZE))
    path = relocated(tmp_path / "in", location=location.format(folder=tmp_path))
    with pytest.raises(ModelError) as caught:
        ModelStore.load(path)
    one_line(str(caught.value), path, "'U'")
    proto = onnx.load(path, load_external_data=False)
    store = ModelStore(proto=proto, folder=path.parent, path=path)  # as if it were sound
    with pytest.raises(ModelError) as caught:
        store.array(store.proto.graph.initializer[0])
    one_line(str(caught.value), path, "'U'")
    with pytest.raises(ModelError) as caught:
        store.save(tmp_path / "out.onnx")
    one_line(str(caught.value), "'U'")
    assert files(tmp_path) == ["in", "secret.bin"]
    with pytest.raises(ModelError):
        compress(path, feeds(), SMALLER)


def test_data_that_are_cut_short_are_an_error(tmp_path: Path):
    path = outside(tmp_path / "in")
    store = ModelStore.load(path)
    (path.parent / "weights.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match=r"model\.onnx: tensor 'U': its data end at byte 14400"):
        compress(path, feeds(), SMALLER)
    with pytest.raises(ModelError, match="'U'"):
        store.fingerprint()


def test_fingerprint_covers_the_data_outside(tmp_path: Path):
    path = outside(tmp_path / "in")
    before = ModelStore.load(path).fingerprint()
    assert ModelStore.load(path).fingerprint() == before
    data = path.parent / "weights.bin"
    raw = bytearray(data.read_bytes())
    raw[-1] ^= 1
    data.write_bytes(raw)
    assert ModelStore.load(path).fingerprint() != before
    assert ModelStore.load(two_layers()).fingerprint() != before


@pytest.mark.parametrize("external", [False, True])
def test_models_beyond_the_limit_of_one_file_put_their_weights_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
):
    monkeypatch.setattr(store_module, "INLINE_LIMIT", 20_000)  # in place of 2 GiB
    proto = two_layers()
    if external:  # one tensor only, so that what is left inline passes the limit
        set_external_data(proto.graph.initializer[2], "weights.bin")
        onnx.save_model(proto, tmp_path / "in.onnx")
        assert files(tmp_path) == ["in.onnx", "weights.bin"]
    source = ModelStore.load(tmp_path / "in.onnx" if external else proto)
    (out := tmp_path / "out").mkdir()
    source.save(out / "big.onnx")
    assert files(out) == ["big.onnx", "big.onnx.data"]
    assert (out / "big.onnx").stat().st_size < 20_000
    feed = feeds()[0]
    saved = ModelStore.load(out / "big.onnx")
    np.testing.assert_array_equal(run(saved, feed)["y"], run(two_layers(), feed)["y"])


# --- sizes --------------------------------------------------------------------------------------


def test_size_of_one_file_is_that_on_disk(tmp_path: Path):
    store = ModelStore.load(two_layers())
    store.save(tmp_path / "m.onnx")
    assert store.file_bytes == size_on_disk(tmp_path)
    result = compress(tmp_path / "m.onnx", feeds(), SMALLER)
    result.save(tmp_path / "m.onnx")
    assert result.store is not None
    assert result.store.file_bytes == size_on_disk(tmp_path) < store.file_bytes
    assert result.validation is not None
    assert result.validation.candidate.file_bytes == result.store.file_bytes


def test_size_with_external_data_is_that_on_disk_without_padding(tmp_path: Path):
    store = ModelStore.load(outside(tmp_path / "in"))
    assert 0 <= size_on_disk(tmp_path / "in") - store.file_bytes < 4096 * 3
    bytes_of_weights = 4 * (2 * SIZE * SIZE + SIZE)
    assert store.file_bytes == (tmp_path / "in" / "model.onnx").stat().st_size + bytes_of_weights


def test_size_does_not_need_the_length_that_an_entry_may_omit(tmp_path: Path):
    stated = ModelStore.load(relocated(tmp_path / "in"))
    silent = ModelStore.load(relocated(tmp_path / "in", length=None))
    fewer = stated.proto.ByteSize() - silent.proto.ByteSize()
    assert stated.file_bytes - silent.file_bytes == fewer > 0


# --- writing ------------------------------------------------------------------------------------


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "kept.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as f:
            f.write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["kept.bin"]


def test_until_the_end_a_reader_sees_the_old_file(tmp_path: Path):
    path = tmp_path / "kept.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as f:
        f.write(b"new")
        f.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert files(tmp_path) == ["kept.bin"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_permissions_of_any_new_file(tmp_path: Path, mask: int, mode: int):
    before = os.umask(mask)
    try:
        ModelStore.load(two_layers()).save(tmp_path / "m.onnx")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.onnx").stat().st_mode) == mode


@pytest.mark.parametrize("target", ["no/such/folder/m.onnx", "folder", "file/m.onnx"])
def test_target_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path, target: str):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be written") as caught:
        ModelStore.load(two_layers()).save(tmp_path / target)
    one_line(str(caught.value), tmp_path / target)
    assert files(tmp_path) == ["file", "folder"]
    assert files(tmp_path / "folder") == []


def test_tensor_types_that_numpy_lacks_are_errors_of_the_model():
    tensor = TensorProto(name="odd", data_type=TensorProto.UNDEFINED, dims=[1])
    proto = right(2).proto
    proto.graph.initializer.append(tensor)
    with pytest.raises(ModelError, match="'odd': element type 0 is not known"):
        ModelStore.load(proto)
    with pytest.raises(ModelError, match="'odd'"):
        ModelStore(proto=proto).array(tensor)
