"""Which positions are padding: told from the values of a mask, whichever marks it."""

import numpy as np
import onnx
import pytest
from builders import model, noise, run
from hypothesis import given
from hypothesis import strategies as st

from onnx_utilrank import CompressConfig, compress
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.statistics.padding import Padding, find_padding
from onnx_utilrank.validation.divergence import find_losses

LENGTH, D, H, C = 10, 12, 32, 4


def find(mask: object, name: str = "mask") -> Padding | None:
    held = np.asarray(mask)
    return find_padding([{name: held}], (*held.shape, 7))


@given(
    st.lists(st.integers(1, LENGTH), min_size=2, max_size=6),
    st.integers(0, 1),
    st.booleans(),
    st.sampled_from([bool, np.int64, np.float32]),
)
def test_the_side_without_padding_tells(lengths, real, left, kind):
    padded = np.arange(LENGTH) >= np.array(lengths)[:, None]
    padded = padded[:, ::-1] if left else padded
    mask = np.where(padded, 1 - real, real).astype(kind)
    found = find(mask)
    if len({n < LENGTH for n in lengths}) == 2 or not padded.any():
        assert found == Padding("mask", real)
        kept = found.kept({"mask": mask})
        np.testing.assert_array_equal(kept, ~padded)
    else:  # all are padded on one side, so that either end may be the real one
        assert found == Padding("mask", 1)
        assert find(mask, "key_padding_mask") == Padding("key_padding_mask", 0)


@pytest.mark.parametrize("hidden", [-np.inf, np.finfo(np.float32).min, -1e4])
@pytest.mark.parametrize("name", ["mask", "attention_mask"])
@pytest.mark.parametrize("form", [(-1, LENGTH), (-1, 1, 1, LENGTH)])
@pytest.mark.parametrize("lengths", [(3, LENGTH, 5), (LENGTH, LENGTH), (4, 4)])
def test_what_is_added_to_scores_is_zero_where_positions_are_real(hidden, name, form, lengths):
    padded = np.arange(LENGTH) >= np.array(lengths)[:, None]
    mask = np.where(padded, hidden, 0.0).astype(np.float32).reshape(form)
    found = find_padding([{name: mask}], (len(lengths), LENGTH, 7))
    assert found == Padding(name, 0)
    np.testing.assert_array_equal(found.kept({name: mask}), ~padded)


def test_masks_of_pairs_are_no_padding():
    causal = np.triu(np.full((2, 1, 4, 4), -np.inf), 1)
    assert find_padding([{"mask": causal}], (2, 4, 7)) is None


@pytest.mark.parametrize(
    "mask",
    [
        [[0, 1, 1, 0], [1, 0, 0, 1]],  # positions that are hidden from a model, say
        [[0, 2, 1, 1], [1, 1, 1, 1]],
        np.zeros((2, 0), np.int64),
    ],
)
def test_other_masks_are_none(mask):
    assert find(mask) is None


def test_holes_are_padding_where_the_ends_are_real():
    assert find([[1, 0, 1], [1, 1, 1]]) == Padding("mask", 1)


def test_the_usual_name_means_the_usual():
    """An attention mask is 1 at real positions, also where it is padded on both sides."""
    assert find([[0, 1, 1, 0], [1, 1, 0, 0]], "attention_mask") == Padding("attention_mask")


KEPT = np.arange(LENGTH) < np.array([3, LENGTH, 5, 6])[:, None]
IDS = np.random.default_rng(1).integers(1, 90, KEPT.shape)
OTHER = np.random.default_rng(2).integers(1, 90, KEPT.shape)
PLACES = np.broadcast_to(np.arange(LENGTH), KEPT.shape)


@pytest.mark.parametrize("batch", [4, 1])
@pytest.mark.parametrize(
    ("others", "found"),
    [
        ({"ids": IDS * KEPT}, True),
        ({"ids": IDS}, True),  # whatever the filler is
        ({"ids": IDS * KEPT, "types": 0 * IDS, "places": PLACES}, True),
        ({"ids": IDS, "types": 0 * IDS}, True),
        ({"ids": IDS * KEPT, "decoder": OTHER}, False),
        ({"decoder": OTHER, "ids": IDS * KEPT + 7}, False),
        ({"ids": IDS[..., None] * KEPT[..., None], "decoder": OTHER[..., None]}, False),
        ({"ids": IDS * KEPT, "states": OTHER[:, :-1]}, True),
        ({"ids": IDS * KEPT, "age": OTHER[:, :1].repeat(LENGTH, 1)}, True),
        ({"ids": IDS * KEPT, "places": OTHER[:, :1] + PLACES}, True),
        ({"ids": IDS * KEPT, "noise": OTHER / 7}, True),
        ({"ids": IDS * KEPT, "images": OTHER[0]}, True),
        ({"ids": IDS * KEPT, "token_mask": OTHER}, True),
    ],
)
def test_the_mask_of_an_encoder_is_not_that_of_a_decoder_of_as_many_positions(
    others: dict[str, np.ndarray], found: bool, batch: int
):
    feed = {**others, "attention_mask": KEPT.astype(np.int64)}
    feeds = [{k: v[at : at + batch] for k, v in feed.items()} for at in range(0, 4, batch)]
    padding = find_padding(feeds, (batch, LENGTH, 7))
    assert padding == (Padding("attention_mask") if found else None)


def test_inputs_with_positions_of_their_own_are_not_asked():
    feeds = [{"attention_mask": KEPT.astype(np.int64)}]
    assert find_padding(feeds, (4, LENGTH, 7)) == Padding("attention_mask")
    assert find_padding(feeds, (4, LENGTH, 7), {"attention_mask"}) is None


@pytest.mark.parametrize(
    ("positions", "declared", "masked", "found"),
    [
        ("t", "t", "p", False),
        ("p", "p", "p", True),
        ("t", "made_up", "p", True),
        ("t", "10", "p", True),
        ("p", "p", "past_and_p", True),  # of a decoder with a cache
    ],
)
def test_declared_positions_tell_whose_the_mask_is(positions, declared, masked, found):
    inputs = f"float[n,p,3] x, int64[n,{masked}] attention_mask, float[n,{positions},3] z"
    proto = model(f"({inputs}) => (float[n,{declared},k] y)", "a = Add(x, z) y = Softmax(a)")
    feed = {"attention_mask": KEPT.astype(np.int64)}
    feed |= {name: noise(3, 4, LENGTH, 3).astype(np.float32) for name in ("x", "z")}
    store = ModelStore.load(proto)
    (loss,) = find_losses(store, open_session(store, CPU), [feed])
    assert (loss.padding is not None) == found


def test_values_of_another_shape_have_no_padding():
    assert find_padding([{"mask": np.ones((2, 3))}], (2, 4, 7)) is None
    assert find_padding([{"mask": np.ones((2, 3))}], (2, 3)) is None
    assert find_padding([{"other": np.ones((2, 3))}], (2, 3, 7)) is None
    assert Padding("mask").kept({"x": np.ones(3)}) is None


def tagger(name: str, kind: str) -> onnx.ModelProto:
    """A position-wise network; its mask is read, and changes nothing."""
    return model(
        f"(float[n,t,{D}] x, {kind}[n,t] {name}) => (float[n,t,{C}] y)",
        f"m = Cast<to=1>({name}) u = Unsqueeze(m, last) o = Mul(u, zero) h = Add(x, o) "
        "a = MatMul(h, W) r = Relu(a) y = MatMul(r, V)",
        W=noise(1, D, H).astype(np.float32),
        V=noise(2, H, C).astype(np.float32),
        last=np.array([2], np.int64),
        zero=np.zeros(1, np.float32),
    )


def samples(real: int, kind: type) -> dict[str, np.ndarray]:
    """Real positions lie in a subspace of 4 dimensions, and padding in another."""
    lengths = np.random.default_rng(3).integers(2, LENGTH + 1, 60)
    padded = np.arange(LENGTH) >= lengths[:, None]
    rows, others = noise(4, 60, LENGTH, 4) @ noise(5, 4, D), noise(6, 60, LENGTH, D)
    x = np.where(padded[..., None], others, rows).astype(np.float32)
    return {"x": x, "mask": np.where(padded, 1 - real, real).astype(kind), "padded": padded}


@pytest.mark.parametrize("method", ["two-sided", "one-sided"])
@pytest.mark.parametrize(("real", "kind"), [(1, np.int64), (0, bool)])
def test_what_is_real_counts_whichever_value_marks_it(real, kind, method):
    held = samples(real, kind)
    padded = held.pop("padded")
    name = "bool" if kind is bool else "int64"
    proto = tagger("mask", name)
    # In the 4 dimensions of what is real nothing is lost at half of W.
    config = CompressConfig(
        param_ratio=0.7,
        method=method,
        moves=("low-rank",),
        include=("W",),
        weighting="values",
        refit=False,
    )
    result = compress(proto, held, config)
    y, z = (run(each, held)["y"] for each in (proto, result.model))
    lost = ((y - z) ** 2).sum(-1)
    if method == "two-sided":
        assert lost[~padded].mean() < 1e-3 * lost[padded].mean()
        assert any(f"where 'mask' is {real}" in note for note in result.notes)
    assert result.quality is not None
    assert result.quality.divergence is not None
    # Means over the samples held back, and over all of them.
    own = lost[~padded].mean() / (2 * y[~padded].var(0).sum())
    assert result.quality.divergence.mean == pytest.approx(own, rel=0.5, abs=1e-6)


@pytest.mark.parametrize("then", [None, "fp16"])
def test_positions_hidden_by_infinities_do_not_count(then):
    """Attention whose scores are masked by what is added to them; what is hidden is noise."""
    proto = model(
        f"(float[n,t,{D}] x, float[n,1,1,t] mask) => (float[n,t,{C}] y)",
        "a = MatMul(x, W) k = Transpose<perm=[0, 2, 1]>(a) s = MatMul(a, k) "
        "m = Squeeze(mask, one) b = Add(s, m) p = Softmax(b) v = MatMul(p, x) r = MatMul(v, V) "
        "u = Tanh(r) y = MatMul(u, O)",
        W=(noise(1, D, D) / D).astype(np.float32),
        V=noise(2, D, H).astype(np.float32),
        O=noise(3, H, C).astype(np.float32),
        one=np.array([1], np.int64),
    )
    held = samples(1, np.float32)
    padded = held.pop("padded")
    held["mask"] = np.where(padded, -np.inf, 0).astype(np.float32)[:, None, None]
    config = CompressConfig(param_ratio=0.7, moves=("low-rank",), weighting="values", then=then)
    result = compress(proto, held, config)
    assert result.plan.factored
    assert not any("gradients" in note for note in result.notes)
    assert any("where 'mask' is 0" in note for note in result.notes)
    y, z = (run(each, held)["y"] for each in (proto, result.model))
    lost = ((y - z) ** 2).sum(-1)[~padded].mean() / (2 * y[~padded].var(0).sum())
    assert result.quality.divergence.mean == pytest.approx(lost, rel=0.7, abs=1e-6)
