"""Accuracy of two models on the same labels: what `validate` measures of it, and its law."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, noise, run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnx_utilrank import ConfigError, DataError, ValidateConfig, validate
from onnx_utilrank.calibration.labels import IGNORED, Answers
from onnx_utilrank.cli.main import main
from onnx_utilrank.validation.accuracy import Accuracy, accuracy_drop
from onnx_utilrank.validation.validate import tolerance_failures

N, D, C = 60, 8, 4
W = noise(1, D, C).astype(np.float32)
OFF = W + 0.6 * noise(2, D, C).astype(np.float32)


def classifier(w: np.ndarray = W, body: str = "y = MatMul(x, w)") -> onnx.ModelProto:
    return model(f"(float[n,{D}] x) => (float[n,{C}] y)", body, w=w)


def deciding(w: np.ndarray = W, scores: str = "s") -> onnx.ModelProto:
    body = f"{scores} = MatMul(x, w) y = ArgMax<axis = -1, keepdims = 0>({scores})"
    return model(f"(float[n,{D}] x) => (int64[n] y)", body, w=w)


def data(**labels: np.ndarray) -> dict[str, np.ndarray]:
    x = noise(3, N, D).astype(np.float32)
    return {"x": x, **(labels or {"label": (x @ noise(4, D, C)).argmax(-1)})}


def of_samples(right: np.ndarray) -> Answers:
    """One label for each sample."""
    return Answers(right, np.arange(len(right)))


def measured(
    reference: onnx.ModelProto,
    candidate: onnx.ModelProto,
    held: dict[str, np.ndarray] | None = None,
    **options: object,
) -> Accuracy:
    config = ValidateConfig(**{"labels": "label", **options})  # type: ignore[arg-type]
    (result,) = validate(reference, candidate, held or data(), config).providers
    assert result.accuracy is not None
    return result.accuracy


@given(
    arrays(bool, st.integers(2, 40)).flatmap(
        lambda a: st.tuples(st.just(a), arrays(bool, a.shape[0]))
    )
)
def test_the_drop_is_that_of_the_accuracies_and_its_error_that_of_paired_differences(answers):
    before, after = answers
    drop, error = accuracy_drop(of_samples(before), of_samples(after))
    assert error is not None
    n = len(before)
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    # Sums of n terms of 100 at most, each rounded.
    tolerance = 100 * n * np.finfo(np.float64).eps
    assert drop == pytest.approx(100 * (before.mean() - after.mean()), abs=tolerance)
    spread = (lost + won) / n - ((lost - won) / n) ** 2
    assert error == pytest.approx(100 * math.sqrt(max(spread, 0) / (n - 1)), abs=1e-6)
    turned, _ = accuracy_drop(of_samples(after), of_samples(before))
    assert turned == pytest.approx(-drop, abs=tolerance)
    assert accuracy_drop(of_samples(before), of_samples(before)) == (0.0, 0.0)


@given(
    arrays(bool, st.integers(2, 20)).flatmap(
        lambda a: st.tuples(st.just(a), arrays(bool, a.shape[0]), st.integers(1, 5))
    )
)
def test_labels_that_go_wrong_together_say_no_more_than_one(case):
    """Each answer given several times by its sample: the same drop, the same error."""
    before, after, times = case
    samples = np.arange(len(before)).repeat(times)
    many = [Answers(right.repeat(times), samples) for right in (before, after)]
    once = accuracy_drop(of_samples(before), of_samples(after))
    assert accuracy_drop(*many) == pytest.approx(once, abs=1e-9)


def test_samples_weigh_as_many_labels_as_they_have():
    """Two samples, of 3 labels and of 1, counted by hand."""
    lost = np.array([True, True, False, True]), np.array([False, True, False, True])
    drop, error = accuracy_drop(*(Answers(right, np.array([0, 0, 0, 4])) for right in lost))
    # Residuals are 100 - 3·25 and 0 - 25; their squares sum to 1250, times 2, over 4 labels.
    assert (drop, error) == (25.0, pytest.approx(math.sqrt(2 * 1250) / 4))


def test_one_sample_has_no_spread():
    one = np.array([0])
    before, after = (Answers(np.array([right]), one) for right in (True, False))
    assert accuracy_drop(before, after) == (100.0, None)
    several = Answers(np.array([True, False]), np.array([0, 0]))
    assert accuracy_drop(several, several) == (0.0, None)
    x = noise(3, N, D).astype(np.float32)[:1]
    found = measured(classifier(), classifier(), {"x": x, "label": np.array([0])})
    assert (found.count, found.drop, found.drop_error) == (1, 0.0, None)


def test_both_models_are_held_to_the_labels():
    held = data()
    found = measured(classifier(), classifier(OFF))
    right = [held["x"] @ w for w in (W, OFF)]
    shares = [100 * float(np.mean(y.argmax(-1) == held["label"])) for y in right]
    assert [found.reference, found.candidate] == pytest.approx(shares)
    assert found.drop == pytest.approx(shares[0] - shares[1])
    assert found.drop != 0
    assert (found.labels, found.output, found.count) == ("label", "y", N)


def test_a_model_loses_nothing_against_itself():
    found = measured(classifier(), classifier())
    assert (found.drop, found.drop_error) == (0.0, 0.0)


def test_without_labels_nothing_is_said_of_accuracy():
    (result,) = validate(classifier(), classifier(OFF), data()).providers
    assert result.accuracy is None


def test_labels_that_are_ignored_do_not_count():
    held = data()
    held["label"][::3] = IGNORED
    found = measured(classifier(), classifier(OFF), held)
    assert found.count == int((held["label"] != IGNORED).sum())


def test_positions_have_labels_of_their_own():
    x = noise(5, N, 3, D).astype(np.float32)
    label = (x @ W).argmax(-1)
    label[:, 0] = (label[:, 0] + 1) % C
    signature = f"(float[n,p,{D}] x) => (float[n,p,{C}] y)"
    one, other = (model(signature, "y = MatMul(x, w)", w=w) for w in (W, OFF))
    found = measured(one, other, {"x": x, "label": label})
    assert found.count == 3 * N
    assert found.reference == pytest.approx(200 / 3)
    assert found.candidate < found.reference


class TestDecisions:
    """Of models that give the class alone."""

    def test_the_scores_behind_it_are_held_to_the_labels(self):
        found = measured(deciding(), deciding(OFF))
        plain = measured(classifier(), classifier(OFF))
        assert dataclasses.replace(found, output="y") == plain
        assert found.output == "y"

    def test_what_lies_between_scores_and_decision_counts(self):
        """As where a quantization of the scores was put behind them, under another name."""
        body = "s = MatMul(x, w) q = Neg(s) y = ArgMax<axis = -1, keepdims = 0>(q)"
        turned = model(f"(float[n,{D}] x) => (int64[n] y)", body, w=W)
        held = data()
        right = run(turned, {"x": held["x"]})["y"] == held["label"]
        assert measured(deciding(), turned).candidate == pytest.approx(100 * right.mean())

    @pytest.mark.parametrize(
        "body",
        [
            "t = MatMul(x, w) y = ArgMax<axis = -1, keepdims = 0>(t)",
            "a = MatMul(x, w) t = Transpose(a) y = ArgMax<axis = 0, keepdims = 0>(t)",
        ],
    )
    def test_a_candidate_may_call_its_scores_as_it_likes(self, body):
        other = model(f"(float[n,{D}] x) => (int64[n] y)", body, w=OFF)
        assert measured(deciding(), other) == measured(deciding(), deciding(OFF))

    def test_ties_are_those_of_the_model(self):
        body = "s = MatMul(x, w) y = ArgMax<axis = -1, keepdims = 0, select_last_index = 1>(s)"
        tied = model(f"(float[n,{D}] x) => (int64[n] y)", body, w=0 * W)
        assert measured(tied, tied, data(label=np.full(N, C - 1))).reference == 100


class TestWhatLabelsAreNot:
    """Labels travel with the inputs, and are none of them."""

    P, WIDE = 3, f"(float[n,p,{D}] x, float[n,p] attention_mask) => (float[n,p,{C}] y)"

    def held(self) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        proto = model(self.WIDE, "s = MatMul(x, w) z = Neg(attention_mask) y = Identity(s)", w=W)
        x = noise(5, N, self.P, D).astype(np.float32)
        mask = np.ones((N, self.P), np.float32)
        mask[::2, -1] = 0
        return proto, {"x": x, "attention_mask": mask, "label": (x @ W).argmax(-1)}

    def test_padding_does_not_count(self):
        proto, held = self.held()
        held["label"][::2, -1] = (held["label"][::2, -1] + 1) % C
        found = measured(proto, proto, held)
        assert (found.count, found.reference) == (int(held["attention_mask"].sum()), 100)

    def test_labels_of_padding_alone_are_none(self):
        proto, held = self.held()
        held["label"][held["attention_mask"] == 1] = IGNORED
        with pytest.raises(DataError, match=r"data.*none counts"):
            measured(proto, proto, held)

    def test_they_are_no_mask_by_their_name(self):
        signature = f"(float[n,p,{D}] x) => (float[n,p,2] y)"
        proto = model(signature, "y = MatMul(x, w)", w=W[:, :2])
        x = noise(5, N, self.P, D).astype(np.float32)
        mask = np.sort(x @ W[:, :2], -1).argmax(-1)
        mask[::2, 0] = 0
        assert measured(proto, proto, {"x": x, "mask": mask}, labels="mask").count == mask.size
        # Rows that a mask would leave out have another error than the rest.
        other = model(signature, "z = MatMul(x, w) y = Relu(z)", w=W[:, :2])
        config = ValidateConfig(labels="mask")
        with_labels = validate(proto, other, {"x": x, "mask": mask}, config)
        assert with_labels.depth == validate(proto, other, {"x": x}).depth

    @pytest.mark.parametrize("key", ["y", "h"])
    def test_they_are_no_value_of_the_model_by_their_name(self, key):
        proto = classifier(body="h = MatMul(x, w) y = Relu(h)")
        held = data()
        held[key] = held.pop("label")
        config = ValidateConfig(labels=key)
        plain = validate(proto, proto, {"x": held["x"]})
        assert validate(proto, proto, held, config).reference == plain.reference

    def test_positions_before_samples_are_told_by_their_number(self):
        signature = f"(float[n,p,{D}] x) => (float[p,n,{C}] y)"
        body = "a = MatMul(x, w) y = Transpose<perm = [1, 0, 2]>(a)"
        x = noise(5, N, self.P, D).astype(np.float32)
        proto = model(signature, body, w=W)
        found = measured(proto, proto, {"x": x, "label": (x @ W).argmax(-1)})
        assert (found.reference, found.count) == (100, N * self.P)

    def test_positions_in_another_order_are_refused(self):
        signature = f"(float[n,p,q,{D}] x) => (float[n,q,p,{C}] y)"
        body = "a = MatMul(x, w) y = Transpose<perm = [0, 2, 1, 3]>(a)"
        x = noise(5, N, self.P, self.P + 3, D).astype(np.float32)
        proto = model(signature, body, w=W)
        with pytest.raises(DataError, match="fit no output"):
            measured(proto, proto, {"x": x, "label": (x @ W).argmax(-1)})


class TestWhichOutput:
    BODY = "y = MatMul(x, w) z = Neg(y)"
    SIGNATURE = f"(float[n,{D}] x) => (float[n,{C}] y, float[n,{C}] z)"

    def two(self, w: np.ndarray) -> onnx.ModelProto:
        return model(self.SIGNATURE, self.BODY, w=w)

    def test_the_user_may_name_it(self):
        held = data()
        found = measured(self.two(W), self.two(OFF), held, labels="label=z")
        assert found.output == "z"
        scores = run(self.two(W), {"x": held["x"]})["z"]
        assert found.reference == pytest.approx(100 * np.mean(scores.argmax(-1) == held["label"]))

    def test_one_that_is_not_there_is_told(self):
        with pytest.raises(ConfigError, match="'nowhere' is none of the outputs"):
            measured(self.two(W), self.two(OFF), labels="label=nowhere")

    def test_labels_that_fit_no_output_are_told(self):
        with pytest.raises(DataError, match="fit no output"):
            measured(classifier(), classifier(OFF), data(label=np.full(N, C)))

    def test_data_without_the_array_are_told(self):
        with pytest.raises(DataError, match="absent"):
            measured(classifier(), classifier(OFF), labels="absent")


class TestTolerance:
    def test_it_is_missed_by_more_than_it_allows(self):
        lost = measured(classifier(), classifier(OFF)).drop
        assert lost > 0

        def passed(limit: float) -> bool:
            config = ValidateConfig(labels="label", max_drop=limit)
            return validate(classifier(), classifier(OFF), data(), config).passed

        assert passed(lost)
        assert not passed(np.nextafter(lost, 0))

    def test_every_provider_is_held_to_it(self):
        report = validate(classifier(), classifier(OFF), data(), ValidateConfig(labels="label"))
        (result,) = report.providers
        assert result.accuracy is not None
        limit = result.accuracy.drop / 2
        good = dataclasses.replace(result.accuracy, drop=limit)
        others = [
            dataclasses.replace(result, provider=name, accuracy=accuracy)
            for name, accuracy in (("first", good), ("second", result.accuracy))
        ]
        (line,) = tolerance_failures(others, None, None, limit)
        assert line.startswith("second: output 'y': accuracy drop")
        unknown = dataclasses.replace(result.accuracy, drop=math.nan)
        assert tolerance_failures([dataclasses.replace(result, accuracy=unknown)], None, None, 99.0)
        unmeasured = [dataclasses.replace(result, accuracy=None)]
        assert "no labels" in tolerance_failures(unmeasured, None, None, limit)[0]

    def test_a_better_model_passes(self):
        config = ValidateConfig(labels="label", max_drop=0.0)
        assert validate(classifier(OFF), classifier(W), data(), config).passed

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"max_drop": 1.0}, "max drop needs labels"),
            ({"max_drop": -1.0, "labels": "label"}, "must not be negative"),
            ({"labels": ""}, "do not name an array"),
            ({"labels": "=y"}, "do not name an array"),
            ({"max_drop": math.nan, "labels": "label"}, "must not be negative"),
        ],
    )
    def test_options_that_make_no_sense(self, options, reason):
        with pytest.raises(ConfigError, match=reason):
            validate(classifier(), classifier(), data(), ValidateConfig(**options))


class TestCommandLine:
    @pytest.fixture
    def files(self, tmp_path: Path, monkeypatch) -> Path:
        monkeypatch.chdir(tmp_path)
        onnx.save(classifier(), "a.onnx")
        onnx.save(classifier(OFF), "b.onnx")
        np.savez("d.npz", **data())
        return tmp_path

    def test_it_is_printed_and_in_the_report(self, files, capsys):
        words = ["validate", "a.onnx", "b.onnx", "--data", "d.npz", "--labels", "label"]
        assert main([*words, "--report", "r.json"]) == 0
        found = measured(classifier(), classifier(OFF))
        spread = f"drop {found.drop:.3g} ± {found.drop_error:.2g}"
        shown = " ".join(capsys.readouterr().out.split())
        assert (
            f"{found.reference:.2f} % before, {found.candidate:.2f} % after, on {N} labels" in shown
        )
        assert spread in shown
        (provider,) = json.loads((files / "r.json").read_text())["providers"]
        assert provider["accuracy"] == dataclasses.asdict(found)

    def test_a_page_shows_it(self, files):
        words = ["validate", "a.onnx", "b.onnx", "--data", "d.npz", "--labels", "label"]
        assert main([*words, "--report", "r.html"]) == 0
        found = measured(classifier(), classifier(OFF))
        page = (files / "r.html").read_text(encoding="utf8")
        _, _, fact = page.partition("Loss of accuracy on CPU")
        fact = re.sub(r"<[^>]*>", " ", fact[:600])
        assert " ".join(fact.split()).startswith(f"{found.drop:.3g} ± {found.drop_error:.2g} of y:")
        assert f"{found.reference:.2f} % before, {found.candidate:.2f} % after" in fact

    @pytest.mark.usefixtures("files")
    def test_a_missed_tolerance_ends_in_3_and_says_how_far(self, capsys):
        words = ["validate", "a.onnx", "b.onnx", "--data", "d.npz", "--labels", "label"]
        assert main([*words, "--max-drop", "0"]) == 3
        assert "accuracy drop" in capsys.readouterr().err
        assert main([*words, "--max-drop", "100"]) == 0

    def test_labels_that_fit_nothing_are_told_with_their_file(self, files, capsys):
        np.savez(files / "bad.npz", **data(label=np.full(N, C)))
        words = ["validate", "a.onnx", "b.onnx", "--data", "bad.npz", "--labels", "label"]
        assert main(words) == 5
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "bad.npz" in line

    @pytest.mark.usefixtures("files")
    def test_a_tolerance_without_labels_is_wrong_usage(self, capsys):
        words = ["validate", "a.onnx", "b.onnx", "--data", "d.npz", "--max-drop", "1"]
        assert main(words) == 2
        assert "max drop needs labels" in capsys.readouterr().err
