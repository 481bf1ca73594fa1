"""Where the time goes, and how errors grow from layer to layer."""

import numpy as np
import onnx
import pytest
from builders import activations, model, noise
from onnx import numpy_helper

from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.profile import operator_times
from onnx_utilrank.runtime.providers import find_provider
from onnx_utilrank.validation.depth import error_through_depth

SIGNATURE = "(float[n,t,8] x, int64[n,t] mask) => (float[n,t,4] y)"
BODY = """
    h = MatMul(x, A)
    back = Transpose<perm = [0, 2, 1]>(h)
    s = MatMul(h, back)
    p = MatMul(s, h)
    u = Tanh(p)
    y = MatMul(u, B)
"""


@pytest.fixture
def cpu():
    return find_provider("cpu", (), ())


def attention(**changes: np.ndarray) -> ModelStore:
    weights = {"A": noise(1, 8, 8).astype(np.float32), "B": noise(2, 8, 4).astype(np.float32)}
    return ModelStore.load(model(SIGNATURE, BODY, **(weights | changes)))


def feed(padded: int = 0) -> dict[str, np.ndarray]:
    mask = np.ones((1, 6), dtype=np.int64)
    mask[:, 6 - padded :] = 0
    return {"x": noise(3, 1, 6, 8).astype(np.float32), "mask": mask}


def test_operators_are_counted_and_timed(cpu):
    times = {t.op_type: t for t in operator_times(attention(), cpu, feed())}
    products = [t.nodes for name, t in times.items() if "MatMul" in name]
    assert sum(products) == 4
    assert times["Tanh"].nodes == 1
    assert all(t.ms >= 0 for t in times.values())
    listed = [t.ms for t in operator_times(attention(), cpu, feed())]
    assert listed == sorted(listed, reverse=True)


def test_nodes_of_branches_count_and_what_holds_them_does_not(cpu):
    inner = "then_branch = g () => (float[n,8] z) { z = Tanh(x) }"
    other = "else_branch = g () => (float[n,8] z) { z = Neg(x) }"
    body = f"yes = Cast<to = 9>(c) y = If(yes)<{inner}, {other}>"
    store = ModelStore.load(model("(float[n,8] x, float c) => (float[n,8] y)", body))
    values = {"x": noise(3, 2, 8).astype(np.float32), "c": np.array(1, dtype=np.float32)}
    names = {t.op_type for t in operator_times(store, cpu, values)}
    assert "Tanh" in names
    assert not {"If", "Neg"} & names


def test_names_that_break_quotes_break_no_profile(cpu):
    store = attention()
    proto = onnx.ModelProto()
    proto.CopyFrom(store.proto)
    for k, node in enumerate(proto.graph.node):
        node.name = f'"}},\\ \x07\n{{{k}'
    assert operator_times(ModelStore.load(proto), cpu, feed())


def test_errors_are_those_of_layers_with_weights(cpu):
    changed = noise(1, 8, 8).astype(np.float32) * np.float32(1.01)
    first, second = attention(), attention(A=changed)
    found = error_through_depth(first, second, [feed()], cpu)
    assert [(e.value, e.op_type) for e in found] == [("h", "MatMul"), ("y", "MatMul")]
    assert found[0].relative_error == pytest.approx(0.01, rel=1e-3)
    assert found[1].relative_error is not None
    assert found[1].relative_error > 0
    same = error_through_depth(first, attention(), [feed()], cpu)
    assert [e.relative_error for e in same] == [0.0, 0.0]


def test_padding_does_not_count(cpu):
    store = attention()
    proto = onnx.ModelProto()
    proto.CopyFrom(store.proto)
    # It adds to the last positions of `h` alone, which the mask says are padding.
    proto.graph.node[0].output[0] = "before"
    late = np.zeros((1, 6, 8), dtype=np.float32)
    late[:, 4:] = 1
    proto.graph.initializer.append(numpy_helper.from_array(late, "late"))
    proto.graph.node.insert(1, onnx.helper.make_node("Add", ["before", "late"], ["h"]))
    other = ModelStore.load(proto)
    masked = error_through_depth(store, other, [feed(padded=2)], cpu)
    assert masked[0].relative_error == 0.0
    unmasked = error_through_depth(store, other, [feed()], cpu)
    assert unmasked[0].relative_error is not None
    assert unmasked[0].relative_error > 0.1


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_the_original_leaves_infinite_has_no_error(cpu, bad: float):
    held = noise(1, 8, 8).astype(np.float32)
    other = held * np.float32(1.01)
    held[:, 3] = other[:, 3] = bad  # of one feature alone
    bodies = ("(float[n,8] x) => (float[n,8] y)", "y = MatMul(x, A)")
    first, second = (ModelStore.load(model(*bodies, A=a)) for a in (held, other))
    values = {"x": activations(3, 5, 8).astype(np.float32)}
    (found,) = error_through_depth(first, second, [values], cpu)
    assert found.relative_error == pytest.approx(0.01, rel=1e-3)


def test_what_only_the_candidate_makes_infinite_is_no_figure(cpu):
    held = noise(1, 8, 8).astype(np.float32)
    other = held.copy()
    other[:, 3] = np.inf
    bodies = ("(float[n,8] x) => (float[n,8] y)", "y = MatMul(x, A)")
    first, second = (ModelStore.load(model(*bodies, A=a)) for a in (held, other))
    values = {"x": activations(3, 5, 8).astype(np.float32)}
    (found,) = error_through_depth(first, second, [values], cpu)
    assert found.relative_error is None


def test_values_of_other_shapes_and_names_are_left_out(cpu):
    first = ModelStore.load(
        model(
            "(float[n,8] x) => (float[n,4] y)",
            "h = MatMul(x, A) y = MatMul(h, B)",
            A=noise(1, 8, 8).astype(np.float32),
            B=noise(2, 8, 4).astype(np.float32),
        )
    )
    second = ModelStore.load(
        model(
            "(float[n,8] x) => (float[n,4] y)",
            "h = MatMul(x, A) y = MatMul(h, B)",
            A=noise(1, 8, 3).astype(np.float32),
            B=noise(2, 3, 4).astype(np.float32),
        )
    )
    values = {"x": noise(3, 5, 8).astype(np.float32)}
    assert [e.value for e in error_through_depth(first, second, [values], cpu)] == ["y"]
    third = ModelStore.load(
        model(
            "(float[n,8] x) => (float[n,4] z)",
            "z = MatMul(x, A)",
            A=noise(1, 8, 4).astype(np.float32),
        )
    )
    assert error_through_depth(first, third, [values], cpu) == ()
