"""The validation stage against numpy and by hand, on models small enough to see through."""

import dataclasses
import json
import math
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_utilrank.errors import ConfigError, DataError, ModelError
from onnx_utilrank.model.heads import is_classification
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.binding import Binding
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import Feed, Session, open_session
from onnx_utilrank.validation.bench import (
    WARM_UPS,
    LatencyComparison,
    compare_latencies,
    compare_latency,
)
from onnx_utilrank.validation.compare import (
    OutputComparison,
    compare_outputs,
    find_classifications,
    snr_db,
)
from onnx_utilrank.validation.report import (
    ModelFigures,
    ProviderResult,
    ValidationReport,
)
from onnx_utilrank.validation.validate import tolerance_failures, validate


def store(signature: str, body: str, opset: int = 17) -> ModelStore:
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    return ModelStore.load(onnx.parser.parse_model(f"{header} m {signature} {{ {body} }}"))


def session(signature: str, body: str) -> Session:
    return open_session(store(signature, body), CPU, threads=1)


def pick(dtype: str, shape: str = "[M, N]") -> tuple[Session, Session]:
    """Two models of inputs a and b: the reference gives a as its output y, the candidate b."""
    signature = f"({dtype}{shape} a, {dtype}{shape} b) => ({dtype}{shape} y)"
    return session(signature, "y = Identity(a)"), session(signature, "y = Identity(b)")


@pytest.fixture(scope="module")
def floats() -> tuple[Session, Session]:
    return pick("float")


@pytest.fixture(scope="module")
def doubles() -> tuple[Session, Session]:
    return pick("double")


def compare(
    models: tuple[Session, Session],
    *pairs: tuple[object, object],
    dtype: type[np.generic] | type[object] = np.float32,
    classes: bool = False,
) -> OutputComparison:
    """Compare reference values with candidate values: one pair per feed."""
    feeds = [{"a": np.asarray(a, dtype), "b": np.asarray(b, dtype)} for a, b in pairs]
    (output,) = compare_outputs(*models, feeds, {"y"} if classes else ())
    assert output.name == "y"
    return output


LINEAR = "(float[N, 3] x) => (float[N, 2] y)"
WEIGHTS = "float[3, 2] w = {1, 2, 3, 4, 5, 6}"


def linear(weights: str = WEIGHTS) -> ModelStore:
    return store(f"{LINEAR} <{weights}>", "y = MatMul(x, w)")


def samples(*rows: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((n, 3)).astype(np.float32)} for n in rows]


class TestOutputs:
    def test_a_model_matches_itself(self) -> None:
        one, two = open_session(linear(), CPU), open_session(linear(), CPU)
        (output,) = compare_outputs(one, two, samples(4, 3), {"y"})
        assert output == OutputComparison(
            name="y",
            kind="classification",
            relative_error=0.0,
            snr_db=200.0,
            max_abs_error=0.0,
            agreement=1.0,
            decisions=7,
        )

    def test_a_changed_weight_gives_the_error_that_numpy_gives(self) -> None:
        other = linear("float[3, 2] w = {1, 2, 3, 4.5, 5, 6}")
        feeds = samples(4, 3, 8)
        (output,) = compare_outputs(
            open_session(linear(), CPU), open_session(other, CPU), feeds, ()
        )
        x = np.concatenate([f["x"] for f in feeds]).astype(np.float64)
        w = np.arange(1.0, 7.0).reshape(3, 2)
        error = np.linalg.norm(0.5 * x[:, 1]) / np.linalg.norm(x @ w)
        assert output.kind == "values"
        assert output.relative_error == pytest.approx(error, rel=1e-5)
        assert output.snr_db == pytest.approx(-20 * math.log10(error), rel=1e-5)
        assert output.max_abs_error == pytest.approx(np.abs(0.5 * x[:, 1]).max(), rel=1e-5)
        assert (output.agreement, output.decisions) == (None, 0)

    @given(data=st.data())
    @settings(deadline=None)
    def test_batches_do_not_matter(
        self, floats: tuple[Session, Session], data: st.DataObject
    ) -> None:
        shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 4)))
        values = hnp.arrays(
            np.float32, shape, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
        )
        a, b = data.draw(values), data.draw(values)
        cuts = sorted(data.draw(st.sets(st.integers(1, shape[0]))))
        whole = compare(floats, (a, b), classes=True)
        parts = compare(
            floats, *zip(np.split(a, cuts), np.split(b, cuts), strict=True), classes=True
        )
        assert whole.relative_error is not None
        assert parts.relative_error == pytest.approx(whole.relative_error, rel=1e-12)
        assert dataclasses.replace(parts, relative_error=None, snr_db=None) == dataclasses.replace(
            whole, relative_error=None, snr_db=None
        )
        y, z = a.astype(np.float64), b.astype(np.float64)
        if y.any():
            expected = np.linalg.norm(y / 2**128 - z / 2**128) / np.linalg.norm(y / 2**128)
            assert whole.relative_error == pytest.approx(expected, rel=1e-6)
        else:
            assert whole.relative_error == (math.inf if z.any() else 0.0)

    def test_scale_of_the_values_does_not_matter(self, doubles: tuple[Session, Session]) -> None:
        # The squares of these leave float64 at either end.
        for scale in (1e-300, 1e-160, 1.0, 1e160, 1e300):
            pair = (
                [[3 * scale, 0.0], [0.0, 4 * scale]],
                [[3 * scale, 0.0], [5 * scale, 4 * scale]],
            )
            output = compare(doubles, pair, dtype=np.float64)
            assert output.relative_error == pytest.approx(1.0, rel=1e-12)
            assert output.max_abs_error == 5 * scale

    def test_an_error_beyond_float64_is_infinite_and_stays_so(
        self, doubles: tuple[Session, Session]
    ) -> None:
        output = compare(doubles, ([[1.7e308]], [[-1.7e308]]), ([[1.0]], [[2.0]]), dtype=np.float64)
        assert (output.relative_error, output.snr_db) == (math.inf, -math.inf)
        assert output.max_abs_error == math.inf

    def test_zero_references(self, floats: tuple[Session, Session]) -> None:
        nothing = compare(floats, ([[0.0, 0.0]], [[0.0, 0.0]]))
        assert (nothing.relative_error, nothing.snr_db) == (0.0, 200.0)
        something = compare(floats, ([[0.0, 0.0]], [[0.0, 1.0]]))
        assert (something.relative_error, something.snr_db) == (math.inf, -math.inf)

    def test_half_precision_is_summed_in_double(self) -> None:
        # 60000 is near the largest float16; its square and the difference below leave that range.
        output = compare(pick("float16"), ([[6e4, 6e4]], [[-6e4, 6e4]]), dtype=np.float16)
        assert output.relative_error == pytest.approx(math.sqrt(2), rel=1e-3)
        assert output.max_abs_error == pytest.approx(1.2e5, rel=1e-3)

    def test_agreement_counts_equal_largest_entries(self, floats: tuple[Session, Session]) -> None:
        a = [[3, 1, 2], [0, 5, 1], [7, 7, 0], [1, 2, 3]]
        b = [[9, 1, 2], [0, 5, 6], [7, 8, 0], [0, 0, 1]]  # the third: first of equals, then not
        output = compare(floats, (a, b), ([[1, 0]], [[1, 0]]), classes=True)
        assert (output.kind, output.agreement, output.decisions) == ("classification", 3 / 5, 5)

    def test_every_position_of_a_higher_rank_decides(self) -> None:
        a = np.eye(4)[None].repeat(2, axis=0)
        b = a.copy()
        b[1, 2] = b[1, 3]
        output = compare(pick("float", "[A, B, C]"), (a, b), classes=True)
        assert (output.agreement, output.decisions) == (7 / 8, 8)

    def test_one_column_decides_nothing(self, floats: tuple[Session, Session]) -> None:
        output = compare(floats, ([[1], [2]], [[1], [2]]), classes=True)
        assert (output.kind, output.agreement, output.decisions) == ("values", None, 0)

    def test_a_scalar_is_compared(self) -> None:
        output = compare(pick("float", ""), (2.0, 1.0), (0.0, 0.0), classes=True)
        assert (output.kind, output.relative_error) == ("values", 0.5)

    @pytest.mark.parametrize(
        ("dtype", "numpy", "a", "b"),
        [
            ("int64", np.int64, [[1, 2], [3, 4]], [[1, 2], [3, 5]]),
            ("uint8", np.uint8, [[1, 2], [3, 4]], [[1, 2], [3, 5]]),
            ("bool", np.bool_, [[True, False], [True, True]], [[True, False], [True, False]]),
            ("string", object, [["cat", "dog"], ["cat", ""]], [["cat", "dog"], ["cat", "owl"]]),
        ],
    )
    def test_discrete_outputs_are_decisions(
        self, dtype: str, numpy: type[object], a: object, b: object
    ) -> None:
        assert compare(pick(dtype), (a, b), (a, a), dtype=numpy, classes=True) == OutputComparison(
            name="y", kind="decisions", agreement=7 / 8, decisions=8
        )

    @pytest.mark.parametrize(
        ("kind", "body"),
        [
            ("seq(float[N])", "y = SequenceConstruct(x)"),
            ("bfloat16[N]", "y = Cast <to = 16> (x)"),
        ],
    )
    def test_what_numpy_cannot_hold_is_skipped_and_said(self, kind: str, body: str) -> None:
        model = store(f"(float[N] x) => ({kind} y, float[N] z)", f"{body} z = Neg(x)")
        one, two = open_session(model, CPU), open_session(model, CPU)
        feeds = [{"x": np.ones(2, np.float32)}]
        skipped, values = compare_outputs(one, two, feeds, ())
        assert (skipped.kind, skipped.relative_error, skipped.agreement) == ("skipped", None, None)
        assert skipped.reason is not None
        assert kind.split("[")[0].split("(")[0] in skipped.reason
        assert (values.name, values.kind) == ("z", "values")
        alone = store(f"(float[N] x) => ({kind} y)", body)
        only = open_session(alone, CPU)
        assert [o.kind for o in compare_outputs(only, only, feeds, ())] == ["skipped"]

    def test_an_output_without_elements_is_not_called_equal(
        self, floats: tuple[Session, Session]
    ) -> None:
        output = compare(floats, (np.ones((0, 3)), np.ones((0, 3))), classes=True)
        assert (output.kind, output.relative_error) == ("skipped", None)
        assert output.reason == "it holds no element on any feed"

    def test_no_feed_is_no_proof(self, floats: tuple[Session, Session]) -> None:
        with pytest.raises(DataError, match="no held-back feed"):
            compare_outputs(*floats, iter(()), ())

    def test_feeds_are_dropped_as_they_are_done(self, floats: tuple[Session, Session]) -> None:
        past: list[weakref.ref[np.ndarray]] = []
        alive: list[int] = []

        def feeds() -> Iterator[Feed]:
            for _ in range(4):
                alive.append(sum(r() is not None for r in past))
                a = np.ones((2, 2), np.float32)
                past.append(weakref.ref(a))
                yield {"a": a, "b": a}
                del a

        compare_outputs(*floats, feeds(), {"y"})
        # The loop that asks for the next feed still names the last one.
        assert alive == [0, 1, 1, 1]


class TestMismatch:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite(self, floats: tuple[Session, Session], bad: float) -> None:
        good = ([[1.0, 2.0]], [[1.0, 2.0]])
        with pytest.raises(
            ModelError, match=r"^candidate model 'm': output 'y' .* NaN or infinity .* feed 1$"
        ):
            compare(floats, good, ([[1.0, 2.0]], [[1.0, bad]]))
        with pytest.raises(ModelError, match=r"^reference model 'm': output 'y' .* feed 0$"):
            compare(floats, ([[bad, 2.0]], [[bad, 2.0]]), good)

    def test_half_precision_overflow_never_passes(self) -> None:
        # Half precision ends at 65504: a value that float32 holds with ease becomes infinity.
        exact = session("(float[N] x) => (float[N] y)", "y = Identity(x)")
        half = session("(float[N] x) => (float16[N] y)", "y = Cast <to = 10> (x)")
        ok = {"x": np.full(2, 6e4, np.float32)}
        (output,) = compare_outputs(exact, half, [ok], ())
        assert output.relative_error == pytest.approx(0.0, abs=1e-3)
        with pytest.raises(ModelError, match=r"candidate .* NaN or infinity"):
            compare_outputs(exact, half, [ok, {"x": np.full(2, 7e4, np.float32)}], ())

    def test_shapes(self, floats: tuple[Session, Session]) -> None:
        with pytest.raises(
            ModelError, match=r"output 'y' has shape \[1, 3\] on .* feed 0, .* reference \[1, 2\]$"
        ):
            compare(floats, (np.ones((1, 2)), np.ones((1, 3))))
        # As different: shapes that numpy would broadcast, and shapes of the same size.
        for shape in ((2, 2), (2, 1)):
            with pytest.raises(ModelError, match="shape"):
                compare(floats, (np.ones((1, 2)), np.ones(shape)))

    @pytest.mark.parametrize(
        ("signature", "body", "message"),
        [
            ("(float[N] z) => (float[N] y)", "y = Neg(z)", "inputs lack 'x' .* and hold 'z'"),
            (
                "(float[N] x, float[N] z) => (float[N] y)",
                "y = Add(x, z)",
                "inputs hold 'z', which the reference has not",
            ),
            ("(float[N] x) => (float[N] z)", "z = Neg(x)", "outputs lack 'y' .* and hold 'z'"),
            (
                "(float[N] x) => (float[N] y, float[N] z)",
                "y = Neg(x) z = Neg(x)",
                "outputs hold 'z'",
            ),
            (
                "(float[N] x) => (int64[N] y)",
                "y = Cast <to = 7> (x)",
                r"output 'y' is tensor\(int64\), in the reference tensor\(float\)",
            ),
        ],
    )
    def test_signatures(self, signature: str, body: str, message: str) -> None:
        reference = session("(float[N] x) => (float[N] y)", "y = Neg(x)")
        with pytest.raises(ModelError, match=message):
            compare_outputs(reference, session(signature, body), samples(2), ())

    def test_order_of_names_and_float_width_may_differ(self) -> None:
        one = session(
            "(float[N] a, float[N] b) => (float[N] y, float[N] z)", "y = Neg(a) z = Neg(b)"
        )
        two = session(
            "(float[N] b, float[N] a) => (double[N] z, float[N] y)",
            "c = Neg(b) z = Cast <to = 11> (c) y = Neg(a)",
        )
        feed = {"a": np.ones(2, np.float32), "b": np.full(2, 3, np.float32)}
        outputs = compare_outputs(one, two, [feed], ())
        assert [(o.name, o.relative_error) for o in outputs] == [("y", 0.0), ("z", 0.0)]

    def test_a_weight_that_is_also_an_input_may_go(self) -> None:
        listed = session("(float[N] x, float[1] w = {2}) => (float[N] y)", "y = Mul(x, w)")
        assert "w" in listed.inputs
        plain = session("(float[N] x) => (float[N] y) <float[1] w = {2}>", "y = Mul(x, w)")
        for one, two in ((listed, plain), (plain, listed)):
            (output,) = compare_outputs(one, two, [{"x": np.ones(2, np.float32)}], ())
            assert output.relative_error == 0.0


def rule(output: str, body: str, opset: int = 17) -> bool:
    """`is_classification` of an output y; weights w and s need not make a model that runs."""
    return is_classification(
        store(f"(float[N, 3] x, float[3, 2] w, int64[2] s) => ({output} y)", body, opset), "y"
    )


class TestClassificationRule:
    @pytest.mark.parametrize(
        ("expected", "output", "body"),
        [
            (True, "float[N, 2]", "y = Softmax(x)"),
            (True, "float16[N, 2]", "y = LogSoftmax <axis = -1> (x)"),
            (True, "float[N, T, 5]", "y = Softmax <axis = 2> (x)"),
            (True, "float[N, K]", "y = Softmax(x)"),
            (True, "float[K]", "y = Softmax(x)"),
            (True, "float[]", "y = Softmax(x)"),
            (False, "float[]", "y = Softmax <axis = 1> (x)"),
            (False, "float[N, 5, T]", "y = Softmax <axis = 1> (x)"),
            (False, "float[N, 1]", "y = Softmax(x)"),
            (False, "float", "y = Softmax(x)"),
            (True, "float[N, 2]", "a = Softmax <axis = 1> (x) y = Reshape(a, s)"),
            (True, "float[N, T, 2]", "a = Softmax(x) y = Reshape(a, s)"),
            (False, "float[N, T, 2]", "a = Softmax <axis = 1> (x) y = Reshape(a, s)"),
            (True, "float[N, 2]", "a = Gemm(x, w) y = Identity(a)"),
            (True, "float[N, K]", "y = MatMul(x, w)"),
            (True, "float[N, 2]", "a = MatMul(x, w) y = Add(a, w)"),
            (True, "float[N, 2]", "y = com.microsoft.FusedGemm(x, w)"),
            (True, "float[N, 2]", "a = Conv(x, w) y = Flatten(a)"),
            (
                True,
                "double[N, 2]",
                "a = Gemm(x, w) b = Cast <to = 11> (a) c = Unsqueeze(b, s) y = Squeeze(c, s)",
            ),
            (False, "float[N, 1]", "y = Gemm(x, w)"),
            (False, "float[N, T, 5]", "y = MatMul(x, w)"),
            (False, "float[N, 5, H, W]", "y = Conv(x, w)"),
            (False, "float[5]", "y = MatMul(x, w)"),
            (False, "float[]", "y = MatMul(x, w)"),
            (False, "float[N, 2]", "a = Gemm(x, w) y = Relu(a)"),
            (False, "float[N, 2]", "a = Gemm(x, w) y = Transpose(a)"),
            (False, "float[N, 2]", "y = Identity(x)"),
            (False, "float[N, 2]", "y = com.microsoft.Softmax(x)"),
            (False, "float[N, 2]", "a = com.microsoft.Identity(x) y = com.microsoft.Gemm(x, w)"),
            (False, "float[N, 2]", "a = Gemm(x, w) y = com.microsoft.Identity(a)"),
            (False, "int64[N, 2]", "y = Add(s, s)"),
            (False, "seq(float[N, 2])", "y = Gemm(x, w)"),
        ],
    )
    def test_of_declared_shapes(self, expected: bool, output: str, body: str) -> None:
        assert rule(output, body) is expected

    def test_old_softmax_runs_over_axis_1_unless_told(self) -> None:
        assert rule("float[N, 2]", "y = Softmax(x)", opset=11)
        assert not rule("float[N, T, 2]", "y = Softmax(x)", opset=11)
        assert rule("float[N, T, 2]", "y = Softmax <axis = 2> (x)", opset=11)

    def test_a_shape_seen_in_a_run_takes_the_declared_ones_place(self) -> None:
        model = store("(float[N, 3] x, float[3, 2] w) => (float[] y)", "y = MatMul(x, w)")
        assert is_classification(model, "y", (4, 2))
        assert not is_classification(model, "y", (4, 1))
        assert not is_classification(model, "y", (4, 2, 2))
        assert not is_classification(model, "z", (4, 2))

    def test_a_broken_model_that_runs_in_circles_ends(self) -> None:
        sound = store("(float[N, 2] x) => (float[N, 2] y)", "a = Identity(x) y = Identity(a)")
        broken = ModelStore(proto=sound.proto)  # which `load` would refuse
        broken.proto.graph.node[0].input[0] = "y"
        assert not is_classification(broken, "y")

    @pytest.mark.parametrize(("rank", "expected"), [(2, {"p", "y"}), (3, {"p"})])
    def test_open_ranks_are_settled_by_a_run(self, rank: int, expected: set[str]) -> None:
        model = store(
            "(float[] x, int64[N] ids) => "
            "(float[] y, float[] p, int64[] ids2, seq(float[]) list) "
            f"<{WEIGHTS}>",
            "y = MatMul(x, w) p = Softmax(y) ids2 = Identity(ids) list = SequenceConstruct(y)",
        )
        feed: Feed = {"x": np.ones((2, 2, 3)[-rank:], np.float32), "ids": np.arange(2)}
        assert find_classifications(model, open_session(model, CPU), feed) == expected


class TestTokens:
    """Scores of tokens decide at each position that is none of padding."""

    @staticmethod
    def tagger(scores: str, *, turned: bool = False) -> ModelStore:
        """Of x's classes, and at positions that are masked of whatever `scores` says."""
        perm, shape = ([1, 0, 2], "T, N") if turned else ([0, 1, 2], "N, T")
        body = f"""m = Cast<to=1>(attention_mask) u = Sub(one, m) f = Unsqueeze(u, last)
            h = MatMul(x, w) e = Mul(f, {scores}) i = Transpose<perm={perm}>(h)
            j = Transpose<perm={perm}>(e) y = Add(i, j)"""
        held = (
            "float one = {1}, int64[1] last = {2}, float[3] a = {9, 0, 0}, float[3] b = {0, 9, 0}"
        )
        weights = "float[3, 3] w = {4, 0, 0, 0, 4, 0, 0, 0, 4}"
        inputs = "float[N, T, 3] x, int64[N, T] attention_mask"
        return store(f"({inputs}) => (float[{shape}, 3] y) <{held}, {weights}>", body)

    def test_agreement_is_of_positions_that_are_real(self) -> None:
        rng = np.random.default_rng(1)
        x = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (8, 6))]
        mask = (np.arange(6) < rng.integers(1, 7, 8)[:, None]).astype(np.int64)
        assert not mask.all()
        feeds = [{"x": x, "attention_mask": mask}]
        models = self.tagger("a"), self.tagger("b")
        (provider,) = validate(
            *models, feeds, samples=8, providers=[CPU], figures=(LARGE, SMALL), min_agreement=1.0
        ).providers
        (output,) = provider.outputs
        assert output.kind == "classification"
        assert output.agreement == 1.0
        assert output.decisions == mask.sum()

    @pytest.mark.parametrize("steps", [6, 8])
    def test_positions_may_come_first(self, steps: int) -> None:
        rng = np.random.default_rng(3)
        x = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (8, steps))]
        mask = (np.arange(steps) < rng.integers(1, steps + 1, 8)[:, None]).astype(np.int64)
        short = {"x": x[:, :5], "attention_mask": mask[:, :5]}  # tells which axis counts samples
        models = [self.tagger(scores, turned=True) for scores in ("a", "b")]
        feeds = [short, {"x": x, "attention_mask": mask}]
        (provider,) = validate(
            *models, feeds, samples=16, providers=[CPU], figures=(LARGE, SMALL)
        ).providers
        (output,) = provider.outputs
        assert (output.agreement, output.decisions) == (1.0, mask.sum() + mask[:, :5].sum())

    def test_values_along_positions_are_no_decisions(self) -> None:
        x = np.random.default_rng(2).normal(size=(8, 6, 3)).astype(np.float32) * 1e-3
        feeds = [{"x": x, "attention_mask": np.ones((8, 6), np.int64)}]
        model = self.tagger("a")
        (provider,) = validate(
            model, model, feeds, samples=8, providers=[CPU], figures=(LARGE, SMALL)
        ).providers
        assert provider.outputs[0].kind == "values"


class TestSnr:
    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (1.0, 0.0),
            (0.1, 20.0),
            (10.0, -20.0),
            (1e-12, 200.0),
            (0.0, 200.0),
            (math.inf, -math.inf),
        ],
    )
    def test_values(self, error: float, expected: float) -> None:
        assert snr_db(error) == pytest.approx(expected)

    @given(st.floats(1e-9, 1e9), st.floats(1.001, 1e3))
    def test_a_larger_error_has_a_smaller_ratio(self, error: float, factor: float) -> None:
        assert snr_db(error * factor) < snr_db(error)


def latency(
    ratio: float = 1.0, low: float | None = None, high: float | None = None, pairs: int = 100
) -> LatencyComparison:
    return LatencyComparison(
        reference_ms=2.0,
        candidate_ms=2.0 * ratio,
        ratio=ratio,
        ratio_low=ratio if low is None else low,
        ratio_high=ratio if high is None else high,
        pairs=pairs,
    )


def exchanged(one: LatencyComparison) -> LatencyComparison:
    """What the same runs give with the candidate for the reference."""
    return latency(1 / one.ratio, 1 / one.ratio_high, 1 / one.ratio_low, one.pairs)


RUNS: list[tuple[str, int]] = []


class RecordedSession(Session):
    """A session that also writes down which model ran, and on how many rows."""

    def bind(self, feed: Feed, outputs: Sequence[str] | None = None) -> Binding:
        given = {"session": self.raw, "feed": feed, "outputs": outputs or self.outputs}
        return RecordedBinding(**given, nvidia=False, label=self.label)


class RecordedBinding(Binding):
    def run(self) -> float:
        RUNS.append((self._label, len(self._feed["x"])))
        return super().run()


def recorded(label: str) -> Session:
    plain = open_session(linear(), CPU, threads=1)
    return RecordedSession(
        label=label,
        provider=plain.provider,
        inputs=plain.inputs,
        outputs=plain.outputs,
        raw=plain.raw,
    )


class TestLatency:
    def test_figures_are_consistent(self) -> None:
        one, two = open_session(linear(), CPU), open_session(linear(), CPU)
        result = compare_latency(one, two, samples(4, 3), seconds=60.0, max_pairs=25)
        assert result.pairs == 25
        assert 0 < result.ratio_low <= result.ratio <= result.ratio_high
        assert 0 < result.reference_ms < 60e3
        assert 0 < result.candidate_ms < 60e3
        assert not (result.slower and result.faster)

    def test_the_candidate_is_the_numerator(self) -> None:
        # Thousands of times the work: the order is certain, the times are not asserted.
        light = session("(float[N] x) => (float[N] y)", "y = Neg(x)")
        heavy = session(
            "(float[N] x) => (float[N] y) <int64[2] t = {512, 512}>",
            "a = Expand(x, t) b = MatMul(a, a) c = MatMul(b, a) y = ReduceMax <axes = [0]> (c)",
        )
        feed = {"x": np.full(512, 1e-3, np.float32)}
        result = compare_latency(light, heavy, [feed], seconds=60.0, max_pairs=10)
        assert result.ratio > 1
        assert result.candidate_ms > result.reference_ms

    def test_runs_are_paired_in_both_orders_after_warming_up(self) -> None:
        RUNS.clear()
        r, c = "reference", "candidate"
        feeds = [*samples(4), *samples(4), *samples(7)]
        compare_latency(recorded(r), recorded(c), feeds, seconds=60.0, max_pairs=7)
        expected = [
            *[(r, 4), (c, 4)] * 2,  # warm-up
            *[(r, 4), (c, 4), (c, 4), (r, 4)],  # the first feed
            *[(r, 4), (c, 4), (c, 4), (r, 4)],  # the second, of the same shape
            *[(r, 7), (c, 7)] * 2,  # warm-up
            *[(r, 7), (c, 7), (c, 7), (r, 7)],  # the third
            *[(r, 4), (c, 4)],  # the first again
        ]
        assert expected == RUNS

    def test_several_candidates_run_in_the_same_rounds(self) -> None:
        RUNS.clear()
        labels = ["reference", "one", "two"]
        first, *others = map(recorded, labels)
        found = compare_latencies(first, others, samples(4), seconds=60.0, max_pairs=2)
        order = [label for label, _ in RUNS]
        assert order == [*labels * WARM_UPS, *labels, *reversed(labels)]
        assert len(found) == 2
        assert found[0].reference_ms == found[1].reference_ms
        assert found[0].candidate_ms != found[1].candidate_ms

    def test_when_it_stops(self) -> None:
        one, two = open_session(linear(), CPU), open_session(linear(), CPU)
        feeds = samples(2)
        # All the time is up at once: not even the pairs asked for are waited for.
        assert compare_latency(one, two, feeds, seconds=0.0, min_pairs=50).pairs == 3
        assert compare_latency(one, two, feeds, seconds=0.0, min_pairs=2).pairs == 2
        assert compare_latency(one, two, feeds, seconds=0.0, max_pairs=1).pairs == 1
        assert compare_latency(one, two, feeds, seconds=1e9, min_pairs=2, max_pairs=9).pairs == 9
        # Between the time and four times the time, the pairs asked for decide.
        assert compare_latency(one, two, feeds, seconds=0.2, max_pairs=10**9).pairs >= 10

    def test_no_feed(self) -> None:
        one = open_session(linear(), CPU)
        with pytest.raises(DataError, match="no held-back feed"):
            compare_latency(one, one, [])

    @pytest.mark.parametrize(
        ("expected", "result"),
        [
            (True, latency(1.5, 1.4, 1.6)),
            (True, latency(1.03)),
            (True, latency(3.0, pairs=3)),
            (False, latency(1.0)),
            (False, latency(1.02)),
            (False, latency(1.5, 1.01, 1.6)),  # one pair in four is not slower
            (False, latency(1.5, 1.3, 1.7, pairs=3)),  # too few for their spread
            (False, latency(2.0, 1.57, 2.563, pairs=6)),  # above 1, but not surely above 1.02
            (False, latency(3.0, pairs=2)),  # nothing is clear from two
            (False, latency(0.5)),
        ],
    )
    def test_slower(self, expected: bool, result: LatencyComparison) -> None:
        assert result.slower is expected
        assert exchanged(result).faster is expected

    @given(st.lists(st.floats(0.2, 5.0), min_size=3, max_size=3).map(sorted), st.integers(1, 200))
    def test_faster_is_slower_with_the_models_exchanged(
        self, ratios: list[float], pairs: int
    ) -> None:
        low, ratio, high = ratios
        one = latency(ratio, low, high, pairs)
        two = exchanged(one)
        assert one.slower == two.faster
        assert one.faster == two.slower
        assert not (one.slower and one.faster)


def values(error: float, name: str = "logits", **more: object) -> OutputComparison:
    made = OutputComparison(
        name=name,
        kind="values",
        relative_error=error,
        snr_db=snr_db(error),
        max_abs_error=error,
    )
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def result(*outputs: OutputComparison, time: LatencyComparison | None = None) -> ProviderResult:
    return ProviderResult(provider=CPU.name, outputs=outputs, latency=time or latency())


IDS = OutputComparison(name="ids", kind="decisions", agreement=0.5, decisions=10)
LIST = OutputComparison(name="list", kind="skipped", reason="values of type seq are not compared")
SMALL = ModelFigures(parameters=10, file_bytes=1_000, flops=20)
LARGE = ModelFigures(parameters=99, file_bytes=20_000, flops=None)


def report(
    *providers: ProviderResult,
    reference: ModelFigures = LARGE,
    candidate: ModelFigures = SMALL,
    failures: tuple[str, ...] = (),
) -> ValidationReport:
    return ValidationReport(
        reference=reference,
        candidate=candidate,
        samples=7,
        feeds=2,
        providers=providers,
        failures=failures,
    )


class TestTolerances:
    def test_lines(self) -> None:
        outputs = (values(0.031), values(0.02, "fine"), IDS, LIST)
        assert tolerance_failures([result(*outputs)], 0.02, 0.75) == (
            "CPUExecutionProvider: output 'logits': relative error 0.031 exceeds 0.02",
            "CPUExecutionProvider: output 'ids': agreement 0.5 on 10 decisions is below 0.75",
        )
        assert tolerance_failures([result(*outputs)], 0.031, 0.5) == ()
        assert tolerance_failures([result(*outputs)], None, None) == ()

    def test_every_provider_is_held_to_them(self) -> None:
        lines = tolerance_failures(
            [result(values(0.0)), dataclasses.replace(result(values(1.0)), provider="X")], 0.5, None
        )
        assert lines == ("X: output 'logits': relative error 1 exceeds 0.5",)

    def test_a_narrow_miss_shows_as_one(self) -> None:
        (line,) = tolerance_failures([result(values(0.0200004))], 0.02, None)
        assert line.endswith("relative error 0.0200004 exceeds 0.02")
        almost = dataclasses.replace(IDS, agreement=99_999 / 100_000, decisions=100_000)
        (line,) = tolerance_failures([result(almost)], None, 1.0)
        assert line.endswith("agreement 0.99999 on 100000 decisions is below 1")

    def test_an_infinite_error_fails(self) -> None:
        (line,) = tolerance_failures([result(values(math.inf))], 1e300, None)
        assert line.endswith("relative error inf exceeds 1e+300")

    def test_what_was_not_measured_fails(self) -> None:
        assert tolerance_failures([result(values(0.0), LIST)], 0.1, 0.9) == (
            "an agreement of at least 0.9 is asked for, but no output makes decisions",
        )
        assert tolerance_failures([result(IDS)], 0.1, 0.2) == (
            "a relative error of at most 0.1 is asked for, but no output has float values",
        )

    @pytest.mark.parametrize(
        "bounds", [(-0.1, None), (math.nan, None), (None, -0.1), (None, 1.1), (None, math.nan)]
    )
    def test_bounds_that_mean_nothing(self, bounds: tuple[float | None, float | None]) -> None:
        with pytest.raises(ConfigError, match="must"):
            tolerance_failures([result(values(0.0))], *bounds)


class TestReport:
    def test_the_worst_counts(self) -> None:
        good = values(1e-3, "a", agreement=0.9, decisions=10)
        whole = report(result(good, LIST), result(values(0.1, "b"), IDS))
        assert whole.relative_error == 0.1
        assert whole.snr_db == pytest.approx(20.0)
        assert whole.agreement == 0.5
        nothing = report(result(LIST))
        assert (nothing.relative_error, nothing.snr_db, nothing.agreement) == (None, None, None)

    def test_failures_decide(self) -> None:
        assert report(result()).passed
        assert not report(result(), failures=("missed",)).passed

    def test_notes(self) -> None:
        slow = result(LIST, time=latency(1.5))
        assert report(slow, slow, reference=SMALL, candidate=LARGE).notes == (
            *[
                "The candidate is slower than the reference on CPUExecutionProvider: 3 ms against "
                "2 ms a run (1.50 times)."
            ]
            * 2,
            "The candidate's file is larger than the reference's: 20,000 bytes against 1,000.",
            "Output 'list' was not compared: values of type seq are not compared.",
        )
        assert report(result(values(0.0), time=latency(0.5)), candidate=LARGE).notes == ()

    @pytest.mark.parametrize(
        ("ratios", "expected"),
        [
            ((1.0,), "alike"),
            ((0.5,), "faster"),
            ((1.5,), "slower"),
            ((0.5, 0.6), "faster"),
            ((0.5, 1.0), "alike"),
            ((0.5, 1.5), "slower"),
        ],
    )
    def test_faster_is_so_everywhere_and_slower_anywhere(
        self, ratios: tuple[float, ...], expected: str
    ) -> None:
        results = [result(values(0.1), time=latency(ratio)) for ratio in ratios]
        assert report(*results).in_time == expected

    def test_json_is_strict_and_complete(self) -> None:
        whole = report(result(values(math.inf), IDS, LIST, time=latency(1.5)), failures=("no",))
        read = json.loads(json.dumps(whole.as_dict(), allow_nan=False))
        assert read == {
            "passed": False,
            "failures": ["no"],
            "notes": list(whole.notes),
            "relative_error": "Infinity",
            "snr_db": "-Infinity",
            "agreement": 0.5,
            "samples": 7,
            "feeds": 2,
            "reference": {"parameters": 99, "file_bytes": 20_000, "flops": None},
            "candidate": {"parameters": 10, "file_bytes": 1_000, "flops": 20},
            "providers": read["providers"],
            "depth": [],
        }
        (provider,) = read["providers"]
        assert provider["provider"] == "CPUExecutionProvider"
        assert [o["name"] for o in provider["outputs"]] == ["logits", "ids", "list"]
        assert provider["outputs"][0]["max_abs_error"] == "Infinity"
        assert float(provider["outputs"][0]["snr_db"]) == -math.inf
        assert provider["outputs"][1]["relative_error"] is None
        assert provider["outputs"][2]["reason"] == LIST.reason
        assert provider["latency"]["ratio"] == 1.5
        assert (provider["latency"]["slower"], provider["latency"]["faster"]) == (True, False)


def run_validation(
    candidate: ModelStore, reference: ModelStore | None = None, **more: object
) -> ValidationReport:
    return validate(
        reference or linear(),
        candidate,
        samples(4, 3),
        samples=7,
        figures=(LARGE, SMALL),
        **({"providers": [CPU], "seconds": 0.0} | more),  # type: ignore[arg-type]
    )


class TestValidate:
    def test_a_good_candidate_passes(self) -> None:
        made = run_validation(linear(), max_error=0.0, min_agreement=1.0)
        assert (made.passed, made.failures, made.notes) == (True, (), ())
        assert (made.samples, made.feeds) == (7, 2)
        assert (made.reference, made.candidate) == (LARGE, SMALL)
        assert (made.relative_error, made.snr_db, made.agreement) == (0.0, 200.0, 1.0)
        (provider,) = made.providers
        assert provider.provider == "CPUExecutionProvider"
        assert [(o.kind, o.decisions) for o in provider.outputs] == [("classification", 7)]
        assert provider.latency.pairs == 3

    def test_a_bad_candidate_fails(self) -> None:
        # Columns exchanged: of two classes, every decision is the other one.
        made = run_validation(
            linear("float[3, 2] w = {2, 1, 4, 3, 6, 5}"), max_error=0.01, min_agreement=0.5
        )
        assert not made.passed
        assert made.agreement == 0.0
        assert [line.split(":")[1] for line in made.failures] == [" output 'y'"] * 2

    def test_every_provider_is_run(self) -> None:
        assert len(run_validation(linear(), providers=[CPU, CPU]).providers) == 2

    def test_outputs_that_numpy_cannot_hold_do_not_stop_the_clock(self) -> None:
        model = store(
            f"(float[N, 3] x) => (float[N, 2] y, bfloat16[N, 2] z) <{WEIGHTS}>",
            "y = MatMul(x, w) z = Cast <to = 16> (y)",
        )
        made = run_validation(model, model)
        assert [o.kind for o in made.providers[0].outputs] == ["classification", "skipped"]
        assert made.notes == (
            "Output 'z' was not compared: values of type tensor(bfloat16) are not compared.",
        )

    def test_errors_are_raised(self) -> None:
        with pytest.raises(ConfigError, match="no provider"):
            run_validation(linear(), providers=[])
        with pytest.raises(ConfigError, match="agreement"):
            run_validation(linear(), min_agreement=2.0)
        with pytest.raises(ModelError, match="cannot load"):
            run_validation(store(LINEAR, "y = Relu(x, x)"))
        with pytest.raises(DataError, match="no held-back feed"):
            validate(linear(), linear(), [], samples=0, providers=[CPU], figures=(LARGE, SMALL))
