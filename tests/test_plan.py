"""The plan file: what goes in comes out, and what does not belong there is refused."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_utilrank.config import SCHEME_KEYS
from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.moves.moves import MOVES
from onnx_utilrank.ranking.plan import HiddenEntry, PlanEntry, RankPlan, SkippedNode
from onnx_utilrank.ranking.replay import check_plan, planned_moves
from onnx_utilrank.ranking.then import ThenEntry
from onnx_utilrank.sites.find import find_sites
from onnx_utilrank.statistics.divergence import WEIGHTINGS

# A shared machine may stall for longer than any deadline.
law = settings(deadline=None, max_examples=60)

# JSON can carry any of these, a lone surrogate too.
NAMES = st.text(st.characters(), max_size=8) | st.sampled_from(["w", "\ud800", 'a"\n\\'])
COUNTS = st.integers(0, 2**40)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def entries(draw: st.DrawFn, site: str) -> PlanEntry:
    m, d = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    rank = draw(st.none() | st.integers(1, min(m, d)))
    subspaces = None
    if rank is not None and draw(st.booleans()):
        wide = draw(st.booleans())
        subspaces = (
            draw(st.integers(rank, d)) if wide else rank,
            rank if wide else draw(st.integers(rank, m)),
        )
    return PlanEntry(
        site=site,
        nodes=tuple(draw(st.lists(NAMES, max_size=3))),
        op_type=draw(NAMES),
        m=m,
        d=d,
        rank=rank,
        bias=draw(st.booleans()),
        subspaces=subspaces,
        move=None if rank is None else draw(st.sampled_from([move.key for move in MOVES])),
        parameters_before=draw(COUNTS),
        parameters_after=draw(COUNTS),
        predicted_error=draw(st.none() | NUMBERS),
        rows=draw(st.none() | COUNTS),
        trusted=draw(st.booleans()),
        reason=draw(NAMES),
    )


@st.composite
def hidden_entries(draw: st.DrawFn) -> HiddenEntry:
    size = draw(st.integers(2, 60))
    return HiddenEntry(
        hidden=draw(NAMES),
        sites=tuple(draw(st.lists(NAMES, max_size=3))),
        groups=draw(COUNTS),
        size=size,
        kept=draw(st.none() | st.integers(1, size - 1)),
        predicted_error=draw(NUMBERS),
        reason=draw(NAMES),
    )


SCHEMES = st.sampled_from(SCHEME_KEYS)
STAYING = st.none() | st.lists(NAMES, max_size=2).map(tuple)
SKIPPED = st.builds(SkippedNode, node=NAMES, op_type=NAMES, reason=NAMES)


@st.composite
def plans(draw: st.DrawFn) -> RankPlan:
    keys = draw(st.lists(NAMES, max_size=4, unique=True))
    return RankPlan(
        model_sha256=draw(NAMES),
        method=draw(NAMES),
        target=draw(st.dictionaries(NAMES, NUMBERS, max_size=2)),
        parameters_before=draw(COUNTS),
        parameters_after=draw(COUNTS),
        predicted_divergence=draw(st.none() | NUMBERS),
        weighting=draw(st.none() | st.sampled_from(WEIGHTINGS)),
        refit=draw(st.booleans()),
        augment=draw(st.booleans()),
        entries=tuple(draw(entries(key)) for key in keys),
        hidden=tuple(draw(st.lists(hidden_entries(), max_size=2))),
        skipped=tuple(draw(st.lists(SKIPPED, max_size=2))),
        then=draw(st.none() | st.builds(ThenEntry, scheme=SCHEMES, in_float=STAYING)),
    )


ENTRY = PlanEntry(
    site="fc.weight",
    nodes=("fc", "fc again"),
    op_type="Gemm",
    m=6,
    d=8,
    rank=2,
    bias=True,
    subspaces=(2, 3),
    move="low-rank",
    parameters_before=48,
    parameters_after=28,
    predicted_error=0.25,
    rows=64,
    trusted=True,
    reason="rank 2 of 6",
)
DENSE = dataclasses.replace(
    ENTRY, site="head.weight", rank=None, subspaces=None, move=None, bias=False, predicted_error=0.0
)
HIDDEN = HiddenEntry(
    hidden="q.weight",
    sites=("q.weight", "k.weight"),
    groups=4,
    size=8,
    kept=3,
    predicted_error=0.5,
    reason="3 of 8 features in each of 4 groups",
)
WHOLE = dataclasses.replace(HIDDEN, hidden="v.weight", sites=("v.weight",), kept=None)
PLAN = RankPlan(
    model_sha256="abc",
    method="utilized-rank",
    target={"param_ratio": 0.5},
    parameters_before=100,
    parameters_after=80,
    predicted_divergence=0.125,
    weighting="logits",
    refit=True,
    augment=True,
    entries=(DENSE, ENTRY),
    hidden=(WHOLE, HIDDEN),
    skipped=(SkippedNode(node="conv", op_type="Conv", reason="the weight is empty"),),
)


# --- what goes in comes out ---------------------------------------------------------------------


@law
@given(plan=plans())
def test_a_plan_survives_json(plan):
    text = plan.to_json()
    again = RankPlan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert again.fingerprint() == plan.fingerprint()


def test_a_plan_survives_a_file(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert RankPlan.load(path) == RankPlan.load(str(path)) == PLAN
    assert path.read_text(encoding="utf8") == PLAN.to_json()


def test_the_file_is_json_with_every_field_in_its_place():
    raw = json.loads(PLAN.to_json())
    assert list(raw) == [f.name for f in dataclasses.fields(RankPlan)]
    assert raw["schema"] == 4
    assert raw["entries"][1]["rank"] == 2
    assert raw["entries"][1]["subspaces"] == [2, 3]
    assert raw["entries"][1]["nodes"] == ["fc", "fc again"]
    assert [h["kept"] for h in raw["hidden"]] == [None, 3]
    assert raw["hidden"][1]["sites"] == ["q.weight", "k.weight"]


def test_quantization_makes_it_another_plan():
    int8 = dataclasses.replace(PLAN, then=ThenEntry(scheme="int8", in_float=()))
    others = [
        dataclasses.replace(int8, then=ThenEntry(scheme="int4", in_float=())),
        dataclasses.replace(int8, then=ThenEntry(scheme="int8", in_float=("h",))),
    ]
    assert len({plan.fingerprint() for plan in (PLAN, int8, *others)}) == 4


def test_the_factored_entries_are_those_with_a_rank():
    assert PLAN.factored == (ENTRY,)
    assert PLAN.shrunk == (HIDDEN,)
    assert PLAN.changes
    only = dataclasses.replace(PLAN, entries=(DENSE,))
    assert only.changes
    assert not dataclasses.replace(only, hidden=(WHOLE,)).changes
    assert PLAN.param_ratio == 0.8


# --- saving -------------------------------------------------------------------------------------


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("of old")
    before = tmp_path / "before.json"
    os.link(path, before)
    PLAN.save(path)
    assert RankPlan.load(path) == PLAN
    assert before.read_text() == "of old"  # a new file under the name, not the old one rewritten
    assert sorted(p.name for p in tmp_path.iterdir()) == ["before.json", "plan.json"]


def test_a_plan_that_cannot_be_written_leaves_the_file_alone(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    broken = dataclasses.replace(PLAN, target={"param_ratio": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.save(path)
    assert RankPlan.load(path) == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "nowhere" / "plan.json"
    with pytest.raises(ModelError, match="cannot be written") as caught:
        PLAN.save(path)
    assert str(caught.value).startswith(str(path))


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be written"):
        PLAN.save(tmp_path)
    assert not list(tmp_path.iterdir())
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


# --- refusals -----------------------------------------------------------------------------------


def refuses(text: str, *parts: str) -> None:
    """Reading fails with one line that names the file and holds all of `parts`."""
    with pytest.raises(ModelError) as caught:
        RankPlan.from_json(text, label="plan.json")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("plan.json: ")
    for part in parts:
        assert part in message


def changed(place: str, changes: Mapping[str, Any], *, without: str | None = None) -> str:
    """The plan as JSON with something else at its top, in entry 1, hidden 1 or skipped node 0."""
    raw = json.loads(PLAN.to_json())
    places = {"plan": raw, "entry": raw["entries"][1]}
    places |= {"hidden": raw["hidden"][1], "skipped": raw["skipped"][0]}
    places[place].update(changes)
    if without is not None:
        del places[place][without]
    return json.dumps(raw)


NAMED = {"plan": "plan.json: ", "entry": "entry 1", "hidden": "hidden 1", "skipped": "skipped 0"}

# What JSON can hold, by kind, and the kinds that each field takes.
VALUES = {
    "null": None,
    "bool": True,
    "int": 1,
    "float": 1.5,
    "str": "x",
    "list": [],
    "dict": {},
    "nan": float("nan"),
}
TAKES = {
    "plan": {
        "model_sha256": {"str"},
        "method": {"str"},
        "target": {"dict"},
        "parameters_before": {"int"},
        "parameters_after": {"int"},
        "predicted_divergence": {"int", "float", "null"},
        "weighting": {"null"},
        "refit": {"bool"},
        "augment": {"bool"},
        "entries": {"list"},
        "hidden": {"list"},
        "skipped": {"list"},
        "then": {"null"},  # an object has to have its own keys: see below
        "schema": {"int"},
    },
    "entry": {
        "site": {"str"},
        "nodes": {"list"},
        "op_type": {"str"},
        "m": {"int"},
        "d": {"int"},
        "rank": {"int", "null"},
        "bias": {"bool"},
        "subspaces": {"null"},
        "move": set(),  # a text has to be one of the keys, and null goes with a rank of null
        "parameters_before": {"int"},
        "parameters_after": {"int"},
        "predicted_error": {"int", "float", "null"},
        "rows": {"int", "null"},
        "trusted": {"bool"},
        "reason": {"str"},
    },
    "hidden": {
        "hidden": {"str"},
        "sites": {"list"},
        "groups": {"int"},
        "size": {"int"},
        "kept": {"int", "null"},
        "predicted_error": {"int", "float"},
        "reason": {"str"},
    },
    "skipped": {"node": {"str"}, "op_type": {"str"}, "reason": {"str"}},
}
FIELDS = [(place, field) for place, fields in TAKES.items() for field in fields]


def test_every_field_is_tried_below():
    kinds = {"plan": RankPlan, "entry": PlanEntry, "hidden": HiddenEntry, "skipped": SkippedNode}
    for place, kind in kinds.items():
        assert list(TAKES[place]) == [f.name for f in dataclasses.fields(kind)]


@pytest.mark.parametrize(("place", "field"), FIELDS)
@pytest.mark.parametrize("kind", VALUES)
def test_a_value_of_another_type_is_refused(place, field, kind):
    text = changed(place, {field: VALUES[kind]})
    if kind not in TAKES[place][field]:
        named = {"weighting": "weighting", "move": "move"} if kind == "str" else {}
        refuses(text, NAMED[place], named.get(field, f"'{field}'"))


@pytest.mark.parametrize(("place", "field"), FIELDS)
def test_a_missing_key_is_refused(place, field):
    refuses(changed(place, {}, without=field), NAMED[place], f"key '{field}' is missing")


@pytest.mark.parametrize("place", TAKES)
@pytest.mark.parametrize("key", ["colour", "a\nb"])
def test_an_unknown_key_is_refused(place, key):
    refuses(changed(place, {key: 1}), NAMED[place], f"unknown key {key!r}")


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ({}, "'then' does not have the keys in_float, scheme"),
        ({"scheme": "int8"}, "'then' does not have the keys in_float, scheme"),
        ({"scheme": "int8", "in_float": [], "bits": 8}, "'then' does not have the keys"),
        ({"scheme": "int3", "in_float": []}, "'then' names scheme 'int3', which is not known"),
        ({"scheme": ["int8"], "in_float": []}, "'then' names scheme ['int8']"),
        ({"scheme": "int8", "in_float": "x"}, "'in_float' of 'then' is not a list of names"),
        ({"scheme": "int8", "in_float": [1]}, "'in_float' of 'then' is not a list of names"),
    ],
)
def test_a_quantization_of_another_form_is_refused(then, reason):
    refuses(changed("plan", {"then": then}), reason)


@pytest.mark.parametrize("place", ["entries", "hidden", "skipped"])
@pytest.mark.parametrize("value", [None, 1, "fc", [[]], []])
def test_an_entry_that_is_no_object_is_refused(place, value):
    name = {"entries": "entry 0"}.get(place, f"{place} 0")
    refuses(changed("plan", {place: [value]}), name, "not an object")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 0}, "rank 0 is not between 1 and 6"),
        ({"rank": -1}, "rank -1 is not between 1 and 6"),
        ({"rank": 7}, "rank 7 is not between 1 and 6"),
        ({"rank": 10**30}, "is not between 1 and 6"),
        ({"m": 1}, "rank 2 is not between 1 and 1"),
        ({"d": 0}, "rank 2 is not between 1 and 0"),
        ({"subspaces": []}, "'subspaces' is not a pair"),
        ({"subspaces": [2]}, "'subspaces' is not a pair"),
        ({"subspaces": [2, 3, 4]}, "'subspaces' is not a pair"),
        ({"subspaces": [2, 3.0]}, "'subspaces' is not a pair"),
        ({"subspaces": [True, 3], "rank": 1}, "'subspaces' is not a pair"),
        ({"subspaces": [2, "3"]}, "'subspaces' is not a pair"),
        ({"subspaces": [2, [3]]}, "'subspaces' is not a pair"),
        ({"subspaces": [9, 2]}, "subspaces [9, 2] are out of range"),
        ({"subspaces": [2, 7]}, "subspaces [2, 7] are out of range"),
        ({"subspaces": [0, 2]}, "subspaces [0, 2] are out of range"),
        ({"subspaces": [2, 0]}, "subspaces [2, 0] are out of range"),
        ({"subspaces": [3, 4]}, "subspaces [3, 4] do not have rank 2"),
        ({"subspaces": [1, 4]}, "subspaces [1, 4] do not have rank 2"),
        ({"rank": 3}, "subspaces [2, 3] do not have rank 3"),
        ({"move": "pivots"}, "move 'pivots' is not known"),
        ({"move": ""}, "move '' is not known"),
        ({"move": None}, "'move' and 'rank' have to be given together"),
        ({"rank": None, "subspaces": None}, "'move' and 'rank' have to be given together"),
        ({"nodes": ["fc", 1]}, "'nodes' holds something that is not a name"),
        ({"nodes": ["fc", ["fc"]]}, "'nodes' holds something that is not a name"),
        ({"predicted_error": float("nan")}, "'predicted_error' is not a finite number"),
        ({"predicted_error": float("inf")}, "'predicted_error' is not a finite number"),
        ({"predicted_error": 10**400}, "'predicted_error' is not a finite number"),
    ],
)
def test_an_entry_out_of_range_is_refused_by_name(changes, reason):
    refuses(changed("entry", changes), "entry 1 ('fc.weight')", reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kept": 0}, "0 kept features are not between 1 and "),
        ({"kept": -1}, "-1 kept features are not between 1 and "),
        ({"kept": 8}, "8 kept features are not between 1 and "),
        ({"kept": 10**30}, "kept features are not between 1 and "),
        ({"kept": 1, "size": 1}, "1 kept features are not between 1 and "),
        ({"size": 3}, "3 kept features are not between 1 and "),
        ({"sites": ["q.weight", 1]}, "'sites' holds something that is not a name"),
        ({"sites": [["q.weight"]]}, "'sites' holds something that is not a name"),
        ({"predicted_error": float("nan")}, "'predicted_error' is not a finite number"),
        ({"predicted_error": float("inf")}, "'predicted_error' is not a finite number"),
        ({"predicted_error": 10**400}, "'predicted_error' is not a finite number"),
    ],
)
def test_hidden_features_out_of_range_are_refused_by_name(changes, reason):
    refuses(changed("hidden", changes), "hidden 1 ('q.weight')", reason)


@pytest.mark.parametrize("kept", [1, 7, None])
def test_hidden_features_in_range_are_read(kept):
    hidden = RankPlan.from_json(changed("hidden", {"kept": kept})).hidden[1]
    assert hidden == dataclasses.replace(HIDDEN, kept=kept)


def test_the_largest_rank_and_subspaces_are_in_range():
    text = changed("entry", {"rank": 6, "subspaces": [8, 6]})
    entry = RankPlan.from_json(text).entries[1]
    assert (entry.rank, entry.subspaces) == (6, (8, 6))


def test_two_entries_for_one_site_are_refused():
    text = changed("entry", {"site": "head.weight"})
    refuses(text, "entry 1 ('head.weight')", "has an entry already")


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), 10**400, None, True, "0.5", [0.5], {}]
)
def test_a_target_that_is_no_number_is_refused(value):
    text = changed("plan", {"target": {"param_ratio": value}})
    refuses(text, "target 'param_ratio' is not a finite number")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 10**400])
def test_a_prediction_that_is_no_number_is_refused(value):
    text = changed("plan", {"predicted_divergence": value})
    refuses(text, "'predicted_divergence' is not a finite number")


@pytest.mark.parametrize("value", ["", "Softmax", "kl"])
def test_an_unknown_weighting_is_refused(value):
    refuses(changed("plan", {"weighting": value}), f"weighting {value!r} is not known")


@pytest.mark.parametrize("schema", [0, 1, 2, 3, -1])
def test_another_schema_is_refused_whatever_its_keys(schema):
    reason = f"plan schema {schema} is not 4"
    refuses(changed("plan", {"schema": schema}), reason)
    refuses(changed("plan", {"schema": schema, "colour": 1}, without="method"), reason)


@pytest.mark.parametrize(
    "text", ["", "{", "plan", "{'schema': 2}", '{"schema": 2,}', "[" * 100_000, "1" * 5_000]
)
def test_what_is_not_json_is_refused(text):
    refuses(text, "not JSON")


@pytest.mark.parametrize("text", ["[]", "1", "null", "true", '"plan"', "NaN", '["schema"]'])
def test_json_that_is_no_plan_is_refused(text):
    refuses(text, "not an object")


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    missing, folder, binary = tmp_path / "none.json", tmp_path, tmp_path / "model.onnx"
    binary.write_bytes(b"\x08\x0a\xff\xfe")
    for path in (missing, folder, binary):
        with pytest.raises(ModelError, match="cannot be read") as caught:
            RankPlan.load(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_a_refusal_of_a_file_names_it(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(changed("entry", {"rank": 7}))
    with pytest.raises(ModelError, match=r"entry 1 \('fc.weight'\): rank 7 is not") as caught:
        RankPlan.load(path)
    assert str(caught.value).startswith(f"{path}: ")


# --- the fingerprint ----------------------------------------------------------------------------


def with_entry(**changes: Any) -> RankPlan:
    return dataclasses.replace(PLAN, entries=(DENSE, dataclasses.replace(ENTRY, **changes)))


def with_hidden(**changes: Any) -> RankPlan:
    return dataclasses.replace(PLAN, hidden=(WHOLE, dataclasses.replace(HIDDEN, **changes)))


@pytest.mark.parametrize(
    "same",
    [
        with_hidden(reason="because"),
        with_hidden(predicted_error=0.0),
        dataclasses.replace(PLAN, hidden=(HIDDEN,)),
        with_entry(reason="because"),
        with_entry(predicted_error=None),
        with_entry(rows=None),
        with_entry(trusted=False),
        with_entry(parameters_after=1),
        dataclasses.replace(PLAN, entries=(ENTRY,)),
        dataclasses.replace(PLAN, skipped=()),
        dataclasses.replace(PLAN, target={"energy": 0.9}),
        dataclasses.replace(PLAN, parameters_after=1),
        dataclasses.replace(PLAN, predicted_divergence=None),
    ],
)
def test_the_fingerprint_ignores_what_decides_nothing(same):
    assert same != PLAN
    assert same.fingerprint() == PLAN.fingerprint()


@pytest.mark.parametrize(
    "other",
    [
        with_entry(rank=3),
        with_entry(rank=None, subspaces=None, move=None),
        with_entry(move="pivot"),
        with_entry(bias=False),
        with_entry(subspaces=(2, 4)),
        with_entry(subspaces=None),
        with_entry(site="fc2.weight"),
        dataclasses.replace(PLAN, model_sha256="abd"),
        dataclasses.replace(PLAN, method="svd"),
        with_hidden(kept=4),
        with_hidden(kept=None),
        with_hidden(hidden="v.weight"),
        dataclasses.replace(PLAN, hidden=()),
        dataclasses.replace(PLAN, refit=False),
        dataclasses.replace(PLAN, augment=False),
    ],
)
def test_the_fingerprint_tells_decisions_apart(other):
    assert other.fingerprint() != PLAN.fingerprint()


# --- a plan and a model -------------------------------------------------------------------------


def index(gemm: str = "Gemm(x, w, b)") -> GraphIndex:
    weights = f"float[8, 6] w = {{{', '.join(['1'] * 48)}}}, float[6] b = {{1, 2, 3, 4, 5, 6}}"
    text = f"""
        <ir_version: 10, opset_import: ["" : 17]>
        m (float[N, 8] x, float[6] computed) => (float[N, 6] y) <{weights}> {{ y = {gemm} }}
    """
    return GraphIndex.build(ModelStore.load(onnx.parser.parse_model(text)))


def check(where: GraphIndex, method: str = "one-sided", **changes: Any) -> None:
    entry = dataclasses.replace(ENTRY, **{"site": "w", "subspaces": None, **changes})
    plan = dataclasses.replace(
        PLAN, model_sha256=where.store.fingerprint(), method=method, entries=(entry,)
    )
    check_plan(plan, where, find_sites(where)[0])


@pytest.mark.parametrize("method", ["two-sided", "one-sided", "utilized-rank"])
def test_a_plan_fits_its_own_model(method):
    check(index(), method)
    check(index("Gemm(x, w, computed)"), method, bias=False)


def test_a_plan_for_another_model_is_refused():
    where = index()
    with pytest.raises(ModelError, match="is for another model"):
        check_plan(PLAN, where, find_sites(where)[0])


@pytest.mark.parametrize(
    ("model", "changes", "reason"),
    [
        ("Gemm(x, w, b)", {"m": 8, "d": 6}, "has 'w' as 8 x 6, it is 6 x 8"),
        ("Gemm(x, w, computed)", {}, "corrects the bias of 'w'"),
        ("Gemm(x, w, b)", {"method": "svd"}, "corrects the bias of 'w'"),
        ("Gemm<alpha=2.0>(x, w, b)", {"move": "pivot"}, "makes move 'pivot' at 'w'"),
    ],
)
def test_a_plan_that_its_model_cannot_follow_is_refused(model, changes, reason):
    with pytest.raises(ModelError, match=reason):
        check(index(model), **changes)


def test_a_plan_with_a_site_that_the_model_does_not_have_is_refused():
    where = index()
    plan = dataclasses.replace(PLAN, model_sha256=where.store.fingerprint())
    with pytest.raises(ModelError, match=r"factors 'fc.weight', which is no site"):
        check_plan(plan, where, find_sites(where)[0])


def test_the_planned_moves_are_the_decisions_by_site():
    (key, move), *others = planned_moves(PLAN).items()
    assert not others
    assert key == "fc.weight"
    assert (move.rank, move.bias, move.subspaces) == (2, True, (2, 3))
    assert move.kind == "low-rank"
    assert (move.parameters, move.error) == (28, 0.25)
