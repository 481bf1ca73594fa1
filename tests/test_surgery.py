"""Rewriting: equal outputs, valid models, and everything else as it was, to the byte."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from builders import (
    FORMS,
    GATHERS,
    UNRUNNABLE,
    Feed,
    Form,
    activations,
    constants,
    gemm,
    index,
    model,
    noise,
    ops,
    right,
    root_error,
    run,
)
from google.protobuf.message import Message
from onnx import helper, numpy_helper

from onnx_utilrank import CompressConfig, ModelError, RankPlan, UtilrankError, compress
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.model.graph import all_names, captured_names
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.ranking.stamp import PLAN_KEY
from onnx_utilrank.sites.find import find_sites, site_matrix
from onnx_utilrank.statistics.factorize import plain_svd
from onnx_utilrank.surgery.rewrite import Replacement, check_contract, rewrite

EXACT = CompressConfig(energy=1.0, force=True)
# Every factor pair that takes no more room than its weight: truncates each form.
TRUNCATED = CompressConfig(param_ratio=1.0, method="one-sided", force=True)
NOTHING = CompressConfig(param_ratio=1.0, exclude=("*",))


def factored(proto: onnx.ModelProto, *, lost: float | None = None) -> onnx.ModelProto:
    """Every site at full rank, without running anything; `lost` is added to every bias."""
    graph = index(proto)
    replacements = []
    for site in find_sites(graph)[0]:
        weight = site_matrix(graph, site)
        mean = None if lost is None or site.bias == "none" else np.full(site.m, lost)
        factors = plain_svd(weight).factors(weight, site.full_rank)
        replacements.append(Replacement(site=site, factors=factors, lost_mean=mean))
    store = rewrite(graph, replacements)
    check_contract(graph.store, store)
    return store.proto


def serial(proto: Message) -> bytes:
    return proto.SerializeToString(deterministic=True)


# --- the forms ----------------------------------------------------------------------------------


def signature(proto: onnx.ModelProto) -> list[object]:
    fed = {spec.name for spec in ModelStore(proto=proto).inputs}
    inputs = [i for i in proto.graph.input if i.name in fed]
    return [proto.ir_version, list(proto.opset_import), inputs, list(proto.graph.output)]


@pytest.mark.parametrize("form", [*FORMS, *GATHERS], ids=str)
def test_full_rank_is_exact(form: Form):
    given = serial(form.proto)
    result = compress(form.proto, form.data(), EXACT)
    assert serial(form.proto) == given
    (entry,) = result.plan.entries
    assert entry.rank == min(form.weight.shape)
    assert ops(result.model) == form.exact
    onnx.checker.check_model(result.model, full_check=True)
    assert signature(result.model) == signature(form.proto)
    feeds = form.data()[:2]
    atol, _ = form.rounding(feeds)
    for feed in feeds:
        before, after = run(form.proto, feed), run(result.model, feed)
        for name, expected in before.items():
            assert after[name].dtype == expected.dtype
            np.testing.assert_allclose(after[name], expected, rtol=0, atol=atol)


def test_factors_of_full_rank_are_called_larger():
    form = right(2)
    result = compress(form.proto, form.data(), EXACT)
    assert result.validation.candidate.file_bytes > result.validation.reference.file_bytes
    assert result.verdict == "larger"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_predicted_error_is_the_measured_one(form: Form):
    result = compress(form.proto, form.data(), TRUNCATED)
    (entry,) = result.plan.entries
    assert entry.trusted
    assert entry.bias == bool(form.corrected)
    assert ops(result.model) == (form.corrected or form.exact)
    onnx.checker.check_model(result.model, full_check=True)

    data = form.data()
    chosen, _ = open_data(data, ModelStore.load(form.proto).inputs).split()
    feeds = [data[k] for k in chosen]
    rows = form.all_rows(feeds)
    assert len(rows) == entry.rows
    before, after = (
        np.concatenate([form.output_rows(run(proto, feed)["y"]) for feed in feeds])
        for proto in (form.proto, result.model)
    )
    outputs = form.alpha * rows @ form.weight.T
    if form.corrected:
        outputs -= outputs.mean(0)
    predicted = math.sqrt(entry.predicted_error)
    noise = 2 * form.rounding(feeds)[1] / float(np.linalg.norm(outputs))
    assert predicted > 2 * noise
    assert root_error(before - after, outputs) == pytest.approx(predicted, abs=noise)


@pytest.mark.parametrize("form", UNRUNNABLE, ids=str)
def test_types_without_kernels_here_are_rewritten_in_their_own_type(form: Form):
    made = factored(form.proto, lost=0.0)
    assert ops(made) == form.corrected
    tensors = list(made.graph.initializer)
    assert {t.data_type for t in tensors} == {form.proto.graph.initializer[0].data_type}
    graph = index(made)
    first, second = (site_matrix(graph, site) for site in find_sites(graph)[0])
    # Two factors of norm √‖W‖_* are rounded.
    bound = 2 * float(ml_dtypes.finfo(form.dtype).eps) * np.linalg.norm(form.weight, "nuc")
    np.testing.assert_allclose(second @ first, form.weight, rtol=0, atol=bound)


def test_column_is_no_bias_of_a_vector():
    body = "h = MatMul(W, x) y = Add(h, b)"
    weight, column = noise(33, 5, 7).astype(np.float32), noise(34, 5, 1).astype(np.float32)
    proto = model("(float[7] x) => (float[5,5] y)", body, W=weight, b=column)
    data = [{"x": activations(k, 7).astype(np.float32)} for k in range(64)]
    made = compress(proto, data, TRUNCATED).model
    assert ops(made) == ["MatMul", "MatMul", "Add"]
    np.testing.assert_array_equal(constants(made)["b"], column)


@pytest.mark.parametrize("name", ["matmul_ir3_opset7", "gemm_ir3_opset8", "conv_ir3_opset7"])
def test_factors_are_inputs_too_where_initializers_have_to_be(name: str):
    (form,) = (f for f in FORMS if f.name == name)
    made = compress(form.proto, form.data(), TRUNCATED).model
    assert {i.name for i in made.graph.input} == {"x", *constants(made)}
    assert made.graph.input[0].name == "x"
    assert "W" not in constants(made)


def test_correction_that_the_type_cannot_hold_is_an_error():
    form = next(f for f in UNRUNNABLE if f.name == "matmul_bfloat16")
    factored(form.proto, lost=1e38)
    half = right(2, dtype="float16").proto
    factored(half, lost=6e4)
    with pytest.raises(ModelError, match=r"MatMul 'y': .*'W' does not fit float16"):
        factored(half, lost=7e4)


# --- what is not rewritten ----------------------------------------------------------------------


def unlike(entries: Iterable[Message], gone: set[str]) -> list[bytes]:
    """Serialized entries, without those whose name (or a node's output) is in `gone`."""
    kept = []
    for entry in entries:
        fields = {f.name for f in entry.DESCRIPTOR.fields}
        if "tensor_name" in fields:
            names = {entry.tensor_name}
        else:
            names = set(entry.output) if "output" in fields else {entry.name}
        if not names & gone:
            kept.append(serial(entry))
    return kept


def assert_rest_is_kept(
    source: onnx.ModelProto, result: onnx.ModelProto, gone: set[str] = frozenset()
) -> None:
    """All that is in `source` is in `result`, to the byte and in order, except what is `gone`."""
    edited = ("node", "initializer", "value_info", "input", "quantization_annotation")
    outer = [onnx.ModelProto(), onnx.ModelProto()]
    for copy, proto in zip(outer, (source, result), strict=True):
        copy.CopyFrom(proto)
        kept = [e for e in proto.metadata_props if e.key != PLAN_KEY]
        del copy.metadata_props[:]
        copy.metadata_props.extend(kept)
        for field in edited:
            copy.graph.ClearField(field)
    assert serial(outer[0]) == serial(outer[1])
    for field in edited:
        before = unlike(getattr(source.graph, field), gone)
        known = set(before)
        assert [e for e in unlike(getattr(result.graph, field), set()) if e in known] == before


def hostile() -> onnx.ModelProto:
    """A model with everything that a careless tool loses, around one MatMul that gives h."""
    square = noise(30, 6, 6).astype(np.float32)
    proto = model(
        "(float[batch,6] x, bool flag) => (float[batch,6] y, float[rows,columns] z)",
        """
        ["odd/na:me α;"] "c é/1" = Clip(x, , high)
        ["y/low_rank"] "W/right" = Neg("c é/1")
        h = MatMul("W/right", W)
        "h/hidden" = Relu(h)
        "W/bias" = local.f:over("h/hidden")
        dead = Exp(x)
        idle = Constant <value = float {1}> ()
        o = Optional <type = float[n,6]> ()
        some = OptionalHasElement(o)
        none = Not(some)
        picked = Where(none, "W/bias", x)
        s = Neg(picked)
        y = If (flag) <
            then_branch = one () => (float[n,6] a) { a = Mul(h, outer) },
            else_branch = two () => (float[n,6] b) { b = Sub(s, inner) }
        >
        z = MatMul(x, stacked)
        """,
        domains=', "local" : 1, "unused" : 3',
        functions=(
            '<opset_import: ["" : 17], domain: "local", overload: "over">'
            " f (a) => (b) { b = Identity(a) }"
        ),
        high=np.float32(9),
        W=square,
        outer=square[:1],
        inner=square[1:2],
        unused=square[2],
        scale=np.float32(0.1),
        stacked=square,
    )
    graph = proto.graph
    proto.producer_name, proto.producer_version, proto.domain = "someone", "7", "some.where"
    proto.model_version = 42
    proto.doc_string = "model doc"
    graph.doc_string = "graph doc\nin two lines"
    graph.node[0].doc_string = "node doc"
    held = [proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer]
    graph.value_info.append(helper.make_tensor_value_info("h", 1, ["batch", 6], "value doc"))
    graph.value_info.append(helper.make_tensor_value_info("h/hidden", 1, ["batch", 6]))
    graph.value_info.append(helper.make_tensor_value_info("W", 1, [6, 6]))
    graph.value_info.append(onnx.ValueInfoProto(name="no such value"))
    for k, entry in enumerate([*held, *graph.value_info, *proto.functions]):
        for key in ("key", "other"):
            entry.metadata_props.add(key=key, value=f"value {k}")
    values = numpy_helper.from_array(square[3, :2], "sparse")
    at = numpy_helper.from_array(np.array([1, 4]), "sparse_at")
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [6]))
    for name in ("outer", "W"):
        note = graph.quantization_annotation.add(tensor_name=name)
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    return proto


def hostile_data() -> list[Feed]:
    return [
        {"x": activations(k, 12, 6).astype(np.float32), "flag": np.array(k % 2 == 0)}
        for k in range(8)
    ]


ONLY_H = replace(EXACT, include=("h",))


def test_everything_around_a_rewritten_node_is_kept_to_the_byte():
    proto = hostile()
    onnx.checker.check_model(proto, full_check=True)
    made = compress(proto, hostile_data(), ONLY_H).model
    assert_rest_is_kept(proto, made, gone={"h", "W"})
    before = ops(proto)
    assert ops(made) == [*before[:2], "MatMul", *before[2:]]
    assert [i.name for i in made.graph.value_info] == ["h", "h/hidden", "no such value"]
    assert [a.tensor_name for a in made.graph.quantization_annotation] == ["outer"]
    for feed in hostile_data()[:2]:
        for name, expected in run(proto, feed).items():
            np.testing.assert_allclose(run(made, feed)[name], expected, rtol=0, atol=1e-4)


def test_new_names_avoid_all_old_ones():
    proto = hostile()
    made = factored(proto, lost=0.0)
    names = [name for node in made.graph.node for name in (node.name, *node.output) if name]
    assert len(names) == len(set(names))
    values = [*names, *constants(made), *(i.name for i in made.graph.input)]
    new = set(values) - all_names(proto)
    assert {"W/right_1", "W/bias_1", "h/hidden_1"} <= new
    # For each of two sites: factors, bias, hidden value, product, and the names of three nodes.
    assert len(new) == 2 * 8


def test_all_entries_are_kept_where_nothing_is_rewritten():
    proto = hostile()
    made = rewrite(index(proto), []).proto
    assert made is not proto
    assert serial(made) == serial(proto)


def test_fields_of_a_later_onnx_are_kept():
    later = b"\xc2\x3e\x05later"  # field 1000, a string
    form = right(2)
    proto = onnx.ModelProto.FromString(form.proto.SerializeToString() + later)
    proto.graph.node.add().ParseFromString(
        helper.make_node("Neg", ["x"], ["z"]).SerializeToString() + later
    )
    assert factored(proto).SerializeToString().count(later) == 2


@pytest.mark.parametrize("form", [*FORMS, *GATHERS], ids=str)
def test_parts_of_a_form_that_are_not_its_weight_are_kept(form: Form):
    graph = index(form.proto)
    (site,), _ = find_sites(graph)
    k = site.uses[0].node
    behind, gone = [site.uses[0].weight], {*graph.node(k).output, *graph.origin(k).output}
    while behind:
        gone.add(name := behind.pop())
        if name in graph.producers:
            behind += graph.node(graph.producers[name]).input
    assert_rest_is_kept(form.proto, factored(form.proto), gone)


def test_dead_nodes_and_constants_that_were_there_before_stay():
    body = "V = Transpose(U) dead = MatMul(x, V) lone = Constant<value = float {1}>() y = Neg(x)"
    proto = model("(float[n,4] x) => (float[n,4] y)", body, U=noise(31, 4, 4), unused=noise(32, 3))
    assert serial(rewrite(index(proto), []).proto) == serial(proto)


def test_node_stays_while_one_of_its_outputs_is_wanted():
    signature = "(float[n,7] x, float[n,10] z) => (float[n,5] y, float[n,5] rest)"
    body = "c, rest = Split<axis=1>(z, sizes) y = Gemm<beta=0.0>(x, W, c)"
    weight = noise(35, 7, 5).astype(np.float32)
    made = factored(model(signature, body, W=weight, sizes=np.array([5, 5])), lost=1.0)
    assert ops(made) == ["Split", "MatMul", "Gemm"]
    assert "sizes" in constants(made)


def test_subgraphs_capture_what_they_read_and_do_not_make():
    body = """
        y = If (flag) <
            then_branch = one () => (float[n,6] a) { t = Neg(outer) a = Add(t, far) },
            else_branch = two () => (float[n,6] b) {
                b = If (deep) <
                    then_branch = three () => (float[n,6] c) { c = Neg(inner) },
                    else_branch = four () => (float[n,6] x) { }
                >
            }
        >
    """
    proto = model("(float[n,6] x, bool flag) => (float[n,6] y)", body)
    assert captured_names(proto.graph.node[0]) == {"outer", "far", "deep", "inner", "x"}


# --- on disk ------------------------------------------------------------------------------------


def foreign(proto: onnx.ModelProto, path: Path) -> bytes:
    """Write a model as another writer might: fields in another order, and one not known here."""
    head = onnx.ModelProto()
    head.CopyFrom(proto)
    head.ClearField("graph")
    graph = onnx.ModelProto(graph=proto.graph)
    raw = b"\xc0\x3e\x07" + graph.SerializeToString() + head.SerializeToString()
    path.write_bytes(raw)
    return raw


def test_file_that_is_not_rewritten_is_copied_to_the_byte(tmp_path: Path):
    raw = foreign(hostile(), tmp_path / "in.onnx")
    assert raw != hostile().SerializeToString()
    result = compress(tmp_path / "in.onnx", hostile_data(), NOTHING)
    assert result.verdict == "unchanged"
    result.save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == raw


def test_same_plan_on_its_own_result_changes_nothing(tmp_path: Path):
    foreign(hostile(), tmp_path / "in.onnx")
    first = compress(tmp_path / "in.onnx", hostile_data(), replace(TRUNCATED, include=("h",)))
    first.save(tmp_path / "first.onnx")
    first.plan.save(tmp_path / "plan.json")
    plan = RankPlan.load(tmp_path / "plan.json")
    force = CompressConfig(force=True)
    second = compress(tmp_path / "first.onnx", hostile_data(), force, plan=plan)
    second.save(tmp_path / "second.onnx")
    assert (tmp_path / "second.onnx").read_bytes() == (tmp_path / "first.onnx").read_bytes()
    again = compress(tmp_path / "in.onnx", hostile_data(), force, plan=plan)
    again.save(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "first.onnx").read_bytes()


def test_result_can_be_compressed_further():
    form = right(2)
    once = compress(form.proto, form.data(), TRUNCATED)
    twice = compress(once.model, form.data(), EXACT)
    onnx.checker.check_model(twice.model, full_check=True)


# --- the contract -------------------------------------------------------------------------------


def retyped(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda p: setattr(p, "ir_version", 9), "IR version"),
        (lambda p: setattr(p.opset_import[0], "version", 18), "opset"),
        (lambda p: setattr(p.graph.input[0], "name", "x2"), "inputs"),
        (retyped, "outputs"),
        (lambda p: setattr(p.graph.node[0], "op_type", "NoSuchOp"), "not valid ONNX"),
        (lambda p: p.graph.initializer.pop(), "not valid ONNX"),
    ],
)
def test_rewrite_that_breaks_the_contract_is_our_fault(damage, what: str):
    store = ModelStore.load(gemm("").proto)
    broken = onnx.ModelProto()
    broken.CopyFrom(factored(store.proto))
    check_contract(store, ModelStore(proto=broken))
    damage(broken)
    with pytest.raises(UtilrankError, match=f"{what}.*please report it"):
        check_contract(store, ModelStore(proto=broken))


def test_models_that_the_checker_refuses_are_rewritten_all_the_same():
    form = right(2)
    odd = onnx.ModelProto()
    odd.CopyFrom(form.proto)
    odd.graph.name = ""  # the checker wants one, ONNX Runtime does not
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(odd)
    assert ops(compress(odd, form.data(), EXACT).model) == form.exact
