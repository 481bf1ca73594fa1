"""`tools/peers`: the table of what others make, by those of them that run in this environment."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from digits import load_digits_split

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tools" / "peers"

# Its metric is the size of the file, so that it tells models apart.
ZOO = """
import json, os, sys
import numpy as np
verb, name = sys.argv[1:3]
here = os.path.dirname(os.path.abspath(__file__))
if verb == "calib":
    n = int(sys.argv[sys.argv.index("--samples") + 1])
    with np.load(os.path.join(here, "samples.npz")) as arrays:
        np.savez(sys.argv[4], image=arrays["image"][:n])
else:
    before = os.path.getsize(os.path.join(here, name, "model.onnx")) / 1000
    after = os.path.getsize(sys.argv[3]) / 1000
    print(json.dumps({"metric": "kB", "value": after, "n": 9, "baseline": before,
                      "drop": before - after}))
"""


@pytest.fixture(scope="module")
def peers():
    """The driver and its list, as they are where the script runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("run"), importlib.import_module("peer")


@pytest.fixture
def zoo(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "model.onnx").symlink_to(ROOT / "models" / "digits_cnn.onnx")
    (tmp_path / "zoo.py").write_text(ZOO, encoding="utf8")
    np.savez(tmp_path / "samples.npz", image=load_digits_split().calibration_images[:40])
    return tmp_path


def cells(text):
    rows = [line for line in text.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert len({len(row) for row in split}) == 1, "the rows differ in length"
    return [split[0], *split[2:]]


def test_peers_are_measured_beside_the_original(peers, zoo, monkeypatch, capsys):
    run, _ = peers
    monkeypatch.setattr(run, "python_of", lambda *_: sys.executable)
    chosen = ("svd-llm-whitening", "ort-int8", "ort-int4")
    words = ["--models", "digits", "--samples", "40", "--seconds", "0", "--keep", "0.6"]
    assert run.main(["--zoo", str(zoo), *words, "--peers", *chosen]) == 0
    out = capsys.readouterr().out
    head, original, whitened, int8, int4 = cells(out)
    assert tuple(head) == run.COLUMNS
    assert out.startswith("    ONNX_UTILRANK_ZOO=ZOO python tools/peers/run.py --models digits ")
    assert str(zoo) not in out
    assert original[1:5] == ["the original", "–", "–", "1594.69"]
    assert whitened[1] == "svd-llm-whitening (60 %)"
    assert float(whitened[2]) == pytest.approx(0.6, abs=0.01)
    assert float(int8[2]) == pytest.approx(0.25, abs=0.05)
    for row in (whitened, int8):
        assert float(row[5]) == pytest.approx(1594.689 * (1 - float(row[2])), abs=2)
        assert re.fullmatch(r"[\d.]+ \([\d.]+-[\d.]+\)", row[6])
        assert float(row[3].split(" ± ")[0]) >= 0
        assert float(row[8]) > 50  # a process that loads ONNX Runtime
    # The network has no MatMul, which is all that this scheme takes.
    assert int4[1] == "ort-int4: no MatMul with a constant: nothing is stored in 4 bits"
    assert set(int4[2:]) == {"–"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--zoo", "nowhere"], "not a zoo"),
        (["--peers", "distiller"], "invalid choice: 'distiller'"),
        (["--keep", "1.5"], "--keep is not in (0, 1]"),
        (["--samples", "4"], "too few samples"),
    ],
)
def test_wrong_options_are_told(peers, zoo, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        peers[0].main(["--zoo", str(zoo), *words])
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_ends_in_status_1(peers, zoo, capsys):
    assert peers[0].main(["--zoo", str(zoo), "--models", "none", "--peers", "ours"]) == 1
    assert "none" in capsys.readouterr().err


def test_what_cannot_be_installed_is_told(peers, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    missing = peers[1].Peer(key="none", script="ours.py", requirements=("no-such-package==1",))
    with pytest.raises(peers[1].InstallError, match=r"No matching distribution.*no-such"):
        peers[1].python_of(missing, tmp_path)
    assert not list(tmp_path.glob("*/installed"))


def test_the_script_finds_the_modules_of_the_folder_above(tmp_path):
    words = [sys.executable, str(FOLDER / "run.py"), "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tools/peers/run.py" in done.stdout


def test_reasons_are_what_went_wrong_without_places(peers, zoo, tmp_path):
    held = peers[0].Zoo(folder=zoo, program="", work=tmp_path / "w", samples=9, limit=None)
    told = f"""INFO: {zoo}/digits
Traceback (most recent call last):
  File "script.py", line 9, in <module>
    raise GroupSizeError(msg)
some.errors.GroupSizeError: {tmp_path}/w/out.onnx: no group
of 7:
  a layer (size: 3)
"""
    assert held.error_line(told) == "some.errors.GroupSizeError: out.onnx: no group"
    row = peers[0].Row(model="digits", peer="ours", reason="long " * 100)
    assert len(cells(peers[0].table([row]))[1][1]) < 220


def test_the_peak_of_a_process_is_its_own(peers, tmp_path):
    """Not that of the test's process, which has held more by now."""
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(f'{sys.argv[1:]} {__name__}')", encoding="utf8")
    held = bytearray(300 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    words = [str(script), "a", "b"]
    status, _, peak, told = peers[0].watched(sys.executable, words, tmp_path)
    assert (status, told) == (1, "['a', 'b'] __main__\n")
    assert 1 < peak < 100
    assert len(held) > 2**20 * peak


def test_every_peer_has_a_script(peers):
    listed = peers[1].PEERS
    assert len({peer.key for peer in listed}) == len(listed)
    scripts = {path.name for path in FOLDER.glob("*.py")} - {"peer.py", "run.py", "peak.py"}
    assert {peer.script for peer in listed} == scripts
