import logging
import random
import re
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_utilrank.calibration.data import DYNAMIC_BATCH, Dataset, open_data
from onnx_utilrank.calibration.split import hold_back
from onnx_utilrank.errors import ConfigError, DataError
from onnx_utilrank.model.store import ModelStore, TensorSpec

F32 = np.dtype("float32")


def spec(name="x", shape=("batch", 3), dtype="float32"):
    kind = None if dtype is None else np.dtype(dtype)
    return TensorSpec(name=name, dtype=kind, shape=shape)


X = spec()
IMAGE = spec("image", ("batch", 3, 4, 4))


def numbered(*shape, dtype="float32", start=0):
    """An array whose values all differ."""
    return (np.arange(np.prod(shape, dtype=int)) + start).astype(dtype).reshape(shape)


def everything(data: Dataset, **options):
    return list(data.feeds(range(len(data)), **options))


def joined(data: Dataset, name="x", **options):
    return np.concatenate([feed[name] for feed in everything(data, **options)])


def heights(data: Dataset, name="x", **options):
    return [len(feed[name]) for feed in everything(data, **options)]


def save_npz(path: Path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def save_proto(path: Path, array, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    proto = numpy_helper.from_array(np.asarray(array))
    for key, value in changes.items():
        setattr(proto, key, value)
    path.write_bytes(proto.SerializeToString())


def refuses(source, inputs, *parts):
    """Opening fails with one line that holds all of `parts`."""
    with pytest.raises(DataError) as caught:
        open_data(source, inputs)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


# --- one .npz: rows ---------------------------------------------------------------------------


def test_rows_of_a_free_batch_run_together(tmp_path):
    x = numbered(10, 3)
    data = open_data(save_npz(tmp_path / "calib.npz", x=x), [X])
    assert len(data) == 10
    assert data.run is None
    assert data.label == str(tmp_path / "calib.npz")
    assert heights(data, batch=4) == [4, 4, 2]
    np.testing.assert_array_equal(joined(data, batch=4), x)


def test_default_batch(tmp_path):
    data = open_data(save_npz(tmp_path / "c.npz", x=numbered(DYNAMIC_BATCH + 1, 3)), [X])
    assert heights(data) == [DYNAMIC_BATCH, 1]


@pytest.mark.parametrize("source", [str, lambda p: p])
def test_path_may_be_a_string_or_a_path(tmp_path, source):
    save_npz(tmp_path / "calib.npz", x=numbered(2, 3))
    assert len(open_data(source(tmp_path / "calib.npz"), [X])) == 2


def test_model_of_batch_one_runs_row_by_row():
    data = open_data({"x": numbered(5, 3)}, [spec(shape=(1, 3))])
    assert data.run == 1
    assert heights(data, batch=4) == [1] * 5


def test_fixed_batch_drops_the_remainder_with_a_warning(caplog):
    x = numbered(10, 3)
    data = open_data({"x": x}, [spec(shape=(4, 3))])
    assert len(data) == 10
    assert not caplog.records
    assert heights(data, batch=7) == [4, 4]
    assert caplog.messages == ["calibration data: 2 samples dropped, for they fill no run of 4"]
    np.testing.assert_array_equal(joined(data), x[:8])


def test_fixed_batch_that_is_filled_drops_nothing(caplog):
    assert heights(open_data({"x": numbered(8, 3)}, [spec(shape=(4, 3))])) == [4, 4]
    assert not caplog.records


def test_fewer_rows_than_the_fixed_batch():
    refuses({"x": numbered(3, 3)}, [spec(shape=(4, 3))], "holds 3 samples", "takes 4")


def test_chosen_rows_that_fill_no_run():
    data = open_data({"x": numbered(10, 3)}, [spec(shape=(4, 3))])
    with pytest.raises(DataError, match="3 samples fill no run of 4"):
        data.feeds([0, 5, 9])


def test_one_fixed_first_dimension_rules_the_free_ones():
    inputs = [spec("a", ("n", 2)), spec("b", (4, 2))]
    data = open_data({"a": numbered(8, 2), "b": numbered(8, 2)}, inputs)
    assert data.run == 4
    assert heights(data, "a", batch=3) == heights(data, "b", batch=3) == [4, 4]


def test_first_dimensions_that_disagree_need_whole_feeds():
    inputs = [spec("state", (2, "batch", 5)), spec("x", (1, 3))]
    arrays = {"state": numbered(2, 1, 5), "x": numbered(1, 3)}
    refuses(arrays, inputs, "'state' is 2 and that of input 'x' 1", "[samples, ...]", "one rank")
    feeds = everything(open_data({k: a[None] for k, a in arrays.items()}, inputs))
    np.testing.assert_equal(feeds, [arrays])


def test_rank_that_the_model_does_not_state_means_rows():
    x = numbered(5, 2, 2)
    data = open_data({"x": x}, [spec(shape=None)])
    assert heights(data, batch=2) == [2, 2, 1]
    np.testing.assert_array_equal(joined(data), x)


def test_negative_dimensions_are_free():
    data = open_data({"x": numbered(5, 7)}, [spec(shape=(-1, -1))])
    assert data.run is None
    assert heights(data) == [5]


def test_neighbouring_rows_are_views_and_others_are_gathered():
    x = numbered(10, 3)
    data = open_data({"x": x}, [X])
    (feed,) = data.feeds([2, 3, 4])
    assert np.shares_memory(feed["x"], x)
    np.testing.assert_array_equal(feed["x"], x[2:5])
    for chosen in ([2, 4, 5], [4, 3, 2], [1, 1]):
        (feed,) = data.feeds(chosen)
        np.testing.assert_array_equal(feed["x"], x[chosen])


def test_feeds_checks_its_arguments_at_once():
    data = open_data({"x": numbered(3, 3)}, [X])
    for sample in (3, -1):
        with pytest.raises(IndexError, match=f"no sample {sample} among 3"):
            data.feeds([0, sample])
    with pytest.raises(ConfigError, match="batch: 0"):
        data.feeds([0], batch=0)
    assert list(data.feeds([])) == []


def test_sample_numbers_may_be_numpy_integers():
    data = open_data({"x": numbered(3, 3)}, [X])
    (feed,) = data.feeds(np.array([1]))
    np.testing.assert_array_equal(feed["x"], numbered(3, 3)[1:2])


def test_first_dimension_of_zero_is_no_batch():
    assert heights(open_data({"x": numbered(3, 3)}, [spec(shape=(0, 3))])) == [3]


def test_constants_go_with_every_run():
    scale = np.array(2, "float32")
    data = open_data({"x": numbered(5, 3), "scale": scale}, [X, spec("scale", ())])
    feeds = everything(data, batch=2)
    assert [feed["x"].shape for feed in feeds] == [(2, 3), (2, 3), (1, 3)]
    assert all(feed["scale"].shape == () and feed["scale"] == 2 for feed in feeds)


def test_a_constant_is_checked_too():
    inputs = [X, spec("scale", ())]
    refuses(
        {"x": numbered(5, 3), "scale": np.array(2)},
        inputs,
        "input 'scale' wants float32[], got int64[]",
    )
    refuses({"x": numbered(5, 3), "scale": np.array(np.nan, F32)}, inputs, "'scale' holds NaN")


def test_a_set_of_constants_is_one_feed():
    (feed,) = everything(open_data({"scale": np.array(2, "float32")}, [spec("scale", ())]))
    assert feed["scale"].shape == ()


# --- one .npz: whole feeds --------------------------------------------------------------------


def test_one_rank_more_means_whole_feeds(tmp_path):
    x = numbered(6, 2, 3)
    data = open_data(save_npz(tmp_path / "c.npz", x=x), [X])
    assert len(data) == 6
    assert data.run == 1
    feeds = everything(data, batch=4)
    assert len(feeds) == 6
    for feed, item in zip(feeds, x, strict=True):
        np.testing.assert_array_equal(feed["x"], item)
        assert np.shares_memory(feed["x"], feeds[0]["x"].base)


def test_scalar_input_with_a_value_a_sample_makes_all_samples_feeds():
    x, scale = numbered(4, 3), numbered(4)
    feeds = everything(open_data({"x": x, "scale": scale}, [X, spec("scale", ())]))
    assert len(feeds) == 4
    for i, feed in enumerate(feeds):
        assert isinstance(feed["scale"], np.ndarray)
        assert feed["scale"].shape == ()
        assert feed["scale"] == i
        np.testing.assert_array_equal(feed["x"], x[i : i + 1])


def test_whole_feeds_keep_constants():
    inputs = [X, spec("scale", ())]
    feeds = everything(open_data({"x": numbered(4, 2, 3), "scale": np.array(2, "f4")}, inputs))
    assert [float(feed["scale"]) for feed in feeds] == [2] * 4


def test_whole_feeds_have_to_match_the_fixed_batch():
    inputs = [spec(shape=(4, 3)), spec("scale", ())]
    refuses(
        {"x": numbered(8, 3), "scale": numbered(8)},
        inputs,
        "input 'x' wants float32[4, 3], got float32[1, 3] a sample",
    )
    good = open_data({"x": numbered(8, 4, 3), "scale": numbered(8)}, inputs)
    assert heights(good) == [4] * 8


def test_unknown_rank_beside_whole_feeds_gives_a_row_each():
    inputs = [X, spec("y", None)]
    feeds = everything(open_data({"x": numbered(4, 2, 3), "y": numbered(4, 5)}, inputs))
    assert [feed["y"].shape for feed in feeds] == [(1, 5)] * 4


# --- checks -----------------------------------------------------------------------------------


def test_type_error_names_file_input_want_and_got(tmp_path):
    source = save_npz(tmp_path / "calib.npz", image=np.zeros((100, 3, 4, 4)))
    assert refuses(source, [IMAGE]) == (
        f"{source}: input 'image' wants float32[batch, 3, 4, 4], got float64[100, 3, 4, 4]"
    )


@pytest.mark.parametrize(
    ("shape", "got"),
    [
        ((10, 3, 4, 5), "float32[10, 3, 4, 5]"),
        ((10, 1, 3, 4, 5), "float32[1, 3, 4, 5] a sample"),
        ((10, 3, 4), "float32[10, 3, 4]"),
        ((10, 1, 1, 3, 4, 4), "float32[10, 1, 1, 3, 4, 4]"),
        ((), "float32[]"),
    ],
)
def test_shape_errors(shape, got):
    message = refuses({"image": np.zeros(shape, "float32")}, [IMAGE])
    assert message.endswith(f"input 'image' wants float32[batch, 3, 4, 4], got {got}")


def test_vector_input_given_a_single_number():
    arrays = {"a": np.array(1, "float32"), "b": numbered(2)}
    inputs = [spec("a", ("n",)), spec("b", ("n",))]
    refuses(arrays, inputs, "input 'a' wants float32[n], got float32[]")


def test_free_dimensions_take_any_size_and_names_need_not_agree():
    inputs = [spec("a", ("n", "t")), spec("b", ("n", "t", None))]
    data = open_data({"a": numbered(4, 5), "b": numbered(4, 6, 7)}, inputs)
    assert everything(data)[0]["b"].shape == (4, 6, 7)
    message = refuses({"a": numbered(4, 5), "b": numbered(4, 6)}, inputs)
    assert "input 'b' wants float32[n, t, ?]" in message


def test_numbers_of_samples_have_to_agree():
    inputs = [spec("a"), spec("b")]
    message = refuses({"a": numbered(10, 3), "b": numbered(9, 3)}, inputs)
    assert "input 'a' has 10 samples and input 'b' 9" in message
    assert "[samples, ...]" in message
    refuses({"a": numbered(5, 2, 3), "b": numbered(9, 3)}, inputs, "'a' has 5 samples", "'b' 9")


def test_missing_input_lists_what_is_wanted_and_found(tmp_path):
    source = save_npz(tmp_path / "c.npz", a=numbered(2, 3), q=numbered(2))
    message = refuses(source, [spec("a"), spec("b"), spec("c")])
    assert message == f"{source}: no array 'b', 'c'; wanted are 'a', 'b', 'c', found 'a', 'q'"
    refuses({}, [X], "no array 'x'", "found nothing")


def test_extra_arrays_are_passed_over_with_a_warning(tmp_path, caplog):
    source = save_npz(tmp_path / "c.npz", x=numbered(2, 3), label=numbered(5), y=numbered(1))
    (feed,) = everything(open_data(source, [X]))
    assert set(feed) == {"x"}
    assert caplog.messages == [f"{source}: the model has no input 'label', 'y'"]
    assert caplog.records[0].levelno == logging.WARNING
    assert caplog.records[0].name.startswith("onnx_utilrank.")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
def test_values_have_to_be_finite(bad, dtype):
    x = numbered(10, 3, dtype=dtype)
    x[7, 1] = x[9, 0] = bad
    message = refuses({"x": x}, [spec(dtype=dtype)])
    assert message == "calibration data: sample 7: input 'x' holds NaN or infinity"


def test_the_search_for_nan_goes_on_past_its_first_part(monkeypatch):
    monkeypatch.setattr("onnx_utilrank.calibration.readers._CHUNK", 6)
    x = numbered(10, 3)
    x[7, 1] = np.nan
    refuses({"x": x}, [X], "sample 7: input 'x' holds NaN")


def test_types_from_outside_numpy():
    bfloat16 = np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    inputs = [spec(dtype=bfloat16)]
    x = numbered(4, 3).astype(bfloat16)
    assert everything(open_data({"x": x}, inputs))[0]["x"].dtype == bfloat16
    x[2, 1] = np.nan
    refuses({"x": x}, inputs, "sample 2: input 'x' holds NaN")


@pytest.mark.parametrize(
    "dtype", ["int64", "uint8", "bool", helper.tensor_dtype_to_np_dtype(TensorProto.INT4)]
)
def test_integers_and_truth_values(dtype):
    x = np.ones((4, 3), dtype)
    assert everything(open_data({"x": x}, [spec(dtype=dtype)]))[0]["x"].dtype == dtype


def test_strings(tmp_path):
    text = spec("text", ("n",), object)
    source = save_npz(tmp_path / "c.npz", text=np.array(["a", "bcd", "ef"]))
    assert [s for f in everything(open_data(source, [text]), batch=2) for s in f["text"]] == [
        "a",
        "bcd",
        "ef",
    ]
    objects = np.array(["a", "bcd"], object)
    assert len(open_data({"text": objects}, [text])) == 2
    refuses({"text": numbered(3)}, [text], "wants string[n], got float32[3]")
    refuses({"text": np.array(["a", 1], object)}, [text], "wants string[n], got object[2]")
    refuses({"text": np.array([b"a"])}, [text], "wants string[n]")
    refuses({"x": np.array([["a"] * 3])}, [X], "wants float32[batch, 3], got string[1, 3]")


def test_foreign_byte_order_is_made_native(tmp_path):
    x = numbered(4, 3)
    data = open_data(save_npz(tmp_path / "c.npz", x=x.astype(x.dtype.newbyteorder("S"))), [X])
    assert joined(data).dtype.isnative
    np.testing.assert_array_equal(joined(data), x)


def test_inputs_that_are_not_tensors_take_only_whole_feeds():
    sequence = spec("s", None, None)
    refuses({"s": numbered(3)}, [sequence], "'s' is not a tensor")
    value = [numbered(2), numbered(3)]
    (feed,) = everything(open_data([{"s": value}], [sequence]))
    assert feed["s"] is value


def test_model_without_inputs():
    refuses({"x": numbered(3, 3)}, [], "the model has no inputs")


@pytest.mark.parametrize("source", [{"x": np.zeros((0, 3), "f4")}, [], iter(()), lambda: []])
def test_no_samples(source):
    assert refuses(source, [X]) == "calibration data: holds no samples"


# --- files that are not what they should be ---------------------------------------------------


@pytest.mark.parametrize(
    "name", ["no.npz", "no/calib.npz", "C:\\data\\calib.npz", "C:/data/calib.npz", "folder"]
)
def test_missing_file(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refuses(name, [X]).startswith(f"{name}: no such file or folder")
    refuses(tmp_path / "no.npz", [X], tmp_path / "no.npz", "no such file")


def test_name_that_no_file_can_have():
    refuses("n" * 300 + ".npz", [X], "cannot be read")


def test_pickles_are_not_read(tmp_path):
    x = np.empty(2, object)
    x[:] = [1, "a"]
    np.savez(tmp_path / "c.npz", x=x)
    refuses(tmp_path / "c.npz", [X], "c.npz", "'x' cannot be read", "allow_pickle")
    np.save(tmp_path / "c.npy", x, allow_pickle=True)
    refuses(tmp_path / "c.npy", [X], "c.npy", "cannot be read")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_archives(tmp_path, save):
    path = tmp_path / "c.npz"
    save(path, x=numbered(20, 3))
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        refuses(path, [X], path, "cannot be read")
        refuses(tmp_path, [X], path, "cannot be read")


def test_archive_that_needs_a_password(tmp_path):
    path = tmp_path / "c.npz"
    np.savez(path, x=numbered(20, 3))
    raw = bytearray(path.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(header) + flags] |= 1
    path.write_bytes(raw)
    refuses(path, [X], path, "'x' cannot be read", "encrypted")


def test_archive_whose_index_points_before_its_start(tmp_path):
    path = tmp_path / "c.npz"
    np.savez(path, x=numbered(20, 3))
    raw = bytearray(path.read_bytes())
    offset = raw.index(b"PK\x05\x06") + 16
    raw[offset : offset + 4] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(raw)
    refuses(tmp_path, [X], path, "cannot be read")


def test_damaged_archives(tmp_path):
    path = tmp_path / "c.npz"
    np.savez_compressed(path, x=numbered(20, 3))
    whole = path.read_bytes()
    middle = whole.index(b"x.npy") + 60
    path.write_bytes(whole[:middle] + bytes(8) + whole[middle + 8 :])
    refuses(path, [X], path, "'x' cannot be read")


@pytest.mark.parametrize(
    "shape", ["(2,", "(99999999999999999999999, 3)", "(9999999999999, 3)", "(30, 3)"]
)
def test_damaged_array_header(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    (tmp_path / "c.npy").write_bytes(start + bytes(120))
    refuses(tmp_path / "c.npy", [X], "c.npy: cannot be read")


def test_archive_and_array_mistaken_for_each_other(tmp_path):
    np.save(tmp_path / "array.npy", numbered(2, 3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    refuses(tmp_path / "array.npz", [X], "array.npz: not an .npz archive")
    np.savez(tmp_path / "archive.npz", x=numbered(2, 3))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    refuses(tmp_path / "archive.npy", [X], "archive.npy: not an .npy file")


def test_file_of_another_kind(tmp_path):
    (tmp_path / "c.csv").write_text("1,2,3")
    refuses(tmp_path / "c.csv", [X], "c.csv: not a .npz or .npy file")


def test_open_archive_is_a_mapping(tmp_path):
    with np.load(save_npz(tmp_path / "c.npz", x=numbered(4, 3))) as archive:
        assert len(open_data(archive, [X])) == 4


# --- folders ----------------------------------------------------------------------------------


def test_archives_of_a_folder_join_in_natural_order(tmp_path):
    sizes = {"part1": 3, "part2": 1, "part10": 4}
    parts, start = [], 0
    for name, size in sizes.items():
        parts.append(numbered(size, 3, start=start))
        save_npz(tmp_path / f"{name}.npz", x=parts[-1])
        start += parts[-1].size
    (tmp_path / ".hidden.npz").write_text("passed over")
    (tmp_path / "README.txt").write_text("passed over")
    data = open_data(tmp_path, [X])
    assert len(data) == 8
    assert data.label == str(tmp_path)
    assert heights(data, batch=3) == [3, 3, 2]
    np.testing.assert_array_equal(joined(data, batch=3), np.concatenate(parts))
    (feed,) = data.feeds([7, 2, 3])
    np.testing.assert_array_equal(feed["x"], np.concatenate(parts)[[7, 2, 3]])


def test_fixed_batch_counts_over_all_files(tmp_path):
    for i in range(5):
        save_npz(tmp_path / f"{i}.npz", x=numbered(1, 3, start=i))
    assert heights(open_data(tmp_path, [spec(shape=(2, 3))])) == [2, 2]
    assert heights(open_data(tmp_path, [spec(shape=(5, 3))])) == [5]
    refuses(tmp_path, [spec(shape=(6, 3))], tmp_path, "holds 5 samples", "takes 6")


def test_rows_of_different_shape_do_not_share_a_run(tmp_path, caplog):
    for i, length in enumerate([4, 4, 6, 6, 4]):
        save_npz(tmp_path / f"{i}.npz", x=np.ones((1, length), "float32"))
    data = open_data(tmp_path, [spec(shape=("n", "t"))])
    assert [f["x"].shape for f in everything(data)] == [(2, 4), (2, 6), (1, 4)]
    data = open_data(tmp_path, [spec(shape=(2, "t"))])
    assert [f["x"].shape for f in everything(data)] == [(2, 4), (2, 6)]
    assert "1 sample dropped" in caplog.text


def test_rows_of_different_constants_do_not_share_a_run(tmp_path):
    for i, scale in enumerate([1, 1, 2]):
        save_npz(tmp_path / f"{i}.npz", x=numbered(2, 3), scale=np.array(scale, "float32"))
    feeds = everything(open_data(tmp_path, [X, spec("scale", ())]))
    assert [(len(f["x"]), float(f["scale"])) for f in feeds] == [(4, 1), (2, 2)]


def test_input_of_unknown_rank_may_be_a_constant_in_one_file(tmp_path):
    save_npz(tmp_path / "1.npz", x=numbered(2, 3), y=np.array(1, "float32"))
    save_npz(tmp_path / "2.npz", x=numbered(2, 3), y=numbered(2))
    feeds = everything(open_data(tmp_path, [X, spec("y", None)]))
    assert [(f["x"].shape, f["y"].shape) for f in feeds] == [((2, 3), ()), ((2, 3), (2,))]


def test_whole_feeds_of_a_folder(tmp_path):
    save_npz(tmp_path / "1.npz", x=numbered(2, 5, 3))
    save_npz(tmp_path / "2.npz", x=numbered(3, 4, 3))
    assert heights(open_data(tmp_path, [X])) == [5, 5, 4, 4, 4]


def test_files_of_a_folder_have_to_agree_on_rows_or_feeds(tmp_path):
    save_npz(tmp_path / "1.npz", x=numbered(2, 3))
    save_npz(tmp_path / "2.npz", x=numbered(2, 4, 3))
    refuses(tmp_path, [X], tmp_path, "rows", "whole feeds")


def test_error_in_a_folder_names_the_file(tmp_path):
    save_npz(tmp_path / "1.npz", x=numbered(2, 3))
    save_npz(tmp_path / "2.npz", x=numbered(2, 4))
    refuses(tmp_path, [X], f"{tmp_path / '2.npz'}: input 'x' wants float32[batch, 3]")


def test_empty_file_among_others_is_passed_over(tmp_path):
    save_npz(tmp_path / "1.npz", x=numbered(0, 3))
    save_npz(tmp_path / "2.npz", x=numbered(2, 3))
    assert len(open_data(tmp_path, [X])) == 2


def test_folder_without_data(tmp_path):
    (tmp_path / "model.onnx").touch()
    refuses(tmp_path, [X], tmp_path, "holds no .npz or .npy file")


def test_folder_of_both_kinds(tmp_path):
    save_npz(tmp_path / "a.npz", x=numbered(2, 3))
    np.save(tmp_path / "b.npy", numbered(2, 3))
    refuses(tmp_path, [X], tmp_path, "a.npz", "b.npy")


def test_npy_files_named_after_the_inputs(tmp_path):
    np.save(tmp_path / "a.npy", numbered(4, 3))
    np.save(tmp_path / "b.npy", numbered(4, 3))
    inputs = [spec("b"), spec("a")]
    (feed,) = everything(open_data(tmp_path, inputs))
    assert feed["a"].shape == feed["b"].shape == (4, 3)
    np.save(tmp_path / "c.npy", numbered(4, 3))
    refuses(tmp_path, inputs, tmp_path, "2 inputs", "b.npy, a.npy")


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(4, 3), (2, 3)], [6]),  # rows
        ([(3,), (3,), (3,)], [3]),  # one sample a file, without its batch axis
        ([(3,), (2, 3)], [3]),
        ([(2, 5, 3), (1, 6, 3)], [5, 5, 6]),  # whole feeds
    ],
)
def test_npy_files_of_one_input(tmp_path, shapes, expected):
    arrays = [numbered(*shape, start=100 * i) for i, shape in enumerate(shapes)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"s{i + 9}.npy", array)  # s9, s10, s11
    data = open_data(tmp_path, [X])
    assert heights(data) == expected
    np.testing.assert_array_equal(joined(data).ravel(), np.concatenate([a.ravel() for a in arrays]))


def test_npy_of_one_input_named_after_it_may_lack_the_batch_axis(tmp_path):
    np.save(tmp_path / "x.npy", numbered(3))
    assert heights(open_data(tmp_path, [X])) == [1]


def test_npy_of_a_scalar_input(tmp_path):
    np.save(tmp_path / "a.npy", np.array(1, "float32"))
    np.save(tmp_path / "b.npy", numbered(2))
    assert len(open_data(tmp_path, [spec("s", ())])) == 3


def test_single_npy_file(tmp_path):
    np.save(tmp_path / "calib.npy", numbered(4, 3))
    assert heights(open_data(tmp_path / "calib.npy", [X])) == [4]


# --- ONNX test data sets ----------------------------------------------------------------------


def test_onnx_test_sets_in_numeric_order(tmp_path):
    inputs = [X, spec("n", (), "int64")]
    for k in (0, 2, 10):
        save_proto(tmp_path / f"test_data_set_{k}" / "input_0.pb", np.full((k + 1, 3), k, F32))
        save_proto(tmp_path / f"test_data_set_{k}" / "input_1.pb", np.array(k))
        save_proto(tmp_path / f"test_data_set_{k}" / "output_0.pb", np.array(k))
    np.savez(tmp_path / "test_data_0.npz", q=numbered(3))  # as older model zoos add
    data = open_data(str(tmp_path), inputs)
    feeds = everything(data)
    assert [int(feed["n"]) for feed in feeds] == [0, 2, 10]
    assert [feed["x"].shape for feed in feeds] == [(1, 3), (3, 3), (11, 3)]
    assert data.run == 1


def test_onnx_test_set_with_ten_inputs(tmp_path):
    inputs = [spec(f"i{k}", (), "int64") for k in range(11)]
    for k in range(11):
        save_proto(tmp_path / "test_data_set_0" / f"input_{k}.pb", np.array(k))
    (feed,) = everything(open_data(tmp_path, inputs))
    assert {name: int(a) for name, a in feed.items()} == {f"i{k}": k for k in range(11)}


def test_onnx_test_set_misses_an_input(tmp_path):
    save_proto(tmp_path / "test_data_set_0" / "input_0.pb", numbered(1, 3))
    missing = tmp_path / "test_data_set_0" / "input_1.pb"
    refuses(tmp_path, [X, spec("y")], f"{missing}: cannot be read (No such file")


def test_onnx_test_set_with_more_inputs_than_the_model(tmp_path, caplog):
    for k in range(2):
        save_proto(tmp_path / "test_data_set_0" / f"input_{k}.pb", numbered(1, 3))
    assert len(open_data(tmp_path, [X])) == 1
    assert "input_1.pb" in caplog.text


def test_onnx_test_set_is_checked(tmp_path):
    folder = tmp_path / "test_data_set_3"
    save_proto(folder / "input_0.pb", numbered(1, 4))
    refuses(tmp_path, [X], f"{folder}: input 'x' wants float32[batch, 3], got float32[1, 4]")
    save_proto(folder / "input_0.pb", np.full((1, 3), np.nan, "float32"))
    refuses(tmp_path, [X], f"{folder}: input 'x' holds NaN")


def test_onnx_test_set_of_strings(tmp_path):
    save_proto(tmp_path / "test_data_set_0" / "input_0.pb", np.array(["a", "b"], object))
    (feed,) = everything(open_data(tmp_path, [spec("t", ("n",), object)]))
    assert feed["t"].tolist() == ["a", "b"]


def test_protos_that_hold_no_tensor(tmp_path):
    path = tmp_path / "test_data_set_0" / "input_0.pb"
    tensor = numpy_helper.from_array(numbered(1, 3))
    sequence = onnx.SequenceProto(elem_type=1, tensor_values=[tensor])
    named = onnx.SequenceProto(name="s", elem_type=1, tensor_values=[tensor])
    optional = onnx.OptionalProto(elem_type=1, tensor_value=tensor)
    path.parent.mkdir()
    for raw in (
        b"",
        b"not a proto",
        tensor.SerializeToString()[:-1],
        TensorProto(data_type=999, dims=[1]).SerializeToString(),
        *(p.SerializeToString() for p in (sequence, named, optional)),
    ):
        path.write_bytes(raw)
        refuses(tmp_path, [spec(shape=None)], f"{path}: not a tensor")


def test_proto_with_external_data(tmp_path):
    path = tmp_path / "test_data_set_0" / "input_0.pb"
    save_proto(path, numbered(1, 3), data_location=TensorProto.EXTERNAL)
    refuses(tmp_path, [X], path, "in another file")


# --- Python sources ---------------------------------------------------------------------------


def dicts(count=4):
    return [{"x": numbered(1 + i, 3)} for i in range(count)]


class Reader:
    """A reader that fills one buffer again and again."""

    def __init__(self, count=3):
        self.buffer = np.zeros((1, 3), "float32")
        self.left = count

    def get_next(self):
        if not self.left:
            return None
        self.left -= 1
        self.buffer += 1
        return {"x": self.buffer}


def test_calibration_data_reader_of_onnxruntime():
    from onnxruntime.quantization import CalibrationDataReader

    class Own(CalibrationDataReader):
        def __init__(self):
            self.items = iter(dicts())

        def get_next(self):
            return next(self.items, None)

    for source in (Own(), Own):
        data = open_data(source, [X])
        assert data.label == "calibration data"
        assert heights(data) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "source",
    [
        dicts(),
        tuple(dicts()),
        (d for d in dicts()),
        dicts,
        lambda: iter(dicts()),
        [OrderedDict(d) for d in dicts()],
    ],
)
def test_iterables_and_callables(source):
    data = open_data(source, [X])
    assert len(data) == 4
    assert data.run == 1
    assert heights(data) == [1, 2, 3, 4]
    assert heights(data) == [1, 2, 3, 4]  # read once, run as often as wanted


def test_callable_may_give_a_mapping_or_a_reader():
    assert heights(open_data(lambda: {"x": numbered(4, 3)}, [X])) == [4]
    assert heights(open_data(Reader, [X])) == [1, 1, 1]


def test_data_that_can_be_called_are_data():
    class Callable(Reader):
        def __call__(self):
            raise AssertionError

    assert heights(open_data(Callable(), [X])) == [1, 1, 1]


def test_what_is_read_once_is_copied():
    def generate():
        buffer = np.zeros((1, 3), "float32")
        for _ in range(3):
            buffer += 1
            yield {"x": buffer}

    for source in (generate(), generate, Reader(), Reader):
        assert [f["x"][0, 0] for f in everything(open_data(source, [X]))] == [1, 2, 3]


def test_what_is_in_memory_is_not_copied():
    samples = dicts()
    for feed, sample in zip(everything(open_data(samples, [X])), samples, strict=True):
        assert feed["x"] is sample["x"]


def test_feeds_are_the_callers_to_change():
    data = open_data(dicts(), [X])
    everything(data)[0]["more"] = 1
    assert set(everything(data)[0]) == {"x"}


def test_numpy_scalars_feed_scalar_inputs():
    (feed,) = everything(open_data([{"s": np.float32(3)}], [spec("s", ())]))
    assert isinstance(feed["s"], np.ndarray)
    assert feed["s"].shape == ()


@pytest.mark.parametrize(
    ("sample", "parts"),
    [
        ({"y": numbered(1, 3)}, ["no array 'x'", "wanted are 'x', found 'y'"]),
        ({"x": numbered(1, 4)}, ["input 'x' wants float32[batch, 3], got float32[1, 4]"]),
        ({"x": numbered(3)}, ["input 'x' wants float32[batch, 3], got float32[3]"]),
        ({"x": np.zeros((1, 3))}, ["input 'x' wants float32[batch, 3], got float64[1, 3]"]),
        ({"x": [[1.0, 2.0, 3.0]]}, ["input 'x' wants float32[batch, 3], got list"]),
        ({"x": np.full((1, 3), np.inf, "float32")}, ["input 'x' holds NaN or infinity"]),
        (numbered(1, 3), ["is ndarray, not a dict"]),
    ],
)
def test_every_dict_is_checked(sample, parts):
    refuses([*dicts(2), sample, *dicts(1)], [X], "calibration data: sample 2", *parts)


def test_dicts_have_to_match_the_fixed_batch():
    refuses(dicts(2), [spec(shape=(1, 3))], "sample 1: input 'x' wants float32[1, 3], got")


def test_extra_entries_of_dicts_are_warned_of_once(caplog):
    samples = [{**d, "label": numbered(1)} for d in dicts()]
    data = open_data(samples, [X])
    assert set(everything(data)[0]) == {"x"}
    assert caplog.messages == ["calibration data: the model has no input 'label'"]


@pytest.mark.parametrize("source", [7, None, lambda: 7, lambda: "calib.npz", lambda: b"x"])
def test_what_is_no_source(source):
    refuses(source, [X], "calibration data: got ", "CalibrationDataReader")


# --- package.module:function ------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function that writes a module of a new name to the current folder and gives the name."""
    monkeypatch.chdir(tmp_path)
    names = []

    def write(text, name=None):
        name = name or f"calib_{abs(hash(tmp_path))}_{len(names)}"
        Path(f"{name.replace('.', '/')}.py").write_text(f"import numpy as np\n{text}")
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


TWO = "    for i in range(2):\n        yield {'x': np.full((1, 3), i, 'float32')}\n"


def test_function_is_imported_from_the_current_folder(module):
    before = list(sys.path)
    source = f"{module(f'def samples():{chr(10)}{TWO}')}:samples"
    data = open_data(source, [X])
    assert data.label == source
    assert [f["x"][0, 0] for f in everything(data)] == [0, 1]
    assert sys.path == before


def test_function_of_a_package_and_of_a_class(module, tmp_path):
    (tmp_path / "pack").mkdir()
    name = module(f"class C:\n  @staticmethod\n  def samples():\n{TWO}", name="pack.calib")
    assert len(open_data(f"{name}:C.samples", [X])) == 2
    sys.modules.pop("pack", None)


def test_function_may_import_its_neighbour_while_it_yields(module):
    other = module("VALUE = 7")
    name = module(
        "def samples():\n"
        f"    import {other} as other\n"
        "    yield {'x': np.full((1, 3), other.VALUE, 'float32')}"
    )
    (feed,) = everything(open_data(f"{name}:samples", [X]))
    assert feed["x"][0, 0] == 7


def test_function_may_give_stacked_arrays(module):
    name = module("def samples():\n    return {'x': np.ones((4, 3), 'float32')}")
    assert heights(open_data(f"{name}:samples", [X])) == [4]


def test_errors_in_the_data_of_a_function_name_it(module):
    name = module("def samples():\n    yield {'x': np.ones((1, 3))}")
    refuses(f"{name}:samples", [X], f"{name}:samples: sample 0: input 'x' wants float32")


def test_function_that_cannot_be_imported(module):
    name = module("VALUE = 7")
    refuses("no_such_module_at_all:samples", [X], "No module named 'no_such_module_at_all'")
    refuses(f"{name}:samples", [X], f"{name}:samples: cannot be imported", "attribute 'samples'")
    refuses(f"{name}:VALUE", [X], "int is not a function")
    broken = module("import no_such_module_at_all")
    refuses(f"{broken}:samples", [X], f"{broken}:samples", "No module named")


@pytest.mark.parametrize("error", ["AttributeError", "ImportError", "ValueError", "KeyError"])
@pytest.mark.parametrize("start", ["", "    yield {'x': np.ones((1, 3), 'float32')}\n"])
def test_what_the_function_raises_is_the_users(module, error, start):
    before = list(sys.path)
    name = module(f"def samples():\n{start}    raise {error}('mine')")
    with pytest.raises(Exception, match="mine") as caught:
        open_data(f"{name}:samples", [X])
    assert type(caught.value).__name__ == error
    assert sys.path == before


def test_what_a_callable_raises_is_the_users():
    def samples():
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        open_data(samples, [X])


@pytest.mark.parametrize("name", ["a b:c", "http://x/y.npz", "pkg:", ":f", "a:b:c", "da-ta:f"])
def test_what_is_neither_path_nor_function(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refuses(name, [X], "no such file or folder")


@pytest.mark.skipif(sys.platform == "win32", reason="no colons in Windows file names")
def test_existing_path_with_a_colon_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data:calib").mkdir()
    save_npz(tmp_path / "data:calib" / "c.npz", x=numbered(4, 3))
    assert len(open_data("data:calib", [X])) == 4


# --- choosing samples -------------------------------------------------------------------------


@given(
    st.integers(2, 9000),
    st.none() | st.integers(2, 9000),
    st.integers(-(2**40), 2**40),
    st.sampled_from([256, 1024]),
)
def test_hold_back(n, samples, seed, most):
    calibrate, validate = hold_back(n, samples=samples, seed=seed, most=most)
    used = n if samples is None else min(samples, n)
    assert calibrate == sorted(calibrate)
    assert validate == sorted(validate)
    both = set(calibrate) | set(validate)
    assert len(both) == len(calibrate) + len(validate) == used
    assert both <= set(range(n))
    assert len(validate) == min(max(used // 5, 1), most)
    assert calibrate
    assert hold_back(n, samples=samples, seed=seed, most=most) == (calibrate, validate)


def test_hold_back_depends_on_the_seed_alone():
    first = hold_back(100, samples=50, seed=1)
    assert hold_back(100, samples=50, seed=2) != first
    random.seed(3)
    np.random.seed(3)
    assert hold_back(100, samples=50, seed=1) == first
    # Choices are part of a result that users reproduce: they must not change between releases.
    assert hold_back(10, samples=5, seed=0) == ([0, 2, 4, 9], [6])


@given(st.integers(1, 40), st.integers(0, 400), st.none() | st.integers(0, 400))
def test_hold_back_of_a_fixed_batch_gives_whole_runs(run, more, most):
    n = 2 * run + more
    samples = None if most is None else 2 * run + most
    calibrate, validate = hold_back(n, samples=samples, seed=0, run=run)
    used = n if samples is None else min(n, samples)
    assert calibrate
    assert validate
    assert len(calibrate) % run == len(validate) % run == 0
    assert not set(calibrate) & set(validate)
    assert len(calibrate) + len(validate) == used - used % run
    assert len(validate) < min(max(used // 5, 1), 256) + run


@pytest.mark.parametrize(("n", "held"), [(1, "1 sample"), (0, "0 samples")])
def test_hold_back_needs_two(n, held):
    with pytest.raises(DataError) as caught:
        hold_back(n, samples=None, seed=0, label="calib.npz")
    assert str(caught.value) == (
        f"calib.npz: holds {held}; two are needed, one to calibrate and one held back to validate"
    )


def test_asking_for_too_few_samples():
    with pytest.raises(ConfigError, match="samples: 1 is too few; two are needed"):
        hold_back(10, samples=1, seed=0)


def test_split_of_rows(tmp_path):
    source = save_npz(tmp_path / "c.npz", x=numbered(50, 3))
    data = open_data(source, [X])
    calibrate, validate = data.split(samples=20, seed=3)
    assert (calibrate, validate) == hold_back(50, samples=20, seed=3)
    assert (len(calibrate), len(validate)) == (16, 4)
    one = open_data(save_npz(tmp_path / "one.npz", x=numbered(1, 3)), [X])
    with pytest.raises(DataError, match=re.escape(f"{one.label}: holds 1 sample; two are needed")):
        one.split()


def test_split_of_a_fixed_batch_runs_both_parts(caplog):
    data = open_data({"x": numbered(19, 3)}, [spec(shape=(4, 3))])
    calibrate, validate = data.split()
    assert caplog.messages == ["calibration data: 3 samples left out, for they fill no run of 4"]
    assert [len(f["x"]) for f in data.feeds(calibrate)] == [4, 4, 4]
    assert [len(f["x"]) for f in data.feeds(validate)] == [4]
    assert len(caplog.messages) == 1
    few = open_data({"x": numbered(7, 3)}, [spec(shape=(4, 3))])
    with pytest.raises(DataError, match="holds 7 samples; 8 are needed, a run of 4 to calibrate"):
        few.split()


def test_split_of_whole_feeds():
    data = open_data(dicts(10), [spec(shape=("n", 3))])
    calibrate, validate = data.split()
    assert (len(calibrate), len(validate)) == (8, 2)


# --- together ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 45), st.data())
def test_feeds_give_the_samples_in_order(tmp_path_factory, sizes, batch, draw):
    rows = sum(sizes)
    x = numbered(rows, 3)
    fixed = draw.draw(st.sampled_from([None, 1, batch]))
    inputs = [spec(shape=(fixed, 3))]
    folder = tmp_path_factory.mktemp("rows")
    for i, part in enumerate(np.split(x, np.cumsum(sizes)[:-1])):
        np.save(folder / f"{i}.npy", part)
    if rows < (fixed or 1):
        refuses(folder, inputs, folder)
        return
    data = open_data(folder, inputs)
    assert len(data) == rows
    size = fixed or batch
    feeds = everything(data, batch=batch)
    used = rows - rows % fixed if fixed else rows
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in feeds]), x[:used])
    assert all(len(f["x"]) == size for f in feeds[:-1])
    assert 0 < len(feeds[-1]["x"]) <= size
    assert data.count_feeds(range(rows), batch=batch) == len(feeds)
    chosen = draw.draw(st.lists(st.integers(0, rows - 1), min_size=size, max_size=60 + size))
    used = len(chosen) - len(chosen) % fixed if fixed else len(chosen)
    got = np.concatenate([f["x"] for f in data.feeds(chosen, batch=batch)])
    np.testing.assert_array_equal(got, x[chosen[:used]])


def test_onnxruntime_takes_the_feeds(tmp_path):
    """Views, gathered rows, columns-first arrays, scalars and strings are all good feeds."""
    kinds = {
        "x": (TensorProto.FLOAT, ["n", 3]),
        "text": (TensorProto.STRING, ["n"]),
        "scale": (TensorProto.FLOAT, []),
    }
    values = {k: helper.make_tensor_value_info(k, *v) for k, v in kinds.items()}
    outputs = {k: helper.make_tensor_value_info(f"{k}_out", *v) for k, v in kinds.items()}
    nodes = [helper.make_node("Identity", [k], [f"{k}_out"]) for k in kinds]
    graph = helper.make_graph(nodes, "g", list(values.values()), list(outputs.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    arrays = {
        "x": np.asfortranarray(numbered(6, 3)),
        "text": np.array(list("abcdef")),
        "scale": np.array(2, "float32"),
    }
    stacked = save_npz(tmp_path / "stacked.npz", **arrays)
    feeds = save_npz(tmp_path / "feeds.npz", **{**arrays, "scale": numbered(6)})
    for source in (stacked, feeds):
        data = open_data(source, ModelStore(proto=model).inputs)
        for samples in ([1, 2, 3], [0, 3, 5]):
            x, text = [], []
            for feed in data.feeds(samples, batch=2):
                out = dict(zip(outputs, session.run(None, feed), strict=True))
                np.testing.assert_array_equal(out["scale"], feed["scale"])
                x.append(out["x"])
                text += out["text"].tolist()
            np.testing.assert_array_equal(np.concatenate(x), arrays["x"][samples])
            assert text == arrays["text"][samples].tolist()
