"""The committed demo models are what models/README.md says, and their recipes work."""

import hashlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
NAMES = ["digits_cnn", "digits_vit"]

digits = pytest.importorskip("digits", reason="needs scikit-learn, the extra `demo`")


def run(path, images):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run([digits.OUTPUT_NAME], {digits.INPUT_NAME: images})
    return logits


@pytest.fixture(scope="module")
def split():
    return digits.load_digits_split()


def test_checksums_match_the_models():
    stated = dict(
        reversed(line.split("  ")) for line in (MODELS / "SHA256SUMS").read_text().splitlines()
    )
    assert stated == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in MODELS.glob("*.onnx")
    }
    assert sorted(stated) == [f"{name}.onnx" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_model_is_valid_and_self_contained(name):
    path = MODELS / f"{name}.onnx"
    onnx.checker.check_model(path, full_check=True)
    assert path.stat().st_size < 4_000_000
    content = path.read_bytes()
    # Traces of the machine that exported it.
    assert b".py" not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize("name", NAMES)
def test_model_reaches_the_accuracy_that_the_readme_states(name, split):
    row = re.search(
        rf"^\| `{name}\.onnx` .* (\d+) \((\d+\.\d+) %\) \|$",
        (MODELS / "README.md").read_text(),
        re.M,
    )
    right = int(row[1])
    total = len(split.test_labels)
    assert float(row[2]) == pytest.approx(100 * right / total)
    share = digits.accuracy(MODELS / f"{name}.onnx", split.test_images, split.test_labels)
    assert share == pytest.approx(right / total)


def test_parts_of_the_split_are_disjoint_and_stratified(split):
    parts = [split.train_images, split.calibration_images, split.test_images]
    assert [part.shape for part in parts] == [(n, 1, 8, 8) for n in (1097, 300, 400)]
    assert {part.dtype for part in parts} == {np.dtype(np.float32)}
    # No two of the bundled digits are equal, so equal images would mean overlapping parts.
    assert len(np.unique(np.concatenate(parts), axis=0)) == 1797
    assert np.bincount(split.test_labels).min() >= 38
    assert np.array_equal(digits.load_digits_split().test_images, split.test_images)


def test_digits_script_writes_the_files_of_the_demo(tmp_path, split):
    subprocess.run([sys.executable, MODELS / "digits.py", "-o", tmp_path / "new"], check=True)
    with np.load(tmp_path / "new" / "calibration.npz") as arrays:
        assert arrays.files == ["image"]
        assert np.array_equal(arrays["image"], split.calibration_images)
    with np.load(tmp_path / "new" / "test.npz") as arrays:
        assert sorted(arrays.files) == ["image", "label"]
        assert np.array_equal(arrays["image"], split.test_images)
        assert np.array_equal(arrays["label"], split.test_labels)


@pytest.fixture
def training():
    torch = pytest.importorskip("torch", reason="needs torch, the extra `recipes`")
    pytest.importorskip("onnxscript", reason="needs onnxscript, the extra `recipes`")
    # The tests run side by side: more threads than cores would make training ten times slower.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("training")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_makes_a_model_with_a_dynamic_batch(name, tmp_path, capsys, split, training):
    recipe = importlib.import_module(name).RECIPE
    path = tmp_path / f"{name}.onnx"
    training.main(recipe, ["-o", str(path), "--epochs", "1"])

    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    accuracy, checksum = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"accuracy \d+\.\d\d% on 400 held-out digits", accuracy)
    assert checksum == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"
    made, committed = (onnx.load(file).graph for file in (path, MODELS / path.name))
    assert [node.op_type for node in made.node] == [node.op_type for node in committed.node]
    assert "head/Gemm" in [node.name for node in made.node]
    assert b".py" not in path.read_bytes()
    logits = run(path, split.test_images[:7])
    assert logits.shape == (7, digits.CLASSES)
    for index in range(7):
        alone = run(path, split.test_images[index : index + 1])
        np.testing.assert_allclose(alone[0], logits[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_the_same_way_twice(name, training):
    recipe = importlib.import_module(name).RECIPE
    first, second = (training.train(recipe, 1).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)


def test_demo_counts_parameters_not_shapes(tmp_path):
    demo = importlib.import_module("demo")
    tensors = [
        onnx.numpy_helper.from_array(np.zeros((3, 4), np.float32), "weight"),
        onnx.numpy_helper.from_array(np.zeros((5,), np.float16), "bias"),
        onnx.numpy_helper.from_array(np.zeros((7,), np.int64), "shape"),
    ]
    graph = onnx.helper.make_graph([], "graph", [], [], initializer=tensors)
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    assert demo.parameter_count(path) == 17


@pytest.fixture
def colour_images(monkeypatch, tmp_path) -> list[str]:
    """Options that name files of colour images of another size."""
    monkeypatch.syspath_prepend(Path(digits.__file__).parent)
    rng = np.random.default_rng(0)
    files = []
    for name, count in (("train", 60), ("test", 20)):
        image = rng.random((count, 3, 16, 16), dtype=np.float32)
        files += [f"--{name}", str(tmp_path / f"{name}.npz")]
        np.savez(files[-1], image=image, label=np.arange(count) % 4)
    return files


def test_low_rank_recipe_runs_on_other_images(colour_images, capsys):
    recipe = importlib.import_module("low_rank_vit")
    assert recipe.main([*colour_images, "--steps", "4"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| dense", "| oialr"]


def test_pretraining_recipe_runs_on_other_images(colour_images, capsys):
    recipe = importlib.import_module("pretrained_vit")
    assert recipe.main([*colour_images, "--pretraining", "3", "--steps", "3"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    names = ["| masked patches alone", "| labels alone", "| masked patches, then labels"]
    assert [row[0] for row in rows] == names
    assert all(0 < float(row[2]) <= float(row[3].rstrip(" |")) <= 100 for row in rows)


@pytest.mark.parametrize("option", ["--train", "--test"])
def test_a_recipe_wants_both_files(colour_images, option, capsys):
    recipe = importlib.import_module("pretrained_vit")
    with pytest.raises(SystemExit) as ended:
        recipe.main([option, colour_images[1]])
    assert ended.value.code == 2
    assert "go together" in capsys.readouterr().err


def test_images_are_moved_by_up_to_an_eighth(training):
    images = torch.arange(2 * 3 * 16 * 16, dtype=torch.float32).reshape(2, 3, 16, 16) + 1
    seen = set()
    for seed in range(60):
        moved = training.shifted(images, torch.Generator().manual_seed(seed))
        assert moved.shape == images.shape
        for before, after in zip(images, moved, strict=True):
            rows, columns = (after[0] > 0).nonzero(as_tuple=True)
            down, right = int(rows.min()), int(columns.min())
            up, left = 15 - int(rows.max()), 15 - int(columns.max())
            seen |= {down, right, -up, -left}
            kept = after[:, down : 16 - up, right : 16 - left]
            torch.testing.assert_close(
                kept, before[:, up : 16 - down, left : 16 - right], rtol=0, atol=0
            )
    assert seen == {-2, -1, 0, 1, 2}
