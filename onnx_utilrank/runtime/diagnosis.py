"""Why an execution provider cannot be had here, and what to install."""

import ctypes
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from onnx_utilrank.runtime.cuda_driver import device_fault, driver_version
from onnx_utilrank.runtime.packages import runtime_packages
from onnx_utilrank.runtime.provider import Provider

__all__ = ["Diagnosis", "diagnose", "missing_libraries"]

REQUIREMENTS = "https://onnxruntime.ai/docs/execution-providers/"

_DRIVER = "libcuda."
_TENSORRT = ("libnvinfer", "libnvonnxparser")
_CUDA = ("libcublas", "libcudart", "libcufft", "libcurand", "libnvrtc", "libcudnn", "libcusparse")


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What is wrong with an execution provider on this machine.

    Attributes:
        faults: What was found, each a clause.
        remedies: What to do about it, each an instruction.
    """

    faults: tuple[str, ...]
    remedies: tuple[str, ...]

    def __str__(self) -> str:
        text = "; ".join(self.faults)
        return f"{text}. To have it: {'; '.join(self.remedies)}" if self.remedies else text


def diagnose(provider: Provider, reason: str = "") -> Diagnosis:
    """Look for what keeps a provider from working.

    Args:
        provider: One that is not in this build, or that no session could be opened with.
        reason: What ONNX Runtime said, where it said anything.
    """
    packages = runtime_packages()
    faults, remedies = [], []
    if len(packages) > 1:
        faults.append(
            f"the packages {' and '.join(packages)} are installed at once and overwrite each "
            "other's files"
        )
        remedies += [f"pip uninstall {' '.join(packages)}", f"pip install {_wanted(provider)}"]
    if provider.name not in ort.get_available_providers():
        version = f"{' and '.join(packages) or 'ONNX Runtime'} {ort.__version__}"
        faults.append(f"{version}, which is installed here, was built without {provider.name}")
        if not remedies:
            remedies += _other_build(provider, packages)
        return Diagnosis(faults=tuple(faults), remedies=tuple(remedies))
    missing = missing_libraries(provider)
    if missing:
        faults.append(f"shared libraries are missing: {', '.join(missing)}")
        remedies += _libraries(missing)
    device = _device_fault() if provider.nvidia else None
    if device is not None:
        faults.append(device)
        remedies.append("an NVIDIA GPU with a driver for it")
    if reason or not faults:
        faults.append(f"ONNX Runtime says: {reason}" if reason else "ONNX Runtime does not say why")
    if not remedies:
        remedies.append(f"see {REQUIREMENTS}")
    return Diagnosis(faults=tuple(faults), remedies=tuple(remedies))


def missing_libraries(provider: Provider) -> tuple[str, ...]:
    """Shared libraries that the library of a provider needs and the loader does not find.

    Linux alone, by `ldd`; what this process has loaded already is not missing. Empty where that
    cannot be told.
    """
    library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{provider.key}.so"
    if sys.platform != "linux" or not library.is_file():
        return ()
    try:
        listed = subprocess.run(["ldd", library], capture_output=True, text=True, check=False)
    except OSError:
        return ()
    names = dict.fromkeys(re.findall(r"(\S+) => not found", listed.stdout))
    return tuple(name for name in names if not _loads(name))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _libraries(missing: tuple[str, ...]) -> list[str]:
    """What brings libraries, each thing once, in the order they are missed."""
    found = []
    for name in missing:
        if name.startswith(_CUDA):
            found.append('pip install "onnxruntime-gpu[cuda,cudnn]", for CUDA and cuDNN')
        elif name.startswith(_TENSORRT):
            series = name.rpartition(".so.")[2].partition(".")[0]
            cuda = _built_with()
            package = f"tensorrt-cu{cuda[0]}" if cuda else "tensorrt"
            found.append(f'pip install "{package}=={series}.*"')
        elif not name.startswith(_DRIVER):  # it comes with the driver, of which more is known
            found.append(f"a package that brings {name}")
    return list(dict.fromkeys(found))


def _device_fault() -> str | None:
    fault = device_fault()
    built, driver = _built_with(), driver_version()
    if fault is None and built and driver and driver[0] < built[0]:
        return (
            f"the NVIDIA driver supports CUDA {driver[0]}.{driver[1]} and older, and this ONNX "
            f"Runtime is built with CUDA {built[0]}.{built[1]}"
        )
    return fault


def _built_with() -> tuple[int, int] | None:
    """CUDA that this ONNX Runtime is built with, as (major, minor)."""
    version = re.match(r"(\d+)\.(\d+)", str(getattr(ort, "cuda_version", "")))
    return (int(version[1]), int(version[2])) if version else None


def _wanted(provider: Provider) -> str:
    return provider.package or "the one of them that is wanted"


def _other_build(provider: Provider, packages: tuple[str, ...]) -> list[str]:
    if provider.package is None:
        return [f"an ONNX Runtime that is built with it, see {REQUIREMENTS}"]
    if provider.package in packages:
        return [f"a platform on which {provider.package} has it, see {REQUIREMENTS}"]
    # The packages write the same files: one has to go before the other comes.
    gone = [f"pip uninstall {' '.join(packages)}"] if packages else []
    return [*gone, f"pip install {provider.package}"]
