"""Training: its laws, its schedule, what it keeps, and the verbs that do it."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from builders import Fixed, index, model, noise, run, smooth
from hypothesis import given, settings
from hypothesis import strategies as st

import onnx_utilrank
from onnx_utilrank import (
    CompressConfig,
    ConfigError,
    FinetuneConfig,
    ModelError,
    TrainConfig,
    compress,
    finetune,
    train,
)
from onnx_utilrank.calibration.augment import WINDOW, Augmentation
from onnx_utilrank.calibration.cache import Cache
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.calibration.labels import Labels
from onnx_utilrank.cli.main import main
from onnx_utilrank.model.replaced import with_arrays
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.sites.find import find_sites
from onnx_utilrank.statistics.divergence import OutputLoss, divergence
from onnx_utilrank.statistics.padding import Padding
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.training.adaptive import dense_subspace, factor_pairs, pair_subspace
from onnx_utilrank.training.batches import VARIATIONS, ShuffledBatches
from onnx_utilrank.training.blocks import between_blocks
from onnx_utilrank.training.labels import LabelledSamples
from onnx_utilrank.training.loop import Batch, Recipe, Trainer
from onnx_utilrank.training.objective import Objective, output_divergence
from onnx_utilrank.training.student import Student
from onnx_utilrank.training.subspaces import rotate, subspace
from onnx_utilrank.training.weights import plain_parts, scale_of, trainable_names
from onnx_utilrank.training.windows import window_axes
from onnx_utilrank.validation.divergence import find_losses

law = settings(deadline=None, max_examples=30)
SEEDS = st.integers(0, 2**16)
EPS = float(np.finfo(np.float32).eps)

N, D, H, C = 240, 12, 16, 5
BODY = """
    a = MatMul(x, w1) b = Add(a, b1) h = Relu(b)
    c = MatMul(h, w2) d = Add(c, b2) r = Add(d, x) n = Relu(r)
    y = Gemm(n, w3, b3)
"""


def network(seed: int = 0) -> onnx.ModelProto:
    """Two layers around which a residual runs, and a classifier: its scores share no level."""
    scale = 1 / math.sqrt(D)
    scores = noise(seed + 5, D, C)
    scores -= scores.mean(1, keepdims=True)
    return model(
        f"(float[n,{D}] x) => (float[n,{C}] y)",
        BODY,
        w1=(scale * noise(seed + 1, D, H)).astype(np.float32),
        b1=(0.1 * noise(seed + 2, H)).astype(np.float32),
        w2=(scale * noise(seed + 3, H, D)).astype(np.float32),
        b2=(0.1 * noise(seed + 4, D)).astype(np.float32),
        w3=(2 * scale * scores).astype(np.float32),
        b3=(0.1 * noise(seed + 6, C)).astype(np.float32),
    )


def samples(n: int = N) -> dict[str, np.ndarray]:
    return {"x": noise(20, n, D).astype(np.float32)}


@pytest.fixture(scope="module")
def small() -> onnx.ModelProto:
    """The network at low rank, so that there is something to recover."""
    config = CompressConfig(param_ratio=0.7, method="svd", force=True)
    return compress(network(), samples(), config).model


# --- subspaces ----------------------------------------------------------------------------------


def factors_of(seed: int, m: int, d: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=chance), torch.randn(r, d, generator=chance)


def product(made: dict[str, torch.Tensor]) -> torch.Tensor:
    return (made["left"] @ made["right"]).detach().double()


def named(left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"left": left, "right": right}


SIZES = {"seed": SEEDS, "m": st.integers(1, 9), "d": st.integers(1, 9), "r": st.integers(1, 6)}


@law
@given(**SIZES)
def test_bases_are_orthonormal_and_merge_to_the_weight(seed, m, d, r):
    left, right = factors_of(seed, m, d, r)
    part = subspace("w", left, right, named)
    rank = min(m, d, r)
    assert (part.rank, part.shape) == (rank, (m, d))
    for basis in (part.left, part.right.T):
        gram = basis.T.double() @ basis.double()
        torch.testing.assert_close(gram, torch.eye(rank).double(), rtol=0, atol=4 * max(m, d) * EPS)
    whole = left.double() @ right.double()
    atol = 8 * (r + rank) * EPS * (1 + float(whole.abs().max()))
    torch.testing.assert_close(product(part.made()), whole, rtol=0, atol=atol)


@law
@given(**SIZES)
def test_turning_changes_nothing_and_drops_what_is_zero(seed, m, d, r):
    left, right = factors_of(seed, m, d, r)
    part = subspace("w", left, right, named)
    chance = torch.Generator().manual_seed(seed + 1)
    trained = torch.randn(part.rank, part.rank, generator=chance)
    u, values, v = torch.linalg.svd(trained.double())
    values[(part.rank + 1) // 2 :] = 0  # what training found to be of no use
    with torch.no_grad():
        part.core.copy_(u @ torch.diag(values) @ v)
    before = product(part.made())
    rank = part.rank
    rotate(part, 1e-3)
    assert part.rank <= rank
    assert part.rank == rank - rank // 2 or values[values > 0].min() < 1e-2 * values[0]
    atol = 16 * rank * EPS * (1 + float(before.abs().max()))
    torch.testing.assert_close(product(part.made()), before, rtol=0, atol=atol)
    gram = part.left.T.double() @ part.left.double()
    torch.testing.assert_close(
        gram, torch.eye(part.rank).double(), rtol=0, atol=16 * m * EPS + 1e-6
    )
    assert part.core.requires_grad


def test_at_most_half_goes_at_once_and_a_share_stays():
    left, right = factors_of(3, 200, 200, 200)
    part = subspace("w", left, right, named)
    ranks = []
    for _ in range(12):
        with torch.no_grad():
            part.core.copy_(torch.diag(torch.logspace(0, -30, part.rank)))
        rotate(part, 0.5)
        ranks.append(part.rank)
    assert ranks[:4] == [100, 50, 25, 13]
    assert ranks[-1] == 2  # 1 % of 200


def test_moments_turn_with_the_bases():
    """A step from the turned state is the step that was to be made, in the new bases."""
    left, right = factors_of(4, 6, 7, 5)
    part = subspace("w", left, right, named)
    with torch.no_grad():
        part.core.add_(0.3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(5)))
    gradient = torch.randn(5, 5, generator=torch.Generator().manual_seed(6))
    before = part.left @ gradient @ part.right
    mean, square = rotate(part, 0.0, [gradient, gradient.square()])
    torch.testing.assert_close(part.left @ mean @ part.right, before, rtol=0, atol=64 * EPS)
    assert bool((square >= 0).all())
    torch.testing.assert_close(square.sum(), gradient.square().sum(), rtol=1e-5, atol=0)


WEIGHTS = {
    "matmul": ("(float[n,6] x) => (float[n,4] y)", "y = MatMul(x, w)", (6, 4)),
    "matmul from the left": ("(float[6,n] x) => (float[4,n] y)", "y = MatMul(w, x)", (4, 6)),
    "gemm": ("(float[n,6] x) => (float[n,4] y)", "y = Gemm<transB=1>(x, w)", (4, 6)),
    "conv": (
        "(float[n,3,8,8] x) => (float[n,4,8,8] y)",
        "y = Conv<pads=[1,1,1,1]>(x, w)",
        (4, 3, 3, 3),
    ),
    "conv transpose": (
        "(float[n,3,8,8] x) => (float[n,4,9,9] y)",
        "y = ConvTranspose(x, w)",
        (3, 4, 2, 2),
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_every_operator_go_into_bases_and_back(name: str):
    signature, body, shape = WEIGHTS[name]
    weight = noise(7, *shape).astype(np.float32)
    ((site,), _) = find_sites(index(model(signature, body, w=weight)))
    part = dense_subspace(site, torch.from_numpy(weight))
    assert part.rank == site.full_rank
    (made,) = part.made().values()
    atol = 16 * site.full_rank * EPS * float(np.abs(weight).max())
    np.testing.assert_allclose(made.detach().numpy(), weight, rtol=0, atol=atol)
    whole = part.matrix_of(torch.from_numpy(weight))
    assert tuple(whole.shape) == (site.m, site.d)


PAIRS = {
    "matmul": ("(float[n,6] x) => (float[n,5] y)", "z = MatMul(x, a) y = MatMul(z, b)"),
    "gemm": ("(float[n,6] x) => (float[n,5] y)", "z = Gemm(x, a) y = Gemm(z, b)"),
}


@pytest.mark.parametrize("name", [*PAIRS, "conv", "channels"])
def test_factors_are_found_and_mixed(name: str):
    if name in PAIRS:
        (signature, body), shapes = PAIRS[name], ((6, 3), (3, 5))
        feed = {"x": noise(9, 4, 6).astype(np.float32)}
    else:
        shapes = ((2, 3, 3, 3), (5, 2, 1, 1)) if name == "conv" else ((2, 4, 1, 1), (5, 2, 3, 3))
        pads = ("<pads=[1,1,1,1]>", "")
        first, second = pads if name == "conv" else pads[::-1]
        signature = f"(float[n,{shapes[0][1]},6,6] x) => (float[n,5,6,6] y)"
        body = f"z = Conv{first}(x, a) y = Conv{second}(z, b)"
        feed = {"x": noise(9, 4, shapes[0][1], 6, 6).astype(np.float32)}
    a, b = (noise(k, *shape).astype(np.float32) for k, shape in enumerate(shapes))
    proto = model(signature, body, a=a, b=b)
    ((one, other),) = factor_pairs(index(proto))
    part = pair_subspace(one, other, (torch.from_numpy(a), torch.from_numpy(b)))
    expected = run(proto, feed)["y"]
    atol = 64 * a.size * EPS * (1 + float(np.abs(expected).max()))
    made = {k: v.detach().numpy() for k, v in part.made().items()}
    assert made["a"].shape == a.shape
    np.testing.assert_allclose(
        run(with_arrays(ModelStore.load(proto), made), feed)["y"], expected, rtol=0, atol=atol
    )
    with torch.no_grad():
        part.core[:, -1] = 0
        part.core[-1] = 0
    whole = {k: v.detach().numpy() for k, v in part.made().items()}
    rotate(part, 1e-3)
    cut = {k: v.detach().numpy() for k, v in part.made().items()}
    assert cut["a"].size < a.size
    one_less = run(with_arrays(ModelStore.load(proto), cut), feed)["y"]
    with_zero = run(with_arrays(ModelStore.load(proto), whole), feed)["y"]
    np.testing.assert_allclose(one_less, with_zero, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "body",
    [
        "z = MatMul(x, a) t = Relu(z) y = MatMul(t, b)",
        "z = MatMul(x, a) u = MatMul(z, b) v = ReduceSum(z) y = Add(u, v)",
        "z = Gemm(x, a, c) y = MatMul(z, b)",
    ],
)
def test_what_is_no_pair_is_left(body: str):
    made = {"a": noise(1, 6, 3), "b": noise(2, 3, 5), "c": noise(3, 3)}
    held = {k: v.astype(np.float32) for k, v in made.items() if f"{k})" in body or f"{k}," in body}
    assert not factor_pairs(index(model("(float[n,6] x) => (float[n,5] y)", body, **held)))


# --- what counts --------------------------------------------------------------------------------


@law
@given(
    seed=SEEDS,
    weighting=st.sampled_from(["softmax", "logits", "values"]),
    probabilities=st.booleans(),
    masked=st.booleans(),
    axis=st.sampled_from([-1, 1]),
    scaled=st.booleans(),
)
def test_divergence_in_torch_is_that_of_numpy(seed, weighting, probabilities, masked, axis, scaled):
    rng = np.random.default_rng(seed)
    y, z = rng.normal(size=(2, 4, 3, 5))
    if probabilities and weighting != "values":
        y, z = (np.exp(v) / np.exp(v).sum(axis, keepdims=True) for v in (y, z))
    loss = OutputLoss(
        output="y",
        weighting=weighting,
        probabilities=probabilities and weighting != "values",
        axis=axis,
        variance=2.0,
        scales=(0.3, 2.0, 1.0, 7.0, 0.1)[: 5 if axis == -1 else 3]
        if scaled and weighting == "values"
        else None,
    )
    positions = 3 if axis == -1 else 5
    mask = (rng.random((4, positions)) < 0.7) if masked else None
    one, other = (loss.rows(v, 4) for v in (y, z))
    weights = None if mask is None else mask.astype(np.float64)
    expected = divergence(loss, one, other, weights).mean()
    made = output_divergence(loss, torch.from_numpy(y), torch.from_numpy(z), 4, mask)
    np.testing.assert_allclose(float(made), expected, rtol=1e-5)


def test_labels_count_beside_the_original():
    loss = OutputLoss(output="y", weighting="softmax")
    y = torch.tensor(noise(1, 6, C))
    feed = {"x": np.zeros((6, 1), np.float32), "label": np.arange(6) % C}
    wanted = {"y": noise(2, 6, C)}
    alone = Objective(losses=(loss,))
    both = Objective(losses=(loss,), labels=Labels("label"), classes=loss)
    own = Objective(labels=Labels("label"), classes=loss)
    parts = [float(each(feed, {"y": y}, wanted)) for each in (alone, both, own)]
    assert parts[1] == pytest.approx(parts[0] + 0.5 * parts[2])
    assert parts[2] == pytest.approx(
        float(torch.nn.functional.cross_entropy(y, torch.from_numpy(feed["label"])))
    )
    assert own.wanted == ()


def test_blocks_are_where_everything_flows_through():
    graph = TorchGraph.build(ModelStore.load(network()))
    trained = ["w1", "w2", "w3"]
    assert between_blocks(graph, trained) == ["n"]
    body = "r = MatMul(x, w) a = Relu(r) s = Add(a, r) b = Tanh(s) t = Add(b, s) y = Neg(t)"
    twice = model("(float[n,4] x) => (float[n,4] y)", body, w=noise(1, 4, 4).astype(np.float32))
    graph = TorchGraph.build(ModelStore.load(twice))
    assert between_blocks(graph, ["w"]) == ["r", "s", "t"]


# --- which weights ------------------------------------------------------------------------------


def test_constants_that_are_no_weights_are_not_trained():
    body = """
        a = MatMul(x, w) b = Add(a, bias) s = Mul(b, half) m = Add(s, mask)
        p = Clip(m, low, high) q = Mul(p, gamma) y = Pow(q, two)
    """
    graph = TorchGraph.build(
        ModelStore.load(
            model(
                "(float[n,3] x) => (float[n,4] y)",
                body,
                w=noise(1, 3, 4).astype(np.float32),
                bias=noise(2, 4).astype(np.float32),
                half=np.array(0.5, np.float32),
                mask=np.array([0, 0, -1e9, 0], np.float32),
                low=np.array(-1, np.float32),
                high=np.array(1, np.float32),
                gamma=np.ones(4, np.float32),
                two=np.full(4, 2, np.float32),
            )
        )
    )
    assert sorted(trainable_names(graph)) == ["bias", "gamma", "w"]
    assert sorted(trainable_names(graph, "biases")) == ["bias", "gamma"]


def test_steps_are_shares_of_what_they_change():
    assert scale_of(torch.full((3, 4), 20.0)) == pytest.approx(20)
    assert scale_of(torch.full((3, 4), 1e-5)) == pytest.approx(1e-5)
    assert scale_of(torch.zeros(4)) == pytest.approx(1e-2)


def test_rate_rises_and_falls():
    recipe = Recipe(steps=100, learning_rate=2.0)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[5:]))
    assert 0 < rates[-1] < 0.01


# --- batches and variations ---------------------------------------------------------------------


def test_shuffled_runs_hold_every_sample_once_and_obey_the_seed():
    data = open_data(samples(50), ModelStore.load(network()).inputs)
    seen = [
        np.concatenate([f["x"] for f in data.shuffled(range(50), batch=8, seed=s)])
        for s in (1, 1, 2)
    ]
    assert np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])
    assert np.array_equal(np.sort(seen[0], axis=0), np.sort(samples(50)["x"], axis=0))


def test_rows_of_one_shape_share_a_run_however_they_lie():
    proto = model("(float[n,t] x) => (float[n,t] y)", "y = Neg(x)")
    feeds = [{"x": noise(k, 1, 3 + k % 2).astype(np.float32)} for k in range(16)]

    def arrays() -> Sequence[dict[str, np.ndarray]]:
        return feeds

    data = open_data(arrays, ModelStore.load(proto).inputs)
    if data.run is None:
        runs = list(data.shuffled(range(16), batch=8, seed=0))
        assert [len(f["x"]) for f in runs] == [8, 8]


def test_batches_go_on_from_any_step():
    data = open_data(samples(50), ModelStore.load(network()).inputs)
    vary = Augmentation.of([samples(50)])

    def batches() -> ShuffledBatches:
        return ShuffledBatches(data, range(50), batch=16, most=16, seed=3, augmentation=vary)

    whole, late = batches(), batches()
    steps = [whole.at(k) for k in range(4 * VARIATIONS + 6)]
    for first in (5, 4 * VARIATIONS + 2):
        (batch,) = late.at(first)
        np.testing.assert_array_equal(batch.feed["x"], steps[first][0].feed["x"])
    # Samples come as they are at first, then varied, and the variations come again.
    assert np.isin(steps[0][0].feed["x"], samples(50)["x"]).all()
    assert not np.isin(steps[4][0].feed["x"], samples(50)["x"]).all()
    again = steps[4 * VARIATIONS][0].feed["x"], steps[0][0].feed["x"]
    np.testing.assert_array_equal(*again)


def test_images_move_signals_move_and_features_do_not():
    feeds = [
        {
            "image": smooth(1, 6, 3, 20, 24).astype(np.float32),
            "signal": smooth(2, 6, 400).astype(np.float32),
            "spectrum": smooth(3, 6, 98, 40).astype(np.float32),
            "features": smooth(4, 6, 8).astype(np.float32),
            "table": noise(5, 6, 90).astype(np.float32),
            "ids": np.arange(6 * 30).reshape(6, 30),
            "attention_mask": np.ones((6, 30), np.int64),
        }
    ]
    vary = Augmentation.of(feeds, Padding("attention_mask"))
    unmoved: dict[str, tuple[int, ...]] = {"features": (), "table": ()}
    assert vary.moved == {"image": (2, 3), "signal": (1,), "spectrum": (1,), **unmoved}
    assert set(vary.scale) == set(vary.moved)
    assert vary.scale["table"].shape == (90,)
    assert set(vary.tokens) == {"ids"}
    made = vary(feeds[0], seed=5)
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {
        k: (v.shape, v.dtype) for k, v in feeds[0].items()
    }
    np.testing.assert_array_equal(made["attention_mask"], feeds[0]["attention_mask"])
    np.testing.assert_array_equal(made["ids"][:, [0, -1]], feeds[0]["ids"][:, [0, -1]])
    assert 0 < (made["ids"] != feeds[0]["ids"]).mean() <= 0.15
    assert not np.array_equal(made["image"], feeds[0]["image"])
    again = vary(feeds[0], seed=5)
    assert all(np.array_equal(made[k], again[k]) for k in made)


def test_images_that_show_the_same_are_moved_alike():
    feed = {"x": smooth(1, 40, 1, 20, 24).astype(np.float32)}
    feed["y"] = feed["x"].copy()
    vary = Augmentation.of([feed])
    made = vary(feed, 3)
    slack = 6 * 0.1 * float(vary.scale["x"])  # the noise is of each
    assert np.abs(made["x"] - made["y"]).max() < 2 * slack
    assert np.abs(made["x"] - feed["x"]).max() > 2 * slack


@pytest.mark.parametrize("kind", [np.int64, np.float32])
def test_what_a_mask_speaks_of_stays_in_its_place(kind: type):
    feed = {"x": smooth(1, 8, 1, 20, 24).astype(np.float32), "m": np.ones((8, 24), kind)}
    feed["m"][:, 9:] = 0
    vary = Augmentation.of([feed])
    assert vary.moved == {"x": (2,)}
    np.testing.assert_array_equal(vary(feed, 1)["m"], feed["m"])


def test_features_get_noise_of_their_own_size():
    x = noise(1, 200, 30) * np.geomspace(1e-3, 1e3, 30)
    feed = {"x": x.astype(np.float32)}
    made = Augmentation.of([feed], labelled=True)(feed, 1)["x"]
    np.testing.assert_array_less(np.abs(made - feed["x"]).std(0), 0.2 * feed["x"].std(0))


def test_samples_are_mixed_where_nothing_hangs_on_their_labels():
    x = 1e-3 * noise(7, 64, 3, 4).astype(np.float32)
    x[np.arange(64), np.arange(64) % 3] += 1
    feeds = [{"x": x, "scalar": np.float32(1)}]
    mixed, plain = (Augmentation.of(feeds, labelled=each) for each in (False, True))
    between = [((each(feeds[0], 1)["x"].max(2) > 0.3).sum(1) > 1).mean() for each in (mixed, plain)]
    assert between[0] > 0.15
    assert between[1] < 0.05
    texts = feeds[0] | {"ids": np.arange(640).reshape(64, 10)}
    made = Augmentation.of([texts])(texts, 1)["x"]
    assert ((made.max(2) > 0.3).sum(1) > 1).mean() < 0.05


def test_images_are_mirrored_where_nothing_hangs_on_their_labels():
    ramp = np.linspace(-1, 1, 24) + np.linspace(0, 1, 20)[:, None]
    ramp = np.broadcast_to(ramp.astype(np.float32), (64, 1, 20, 24))
    for labelled in (False, True):
        made = Augmentation.of([{"x": ramp}], labelled=labelled)({"x": ramp}, 1)["x"]
        falling = (made[..., 0] > made[..., -1]).all((1, 2)).mean()
        assert (falling > 0.05) != labelled


def test_padding_is_not_exchanged():
    ids = np.arange(40).reshape(2, 20)
    mask = np.zeros((2, 20), np.int64)
    mask[:, :9] = 1
    vary = Augmentation.of([{"ids": ids, "m": mask}], Padding("m"))
    for seed in range(20):
        made = vary({"ids": ids, "m": mask}, seed)["ids"]
        np.testing.assert_array_equal(made[:, 8:], ids[:, 8:])


# --- windows ------------------------------------------------------------------------------------


def filters(signature: str, body: str = "y = Conv<pads=[1,1,1,1]>(x, k)") -> ModelStore:
    kernel = noise(1, 2, 2, 3, 3).astype(np.float32)
    return ModelStore.load(model(signature, body, k=kernel))


DEEP = "a = Conv<pads=[1,1,1,1]>(x, k) b = Relu(a) y = Conv<pads=[1,1,1,1]>(b, k)"
VALUES = (OutputLoss(output="y", weighting="values"),)
LARGE = {"x": noise(2, 1, 2, 100, 120).astype(np.float32)}


def test_windows_of_large_images_of_any_size():
    store = filters("(float[n,2,h,w] x) => (float[n,2,h,w] y)")
    windows = window_axes(store, LARGE, VALUES, CPU)
    assert windows == {"x": (2, 3)}
    images = {"x": np.arange(3 * 2 * 100 * 120, dtype=np.float32).reshape(3, 2, 100, 120)}
    cut = Augmentation.of([images], windows=windows).cut(images, np.random.default_rng(0))["x"]
    assert cut.shape == (3, 2, WINDOW, WINDOW)
    first = int(cut[0, 0, 0, 0])
    top, left = divmod(first, 120)
    np.testing.assert_array_equal(cut, images["x"][:, :, top : top + WINDOW, left : left + WINDOW])
    assert Augmentation.of([images], windows=windows)(images, 1)["x"].shape == cut.shape


def test_images_of_one_size_are_cut_alike():
    feed = dict.fromkeys(("a", "b"), LARGE["x"])
    vary = Augmentation.of([feed], windows={"a": (2, 3), "b": (2, 3)})
    cut = vary.cut(feed, np.random.default_rng(3))
    np.testing.assert_array_equal(cut["a"], cut["b"])


@pytest.mark.parametrize(
    ("signature", "body", "losses", "feed"),
    [
        ("(float[n,2,100,w] x) => (float[n,2,100,w] y)", None, VALUES, LARGE),
        ("(float[n,2,h,w] x) => (float[n,2,h,w] y)", None, VALUES, {"x": LARGE["x"][..., :90]}),
        (
            "(float[n,2,h,w] x) => (float[n,2,h,w] y)",
            None,
            (OutputLoss(output="y", weighting="softmax", axis=-3),),
            LARGE,
        ),
        (
            "(float[n,2,h,w] x) => (float[n,2] y)",
            "c = Conv(x, k) y = ReduceMean<axes=[2,3], keepdims=0>(c)",
            VALUES,
            LARGE,
        ),
        (
            "(float[n,2,h,w] x) => (float[n,2,1,1] y)",
            "c = Conv(x, k) y = GlobalAveragePool(c)",
            VALUES,
            LARGE,
        ),
        (  # of any size, it says
            "(float[n,2,h,w] x) => (float[n,2,h,w] y)",
            "c = Conv<pads=[1,1,1,1]>(x, k) "
            "s = Constant<value_ints=[-1, 2, 100, 120]>() y = Reshape(c, s)",
            VALUES,
            LARGE,
        ),
    ],
    ids=["one side is fixed", "too small", "classes", "a vector", "a pixel", "refuses the window"],
)
def test_what_windows_are_not_cut_out_of(signature, body, losses, feed):
    store = filters(signature) if body is None else filters(signature, body)
    assert window_axes(store, feed, losses, CPU) == {}


def test_a_filter_is_trained_on_windows():
    original = filters("(float[n,2,h,w] x) => (float[n,2,h,w] y)", DEEP)
    proto = onnx.ModelProto()
    proto.CopyFrom(original.proto)
    held = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    moved = (held + 0.1 * noise(9, *held.shape)).astype(np.float32)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(moved, "k"))
    images = {"x": noise(5, 12, 2, 100, 120).astype(np.float32)}
    result = finetune(original, proto, images, FinetuneConfig(steps=30, learning_rate=2e-2))
    assert result.kept
    assert result.after.mean < 0.5 * result.before.mean


# --- the loop -----------------------------------------------------------------------------------


def trainer(steps: int, cache: Cache | None = None, **options: object) -> Trainer:
    graph = TorchGraph.build(ModelStore.load(network(100)))
    loss = OutputLoss(output="y", weighting="softmax")
    feed = samples(64)
    wanted = run(network(), feed)
    student = Student(graph, plain_parts(graph, trainable_names(graph)))
    objective = Objective(losses=(loss,))

    def judge(student: Student) -> float:
        with torch.no_grad():
            return float(objective(feed, student.forward(feed, ["y"]), wanted))

    recipe = Recipe(steps=steps, learning_rate=1e-2, **options)  # type: ignore[arg-type]
    return Trainer(
        student,
        objective,
        Fixed(Batch(feed, wanted)),
        judge,
        recipe,
        progress=lambda *_: None,
        cache=cache,
    )


def test_training_lowers_the_loss_and_keeps_the_best():
    made = trainer(60, patience=20)
    history = made.run()
    first, best = history.looks[0], history.best
    assert math.isnan(first.loss)
    assert best.divergence < 0.5 * first.divergence
    assert made.judge(made.student) == pytest.approx(best.divergence, rel=1e-6)
    assert history.dropped == 0


def test_the_best_of_the_looks_is_kept():
    made = trainer(20, patience=20)
    seen: list[dict[str, np.ndarray]] = []
    scores = iter([3.0, 2.0, 1.0, *[4.0] * 18])

    def judge(student: Student) -> float:
        seen.append({name: value.copy() for name, value in student.arrays().items()})
        return next(scores)

    made.judge = judge
    made.run()
    kept = made.student.arrays()
    assert all(np.array_equal(kept[name], value) for name, value in seen[2].items())
    assert not any(np.array_equal(kept[name], value) for name, value in seen[-1].items())


def test_what_is_judged_is_a_mean_of_steps():
    """At a rate that makes steps stray, the mean of them is better than most."""
    made = trainer(80, patience=80, averaged=True, warm_up=0.0)
    strays: list[float] = []
    step = made._step

    def taken(k: int) -> None:
        step(k)
        strays.append(made.judge(made.student))

    made._step = taken  # type: ignore[method-assign]
    history = made.run()
    judged = {look.step: look.divergence for look in history.looks}
    assert all(judged[k] != strays[k - 1] for k in list(judged)[1:])
    assert history.best.divergence < judged[0]


def test_steps_whose_gradients_are_not_finite_are_not_taken():
    made = trainer(3)
    made.batches = Fixed(Batch({"x": np.full((4, D), np.nan, np.float32)}, {"y": np.zeros((4, C))}))
    before = made.student.arrays()
    assert made.run().dropped == 3
    after = made.student.arrays()
    assert all(np.array_equal(before[k], after[k]) for k in before)


# --- fine-tuning --------------------------------------------------------------------------------

QUICK = FinetuneConfig(steps=120, learning_rate=5e-3)


def test_finetuning_recovers_and_is_what_the_file_computes(small: onnx.ModelProto):
    result = finetune(network(), small, samples(), QUICK)
    assert result.kept
    assert result.after.mean < 0.8 * result.before.mean
    assert result.history[0].step == 0
    again = finetune(network(), small, samples(), QUICK)
    assert again.model.SerializeToString() == result.model.SerializeToString()
    feed = samples(40)
    graph = TorchGraph.build(result.store)
    expected = graph.run(feed)["y"].detach().numpy()
    atol = 8 * (D + H + D) * EPS * (1 + float(np.abs(expected).max()))
    np.testing.assert_allclose(run(result.model, feed)["y"], expected, rtol=0, atol=atol)


def test_a_student_that_is_near_takes_smaller_steps():
    """One that differs by a thousandth is not shaken out of its place."""
    near = network()
    for tensor in near.graph.initializer:
        held = onnx.numpy_helper.to_array(tensor)
        moved = held * (1 + 1e-3 * noise(len(held), *held.shape))
        tensor.CopyFrom(onnx.numpy_helper.from_array(moved.astype(np.float32), tensor.name))
    result = finetune(network(), near, samples(), FinetuneConfig(steps=60))
    assert max(look.divergence for look in result.history) < 2 * result.history[0].divergence


def test_weights_that_are_no_better_are_not_kept(small: onnx.ModelProto):
    before = small.SerializeToString()
    result = finetune(
        network(), small, samples(), dataclasses.replace(QUICK, steps=3, learning_rate=1.0)
    )
    assert not result.kept
    assert result.model.SerializeToString() == before == small.SerializeToString()
    assert any("stays as it is" in note for note in result.notes)


@pytest.mark.parametrize("method", ["factors", "biases", "oialr"])
def test_the_original_has_nothing_to_recover(method: str):
    config = dataclasses.replace(QUICK, method=method)
    result = finetune(network(), network(), samples(), config)
    assert (result.kept, result.history) == (False, ())
    assert result.notes


def test_biases_alone(small: onnx.ModelProto):
    result = finetune(
        network(), small, samples(), dataclasses.replace(QUICK, method="biases", steps=60)
    )
    held = {t.name: t for t in small.graph.initializer}
    changed = {
        t.name
        for t in result.model.graph.initializer
        if t.SerializeToString() != held[t.name].SerializeToString()
    }
    assert changed
    assert all(len([e for e in held[name].dims if e > 1]) == 1 for name in changed)


def test_oialr_loses_directions(small: onnx.ModelProto):
    options = dataclasses.replace(QUICK, method="oialr", share=0.95, interval=10)
    result = finetune(network(), small, samples(), options)
    assert result.history[-1].trained < result.history[0].trained
    assert result.validation.candidate.parameters <= result.validation.reference.parameters


def test_labels_and_blocks_and_minutes(small: onnx.ModelProto):
    data = samples()
    data["label"] = run(network(), data)["y"].argmax(-1).astype(np.int64)
    config = dataclasses.replace(QUICK, steps=20, labels="label", blocks=True)
    assert len(finetune(network(), small, data, config).history) > 1
    timed = dataclasses.replace(QUICK, steps=None, minutes=0.01)
    assert finetune(network(), small, data, timed).history


def test_labels_decide_what_is_kept(small: onnx.ModelProto):
    data = labelled()  # of another teacher than the original
    config = dataclasses.replace(QUICK, steps=200, learning_rate=5e-3, labels="label")
    result = finetune(network(), small, data, config)
    assert result.kept
    assert result.accuracy is not None
    assert result.accuracy_before is not None
    assert result.accuracy > result.accuracy_before + 5
    assert result.after.mean > result.before.mean  # which alone would have thrown it away
    assert finetune(network(), small, samples(), QUICK).accuracy is None


def test_what_labelled_samples_lose_does_not_depend_on_how_they_come():
    data = {name: value[:50] for name, value in labelled().items()}
    session, candidate = (open_session(ModelStore.load(network(s)), CPU) for s in (0, 100))
    (loss,) = find_losses(ModelStore.load(network()), session, [data], "softmax")
    objective = Objective(losses=(loss,), labels=Labels("label"), classes=loss)
    parts = [{name: v[a:b] for name, v in data.items()} for a, b in ((0, 1), (1, 30), (30, 50))]
    one, several = (LabelledSamples(objective, feeds, session) for feeds in ([data], parts))
    # Means of 50 terms in float32, of the order of 1.
    assert several.loss(candidate) == pytest.approx(one.loss(candidate), rel=50 * 2**-23)
    assert several.accuracy(candidate) == one.accuracy(candidate)
    right = session.run(data)["y"].argmax(-1) == data["label"]
    assert one.accuracy(session) == pytest.approx(100 * right.mean())


def test_labels_need_classes(small: onnx.ModelProto):
    data = samples() | {"label": np.zeros(N, np.int64)}
    config = dataclasses.replace(QUICK, labels="label=z")
    with pytest.raises(ConfigError, match=r"'z' is none of the outputs \['y'\]"):
        finetune(network(), small, data, config)


def test_a_candidate_of_something_else_is_refused():
    other = model(
        f"(float[n,{D}] z) => (float[n,{C}] y)",
        "y = MatMul(z, w)",
        w=noise(1, D, C).astype(np.float32),
    )
    with pytest.raises(ModelError, match="no candidate for it"):
        finetune(network(), other, samples(), QUICK)


@pytest.mark.parametrize("method", ["factors", "oialr"])
def test_resume_equals_uninterrupted(
    tmp_path: Path, small: onnx.ModelProto, monkeypatch, method: str
):
    monkeypatch.setattr("onnx_utilrank.training.loop.CHECKPOINT_SECONDS", 0.0)
    config = FinetuneConfig(steps=40, learning_rate=5e-3, method=method)
    if method == "oialr":
        config = dataclasses.replace(config, share=0.3, interval=7)
    whole = finetune(network(), small, samples(), config)

    class Killed(Exception):
        pass

    def killer(*state: object) -> None:
        if state[:2] == ("training", 13):
            raise Killed

    cached = dataclasses.replace(config, cache=tmp_path)
    with pytest.raises(Killed):
        finetune(network(), small, samples(), cached, progress=killer)
    seen = []

    def watch(*state: object) -> None:
        if state[0] == "training":
            seen.append(state[1])

    resumed = finetune(network(), small, samples(), cached, progress=watch)
    assert min(seen) == 14
    assert resumed.model.SerializeToString() == whole.model.SerializeToString()
    assert [look.divergence for look in resumed.history] == [
        look.divergence for look in whole.history
    ]


def test_a_timed_run_goes_on_with_the_steps_it_had_settled_on(
    tmp_path: Path, small: onnx.ModelProto, monkeypatch
):
    monkeypatch.setattr("onnx_utilrank.training.loop.CHECKPOINT_SECONDS", 0.0)
    config = FinetuneConfig(minutes=0.005, learning_rate=5e-3, cache=tmp_path)
    settled = []

    class Killed(Exception):
        pass

    def killer(*state: object) -> None:
        if state[0] == "training":
            settled.append(state[2])
            raise Killed

    def watch(*state: object) -> None:
        if state[0] == "training":
            settled.append(state[2])

    with pytest.raises(Killed):
        finetune(network(), small, samples(), config, progress=killer)
    # A slower machine by now: it would settle on fewer.
    monkeypatch.setattr("onnx_utilrank.training.loop.TIMED", 0)
    finetune(network(), small, samples(), config, progress=watch)
    assert len(set(settled)) == 1


def test_half_precision_is_trained_in_single(small: onnx.ModelProto):
    half = onnx.ModelProto()
    half.CopyFrom(small)
    full = network()
    for proto in (half, full):
        for tensor in proto.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
        del proto.graph.value_info[:]
    data = {"x": samples()["x"].astype(np.float16)}
    result = finetune(full, half, data, QUICK)
    assert result.kept
    assert {t.data_type for t in result.model.graph.initializer} == {onnx.TensorProto.FLOAT16}


def test_external_data_stay_outside(tmp_path: Path, small: onnx.ModelProto):
    path = tmp_path / "small.onnx"
    held = onnx.ModelProto()
    held.CopyFrom(small)  # saving changes it
    onnx.save_model(held, path, save_as_external_data=True, location="d", size_threshold=0)
    result = finetune(network(), path, samples(), QUICK)
    assert result.kept
    result.save(tmp_path / "out.onnx")
    feed = samples(20)
    made = ModelStore.load(tmp_path / "out.onnx")
    np.testing.assert_array_equal(run(made, feed)["y"], run(result.store, feed)["y"])


def test_compress_finetunes_as_a_last_stage():
    config = CompressConfig(param_ratio=0.7, moves=("low-rank",), force=True)
    tuned = compress(network(), samples(), dataclasses.replace(config, finetune=QUICK))
    plain = compress(network(), samples(), config)
    assert tuned.recovered is not None
    assert tuned.recovered.kept
    assert tuned.plan.parameters_after == plain.plan.parameters_after
    before, after = (each.quality.divergence.mean for each in (plain, tuned))
    assert after < before
    # Both are of the same samples and of what was found to count when it was compressed.
    assert tuned.recovered.after.mean == pytest.approx(after, rel=1e-6)
    json.dumps(tuned.as_dict(), allow_nan=False)


# --- training from labels -----------------------------------------------------------------------


def labelled() -> dict[str, np.ndarray]:
    data = samples(600)
    teacher = noise(50, D, C)
    return data | {"label": (data["x"] @ teacher).argmax(-1).astype(np.int64)}


def test_training_learns_and_comes_out_of_low_rank():
    config = TrainConfig(
        labels="label", steps=300, learning_rate=1e-2, delay=60, interval=20, share=0.6
    )
    result = train(network(), labelled(), config)
    assert result.accuracy > result.accuracy_before + 20
    assert result.trained < result.trainable
    assert result.parameters < result.parameters_before
    assert set(result.ranks) == {"w1", "w2"}  # the last layer stays as it is
    assert all(rank <= min(m, d) for rank, m, d in result.ranks.values())
    assert any("Not in bases (the last layer): 'w3'." in note for note in result.notes)
    dense = train(network(), labelled(), TrainConfig(labels="label", steps=20, method="dense"))
    assert (dense.ranks, dense.trained) == ({}, dense.trainable)
    assert dense.parameters == dense.parameters_before
    json.dumps(result.as_dict(), allow_nan=False)


TRAINING = TrainConfig(
    labels="label", steps=60, learning_rate=1e-2, delay=10, interval=10, share=0.4
)


def test_the_trained_file_is_the_student(monkeypatch):
    students: list[Student] = []

    class Kept(Student):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[arg-type]
            students.append(self)

    monkeypatch.setattr("onnx_utilrank.training.setting.Student", Kept)
    result = train(network(), labelled(), TRAINING)
    assert result.ranks
    feed = samples(40)
    expected = students[0].run(feed, ["y"])["y"]
    atol = 8 * (D + H + D) * EPS * (1 + float(np.abs(expected).max()))
    np.testing.assert_allclose(run(result.model, feed)["y"], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("step", [9, 10, 11, 20])
def test_training_that_was_killed_goes_on_across_the_delay(tmp_path, monkeypatch, step: int):
    monkeypatch.setattr("onnx_utilrank.training.loop.CHECKPOINT_SECONDS", 0.0)
    whole = train(network(), labelled(), TRAINING)

    class Killed(Exception):
        pass

    def killer(*state: object) -> None:
        if state[:2] == ("training", step):
            raise Killed

    cached = dataclasses.replace(TRAINING, cache=tmp_path)
    with pytest.raises(Killed):
        train(network(), labelled(), cached, progress=killer)
    resumed = train(network(), labelled(), cached)
    assert resumed.model.SerializeToString() == whole.model.SerializeToString()
    assert (resumed.ranks, resumed.history[-1]) == (whole.ranks, whole.history[-1])


def test_what_joins_first_does_not_depend_on_the_order_of_initializers():
    turned = network()
    held = list(turned.graph.initializer)[::-1]
    del turned.graph.initializer[:]
    turned.graph.initializer.extend(held)
    one, other = (train(proto, labelled(), TRAINING) for proto in (network(), turned))
    assert one.ranks == other.ranks
    assert one.history == other.history
    ranks = [look.rank for look in one.history]
    assert ranks[0] == 0
    assert ranks[-1] < max(ranks)


def test_the_best_is_kept_in_bases_too(small: onnx.ModelProto):
    """Cuts of half of what mixes them at a time do harm, which the end of training shows."""
    config = FinetuneConfig(steps=100, learning_rate=5e-3, method="oialr", share=0.99)
    result = finetune(network(), small, samples(), config)
    looks = [look.divergence for look in result.history]
    assert result.history[-1].rank < result.history[0].rank
    assert looks[-1] > 3 * min(looks)
    assert result.after.mean < 2 * min(looks)


@pytest.mark.parametrize("steps", [1, 19, 20, 21, 39, 40])
def test_looks_are_about_twenty(steps: int):
    looks = trainer(steps).run().looks
    assert len(looks) - 1 == math.ceil(steps / math.ceil(steps / 20)) <= 20


def test_steps_hold_as_many_samples_where_runs_hold_one():
    data = open_data(samples(40), ModelStore.load(network()).inputs)
    batches = ShuffledBatches(data, range(40), batch=16, most=1, seed=3)
    runs = batches.at(0)
    assert [len(each.feed["x"]) for each in runs] == [1] * 16


def test_training_needs_labels():
    with pytest.raises(ConfigError, match="labels"):
        TrainConfig()


# --- command line -------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, small: onnx.ModelProto) -> Path:
    onnx.save(network(), tmp_path / "model.onnx")
    onnx.save(small, tmp_path / "small.onnx")
    np.savez(tmp_path / "data.npz", **labelled())
    return tmp_path


def test_verbs(files: Path, capsys):
    data = ["--data", str(files / "data.npz")]
    reference, candidate = str(files / "model.onnx"), str(files / "small.onnx")
    words = ["finetune", reference, candidate, "-o", str(files / "tuned.onnx"), *data]
    words += ["--steps", "60", "--learning-rate", "5e-3", "--report", str(files / "r.json")]
    assert main(words) == 0
    assert "The new weights are kept." in capsys.readouterr().out
    report = json.loads((files / "r.json").read_text())
    assert report["kept"]
    assert report["after"]["mean"] < report["before"]["mean"]
    words = ["train", reference, "-o", str(files / "t.onnx"), *data, "--labels", "label"]
    assert main([*words, "--steps", "40", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0
    words = ["compress", reference, "-o", str(files / "c.onnx"), *data, "--param-ratio", "0.7"]
    assert main([*words, "--finetune", "--steps", "20"]) == 0
    assert "Fine-tuned (factors)" in capsys.readouterr().out
    assert main([*words, "--steps", "20"]) == 2
    assert {p.name for p in files.iterdir() if p.suffix == ".onnx"} == {
        *("model.onnx", "small.onnx", "tuned.onnx", "t.onnx", "c.onnx")
    }


def test_labels_that_are_no_classes_end_in_one_line(files: Path, capsys):
    data = labelled()
    data["label"][3] = C
    np.savez(files / "bad.npz", **data)
    words = ["train", str(files / "model.onnx"), "-o", str(files / "bad.onnx")]
    words += ["--data", str(files / "bad.npz"), "--labels", "label", "--steps", "40"]
    assert main(words) == 5
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "labels 'label': classes up to 5, one for each of 32" in line
    assert "'y' has 5 classes for each of 32 x 1" in line
    assert not (files / "bad.onnx").exists()


def test_inputs_without_samples_are_let_be():
    feed = {"rate": np.array(16000), "x": noise(1, 8, 40).astype(np.float32)}
    feed["past"] = np.zeros((8, 2, 0, 4), np.float32)
    made = Augmentation.of([feed])(feed, 1)
    assert made["rate"] == 16000
    assert made["x"].shape == (8, 40)
    assert made["past"].shape == (8, 2, 0, 4)


def test_public_names():
    assert {"finetune", "train", "FinetuneConfig", "TrainConfig"} <= set(onnx_utilrank.__all__)
