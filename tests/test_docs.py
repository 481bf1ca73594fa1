"""Every code block of the README and the pages runs, page by page, in a folder like a checkout."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import synthetic_bert
from digits import load_digits_split, write_npz
from onnx_utilrank.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
ZOO = Path(os.environ.get("ONNX_UTILRANK_ZOO") or ROOT.parent / "shared" / "zoo")
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs" / "pages").glob("*.md"))]
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# Commands that print the tables of measurements; the tests of the scripts run them on small things.
TABLE = re.compile(r"^    (?:\w+=\S+ )?python (tools/\S+\.py)(.*)$", re.MULTILINE)

# Blocks with these words in them do not run here, and why.
NOT_RUN = {
    "pip install": "it would change the environment of the tests; `make` runs it",
    "optimum-cli export": "it downloads a model",
    "AutoTokenizer.from_pretrained(": "it downloads a tokenizer",
    "tf2onnx.convert": "its file has to be fetched, and TensorFlow installed",
}

TINY_BERT = synthetic_bert.BertShape(width=32, layers=1, heads=2, vocabulary=200, positions=32)


def blocks(page):
    """Language, file name and text of each block."""
    return BLOCK.findall(page.read_text(encoding="utf8"))


def reason_not_to_run(text):
    return next((why for words, why in NOT_RUN.items() if words in text), None)


def zoo_samples(folder, name, samples):
    """A model of the zoo as `NAME.onnx`, and its samples."""
    if not (ZOO / "zoo.py").is_file():
        pytest.skip("no zoo of models: set ONNX_UTILRANK_ZOO")
    words = [sys.executable, str(ZOO / "zoo.py"), "calib", name, "-o", str(folder / "zoo.npz")]
    subprocess.run([*words, "--samples", str(samples)], check=True, capture_output=True)
    with np.load(folder / "zoo.npz") as arrays:
        return ZOO / name / "model.onnx", dict(arrays)


def place_photos(folder):
    (folder / "photos").mkdir()
    for k, image in enumerate(load_digits_split().test_images[:4]):
        Image.fromarray((image[0] * 255).astype(np.uint8)).save(folder / "photos" / f"{k}.png")


def place_encoder(folder):
    onnx.save(synthetic_bert.build(TINY_BERT), folder / "encoder.onnx")
    ids = np.random.default_rng(0).integers(0, 200, (60, 16))
    np.savez(folder / "sentences.npz", input_ids=ids, attention_mask=np.ones_like(ids))


def place_recordings(folder):
    model, arrays = zoo_samples(folder, "kwt1", 5)
    (folder / "speech.onnx").symlink_to(model)
    (folder / "recordings").mkdir()
    for k, clip in enumerate(arrays["input_1"]):
        with wave.open(str(folder / "recordings" / f"{k}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes((clip * 32767).astype("<i2").tobytes())


def place_tokens(folder):
    model, arrays = zoo_samples(folder, "stories260k", 6)
    (folder / "llm.onnx").symlink_to(model)
    np.savez(folder / "tokens.npz", **arrays)


def place_digits(folder):
    write_npz(folder / "data")


# What stands in for files that a page takes from elsewhere.
STAND_INS = {
    "vision.md": place_photos,
    "text-encoder.md": place_encoder,
    "speech.md": place_recordings,
    "language-model.md": place_tokens,
    "past-one-machine.md": place_digits,
}
# Samples that blocks run on, of those that a page makes: that they run is what is tested.
SAMPLES = 60


def thin(folder):
    """Fewer samples of the digits, where a block has made them."""
    for file in folder.glob("data/*.npz"):
        with np.load(file) as arrays:
            held = dict(arrays)
        if any(len(array) > SAMPLES for array in held.values()):
            np.savez(file, **{name: array[:SAMPLES] for name, array in held.items()})


def commands(text):
    """The words of each command; None where they are more than words, and need a shell."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    if re.search(r"[|&;<>$`*#]", text):
        return None
    return [shlex.split(line) for line in lines]


def run_block(language, text, folder, environment):
    """Run a block as a reader would; our own commands in this process, which has loaded torch."""
    plain = commands(text) if language == "sh" else None
    steps = [["bash", "-euc", text]] if language == "sh" else [[sys.executable, "-c", text]]
    for words in plain or steps:
        if words[0] == "onnx-utilrank":
            assert main(words[1:]) == 0, words
            continue
        done = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name
)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    STAND_INS.get(page.name, lambda _: None)(tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Olive would report to its makers.
    quiet = {"OLIVE_DISABLE_TELEMETRY": "1", "CI": "1", "PATH": path}
    for language, name, text in blocks(page):
        assert language in ("sh", "python", "text", "json", "yaml")
        if name:
            (tmp_path / name).write_text(text, encoding="utf8")
        if language not in ("sh", "python") or reason_not_to_run(text):
            continue
        if "olive run" in text and importlib.util.find_spec("olive") is None:
            pytest.skip("Olive is not installed (extra `olive`)")
        run_block(language, text, tmp_path, os.environ | quiet)
        thin(tmp_path)


def test_readers_are_told_what_does_not_run():
    used = set()
    for page in PAGES:
        text = page.read_text(encoding="utf8")
        for language, _, block in blocks(page):
            if language in ("sh", "python") and reason_not_to_run(block):
                used.add(reason_not_to_run(block))
                before = " ".join(text[: text.index(block)].split("\n\n")[-2].split())
                assert "pip install" in block or "not run by the tests" in before, block
    assert used == set(NOT_RUN.values())


def test_commands_of_tables_have_their_options(monkeypatch, capsys):
    commands = [command for page in PAGES for command in TABLE.findall(page.read_text("utf8"))]
    assert commands
    for script, words in commands:
        monkeypatch.syspath_prepend((ROOT / script).parent)
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(Path(script).stem).main(["--help"])
        told = capsys.readouterr().out
        for word in shlex.split(words):
            assert not word.startswith("--") or re.search(rf"{word}\b", told), (script, word)


@pytest.mark.parametrize(
    "target",
    # As a command, and not as a word of a sentence.
    re.findall(r"(?:^    |`)make (\w+)", README.read_text("utf8"), re.MULTILINE),
)
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE)


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", README.read_text(encoding="utf8"))
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).is_file(), link


@pytest.mark.skipif(
    importlib.util.find_spec("material") is None,
    reason="mkdocs-material is not installed (extra `docs`)",
)
def test_site_is_built_and_takes_nothing_from_elsewhere(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mkdocs", "build", "--strict"),
            *("-f", str(ROOT / "docs" / "mkdocs.yml"), "-d", str(tmp_path / "site")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf8")
        assert not re.search(r"<(?:script|img|iframe)[^>]*\bsrc=\"?(?:https?:)?//", text), page
        assert not re.search(r"<link[^>]*\bstylesheet[^>]*\bhref=\"?(?:https?:)?//", text), page
        assert "--8&lt;--" not in text, page
