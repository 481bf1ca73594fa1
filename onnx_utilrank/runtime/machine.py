"""The processor and memory of this machine, as the system tells of them."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine", "look_at_machine", "processor"]

# Instructions that decide how fast products are, as Linux names them: those of x86, then of Arm.
FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
ARM_FEATURES = ("asimd", "asimddp", "i8mm", "bf16", "sve", "sme")

_INFORMATION = Path("/proc/cpuinfo")
_MEMORY = Path("/proc/meminfo")
# Of version 2 and version 1 of control groups, which containers limit memory by.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What models run on.

    Attributes:
        system: Operating system and architecture.
        processor: Its model, or else its family.
        features: For each instruction set that matters here whether the processor has it; None
            where the system does not tell (other systems than Linux).
        cores: Logical cores of the machine.
        usable_cores: Those that this process may run on.
        memory: Bytes of memory, or of the limit of the container; None where not told.
        free_memory: Bytes of it that are not taken; None where not told.
    """

    system: str
    processor: str
    features: dict[str, bool] | None
    cores: int
    usable_cores: int
    memory: int | None
    free_memory: int | None


def look_at_machine() -> Machine:
    """The machine as it is now."""
    cores = os.cpu_count() or 1
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    memory, free = _memory()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=processor(),
        features=_features(),
        cores=cores,
        usable_cores=len(affinity(0)) if affinity else cores,
        memory=memory,
        free_memory=free,
    )


def processor() -> str:
    """Its model where the system tells (Linux), or else its family."""
    return _told("model name") or platform.processor() or platform.machine()


def _features() -> dict[str, bool] | None:
    x86, arm = _told("flags"), _told("Features")
    has = set((x86 or arm or "").split())
    return {name: name in has for name in (FEATURES if x86 else ARM_FEATURES)} if has else None


def _told(key: str) -> str | None:
    """What Linux says of the first core."""
    if not _INFORMATION.is_file():
        return None
    for line in _INFORMATION.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _memory() -> tuple[int | None, int | None]:
    if not _MEMORY.is_file():
        names = getattr(os, "sysconf_names", {})
        if {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
        return None, None
    told = dict(line.split(":") for line in _MEMORY.read_text().splitlines())
    total, free = (2**10 * int(told[k].split()[0]) for k in ("MemTotal", "MemAvailable"))
    texts = [path.read_text().strip() for path in _LIMITS if path.is_file()]
    limit = min([total, *(int(text) for text in texts if text.isdecimal())])
    return limit, min(free, limit)
