"""A Conv as two: the rewritten graph, gradients between them, and whole compressions."""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
import torch
from builders import Shape, activations, constants, index, model, noise, ops, run, same_pads
from onnx import numpy_helper
from torch.nn import functional

from onnx_utilrank import CompressConfig, ModelError, RankPlan, compress
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.moves.moves import find_move
from onnx_utilrank.moves.two_convs import CHANNELS, SEPARABLE, TWO_CONVS, TwoConvs
from onnx_utilrank.ranking.two_sided import InnerFeatures, TwoSidedSite, with_inner
from onnx_utilrank.refit.layer import Layer
from onnx_utilrank.refit.propagate import propagate
from onnx_utilrank.sensitivity.rows import (
    CONVOLUTIONS,
    convolved,
    input_gradient,
    input_rows,
    split_rows,
)
from onnx_utilrank.sites.find import find_sites, site_matrix
from onnx_utilrank.sites.site import Patches, Site
from onnx_utilrank.statistics.factorize import Decomposition, Metric, optimal
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.statistics.sensitivity import Sensitivity
from onnx_utilrank.surgery.rewrite import Replacement, check_contract, rewrite
from onnx_utilrank.torch_graph.graph import TorchGraph

EPS = float(np.finfo(np.float32).eps)
C, M = 6, 5  # channels, outputs


@dataclass(frozen=True, kw_only=True)
class Case:
    """One Conv of several taps over an input [2, C, *sizes]."""

    sizes: Shape
    kernel: Shape
    attrs: str = ""
    bias: str = "input"

    @property
    def signature(self) -> str:
        dims = ",".join(map(str, self.sizes))
        outs = ",".join(f"o{k}" for k in range(len(self.sizes)))
        return f"(float[n,{C},{dims}] x) => (float[n,{M},{outs}] y)"

    def proto(self) -> onnx.ModelProto:
        attrs = f"<{self.attrs}>" if self.attrs else ""
        body = {
            "none": f"y = Conv{attrs}(x, W)",
            "input": f"y = Conv{attrs}(x, W, b)",
            "add": f"h = Conv{attrs}(x, W) y = Add(h, b)",
        }[self.bias]
        weight = noise(1, M, C, *self.kernel) / math.sqrt(C * math.prod(self.kernel))
        held = {"W": weight.astype(np.float32)}
        b = noise(2, M).astype(np.float32)
        if self.bias == "input":
            held["b"] = b
        if self.bias == "add":
            held["b"] = b.reshape(-1, *(1,) * len(self.kernel))
        return model(self.signature, body, **held)


SETTINGS = {
    "1d": Case(sizes=(20,), kernel=(3,)),
    "1d dilated": Case(sizes=(20,), kernel=(3,), attrs="dilations=[3], pads=[2,1], strides=[2]"),
    "1d same": Case(sizes=(21,), kernel=(4,), attrs='auto_pad="SAME_LOWER", strides=[2]'),
    "2d": Case(sizes=(6, 7), kernel=(3, 3), attrs="pads=[1,1,1,1], kernel_shape=[3,3]"),
    "2d uneven": Case(sizes=(9, 8), kernel=(3, 2), attrs="pads=[2,1,0,3], strides=[2,3]"),
    "2d dilated": Case(sizes=(9, 9), kernel=(3, 3), attrs="pads=[1,0,2,1], dilations=[2,3]"),
    "2d upper": Case(sizes=(9, 8), kernel=(2, 3), attrs='auto_pad="SAME_UPPER", strides=[2,2]'),
    "2d lower": Case(sizes=(9, 8), kernel=(2, 3), attrs='auto_pad="SAME_LOWER", strides=[2,2]'),
    "2d valid": Case(sizes=(9, 8), kernel=(2, 3), attrs='auto_pad="VALID", dilations=[2,1]'),
    "3d": Case(sizes=(4, 5, 6), kernel=(2, 1, 2), attrs="strides=[1,2,2], pads=[1,0,1,0,0,2]"),
    "3d same": Case(sizes=(4, 5, 6), kernel=(2, 2, 3), attrs='auto_pad="SAME_UPPER"'),
}


def only_site(proto: onnx.ModelProto) -> tuple[GraphIndex, Site]:
    graph = index(proto)
    (site,), _ = find_sites(graph)
    return graph, site


def decomposed(seed: int, channels: int = C) -> InnerFeatures:
    """Channels in a basis that is not orthonormal, as a metric makes it."""
    reduce = np.eye(channels) + 0.3 * noise(seed, channels, channels)
    found = Decomposition(
        expand=np.linalg.inv(reduce), reduce=reduce, errors=np.zeros(channels + 1), energy=1.0
    )
    return InnerFeatures(
        move=CHANNELS.key,
        found=found,
        errors=found.errors,
        seen=found.errors,
        mean=activations(seed, channels),
    )


def projected(inner: InnerFeatures, kernel: np.ndarray, rank: int) -> np.ndarray:
    """W (I ⊗ L K), for features that are the first axes of the kernel after its outputs."""
    kept = inner.found.expand[:, :rank] @ inner.found.reduce[:rank]
    taps = kernel.astype(np.float64).reshape(len(kernel), len(kept), -1)
    return np.einsum("mct,cd->mdt", taps, kept).reshape(kernel.shape)


def with_kernel(proto: onnx.ModelProto, kernel: np.ndarray) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    (held,) = (t for t in changed.graph.initializer if t.name == "W")
    held.CopyFrom(numpy_helper.from_array(kernel.astype(np.float32), "W"))
    return changed


# --- the rewritten graph ------------------------------------------------------------------------


# Which Convs each can take the place of: `separable` needs taps on both sides.
SPLIT = [("channels", name) for name in SETTINGS]
SPLIT += [("separable", name) for name, case in SETTINGS.items() if len(case.kernel) > 1]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("bias", ["input", "add", "none"])
@pytest.mark.parametrize(("move", "name"), SPLIT)
def test_rewritten_model_is_the_one_with_projected_features(
    move: str, name: str, bias: str, corrected: bool
):
    case = replace(SETTINGS[name], bias=bias)
    proto = case.proto()
    graph, site = only_site(proto)
    kind = find_move(move)
    kernel, taps = constants(proto)["W"], math.prod(case.kernel)
    features, last = (
        (C, taps) if kind is CHANNELS else (C * taps // case.kernel[-1], case.kernel[-1])
    )
    inner = decomposed(3, features)
    lost = noise(9, M) if corrected else None
    assert kind.applies(graph, site)
    for rank in range(1, kind.top_rank(site) + 1):
        factors = inner.factors(site_matrix(graph, site), rank)
        store = rewrite(graph, [Replacement(site=site, move=move, factors=factors, lost_mean=lost)])
        check_contract(graph.store, store)
        onnx.checker.check_model(store.proto, full_check=True)
        assert ops(store.proto) == ["Conv", "Conv"] + ["Add"] * (bias == "add")

        stored = sum(math.prod(t.dims) for t in store.proto.graph.initializer)
        kept = M if corrected or bias != "none" else 0
        assert stored == kind.parameters(site, rank) + kept
        assert kind.parameters(site, rank) == rank * (features + M * last)
        sizes = [math.prod(t.dims) for t in store.proto.graph.initializer]
        assert all(m * d in sizes for _, m, d in kind.matrices(site, rank))

        new = projected(inner, kernel, rank)
        feed = {"x": activations(5, 2, C, *case.sizes).astype(np.float32)}
        expected = run(with_kernel(proto, new), feed)["y"].astype(np.float64)
        if lost is not None:
            expected = expected + lost.reshape(-1, *(1,) * len(case.kernel))
        # Sums of features, then of r taps, products, beside those of the dense kernel: independent
        # errors.
        size = np.linalg.norm(factors.left) * np.linalg.norm(factors.right) + np.linalg.norm(new)
        size = size * math.sqrt(C * taps) * np.abs(feed["x"]).max() + np.abs(expected).max()
        atol = 4 * EPS * math.sqrt(features + rank * last + C * taps) * size
        np.testing.assert_allclose(run(store, feed)["y"], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("tail", ["", " y = Add(h, b)"])
def test_bias_that_is_named_by_an_empty_string_is_none(tail: str, corrected: bool):
    case = replace(SETTINGS["2d"], bias="add" if tail else "none")
    proto = case.proto()
    proto.graph.node[0].input.append("")
    graph, site = only_site(proto)
    factors = decomposed(3).factors(site_matrix(graph, site), 2)
    lost = noise(9, M) if corrected else None
    made = Replacement(site=site, move="channels", factors=factors, lost_mean=lost)
    store = rewrite(graph, [made])
    check_contract(graph.store, store)
    assert run(store, {"x": activations(5, 2, C, *case.sizes).astype(np.float32)})["y"].size


@pytest.mark.parametrize(("move", "name"), SPLIT)
def test_top_rank_is_the_largest_that_is_smaller(move: str, name: str):
    _, site = only_site(SETTINGS[name].proto())
    kind = find_move(move)
    smaller = [r for r in range(1, site.d) if kind.parameters(site, r) < site.parameters]
    assert kind.top_rank(site) == max(r for r in smaller if r < kind.matrices(site, 1)[0][2])


def test_strides_make_the_first_conv_dearer():
    cases = [replace(SETTINGS["2d"], attrs=a) for a in ("pads=[1,1,1,1]", "strides=[3,3]")]
    sites = [only_site(c.proto())[1] for c in cases]
    assert [CHANNELS.multiplications(s, 2) for s in sites] == [
        2 * (C + 9 * M),
        2 * (9 * C + 9 * M),
    ]
    assert CHANNELS.pays(sites[0], 4, 1.0)
    assert not CHANNELS.pays(sites[1], 4, 1.0)
    # Of a first Conv that goes along the columns, those of the row alone are skipped.
    assert [SEPARABLE.multiplications(s, 2) for s in sites] == [
        2 * (3 * C + 3 * M),
        2 * (3 * 3 * C + 3 * M),
    ]


@pytest.mark.parametrize("kernel", [(3,), (3, 1), (1, 3), (1, 1, 3), (2, 3, 1)])
def test_taps_along_one_axis_are_not_separated(kernel: Shape):
    case = Case(sizes=(9, 8, 7)[: len(kernel)], kernel=kernel)
    graph, site = only_site(case.proto())
    assert not SEPARABLE.applies(graph, site)
    assert CHANNELS.applies(graph, site)


REFUSED = {
    "pointwise": ((M, C, 1, 1), "y = Conv(x, W)"),
    "pointwise with strides": ((M, C, 1, 1), "y = Conv<strides=[2,2]>(x, W)"),
    "pointwise with pads": ((M, C, 1, 1), "y = Conv<pads=[1,1,1,1]>(x, W)"),
    "shared": ((C, C, 3, 3), "h = Conv<pads=[1,1,1,1]>(x, W) y = Conv(h, W)"),
    "matmul": ((9, M), "y = MatMul(x, W)"),
    "depthwise": ((C, 1, 3, 3), "y = Conv<group=6>(x, W)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_channels_stay_elsewhere(name: str):
    shape, body = REFUSED[name]
    signature = f"(float[n,{C},9,9] x) => (float[n,m,h,w] y)"
    graph = index(model(signature, body, W=noise(1, *shape).astype(np.float32)))
    sites, _ = find_sites(graph)
    assert len(sites) == (name != "depthwise")
    assert not any(kind.applies(graph, site) for site in sites for kind in TWO_CONVS)


def test_one_channel_is_not_reduced():
    proto = model(
        "(float[n,1,9,9] x) => (float[n,5,7,7] y)",
        "y = Conv(x, W)",
        W=noise(1, 5, 1, 3, 3).astype(np.float32),
    )
    assert not any(kind.applies(*only_site(proto)) for kind in TWO_CONVS)


# --- decompositions -----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (2, 1, 2)])
def test_factors_are_the_projection_and_exact_at_full_rank(kernel: Shape):
    taps = math.prod(kernel)
    weight = noise(1, M, C, *kernel)
    channels = decomposed(3)
    for rank in range(1, C + 1):
        found = channels.factors(weight.reshape(M, -1), rank)
        assert found.left.shape == (M, rank * taps)
        assert found.right.shape == (rank, C)
        made = np.einsum("mrt,rc->mct", found.left.reshape(M, rank, taps), found.right)
        expected = projected(channels, weight, rank).reshape(M, C, taps)
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-12)
        # Both factors have the same scale.
        left = found.left.reshape(M, rank, taps).transpose(0, 2, 1).reshape(-1, rank)
        np.testing.assert_allclose(
            left.T @ left, found.right @ found.right.T, rtol=0, atol=1e-11 * np.linalg.norm(weight)
        )
    np.testing.assert_allclose(made, weight.reshape(M, C, taps), rtol=0, atol=1e-12)


def test_lost_mean_is_what_a_constant_input_loses():
    weight, channels = noise(1, M, C, 3, 3), decomposed(3)
    for rank in (1, 3, C):
        change = weight - projected(channels, weight, rank)
        expected = np.einsum("mchw,c->m", change, channels.mean)
        made = channels.lost(weight.reshape(M, -1), rank)
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("centred", [True, False])
def test_channels_are_the_optimum_of_their_rows_and_gradients(centred: bool):
    """½ E[(g^T (I − L K)(x − μ))²] for independent rows and gradients, all ranks."""
    bias = "input" if centred else "computed"
    body = "y = Conv(x, W, b)" if centred else "b = Neg(z) y = Conv(x, W, b)"
    signature = SETTINGS["2d"].signature.replace("x)", "x)" if centred else f"x, float[{M}] z)")
    held = {"W": noise(1, M, C, 3, 3).astype(np.float32)}
    if bias == "input":
        held["b"] = noise(2, M).astype(np.float32)
    _, site = only_site(model(signature, body, **held))
    assert (site.bias != "none") == centred
    x, g = activations(4, 500, C) @ noise(5, C, C), noise(6, 500, C) @ noise(7, C, C)
    moment = SecondMoment.zero(C)
    shift = np.zeros(C)
    moment.add(total=x.sum(0), outer=x.T @ x, rows=len(x), shift=shift)
    seen = Sensitivity(moment=moment, gamma=g.T @ g, samples=500, decisions=500)
    plain = TwoSidedSite(
        site=site,
        moment=moment,
        found=optimal(np.eye(C), Metric.of(seen.fisher()), outputs=moment, centred=centred),
        gamma=seen.fisher(),
        errors=np.zeros(C + 1),
        seen=np.zeros(C + 1),
        bias_cost=0,
    )
    (channels,) = with_inner(plain, CHANNELS.key, seen).inner
    mean = x.mean(0) if centred else np.zeros(C)
    np.testing.assert_allclose(channels.mean, mean, rtol=0, atol=1e-12 * np.abs(x).max())
    second = (x - mean).T @ (x - mean) / len(x)
    for rank in range(C + 1):
        lost = np.eye(C) - channels.found.expand[:, :rank] @ channels.found.reduce[:rank]
        expected = np.trace(seen.fisher() @ lost @ second @ lost.T) / 2
        # Fisher is floored a little where it is singular; here it is not.
        assert channels.errors[rank] == pytest.approx(expected, rel=1e-3, abs=1e-9)


# --- gradients ----------------------------------------------------------------------------------


def patches(kernel: Shape, **changes: object) -> Patches:
    given: dict[str, object] = {
        "channels": C,
        "kernel": kernel,
        "strides": (1,) * len(kernel),
        "dilations": (1,) * len(kernel),
        "pads": (0,) * (2 * len(kernel)),
        "auto_pad": "NOTSET",
    }
    return Patches(**given | changes)  # type: ignore[arg-type]


PADDED = [
    ((11,), patches((3,), pads=(2, 0), strides=(3,))),
    ((9, 8), patches((3, 2), pads=(2, 1, 0, 3), strides=(2, 3))),
    ((9, 8), patches((3, 3), pads=(0, 2, 1, 0), strides=(2, 1), dilations=(1, 2))),
    ((5, 6, 4), patches((2, 3, 2), pads=(1, 0, 2, 0, 2, 0), strides=(2, 2, 1))),
    ((9, 8), patches((2, 3), strides=(2, 2), auto_pad="SAME_UPPER")),
    ((9, 8), patches((2, 3), strides=(2, 2), auto_pad="SAME_LOWER")),
    ((9, 8), patches((2, 3), strides=(2, 2), auto_pad="VALID")),
]


@pytest.mark.parametrize(("sizes", "seen"), PADDED)
def test_channel_gradient_is_that_of_the_plain_convolution(sizes: Shape, seen: Patches):
    spatial = len(sizes)
    before, after = seen.pads[:spatial], seen.pads[spatial:]
    if seen.auto_pad.startswith("SAME"):
        upper = seen.auto_pad == "SAME_UPPER"
        before, after = same_pads(sizes, seen.kernel, seen.strides, seen.dilations, upper=upper)
    x = torch.from_numpy(noise(1, 3, C, *sizes)).requires_grad_()
    kernel = torch.from_numpy(noise(2, M, C, *seen.kernel))
    sides = itertools.chain.from_iterable(zip(before[::-1], after[::-1], strict=True))
    y = CONVOLUTIONS[spatial - 1](
        functional.pad(x, list(sides)), kernel, stride=seen.strides, dilation=seen.dilations
    )
    gradient = torch.from_numpy(noise(3, *y.shape))
    (expected,) = torch.autograd.grad(y, x, gradient)
    with torch.no_grad():  # as it is called
        assert torch.equal(convolved(x, kernel, seen), y)
        found = input_gradient(x, gradient, kernel, seen)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not found.requires_grad
    rows = input_rows(found, 3)
    assert rows.shape == (3, math.prod(sizes), C)
    assert torch.equal(rows[1, 0], found[1, :, *(0,) * spatial])


@pytest.mark.parametrize("kind", TWO_CONVS, ids=lambda kind: kind.key)
@pytest.mark.parametrize(
    "name", ["2d", "2d uneven", "2d dilated", "2d upper", "2d lower", "3d same"]
)
def test_features_between_two_convs_make_the_output_and_its_gradient(kind: TwoConvs, name: str):
    """y = W' x' over what the first reads, and g^T W' δ is what g says of a change δ there."""
    case = SETTINGS[name]
    _, site = only_site(case.proto())
    split, seen = kind.split(site), site.uses[0].inputs.patches
    assert split is not None
    assert seen is not None
    x = torch.from_numpy(noise(1, 3, C, *case.sizes))
    kernel = torch.from_numpy(noise(2, M, C, *case.kernel))
    y = convolved(x, kernel, seen)
    gradient = torch.from_numpy(noise(3, *y.shape))
    rows, (found,) = split_rows(x, (gradient,), kernel, split, 3)
    assert rows.shape == found.shape == (3, rows.shape[1], split.features)
    # The weight is linear: gradient times features sums to gradient times outputs.
    expected = (gradient * y).flatten(1).sum(1)
    torch.testing.assert_close((rows * found).sum((1, 2)), expected, rtol=1e-10, atol=1e-10)


# --- whole compressions -------------------------------------------------------------------------


def network() -> onnx.ModelProto:
    def kernel(seed: int, m: int, channels: int) -> np.ndarray:
        return (noise(seed, m, channels, 3, 3) / math.sqrt(9 * channels)).astype(np.float32)

    return model(
        "(float[n,10,8,8] x) => (float[n,8,6,6] y)",
        "h = Conv<pads=[1,1,1,1]>(x, W, b) r = Relu(h) y = Conv(r, V, c)",
        W=kernel(1, 12, 10),
        b=noise(2, 12).astype(np.float32),
        V=kernel(3, 8, 12),
        c=noise(4, 8).astype(np.float32),
    )


@pytest.fixture(scope="module")
def data():
    mixed = np.einsum("nchw,cd->ndhw", activations(5, 120, 10, 8, 8), noise(6, 10, 10))
    spread = 0.6 ** np.arange(10)
    x = np.einsum("nchw,cd->ndhw", mixed * spread[:, None, None], noise(7, 10, 10))
    return {"x": x.astype(np.float32)}


# Both layers change: a refit of the first alone has nothing before it to make up for.
CONFIG = CompressConfig(param_ratio=0.6)


@pytest.fixture(scope="module", params=["channels", "separable"])
def move(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(data, move):
    config = replace(CONFIG, moves=(move,))
    return {
        refit: compress(network(), data, replace(config, refit=refit)) for refit in (True, False)
    }


@pytest.mark.parametrize("refit", [True, False])
def test_ratio_is_met_and_loss_foreseen(made, move: str, refit: bool):
    result = made[refit]
    plan = result.plan
    assert plan.refit == refit
    assert plan.factored
    assert {e.move for e in plan.factored} == {move}
    stored = sum(math.prod(t.dims) for t in result.model.graph.initializer)
    assert stored == plan.parameters_after <= 0.6 * plan.parameters_before
    onnx.checker.check_model(result.model, full_check=True)
    measured = result.quality.divergence.mean
    assert measured / 3 < plan.predicted_divergence < 3 * measured


def test_refit_is_no_worse(made):
    errors = {refit: made[refit].validation.relative_error for refit in made}
    assert 0 < errors[True] <= 1.1 * errors[False]


@pytest.mark.parametrize("refit", [True, False])
def test_plan_is_replayed(made, data, refit: bool, tmp_path):
    result = made[refit]
    result.plan.save(tmp_path / "plan.json")
    plan = RankPlan.load(tmp_path / "plan.json")
    again = compress(network(), data, CompressConfig(), plan=plan)
    assert again.model.SerializeToString() == result.model.SerializeToString()


@pytest.mark.parametrize(
    "changes",
    [{"rank": None}, {"method": "one-sided"}, {"method": "svd"}],
    ids=["rank", "one-sided", "svd"],
)
def test_plans_that_cannot_be_followed_are_refused(made, data, move: str, changes: dict):
    plan = made[False].plan
    entries = plan.entries
    if "rank" in changes:  # as many as there are features, though less than d
        most = {"channels": 10, "separable": 30}[move]
        entries = tuple(replace(e, rank=most) if e.site == "W" else e for e in entries)
    if "method" in changes:
        entries = tuple(replace(e, bias=False) for e in entries)
        plan = replace(plan, method=changes["method"], predicted_divergence=None)
    with pytest.raises(ModelError):
        compress(network(), data, CompressConfig(force=True), plan=replace(plan, entries=entries))


class Spied:
    """A graph that remembers the last value of an output: that of the compressed twin."""

    def __init__(self, graph: TorchGraph) -> None:
        self.graph = graph
        self.last: np.ndarray | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self.graph, name)

    def step(self, k: int, state: dict[str, torch.Tensor]) -> object:
        made = self.graph.step(k, state)
        if "y" in state:
            self.last = state["y"].numpy().copy()
        return made


@pytest.mark.parametrize(
    "bias",
    ["input", "new", "none"],
)
def test_refit_walks_on_with_what_the_model_gives(data, move: str, bias: str):
    conv = "h = Conv(x, W)" if bias == "new" else "h = Conv(x, W, b)"
    b = noise(2, 12).astype(np.float32)
    proto = model(
        "(float[n,10,8,8] x, float[12] z) => (float[n,12,6,6] y)",
        f"{'b = Neg(z)' if bias == 'none' else ''} {conv} y = Relu(h)",
        W=(noise(1, 12, 10, 3, 3) / math.sqrt(90)).astype(np.float32),
        **({"b": b} if bias == "input" else {}),
    )
    graph, site = only_site(proto)
    assert site.bias == bias
    features = {"channels": 10, "separable": 30}[move]
    inner = replace(decomposed(3, features), move=move)
    if bias == "none":
        inner = replace(inner, mean=np.zeros(features))
    measured = TwoSidedSite(
        site=site,
        moment=SecondMoment.zero(12),
        found=inner.found,
        gamma=np.eye(12),
        errors=np.zeros(13),
        seen=np.zeros(13),
        bias_cost=0,
        inner=(inner,),
    )
    layer = Layer(
        measured=measured,
        weight=site_matrix(graph, site),
        rank=4,
        biases={site.uses[0].node: b.astype(float) if bias == "input" else np.zeros(12)},
        behind=np.zeros(12),
        inner=move,
    )
    feed = {"x": data["x"][:4], "z": np.full(12, 5, np.float32)}
    spied = Spied(TorchGraph.build(graph.store))
    new = propagate(spied, [layer], [feed], None, lambda *_: None)[site.key]  # type: ignore
    made = Replacement(site=site, move=move, factors=new.factors, lost_mean=new.lost_mean)
    expected = run(rewrite(graph, [made]), feed)["y"]
    scale = np.abs(expected).max() * np.linalg.cond(inner.found.reduce)
    np.testing.assert_allclose(spied.last, expected, rtol=0, atol=100 * EPS * scale)


@pytest.mark.parametrize("move", ["channels", "separable"])
@pytest.mark.parametrize("pad", [0, 1])
def test_a_mean_beyond_which_zeros_lie_is_kept(move: str, pad: int):
    """Features of a 1x1 Conv of 4 channels lie in 5 dimensions, or in 4 about their mean.

    A bias makes up for the mean, but not where a Conv sees the zeros around its input.
    """
    wide, channels = 16, 4
    proto = model(
        f"(float[n,{channels},8,8] x) => (float[n,24,h,w] y)",
        f"a = Conv(x, V, c) b = Conv<pads=[{pad},{pad},{pad},{pad}]>(a, W, e) y = Tanh(b)",
        V=(noise(1, wide, channels, 1, 1) / 2).astype(np.float32),
        c=(1 + noise(2, wide)).astype(np.float32),
        W=(noise(3, 24, wide, 3, 3) / 12).astype(np.float32),
        e=np.zeros(24, np.float32),
    )
    config = CompressConfig(param_ratio=0.6, moves=(move,), refit=False, include=("W",))
    result = compress(proto, {"x": noise(4, 60, channels, 8, 8).astype(np.float32)}, config)
    (entry,) = result.plan.factored
    assert entry.move == move
    assert result.quality is not None
    measured = result.quality.divergence.mean
    # What is predicted is within what samples differ by, above what rounding costs.
    assert measured < 3 * max(entry_prediction(result), 1e-9)


def entry_prediction(result) -> float:
    predicted = result.plan.predicted_divergence
    assert predicted is not None
    return predicted
