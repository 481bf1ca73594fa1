"""Models that are legal and unusual: each gives a result or a reason, and never a traceback."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Feed, model, noise, ops, run

from onnx_utilrank import CompressConfig, ModelError, TargetMissedError, analyze, compress, validate
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.statistics.divergence import OutputLoss, samples_in
from onnx_utilrank.validation.divergence import OutputRecorder, find_losses

EXACT = CompressConfig(energy=1.0, force=True)
HALF = CompressConfig(param_ratio=0.5)
EPS = float(np.finfo(np.float32).eps)


def single(seed: int, *shape: int) -> np.ndarray:
    return noise(seed, *shape).astype(np.float32)


def feeds(count: int = 10, **shapes: tuple[int, ...]) -> list[Feed]:
    return [
        {name: single(100 * k + j, *shape) for j, (name, shape) in enumerate(shapes.items())}
        for k in range(count)
    ]


def low_rank(seed: int, m: int, d: int, *, rank: int = 3) -> np.ndarray:
    """A weight that half of the parameters can hold."""
    return (single(seed, m, rank) @ single(seed + 1, rank, d)) / np.float32(np.sqrt(rank * d))


def test_outputs_of_any_length():
    """As audio models give: the last axis of the output differs from feed to feed."""
    proto = model(
        "(float[1,4,t] x) => (float[1,6,t] y)",
        "h = Conv<pads=[1,1]>(x, W) r = Relu(h) y = Conv(r, V)",
        W=low_rank(1, 32, 12).reshape(32, 4, 3),
        V=single(3, 6, 32, 1),
    )
    data = [{"x": single(k, 1, 4, 20 + 3 * k)} for k in range(10)]
    result = compress(proto, data, HALF)
    assert result.plan.method == "two-sided"
    assert result.plan.param_ratio <= 0.5
    exact = compress(proto, data, EXACT)
    assert exact.validation.relative_error < 1e-5


def test_divergence_of_outputs_of_any_length_is_relative_to_them():
    """Twice the values: the error is the signal, at every length, so the divergence is ½ of it."""
    proto, twice = (
        model("(float[1,3,t] x) => (float[1,3,t] y)", f"y = {op}")
        for op in ("Identity(x)", "Add(x, x)")
    )
    data = [{"x": single(k, 1, 3, 200 + 100 * k)} for k in range(8)]
    store = ModelStore.load(proto)
    session = open_session(store, CPU)
    (loss,) = find_losses(store, session, data)
    assert loss.weighting == "values"
    other = open_session(ModelStore.load(twice), CPU)
    found = OutputRecorder(session, (loss,), data).compare(other)
    # Relative to the variance of n normal values, which is known to √(2/n).
    values = sum(feed["x"].size for feed in data)
    assert found.mean == pytest.approx(0.5, rel=5 * np.sqrt(2 / values))


def test_a_single_feature_with_a_vector_added():
    proto = model(
        "(float[n,24] x) => (float[n,1] y)",
        "h = MatMul(x, W) r = Relu(h) s = MatMul(r, V) t = Add(s, b) y = Sigmoid(t)",
        W=low_rank(1, 24, 40),
        V=single(3, 40, 1),
        b=single(4, 1),
    )
    assert compress(proto, feeds(40, x=(4, 24)), HALF).plan.param_ratio <= 0.5


def test_an_output_that_is_listed_twice():
    proto = model(
        "(float[n,24] x) => (float[n,24] y, float[n,24] y)",
        "h = MatMul(x, W) y = MatMul(h, V)",
        W=low_rank(1, 24, 40),
        V=low_rank(3, 40, 24),
    )
    data = feeds(20, x=(8, 24))
    for config in (EXACT, HALF):
        result = compress(proto, data, config)
        assert [o.name for o in result.model.graph.output] == ["y", "y"]
        assert [o.name for o in result.validation.providers[0].outputs] == ["y"]
    single_output = model(
        "(float[n,24] x) => (float[n,24] y)",
        "h = MatMul(x, W) y = MatMul(h, V)",
        W=low_rank(1, 24, 40),
        V=low_rank(3, 40, 24),
    )
    assert compress(single_output, data, HALF).quality.divergence.mean == pytest.approx(
        result.quality.divergence.mean, rel=1e-3
    )


@pytest.mark.parametrize("config", [EXACT, CompressConfig(param_ratio=0.9, method="one-sided")])
def test_weights_that_no_row_reaches(config):
    """An input with no rows at all; the other weight is factored as ever."""
    proto = model(
        "(float[0,20] x, float[n,20] z) => (float[n,30] y, float[0,30] e)",
        "y = MatMul(z, W) e = MatMul(x, V)",
        W=low_rank(1, 20, 30),
        V=low_rank(3, 20, 30),
    )
    data = feeds(20, x=(0, 20), z=(8, 20))
    report = analyze(proto, data)
    assert [layer.site for layer in report.layers] == ["W"]
    assert [s.reason for s in report.skipped] == ["its input is empty on the calibration data"]
    result = compress(proto, data, config)
    assert result.plan.factored[0].site == "W"
    assert ops(result.model).count("MatMul") == 3


def test_nothing_but_empty_values():
    proto = model("(float[0,20] x) => (float[0,30] y)", "y = MatMul(x, W)", W=single(1, 20, 30))
    data = feeds(x=(0, 20))
    assert analyze(proto, data).mean_layer_utilization is None
    for config in (EXACT, HALF):
        with pytest.raises(TargetMissedError, match="1 x its input is empty on the calibration"):
            compress(proto, data, config)
    assert validate(proto, proto, data).providers[0].outputs[0].kind == "skipped"


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("samples", [1, 2])
def test_rows_of_empty_outputs(shape: tuple[int, ...], samples: int):
    rows = OutputLoss(output="y", weighting="values").rows(np.zeros(shape), samples)
    assert rows.ndim == 3
    assert rows.shape[-1] == (1 if shape == (samples,) else shape[-1])
    assert rows.size == 0


def test_a_feed_of_no_rows_is_one_sample():
    assert samples_in({"x": np.zeros((0, 4))}) == 1


BRANCH = """
    c = Constant<value = bool {1}>()
    y = If (c) <then_branch = a () => (float[n,20] p) { p = MatMul(x, W) },
                else_branch = b () => (float[n,20] q) { q = Relu(x) }>
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Relu(x)", "none of its nodes is of MatMul, Gemm, Conv"),
        ("t = Transpose(x) h = MatMul(x, t) y = MatMul(h, x)", "2 x no operand is a constant"),
        (BRANCH, "1 x inside a subgraph of If 'y'"),
    ],
)
@pytest.mark.parametrize("config", [EXACT, HALF], ids=["full rank", "half"])
def test_models_without_a_weight_to_factor_say_why(body: str, reason: str, config):
    held = {"W": single(1, 20, 20)} if "W" in body else {}
    proto = model("(float[n,20] x) => (float[n,20] y)", body, **held)
    with pytest.raises(TargetMissedError, match=f"no weight can be factored: {reason}"):
        compress(proto, feeds(x=(8, 20)), config)


@pytest.mark.parametrize(
    ("first", "second", "method"),
    [(1e18, 1e-18, "two-sided"), (1e-18, 1e18, "two-sided"), (1e-30, 1e-8, "one-sided")],
)
def test_values_of_any_size(first: float, second: float, method: str, caplog):
    """Squares of gradients that overflow float32 are none; the statistics of values then count."""
    proto = model(
        "(float[n,24] x) => (float[n,24] y)",
        "h = MatMul(x, W) y = MatMul(h, V)",
        W=low_rank(1, 24, 40) * np.float32(first),
        V=low_rank(3, 40, 24) * np.float32(second),
    )
    result = compress(proto, feeds(40, x=(4, 24)), HALF)
    assert result.plan.method == method
    assert ("overflow on the calibration data" in caplog.text) == (method == "one-sided")
    assert result.plan.param_ratio <= 0.5


@pytest.mark.parametrize(
    ("declared", "other"),
    [
        ("string[n] s", np.array(["a", "b", "c", "d"])),
        ("seq(float[n]) s", [np.ones(3, np.float32)]),
    ],
    ids=["strings", "a sequence"],
)
def test_inputs_that_torch_does_not_have(declared: str, other: object, caplog):
    proto = model(
        f"(float[n,24] x, {declared}) => (float[n,24] y)",
        "h = MatMul(x, W) y = MatMul(h, V)",
        W=low_rank(1, 24, 40),
        V=low_rank(3, 40, 24),
    )
    data = [feed | {"s": other} for feed in feeds(20, x=(4, 24))]
    result = compress(proto, data, HALF)
    assert result.plan.method == "one-sided"
    assert "input 's': " in caplog.text
    assert compress(proto, data, EXACT).validation.relative_error < 1e-5


def test_outputs_that_cannot_be_compared_are_named():
    proto = model(
        "(float[4,24] x) => (seq(float[a,b]) y)",
        "h = MatMul(x, W) y = SplitToSequence(h)",
        W=low_rank(1, 24, 40),
    )
    reason = r"could be validated \(output 'y': values of type seq\(tensor\(float\)\) are not"
    with pytest.raises(ModelError, match=reason) as caught:
        compress(proto, feeds(x=(4, 24)), EXACT)
    assert "slower" not in str(caught.value)


# --- every opset, and both exporters of torch ---------------------------------------------------

EVERY = """
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, k, kb) r = Relu(c)
    f = Flatten<axis=1>(r) a = MatMul(f, w) s = Add(a, b) t = Tanh(s) y = Gemm(t, g, h)
"""


@pytest.mark.parametrize("opset", range(7, 27))
def test_every_opset_is_kept_and_rewritten(opset: int):
    """7 is the first that broadcasts as later ones do, 26 the newest that ONNX Runtime loads."""
    proto = model(
        "(float[n,2,4,4] x) => (float[n,5] y)",
        EVERY,
        opset=opset,
        ir=3 if opset < 9 else 8,
        k=noise(1, 6, 2, 3, 3).astype(np.float32),
        kb=noise(2, 6).astype(np.float32),
        w=(noise(3, 96, 16) / 10).astype(np.float32),
        b=noise(4, 16).astype(np.float32),
        g=noise(5, 16, 5).astype(np.float32),
        h=noise(6, 5).astype(np.float32),
    )
    data = {"x": noise(7, 60, 2, 4, 4).astype(np.float32)}
    result = compress(proto, data, EXACT)
    assert len(result.plan.factored) == 3
    assert result.model.opset_import == proto.opset_import
    assert result.model.ir_version == proto.ir_version
    expected = run(proto, data)["y"]
    atol = 16 * math.sqrt(96) * EPS * (1 + float(np.abs(expected).max()))
    np.testing.assert_allclose(run(result.model, data)["y"], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
def test_what_torch_exports(tmp_path: Path, dynamo: bool):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    network = torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(64, 8)).eval()
    given = (torch.zeros(2, 4, 16),)
    path = tmp_path / "exported.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        if dynamo:
            shapes = ({0: torch.export.Dim("n")},)
            torch.onnx.export(network, given, path, dynamo=True, dynamic_shapes=shapes)
        else:
            torch.onnx.export(network, given, path, dynamo=False, opset_version=17)
    (name,) = (spec.name for spec in ModelStore.load(path).inputs)
    data = {name: noise(8, 60, 4, 16).astype(np.float32)}
    whole = compress(path, data, EXACT)
    assert len(whole.plan.factored) == 5
    feed = {name: data[name][:2]}
    ((one, expected),) = run(path, feed).items()
    atol = 64 * math.sqrt(64) * EPS * (1 + float(np.abs(expected).max()))
    np.testing.assert_allclose(run(whole.store, feed)[one], expected, rtol=0, atol=atol)
    assert compress(path, data, CompressConfig(param_ratio=0.7)).plan.param_ratio <= 0.7
