"""What there is to compare with, and the virtual environment that each peer runs in."""

import hashlib
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PEERS", "InstallError", "Peer", "python_of"]

HERE = Path(__file__).resolve().parent
# Of torch, one version that every peer with a twin in it bears.
TORCH = ("torch==2.13.0", "torchvision==0.28.0")
RUNTIME = "onnxruntime==1.31.1"


class InstallError(Exception):
    """An environment cannot be made; the message is what pip says last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Something that makes a smaller ONNX file.

    Attributes:
        key: How it is called on the command line and in the table.
        script: A file beside this one, which takes a model, samples and the file to write, then
            `words`; it ends in status 0, or its last line on standard error says why not.
        words: Further arguments. KEEP stands for the share of parameters to keep.
        requirements: What pip installs for it; nothing where it runs in this environment.
        low_rank: Whether it keeps a share of the parameters.
    """

    key: str
    script: str
    words: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    low_rank: bool = False


AIMET = ("aimet-torch==2.42.0", "onnx2torch==1.5.15", *TORCH)
NNCF = ("nncf==3.4.0", "onnx==1.23.2", RUNTIME)
ORT = (RUNTIME, "onnx==1.23.2", "onnx-ir==1.1.0", "sympy==1.14.0")
PEERS = (
    Peer(key="onnxslim", script="slim.py", requirements=("onnxslim==0.1.98", RUNTIME)),
    Peer(
        key="aimet-weight-svd",
        script="aimet_svd.py",
        words=("weight-svd", "KEEP"),
        requirements=AIMET,
        low_rank=True,
    ),
    Peer(
        key="aimet-spatial-svd",
        script="aimet_svd.py",
        words=("spatial-svd", "KEEP"),
        requirements=AIMET,
        low_rank=True,
    ),
    Peer(key="svd-llm-whitening", script="whitened_svd.py", words=("KEEP",), low_rank=True),
    Peer(key="ours", script="ours.py", words=("KEEP",), low_rank=True),
    Peer(key="ort-int8", script="onnxruntime_bits.py", words=("int8",), requirements=ORT),
    Peer(key="nncf-int8", script="nncf_bits.py", words=("int8",), requirements=NNCF),
    Peer(key="ours-int8", script="ours.py", words=("KEEP", "int8"), low_rank=True),
    Peer(key="ort-int4", script="onnxruntime_bits.py", words=("int4",), requirements=ORT),
    Peer(key="nncf-int4", script="nncf_bits.py", words=("int4",), requirements=NNCF),
    Peer(key="ours-int4", script="ours.py", words=("KEEP", "int4"), low_rank=True),
)


def python_of(peer: Peer, folder: Path) -> str:
    """The interpreter of a peer's environment, which is made where it is missing.

    Args:
        peer: Whose.
        folder: Holds the environments, one for each list of requirements.

    Raises:
        InstallError: What it needs cannot be installed.
    """
    if not peer.requirements:
        return sys.executable
    name = hashlib.sha256("\n".join(peer.requirements).encode()).hexdigest()[:12]
    home = folder / f"{peer.requirements[0].partition('=')[0]}-{name}"
    python, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        print(f"installing {' '.join(peer.requirements)}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        words = [str(python), "-m", "pip", "install", "--quiet", *peer.requirements]
        made = subprocess.run(words, capture_output=True, text=True, check=False)
        if made.returncode:
            errors = [line for line in made.stderr.splitlines() if line.startswith("ERROR: ")]
            raise InstallError((errors or ["ERROR: no message"])[-1].removeprefix("ERROR: "))
        done.touch()
    return str(python)
