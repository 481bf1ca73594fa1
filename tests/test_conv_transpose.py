"""ConvTranspose in a decoder: its rows in torch, predictions, operations and moves."""

import math

import numpy as np
import onnx
import pytest
import torch
from builders import CONV_TRANSPOSES, Feed, Form, constants, index, model, noise, ops, run

from onnx_utilrank import CompressConfig, compress
from onnx_utilrank.moves.low_rank import LOW_RANK
from onnx_utilrank.moves.two_convs import CHANNELS
from onnx_utilrank.sensitivity.rows import as_rows
from onnx_utilrank.sites.find import find_sites

C, WIDE = 8, 12


def decoder() -> onnx.ModelProto:
    """8 x 4 x 4 to 1 x 16 x 16, by two steps that each double the extents."""
    decay = 0.7 ** np.arange(WIDE)
    first = noise(1, C, WIDE, 4, 4) * decay[:, None, None] / math.sqrt(4 * C)
    # Its outputs have a few directions.
    mix = noise(2, WIDE, WIDE) / math.sqrt(WIDE)
    first = np.einsum("iokl,op->ipkl", first, mix)
    second = noise(3, WIDE, C, 2, 2) / math.sqrt(WIDE)
    return model(
        f"(float[n,{C},4,4] x) => (float[n,{C},16,16] y)",
        "h = ConvTranspose<strides=[2, 2], pads=[1, 1, 1, 1]>(x, U, u) t = Tanh(h) "
        "y = ConvTranspose<strides=[2, 2]>(t, V, v)",
        U=first.astype(np.float32),
        V=second.astype(np.float32),
        u=noise(4, WIDE).astype(np.float32),
        v=noise(5, C).astype(np.float32),
    )


def images(count: int) -> Feed:
    return {"x": noise(6, count, C, 4, 4).astype(np.float32)}


@pytest.mark.parametrize("form", CONV_TRANSPOSES, ids=str)
def test_rows_in_torch_are_the_rows(form: Form):
    (site,), _ = find_sites(index(form.proto))
    feed = form.data()[0]
    found = as_rows(torch.from_numpy(feed["x"]), site.uses[0].inputs, 2)
    expected = form.rows(feed)
    assert found.shape == (2, len(expected) // 2, site.d)
    np.testing.assert_array_equal(found.reshape(-1, site.d).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("method", ["two-sided", "one-sided"])
def test_predicted_loss_of_a_decoder_is_the_measured_one(method: str):
    config = CompressConfig(param_ratio=0.85, method=method, moves=("low-rank",), refit=False)
    result = compress(decoder(), images(80), config)
    first, second = result.plan.entries
    assert first.op_type == second.op_type == "ConvTranspose"
    assert first.rank is not None
    assert ops(result.model)[:3] == ["ConvTranspose", "Conv", "Tanh"]
    assert result.plan.param_ratio <= 0.85
    onnx.checker.check_model(result.model, full_check=True)
    if method == "two-sided":
        predicted = result.plan.predicted_divergence
        assert predicted > 1e-6
        assert result.quality.divergence.mean == pytest.approx(predicted, rel=0.3)


READERS = {
    "conv": ("Conv<pads=[1, 1, 1, 1]>", (8, WIDE, 3, 3)),
    "pointwise": ("ConvTranspose", (WIDE, 8, 1, 1)),
}


@pytest.mark.parametrize("reader", READERS)
def test_units_that_a_transposed_conv_makes_shrink(reader: str):
    node, shape = READERS[reader]
    proto = model(
        f"(float[n,{C},4,4] x) => (float[n,8,8,8] y)",
        "h = ConvTranspose<strides=[2, 2], pads=[1, 1, 1, 1]>(x, U, u) t = Relu(h) "
        f"y = {node}(t, V, v)",
        U=(noise(1, C, WIDE, 4, 4) / 11).astype(np.float32),
        V=(noise(3, *shape) / 10).astype(np.float32),
        u=noise(4, WIDE).astype(np.float32),
        v=noise(5, 8).astype(np.float32),
    )
    result = compress(proto, images(80), CompressConfig(param_ratio=0.6, moves=("shrink",)))
    ((key, kept),) = ((e.hidden, e.kept) for e in result.plan.shrunk)
    assert key == "U"
    assert kept is not None
    made = constants(result.model).values()
    assert (C, kept, 4, 4) in {values.shape for values in made}
    assert result.plan.predicted_divergence > 1e-6
    assert result.quality.divergence.mean == pytest.approx(
        result.plan.predicted_divergence, rel=0.5
    )


def test_units_that_a_transposed_conv_reads_stay():
    """Each of its positions sees zeros between values, which no mean makes up for."""
    result = compress(decoder(), images(80), CompressConfig(param_ratio=0.8))
    assert not result.plan.shrunk
    feed = images(3)
    assert run(result.model, feed)["y"].shape == run(decoder(), feed)["y"].shape


def test_operations_are_those_of_the_inputs():
    proto, data = decoder(), images(40)
    config = CompressConfig(flop_ratio=0.8, moves=("low-rank",), force=True)
    result = compress(proto, data, config)
    before, after = result.validation.reference.flops, result.validation.candidate.flops
    assert before == 2 * (16 * C * WIDE * 16 + 64 * WIDE * C * 4)
    assert after <= 0.8 * before
    assert after > 0.7 * before


def test_operations_of_a_rank_are_of_both_nodes():
    site, _ = find_sites(index(decoder()))[0]
    assert (site.m, site.d, site.density) == (WIDE, 16 * C, 0.25)
    # A quarter of what each output position sees is a value.
    assert LOW_RANK.multiplications(site, 3) == 3 * (4 * C + WIDE)
    assert not CHANNELS.applies(index(decoder()), site)


def test_groups_are_left_with_the_reason():
    proto = model(
        "(float[n,4,3,3] x) => (float[n,6,a,b] y)",
        "y = ConvTranspose<group=2>(x, W)",
        W=noise(1, 4, 3, 2, 2).astype(np.float32),
    )
    sites, (skip,) = find_sites(index(proto))
    assert not sites
    assert skip.reason == "grouped convolution (2 groups)"
