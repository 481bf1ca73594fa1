"""Right classes of samples: which output they are of, and what is told of them before the work."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from builders import model, noise, run

from onnx_utilrank import (
    CompressConfig,
    ConfigError,
    DataError,
    FinetuneConfig,
    TrainConfig,
    compress,
    finetune,
    train,
)
from onnx_utilrank.calibration.labels import IGNORED, Labels
from onnx_utilrank.cli.main import main
from onnx_utilrank.config import QualityTarget
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.runtime.sessions import open_session
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.statistics.padding import Padding
from onnx_utilrank.training.objective import Objective

N, D, H, C = 300, 12, 16, 5
EMBEDDED = "a = MatMul(x, w1) b = Add(a, b1) emb = Tanh(b) y = Gemm(emb, w2, b2)"
SIDES = {
    "w1": 0.3 * noise(1, D, H),
    "b1": 0.1 * noise(2, H),
    "w2": 0.5 * noise(3, H, C),
    "b2": 0.1 * noise(4, C),
}
TRAINING = TrainConfig(labels="label", steps=150, learning_rate=1e-2)


def two_headed(outputs: str = f"float[n,{H}] emb, float[n,{C}] y") -> onnx.ModelProto:
    sides = {name: value.astype(np.float32) for name, value in SIDES.items()}
    return model(f"(float[n,{D}] x) => ({outputs})", EMBEDDED, **sides)


def data() -> dict[str, np.ndarray]:
    x = noise(9, N, D).astype(np.float32)
    return {"x": x, "label": (x @ noise(10, D, C)).argmax(-1).astype(np.int64)}


def accuracy(proto: onnx.ModelProto) -> float:
    held = data()
    return float(100 * np.mean(run(proto, {"x": held["x"]})["y"].argmax(-1) == held["label"]))


class TestWhichOutput:
    @pytest.mark.parametrize(
        "outputs",
        [f"float[n,{H}] emb, float[n,{C}] y", f"float[n,{C}] y, float[n,{H}] emb"],
    )
    def test_training_takes_the_one_with_as_many_classes(self, outputs):
        result = train(two_headed(outputs), data(), TRAINING)
        assert accuracy(result.model) > accuracy(two_headed(outputs)) + 20
        assert result.accuracy == pytest.approx(accuracy(result.model), abs=20)
        assert "Labels 'label' are classes of output 'y'." in result.notes

    def test_as_many_classes_tell_where_nothing_else_does(self):
        """Weights that were just drawn give scores that look like any values."""
        session = open_session(ModelStore.load(two_headed()), CPU)
        losses = [OutputLoss(output=name, weighting="values") for name in ("emb", "y")]
        found = Labels("label").find_output(session, losses, [data()], "data")
        assert found.output == "y"
        few = data() | {"label": np.minimum(data()["label"], 1)}  # of neither as many
        assert Labels("label").find_output(session, losses, [few], "data").output == "emb"

    def test_the_user_may_name_it(self):
        with pytest.raises(ConfigError, match=r"'z' is none of the outputs \['emb', 'y'\]"):
            train(two_headed(), data(), dataclasses.replace(TRAINING, labels="label=z"))
        dense = dataclasses.replace(TRAINING, labels="label=emb", method="dense")
        named = train(two_headed(), data(), dense)
        assert "Labels 'label' are classes of output 'emb'." in named.notes

    def test_a_metric_is_of_it_too(self):
        trained = train(two_headed(), data(), TRAINING).model
        config = CompressConfig(param_ratio=0.9, labels="label", moves=("low-rank",), force=True)
        result = compress(trained, data(), config)
        assert result.quality is not None
        assert result.quality.metric == pytest.approx(accuracy(trained), abs=20)
        assert result.quality.metric > 50
        assert "Labels 'label' are classes of output 'y'." in result.notes

    def test_fine_tuning_learns_it(self):
        trained = train(two_headed(), data(), TRAINING).model
        config = CompressConfig(param_ratio=0.6, method="svd", force=True)
        small = compress(trained, data(), config).model
        tuning = FinetuneConfig(labels="label", steps=60, learning_rate=5e-3)
        result = finetune(trained, small, data(), tuning)
        assert result.accuracy == pytest.approx(accuracy(result.model), abs=20)

    def test_compress_opens_the_labels_of_its_last_stage(self):
        config = CompressConfig(
            param_ratio=0.6,
            method="svd",
            force=True,
            finetune=FinetuneConfig(labels="label", steps=20),
        )
        result = compress(two_headed(), data(), config)
        assert result.recovered is not None
        assert result.recovered.accuracy is not None
        with pytest.raises(ConfigError, match="labels 'other' and 'label'"):
            dataclasses.replace(config, labels="other")


class TestFit:
    @pytest.mark.parametrize(
        ("labels", "reason"),
        [
            (np.full(N, C), "classes up to 5"),
            (np.full(N, -1), "-1 is no class"),
            (np.full(N, IGNORED), "no sample has a class"),
            (np.zeros((N, C)), "one for each of 32 x 5"),
        ],
    )
    def test_what_cannot_be_is_told_before_the_work(self, labels, reason):
        held = data() | {"label": labels.astype(np.int64)}
        plain = two_headed(f"float[n,{C}] y")
        begun: list[str] = []

        def watch(*state: object) -> None:
            begun.append(str(state[0]))

        with pytest.raises(DataError, match=reason):
            train(plain, held, TRAINING, progress=watch)
        tuning = FinetuneConfig(labels="label", steps=20)
        other = two_headed(f"float[n,{C}] y")
        other.graph.initializer[0].CopyFrom(
            onnx.numpy_helper.from_array(SIDES["w1"].astype(np.float32) / 2, "w1")
        )
        with pytest.raises(DataError, match=reason):
            finetune(plain, other, held, tuning, progress=watch)
        assert "training" not in begun
        quality = QualityTarget(key="max_drop", limit=1.0)
        with pytest.raises(DataError, match=reason):
            compress(plain, held, CompressConfig(quality=quality, labels="label"))

    def test_one_bad_label_anywhere_is_found(self):
        held = data()
        for place in (0, N // 2, N - 1):
            bad = held | {"label": held["label"].copy()}
            bad["label"][place] = C
            with pytest.raises(DataError, match="classes up to 5"):
                train(two_headed(f"float[n,{C}] y"), bad, TRAINING)


class TestPositions:
    SCORES = noise(20, 4, 6, C)

    def test_labels_of_positions_and_of_samples(self):
        loss = OutputLoss(output="y", weighting="softmax")
        each = {"x": np.zeros((4, 6)), "label": self.SCORES.argmax(-1)}
        assert Labels("label").right(each, self.SCORES, loss).all()
        whole = {"x": np.zeros((4, 6)), "label": self.SCORES.mean(1).argmax(-1)}
        assert Labels("label").right(whole, self.SCORES, loss).shape == (4,)
        assert Labels("label").right(whole, self.SCORES, loss).all()
        with pytest.raises(DataError, match="5 of them do not go with"):
            Labels("label").right({"x": np.zeros((4, 6)), "label": np.zeros(5)}, self.SCORES, loss)

    def test_padding_and_ignored_positions_do_not_count(self):
        loss = OutputLoss(output="y", weighting="softmax", padding=Padding("mask"))
        right = self.SCORES.argmax(-1)
        feed = {"mask": np.ones((4, 6), np.int64), "label": right.copy()}
        feed["label"][:, 3:] = (right[:, 3:] + 1) % C
        assert Labels("label").right(feed, self.SCORES, loss).mean() == 0.5
        feed["mask"][:, 4:] = 0
        feed["label"][:, 3] = IGNORED
        assert Labels("label").right(feed, self.SCORES, loss).tolist() == [True] * 12

    def test_the_loss_is_that_of_numpy(self):
        loss = OutputLoss(output="y", weighting="softmax")
        objective = Objective(labels=Labels("label"), classes=loss)
        labels = self.SCORES.argmin(-1)
        labels[0, 2:] = IGNORED
        z = self.SCORES - np.log(np.exp(self.SCORES).sum(-1, keepdims=True))
        counted = labels != IGNORED
        taken = np.take_along_axis(z, np.where(counted, labels, 0)[..., None], -1)[..., 0]
        made = {"y": torch.from_numpy(self.SCORES)}
        found = objective({"x": np.zeros((4, 6)), "label": labels}, made, {})
        # Means of 20 terms in float64.
        assert float(found) == pytest.approx(-taken[counted].mean(), rel=20 * 2**-50)
        nothing = objective({"x": np.zeros((4, 6)), "label": np.full((4, 6), IGNORED)}, made, {})
        assert float(nothing) == 0

    def test_tokens_are_trained_on_labels_of_their_own(self):
        """As taggers of tokens are: one label a token, -100 where none counts."""
        tokens = 7
        proto = model(
            f"(float[n,{tokens},{D}] x) => (float[n,{tokens},{C}] y)",
            "a = MatMul(x, w1) b = Add(a, b1) e = Tanh(b) c = MatMul(e, w2) y = Add(c, b2)",
            **{name: value.astype(np.float32) for name, value in SIDES.items()},
        )
        x = noise(21, 120, tokens, D).astype(np.float32)
        label = (x @ noise(10, D, C)).argmax(-1).astype(np.int64)
        right = label.copy()
        label[:, 0] = IGNORED
        result = train(proto, {"x": x, "label": label}, TRAINING)
        found = run(result.model, {"x": x})["y"].argmax(-1) == right
        assert 100 * found.mean() > result.accuracy_before + 20


def test_probabilities_in_half_precision_count():
    """In float16 the smallest of them are 0, whose logarithm would be no number."""
    sides = {name: 8 * value.astype(np.float16) for name, value in SIDES.items()}
    body = "a = MatMul(x, w1) b = Add(a, b1) e = Tanh(b) z = Gemm(e, w2, b2) y = Softmax<axis=1>(z)"
    sharp = model(f"(float16[n,{D}] x) => (float16[n,{C}] y)", body, **sides)
    held = data() | {"x": data()["x"].astype(np.float16)}
    session = open_session(ModelStore.load(sharp), CPU)
    assert (session.run(held)["y"] == 0).any()
    small = compress(sharp, held, CompressConfig(param_ratio=0.7, method="svd", force=True)).model
    tuning = FinetuneConfig(labels="label", steps=60, learning_rate=5e-3)
    result = finetune(sharp, small, held, tuning)
    assert all(np.isfinite(look.divergence) for look in result.history)
    assert result.kept


def test_labels_and_outputs_on_the_command_line(tmp_path: Path, capsys):
    onnx.save(two_headed(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **data())
    words = ["train", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "out.onnx")]
    words += ["--data", str(tmp_path / "data.npz"), "--steps", "20", "--labels"]
    assert main([*words, "label=y"]) == 0
    assert "Labels 'label' are classes of output 'y'." in " ".join(capsys.readouterr().out.split())
    assert main([*words, "label=z"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "'z' is none of the outputs" in line
