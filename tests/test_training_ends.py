"""Where training begins, joins and ends: what it may not touch, and when it has to stop."""

import dataclasses
import logging
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from builders import Fixed, model, noise, run

from onnx_utilrank import (
    CompressConfig,
    ConfigError,
    DataError,
    FinetuneConfig,
    ModelError,
    TrainConfig,
    compress,
    finetune,
    train,
)
from onnx_utilrank.calibration.cache import Cache
from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.calibration.labels import IGNORED
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.training import adaptive
from onnx_utilrank.training.adaptive import AdaptiveRanks
from onnx_utilrank.training.loop import Batch, Recipe, Trainer
from onnx_utilrank.training.objective import Objective
from onnx_utilrank.training.student import Student
from onnx_utilrank.training.subspaces import Subspace, subspace
from onnx_utilrank.training.weights import plain_parts, trainable_names

N, D, H, C = 120, 12, 16, 5
TRAINING = TrainConfig(
    labels="label=y", steps=60, learning_rate=1e-2, delay=10, interval=5, share=0.5
)


def sides(*names: str) -> dict[str, np.ndarray]:
    shapes = {"v": (D, H), "w": (H, H), "o": (H, C), "e": (D, H), "f": (H, H), "g": (H, C)}
    return {
        name: (noise(k, *shapes[name]) / math.sqrt(shapes[name][0])).astype(np.float32)
        for k, name in enumerate(names, start=1)
    }


CHAIN = "a = MatMul(x, v) b = Relu(a) c = MatMul(b, w) d = Relu(c) y = MatMul(d, o)"


def chain(rows: str = "n") -> onnx.ModelProto:
    signature = f"(float[{rows},{D}] x) => (float[{rows},{C}] y)"
    return model(signature, CHAIN, **sides("v", "w", "o"))


def data(n: int = N) -> dict[str, np.ndarray]:
    x = noise(20, n, D).astype(np.float32)
    return {"x": x, "label": (x @ noise(21, D, C)).argmax(-1)}


@pytest.fixture(scope="module")
def small() -> onnx.ModelProto:
    config = CompressConfig(param_ratio=0.7, method="svd", force=True)
    return compress(chain(), {"x": data()["x"]}, config).model


class TestWhatLabelsDoNotReach:
    BRANCHES = CHAIN + " h = MatMul(x, e) i = Relu(h) j = MatMul(i, f) k = Relu(j) z = MatMul(k, g)"
    SIGNATURE = f"(float[n,{D}] x) => (float[n,{C}] y, float[n,{C}] z)"

    def branches(self, body: str = "") -> onnx.ModelProto:
        return model(self.SIGNATURE, body or self.BRANCHES, **sides("v", "w", "o", "e", "f", "g"))

    @pytest.mark.parametrize("method", ["oialr", "dense"])
    def test_another_branch_stays(self, method):
        options = {"delay": None, "interval": None, "share": None} if method == "dense" else {}
        config = dataclasses.replace(TRAINING, method=method, **options)
        result = train(self.branches(), data(), config)
        feed = {"x": data()["x"]}
        before, after = (run(proto, feed) for proto in (self.branches(), result.model))
        np.testing.assert_array_equal(before["z"], after["z"])
        assert not np.array_equal(before["y"], after["y"])
        assert result.trainable == D * H + H * H + H * C
        assert not any("say nothing of" in note for note in result.notes)
        if method == "oialr":
            # The last layer is the last before the output that labels are of.
            assert set(result.ranks) == {"v", "w"}

    def test_outputs_that_share_weights_are_named(self):
        body = CHAIN + " z = MatMul(b, g)"
        proto = model(self.SIGNATURE, body, **sides("v", "w", "o", "g"))
        result = train(proto, data(), TRAINING)
        assert any("say nothing of change too: z" in note for note in result.notes)

    def test_an_output_without_weights_is_told(self):
        proto = model(
            f"(float[n,{D}] x) => (float[n,{D}] y, float[n,{C}] z)",
            "y = Relu(x) h = MatMul(x, e) i = Relu(h) z = MatMul(i, g)",
            **sides("e", "g"),
        )
        with pytest.raises(ModelError, match="no operator before 'y'"):
            train(proto, data(), TRAINING)


def test_every_part_of_the_samples_needs_a_class(small: onnx.ModelProto):
    held = data()
    only = np.arange(N) == 3
    held["label"] = np.where(only, held["label"], IGNORED)
    with pytest.raises(DataError, match="none of the samples"):
        train(chain(), held, TRAINING)
    with pytest.raises(DataError, match="none of the samples"):
        finetune(chain(), small, held, FinetuneConfig(labels="label", steps=5))


def test_a_candidate_that_no_step_made_better_stays(small: onnx.ModelProto):
    """Though bases, and the product of them, change the last bits of its weights."""
    config = FinetuneConfig(
        method="oialr", steps=40, learning_rate=1e-9, share=0.99, interval=1, delay=0
    )
    result = finetune(chain(), small, {"x": data()["x"]}, config)
    looks = [look.divergence for look in result.history]
    assert min(looks) == looks[0]
    assert not result.kept
    assert result.model.SerializeToString() == small.SerializeToString()
    assert any("No step made it better" in note for note in result.notes)


def test_minutes_end():
    for minutes in (0.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="minutes"):
            FinetuneConfig(minutes=minutes)


def test_a_delay_is_held_to_the_steps_that_minutes_turn_out_to_be(
    small: onnx.ModelProto, monkeypatch
):
    config = FinetuneConfig(method="oialr", minutes=1.0, delay=600)
    for steps in (610, 600):
        monkeypatch.setattr(Trainer, "settled", lambda *_, steps=steps: steps)
        if steps > 600:
            assert finetune(chain(), small, {"x": data()["x"]}, config).history[-1].step > 0
            continue
        with pytest.raises(ConfigError, match="delay 600 leaves none of 600 steps"):
            finetune(chain(), small, {"x": data()["x"]}, config)


@pytest.mark.parametrize("rerun", [1, 2])
def test_a_run_that_lost_patience_goes_no_further_from_its_checkpoint(
    tmp_path: Path, monkeypatch, rerun: int
):
    monkeypatch.setattr("onnx_utilrank.training.loop.CHECKPOINT_SECONDS", -1.0)
    store = ModelStore.load(chain())
    samples = open_data({"x": data()["x"]}, store.inputs)

    def trainer() -> Trainer:
        graph = TorchGraph.build(store)
        feed = {"x": data()["x"]}
        wanted = run(chain(), feed)
        return Trainer(
            Student(graph, plain_parts(graph, trainable_names(graph))),
            Objective(losses=(OutputLoss(output="y", weighting="softmax"),)),
            Fixed(Batch(feed, wanted)),
            lambda _: 1.0,
            Recipe(steps=40, learning_rate=1e-3, patience=3),
            progress=lambda *_: None,
            cache=Cache.open(tmp_path, store, samples, range(N)),
        )

    looks = [[look.step for look in trainer().run().looks] for _ in range(1 + rerun)]
    assert looks[0][-1] < 40
    assert all(each == looks[0] for each in looks)


@pytest.mark.parametrize("rows", [10, 48])
def test_samples_that_fill_runs_are_not_said_to_be_dropped(caplog, rows: int):
    config = CompressConfig(param_ratio=0.8, method="svd", force=True)
    held = {"x": data(10 * rows)["x"]}
    candidate = compress(chain(str(rows)), held, config).model
    with caplog.at_level(logging.WARNING):
        finetune(chain(str(rows)), candidate, held, FinetuneConfig(steps=5))
        compress(chain(str(rows)), held, CompressConfig(param_ratio=0.8))
    assert not [r for r in caplog.records if "dropped" in r.getMessage()]


@pytest.mark.parametrize("parts", [1, 5, 10, 15, 30])
def test_a_tenth_more_of_the_layers_joins_at_each_look(monkeypatch, parts: int):
    turned: list[int] = []
    monkeypatch.setattr(adaptive, "rotate", lambda part, *_: turned.append(id(part)))
    monkeypatch.setattr(adaptive, "_hand_over", lambda *_: None)
    held: list[Subspace] = [
        subspace(
            str(k), torch.randn(4, 3), torch.randn(3, 4), lambda left, right: {"w": left @ right}
        )
        for k in range(parts)
    ]
    graph = TorchGraph.build(ModelStore.load(chain()))
    student = Student(graph, [])
    student.parts = list(held)
    hook = AdaptiveRanks(share=0.1, delay=0, interval=1)
    optimizer = torch.optim.AdamW([part.core for part in held])
    for rounds in range(1, 13):
        turned.clear()
        hook(rounds, student, optimizer)
        joined = math.ceil(min(rounds, 10) * parts / 10 - 1e-9)
        assert turned == [id(part) for part in held[parts - joined :]]
