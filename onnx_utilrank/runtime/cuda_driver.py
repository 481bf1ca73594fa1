"""What the NVIDIA driver itself says, by its C interface (CUDA Driver API)."""

import ctypes
import sys

__all__ = ["device_fault", "driver_version", "used_memory"]

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def device_fault() -> str | None:
    """Why no CUDA device can be used; None where there is one."""
    driver = _driver()
    if driver is None:
        return f"no NVIDIA driver is installed ({_LIBRARY} is missing)"
    status = driver.cuInit(0)
    if status:
        return f"the NVIDIA driver finds no GPU that it can use ({_error(driver, status)})"
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    return None if count.value else "the NVIDIA driver finds no GPU"


def driver_version() -> tuple[int, int] | None:
    """Newest CUDA that the driver supports, as (major, minor); None without a driver."""
    driver = _driver()
    version = ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def used_memory(device: int) -> int | None:
    """Bytes of a device's memory that are taken, by this process and all others; None if unknown.

    A context of this process is made there by the first call, and counts.
    """
    driver = _driver()
    if driver is None or driver.cuInit(0):
        return None
    ordinal, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    failed = (
        driver.cuDeviceGet(ctypes.byref(ordinal), device)
        or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal)
        or driver.cuCtxSetCurrent(context)
        or driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    )
    return None if failed else total.value - free.value


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        return None


def _error(driver: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    if driver.cuGetErrorString(status, ctypes.byref(text)) or text.value is None:
        return f"error {status}"
    return text.value.decode(errors="replace")
