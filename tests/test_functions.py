"""Weights inside model-local functions: bodies take the place of calls where they hold any."""

import numpy as np
import onnx
from builders import activations, model, noise, ops, run

from onnx_utilrank import CompressConfig, compress

WIDTH = 20
FUNCTIONS = """
    <opset_import: ["" : 17, "local" : 1], domain: "local">
    block (a, w) => (b) { h = MatMul(a, w) b = local.bent(h) }
    <opset_import: ["" : 17], domain: "local">
    bent (a) => (b) { b = Tanh(a) }
"""


def proto(functions: str = FUNCTIONS, body: str = "h = local.block(x, V)") -> onnx.ModelProto:
    weights = {
        name: (noise(k, WIDTH, 3) @ noise(k + 1, 3, WIDTH) / 3).astype(np.float32)
        for k, name in ((1, "V"), (5, "W"))
    }
    return model(
        f"(float[n,{WIDTH}] x) => (float[n,{WIDTH}] y)",
        f"{body} y = MatMul(h, W)",
        domains=', "local" : 1',
        functions=functions,
        **weights,
    )


def data() -> dict[str, np.ndarray]:
    return {"x": activations(3, 120, WIDTH).astype(np.float32)}


def test_weights_in_functions_are_factored():
    source = proto()
    onnx.checker.check_model(source, full_check=True)
    before = source.SerializeToString()
    result = compress(source, data(), CompressConfig(param_ratio=0.5, moves=("low-rank",)))
    assert {entry.site for entry in result.plan.factored} == {"V", "W"}
    assert not result.model.functions
    assert ops(result.model).count("MatMul") == 4
    assert source.SerializeToString() == before
    assert result.validation is not None
    assert result.validation.reference.file_bytes == len(before)
    feed = {"x": data()["x"][:9]}
    # Both weights have rank 3, which is kept.
    expected, made = run(source, feed)["y"], run(result.model, feed)["y"]
    atol = 16 * np.finfo(np.float32).eps * WIDTH * float(np.abs(expected).max())
    np.testing.assert_allclose(made, expected, rtol=0, atol=atol)


def test_plan_of_functions_replays():
    result = compress(proto(), data(), CompressConfig(param_ratio=0.5, moves=("low-rank",)))
    again = compress(proto(), data(), plan=result.plan)
    assert again.model.SerializeToString() == result.model.SerializeToString()


def test_model_with_functions_that_nothing_is_done_to_stays_as_it_is():
    source = proto()
    result = compress(source, data(), CompressConfig(param_ratio=1.0, exclude=("*",)))
    assert result.model.SerializeToString() == source.SerializeToString()


def test_functions_without_weights_stay():
    functions = FUNCTIONS[FUNCTIONS.rindex("<") :]
    source = proto(functions, "h = local.bent(x)")
    result = compress(source, data(), CompressConfig(param_ratio=0.6, moves=("low-rank",)))
    assert [f.name for f in result.model.functions] == ["bent"]
    assert [entry.site for entry in result.plan.factored] == ["W"]


def test_functions_of_fused_products_are_inlined():
    functions = """
        <opset_import: ["" : 17, "com.microsoft" : 1], domain: "local">
        block (a, w) => (b) { b = com.microsoft.FusedMatMul(a, w) }
    """
    source = proto(functions)
    source.opset_import.add(domain="com.microsoft", version=1)
    result = compress(source, data(), CompressConfig(param_ratio=0.5, moves=("low-rank",)))
    assert {entry.site for entry in result.plan.factored} == {"V", "W"}
    feed = {"x": data()["x"][:9]}
    expected, made = run(source, feed)["y"], run(result.model, feed)["y"]
    atol = 16 * np.finfo(np.float32).eps * WIDTH * float(np.abs(expected).max())
    np.testing.assert_allclose(made, expected, rtol=0, atol=atol)
