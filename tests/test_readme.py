"""Every code block of the README runs, in its order, in a folder like a checkout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_blocks_run(tmp_path):
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf8"))
    assert {language for language, _ in blocks} == {"sh", "python"}
    (tmp_path / "models").symlink_to(ROOT / "models")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, text in blocks:
        command = ["bash", "-euc", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "half.onnx").exists()


@pytest.mark.parametrize(
    "target",
    # As a command, and not as a word of a sentence.
    re.findall(r"(?:^    |`)make (\w+)", (ROOT / "README.md").read_text("utf8"), re.MULTILINE),
)
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE)
