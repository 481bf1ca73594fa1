"""The smallest model that is good enough: what is measured, searched and refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import activations, model, noise, run

from onnx_utilrank import (
    AnalyzeConfig,
    CompressConfig,
    ConfigError,
    DataError,
    QualityTarget,
    TargetMissedError,
    ValidateConfig,
    compress,
)
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.cli.main import main
from onnx_utilrank.job import Job
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.pipeline import _held_against
from onnx_utilrank.quality import SATURATED, Quality
from onnx_utilrank.search import EVALUATIONS, Candidate
from onnx_utilrank.validation.divergence import Divergence

digits = pytest.importorskip("digits", reason="needs scikit-learn, the extra `demo`")

CNN = Path(__file__).resolve().parent.parent / "models" / "digits_cnn.onnx"
IMAGE, LABEL = digits.INPUT_NAME, digits.LABEL_NAME


@pytest.fixture(scope="module")
def data():
    split = digits.load_digits_split()
    return {IMAGE: split.test_images}


@pytest.fixture(scope="module")
def labelled(data):
    return data | {LABEL: digits.load_digits_split().test_labels}


def target(key: str, limit: float, **options: object) -> CompressConfig:
    return CompressConfig(quality=QualityTarget(key=key, limit=limit), **options)  # type: ignore


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A sure classifier of random weights, and samples for it: quicker than a trained one."""
    first = noise(1, 40, 64) * 0.9 ** np.arange(64)
    proto = model(
        "(float[n,40] x) => (float[n,6] y)",
        "h = MatMul(x, W) t = Tanh(h) y = MatMul(t, V)",
        W=first.astype(np.float32),
        V=(6 * noise(2, 64, 6)).astype(np.float32),
    )
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    path.write_bytes(proto.SerializeToString())
    return path, {"x": (noise(3, 300, 40) * 0.85 ** np.arange(40)).astype(np.float32)}


def size(path: str | Path) -> int:
    return Path(path).stat().st_size


class Metric:
    """A user's function that remembers the sizes of the files it was given."""

    def __init__(self, value: Callable[[str], object]) -> None:
        self.value = value
        self.sizes: list[int] = []

    def __call__(self, path: str) -> object:
        assert isinstance(path, str)
        self.sizes.append(size(path))
        return self.value(path)


def constant(path: str) -> float:
    assert size(path)
    return 1.0


# --- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "limit", "message"),
    [
        ("max_drop", -0.1, "max drop must not be negative"),
        ("max_divergence", -1e-9, "max divergence must not be negative"),
        ("min_agreement", -0.5, "min agreement must not be negative"),
        ("min_agreement", 1.01, "min agreement is at most 1"),
        ("max_divergence", math.inf, "max divergence inf is not a finite number"),
        ("min_snr", math.nan, "min snr nan is not a finite number"),
        ("max_loss", 1.0, "quality 'max_loss' is none of"),
    ],
)
def test_targets_out_of_range_are_refused(key: str, limit: float, message: str):
    with pytest.raises(ConfigError, match=message):
        QualityTarget(key=key, limit=limit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "limit"),
    [("max_drop", 0.0), ("max_divergence", 0.0), ("min_agreement", 1.0), ("min_snr", -3.0)],
)
def test_targets_at_their_limits_are_taken(key: str, limit: float):
    metric = {"labels": "label"} if key == "max_drop" else {}
    assert target(key, limit, **metric).target == {key: limit}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"param_ratio": 0.5}, "param ratio and max divergence exclude each other"),
        ({"evaluate": str, "labels": "label"}, "evaluate and labels exclude each other"),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        target("max_divergence", 0.1, **options)
    with pytest.raises(ConfigError, match="max drop needs a metric"):
        target("max_drop", 1.0)


@pytest.mark.parametrize("kind", [AnalyzeConfig, CompressConfig, ValidateConfig])
def test_seeds_are_not_negative(kind: type):
    assert kind(seed=0).seed == 0
    with pytest.raises(ConfigError, match="seed must not be negative"):
        kind(seed=-1)


def quality(**changes: object) -> Quality:
    found = {"mean": 0.1, "standard_error": 0.01, "agreement": 0.9, "agreement_error": 0.02}
    found |= {"snr_db": 20.0, "snr_error": 1.0, "samples": 50}
    found |= {key: changes.pop(key) for key in tuple(changes) if key in found}
    return Quality(divergence=Divergence(**found), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "met", "near", "missed"),
    [
        # At the limit, within two standard errors of it, and beyond.
        ("max_divergence", 0.1, 0.085, 0.075),
        ("min_agreement", 0.9, 0.93, 0.95),
        ("max_drop", 0.5, 0.35, 0.25),
        ("min_snr", 20.0, 21.5, 22.5),
    ],
)
def test_standard_errors_are_room(key: str, met: float, near: float, missed: float):
    found = quality(drop=0.5, drop_error=0.1)
    goals = [QualityTarget(key=key, limit=v) for v in (met, near, missed)]  # type: ignore[arg-type]
    assert [found.meets(goal) for goal in goals] == [True, False, False]
    assert [found.meets(goal, errors=2.0) for goal in goals] == [True, True, False]
    assert [found.confirms(goal) for goal in goals] == [True, False, False]


def test_what_held_back_samples_do_not_confirm_is_told(data):
    job = Job.open(CNN, data, CompressConfig(), lambda *_: None)
    best = Candidate(ratio=1.0, plan=None, store=job.store, quality=quality())  # type: ignore[arg-type]
    near = _held_against(job, QualityTarget(key="max_divergence", limit=0.085), best, quality())
    assert near == (
        "On samples held back, max divergence is 0.1 ± 0.01, where 0.085 was asked: within two "
        "standard errors; more samples would tell.",
    )
    assert not _held_against(job, QualityTarget(key="max_divergence", limit=0.1), best, quality())


def test_one_sample_gives_no_room():
    found = quality(standard_error=math.inf, samples=1)
    assert not found.meets(QualityTarget(key="max_divergence", limit=0.09), errors=2.0)


def test_saturated_metric_meets_nothing():
    found = quality(drop=-1.0, saturated=True)
    assert not found.meets(QualityTarget(key="max_drop", limit=5.0))
    # That is a search's caution; what was found is not refused for it.
    assert found.confirms(QualityTarget(key="max_drop", limit=5.0))
    assert found.meets(QualityTarget(key="max_drop", limit=5.0), errors=2.0)


def test_saturated_metric_does_not_tighten_other_targets():
    found = quality(drop=-1.0, saturated=True)
    for key, limit in (("max_divergence", 0.1), ("min_agreement", 0.9), ("min_snr", 20.0)):
        assert found.meets(QualityTarget(key=key, limit=limit))  # type: ignore[arg-type]


def test_figures_that_the_outputs_do_not_have_are_refused():
    for key in ("agreement", "snr_db"):
        goal = QualityTarget(key="min_agreement" if key == "agreement" else "min_snr", limit=0.5)
        with pytest.raises(ConfigError, match="no output of the model"):
            quality(**{key: None}).meets(goal)


# --- search -------------------------------------------------------------------------------------


def test_divergence_is_reached_and_reported(data):
    result = compress(CNN, data, target("max_divergence", 0.01))
    searched, held = result.searched.divergence, result.quality.divergence
    assert 0.004 < searched.mean <= 0.01
    assert held.mean <= 0.01 + 2 * held.standard_error
    assert 0 < held.standard_error < held.mean
    assert result.samples + searched.samples + held.samples == 400
    assert result.plan.target == {"max_divergence": 0.01}
    assert result.plan.param_ratio < 0.3


def test_stricter_targets_take_larger_models(small):
    path, data = small
    kept = []
    for limit in (0.2, 0.05, 0.01):
        result = compress(path, data, target("max_divergence", limit))
        assert limit / 4 < result.searched.divergence.mean <= limit
        kept.append(result.plan.param_ratio)
    assert kept[0] < kept[1] < kept[2] < 1


def test_agreement_is_reached(small):
    path, data = small
    result = compress(path, data, target("min_agreement", 0.9))
    assert result.searched.divergence.agreement >= 0.9
    held = result.quality.divergence
    assert held.agreement >= 0.9 - 2 * held.agreement_error
    assert held.agreement_error > 0
    assert result.plan.param_ratio < 0.9


def test_accuracy_by_labels_is_the_one_measured_apart(labelled, tmp_path):
    result = compress(CNN, labelled, target("max_drop", 2.0, labels=LABEL))
    assert result.plan.param_ratio < 0.5
    assert result.searched.drop <= 2.0
    images, labels = labelled[IMAGE], labelled[LABEL]
    _, held = open_data({IMAGE: images}, ModelStore.load(CNN).inputs).split()
    result.save(tmp_path / "made.onnx")
    before, after = (
        100 * digits.accuracy(path, images[held], labels[held])
        for path in (CNN, tmp_path / "made.onnx")
    )
    assert result.quality.metric == pytest.approx(after)
    assert result.quality.drop == pytest.approx(before - after)
    assert result.quality.drop <= 2.0 + 2 * result.quality.drop_error


def test_labels_that_do_not_fit_are_refused(small):
    path, data = small
    config = target("max_drop", 1.0, labels=LABEL)
    for labels, message in (
        (np.zeros((300, 3), np.int64), "one for each of 32 x 3, fit no output"),
        (np.zeros(299, np.int64), LABEL),
    ):
        with pytest.raises(DataError, match=message):
            compress(path, data | {LABEL: labels}, config)
    with pytest.raises(DataError, match=LABEL):
        compress(path, data, config)


def test_labels_do_not_have_to_be_searched_by(small):
    path, data = small
    (scores,) = run(ModelStore.load(path), data).values()
    labels = {LABEL: scores.argmax(1)}
    result = compress(path, data | labels, CompressConfig(param_ratio=0.2, labels=LABEL))
    assert result.searched is None
    agreed = 100 * result.quality.divergence.agreement
    assert result.quality.metric == pytest.approx(agreed)
    assert result.quality.drop == pytest.approx(100 - agreed)
    assert 0 < agreed < 100


def test_function_is_searched_by_and_rarely_called(small):
    path, data = small

    def shrinking(candidate: str) -> float:
        """Falls with the size of the file: loses 40 where nothing of it is left."""
        return 40 * size(candidate) / size(path)

    metric = Metric(shrinking)
    result = compress(path, data, target("max_drop", 12.0, evaluate=metric))
    assert 8 < result.quality.drop <= 12.0
    assert result.quality.drop_error is None
    assert result.quality.metric == pytest.approx(40 - result.quality.drop)
    # The original and the result once more, on the samples that were held back.
    assert len(metric.sizes) <= EVALUATIONS + 3
    assert metric.sizes[0] == size(path)


def test_function_may_be_named(small, tmp_path, monkeypatch):
    path, data = small
    source = "import os\n\ndef judge(path):\n    return os.path.getsize(path) / 1000\n"
    (tmp_path / "users_metric.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    result = compress(path, data, target("max_drop", 3.0, evaluate="users_metric:judge"))
    assert 1.5 < result.quality.drop <= 3.0
    lost = (size(path) - result.store.file_bytes) / 1000
    assert result.quality.drop == pytest.approx(lost, abs=0.01)
    with pytest.raises(DataError, match="users_metric"):
        compress(path, data, target("max_drop", 3.0, evaluate="users_metric:missing"))


@pytest.mark.parametrize(
    ("value", "message"), [("good", "is no number"), (math.nan, "not finite"), (None, "no number")]
)
def test_function_has_to_give_a_number(small, value, message):
    path, data = small
    config = target("max_drop", 1.0, evaluate=Metric(lambda path: value if path else 0.0))
    with pytest.raises(DataError, match=f"evaluate: gave {value!r}.*{message}"):
        compress(path, data, config)


def test_saturated_function_falls_back_to_the_divergence(data):
    metric = Metric(constant)
    result = compress(CNN, data, target("max_drop", 1.0, evaluate=metric))
    assert result.searched.divergence.mean <= SATURATED
    assert result.searched.drop == result.quality.drop == 0
    assert any("it is saturated" in note for note in result.notes)
    # Smaller ones were tried and refused: the floor is where that metric stopped to tell.
    assert min(metric.sizes) < result.store.file_bytes


def test_function_that_is_not_searched_by_may_be_saturated(small):
    path, data = small
    result = compress(path, data, target("max_divergence", 0.02, evaluate=constant))
    assert result.quality.metric == 1.0
    assert not any("saturated" in note for note in result.notes)


def test_target_that_cannot_be_met_names_the_best(small):
    path, data = small
    message = r"max divergence 0 cannot be reached: the best that was found keeps \d.*% of the p"
    with pytest.raises(TargetMissedError, match=message):
        compress(path, data, target("max_divergence", 0.0))
    # Worse with every call.
    calls: list[str] = []
    config = target("max_drop", 0.5, evaluate=lambda p: calls.append(p) or -len(calls))
    with pytest.raises(TargetMissedError, match=r"max drop 0\.5 cannot be reached: .*% of the par"):
        compress(path, data, config)


def test_samples_held_back_have_the_last_word(small):
    path, data = small
    originals = []

    def turning(candidate: str) -> float:
        """Finds no fault, until the original is judged again."""
        if size(candidate) == size(path):
            originals.append(candidate)
            return 1.0
        return 1.0 if len(originals) == 1 else 0.0

    with pytest.raises(TargetMissedError, match=r"met where it was searched \(0\) but not on sam"):
        compress(path, data, target("max_drop", 0.5, evaluate=turning))


def regression() -> tuple[object, dict[str, np.ndarray]]:
    weights = {"W": noise(1, 12, 12) * 0.5 ** np.arange(12), "V": noise(2, 12, 6), "b": noise(3, 6)}
    cast = {name: value.astype(np.float32) for name, value in weights.items()}
    body = "h = MatMul(x, W) t = Tanh(h) u = MatMul(t, V) y = Mul(u, b)"
    proto = model("(float[n,12] x) => (float[n,6] y)", body, **cast)
    return proto, {"x": activations(4, 400, 12).astype(np.float32)}


def test_signal_to_noise_ratio_is_reached():
    proto, data = regression()
    config = target("min_snr", 15.0, force=True)
    result = compress(proto, data, config)
    for found in (result.searched, result.quality):
        assert found.divergence.snr_db >= 15.0
        assert found.divergence.agreement is None
        # ½ of the relative squared error, in decibels.
        assert found.divergence.snr_db == pytest.approx(
            -10 * math.log10(2 * found.divergence.mean), abs=1e-6
        )
        relative = found.divergence.standard_error / found.divergence.mean
        assert found.divergence.snr_error == pytest.approx(10 / math.log(10) * relative)
    with pytest.raises(ConfigError, match="no output of the model makes decisions"):
        compress(proto, data, target("min_agreement", 0.9, force=True))


def head(level: float, classes: int = 6) -> onnx.ModelProto:
    """Scores from random features; so much of them is one level for all."""
    scores = noise(2, 24, classes)
    scores += (level - 1) * scores.mean(1, keepdims=True)
    return model(
        f"(float[n,16] x) => (float[n,{classes}] y)",
        "h = MatMul(x, W) t = Tanh(h) y = Gemm(t, V)",
        W=noise(1, 16, 24).astype(np.float32),
        V=(3 * scores).astype(np.float32),
    )


# 1 is the level that scores have which nothing ties together.
@pytest.mark.parametrize(
    ("level", "decides"), [(0.0, True), (0.25, True), (1.0, False), (4.0, False)]
)
def test_scores_that_share_a_level_are_values(level: float, decides: bool):
    proto, data = head(level), {"x": activations(3, 200, 16).astype(np.float32)}
    found = compress(proto, data, CompressConfig(param_ratio=0.7)).quality.divergence
    assert (found.agreement is not None) is decides
    assert (found.snr_db is None) is decides


def test_what_all_targets_share_is_not_lost():
    # A softmax would be blind to what is added to every score alike.
    proto, data = head(8.0), {"x": activations(3, 400, 16).astype(np.float32)}
    made = compress(proto, data, target("max_divergence", 0.01, force=True)).model
    feed = {"x": activations(3, 600, 16)[400:].astype(np.float32)}
    y, z = run(proto, feed)["y"], run(made, feed)["y"]
    lost = np.square(z - y).sum() / np.square(y - y.mean(0)).sum() / 2
    assert lost < 0.02  # twice the limit, on other samples


def test_weighting_of_the_user_judges_too(small):
    path, data = small
    config = CompressConfig(param_ratio=0.5)
    decisions, values = (
        compress(path, data, replace(config, weighting=w)).quality.divergence
        for w in ("softmax", "values")
    )
    assert decisions.agreement is not None
    assert decisions.snr_db is None
    assert values.agreement is None
    assert values.snr_db == pytest.approx(-10 * math.log10(2 * values.mean), abs=1e-6)


def test_function_judges_what_has_no_floating_output(small):
    path, data = small
    proto = onnx.load(path)
    kind = onnx.TensorProto.INT64
    proto.graph.node.append(onnx.helper.make_node("Cast", ["y"], ["z"], to=kind))
    del proto.graph.output[:]
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", kind, ["n", 6]))
    full = len(proto.SerializeToString())
    metric = Metric(lambda candidate: 40 * size(candidate) / full)
    result = compress(proto, data, target("max_drop", 12.0, evaluate=metric))
    assert 0 < result.quality.drop <= 12.0
    with pytest.raises(ConfigError, match="no output of the model"):
        compress(proto, data, target("max_divergence", 0.1))


# --- command line -------------------------------------------------------------------------------


def test_command_line_reports_the_quality(small, tmp_path, capsys, monkeypatch):
    path, data = small
    monkeypatch.chdir(tmp_path)
    (scores,) = run(ModelStore.load(path), data).values()
    np.savez("data.npz", **data, **{LABEL: scores.argmax(1)})
    given = ["compress", str(path), "--data", "data.npz"]
    status = main([*given, "-o", "o.onnx", "--max-drop", "10", "--labels", LABEL])
    out, _ = capsys.readouterr()
    assert status == 0
    assert size("o.onnx") < 0.9 * size(path)
    assert "±" in out
    for words, expected in (
        (["--max-drop", "1"], 2),
        (["--max-divergence", "0"], 3),
        (["--max-divergence", "-1"], 2),
        (["--max-drop", "1", "--evaluate", "no_such_module:f"], 5),
    ):
        assert main([*given, "-o", "no.onnx", *words]) == expected
        _, err = capsys.readouterr()
        assert len([line for line in err.splitlines() if "error:" in line]) == 1
        assert "Traceback" not in err
    assert not Path("no.onnx").exists()


def test_what_rests_on_a_single_row_is_left_alone():
    """About its mean one row is nothing: any change would be foreseen to cost nothing."""
    proto = model(
        "(float[n,48] x) => (float[n,8] y)",
        "a = MatMul(x, v) b = Tanh(a) y = MatMul(b, w)",
        v=noise(1, 48, 48).astype(np.float32) / 7,
        w=noise(2, 48, 8).astype(np.float32) / 7,
    )
    two, three = ({"x": noise(3, n, 48).astype(np.float32)} for n in (2, 3))
    with pytest.raises(TargetMissedError, match="single row"):
        compress(proto, two, CompressConfig(param_ratio=0.5))
    assert compress(proto, two, CompressConfig(param_ratio=0.5, method="svd")).plan.factored
    assert compress(proto, three, CompressConfig(param_ratio=0.5)).plan.factored
    with pytest.raises(DataError, match="holds 2 samples; 3 are needed, to calibrate with"):
        compress(proto, two, target("max_divergence", 0.01))
