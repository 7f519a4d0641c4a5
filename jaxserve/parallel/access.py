"""Whether GPUs can write into each other's memory, as the CUDA driver says."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

ALREADY_ENABLED = 704
"""CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED: XLA has enabled it for the devices of its client."""


def refusal(ordinals: Sequence[int], driver: Any = None) -> str | None:
    """Why the GPUs of these CUDA ordinals have no access to each other, or None. Enables it where
    it is not yet: a kernel that wrote without would take the whole process's GPUs with it. driver:
    the CUDA driver library, by default that of the machine."""
    if driver is None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return "CUDA's driver library is not there"
    found: list[str | None] = []

    def ask() -> None:
        try:
            found.append(_refusal(ordinals, driver))
        except Failed as error:
            found.append(str(error))

    # A thread has a current context; this one's is of no concern to anybody.
    thread = threading.Thread(target=ask, name="jaxserve-peer-access")
    thread.start()
    thread.join()
    return found[0] if found else "the CUDA driver could not be asked"


class Failed(Exception):
    """A call of the driver gave an error."""


def _refusal(ordinals: Sequence[int], driver: Any) -> str | None:
    devices = []
    _call(driver, "cuInit", 0)
    for ordinal in ordinals:
        device = ctypes.c_int()
        _call(driver, "cuDeviceGet", ctypes.byref(device), ordinal)
        devices.append(device)
    pairs = [(i, j) for i in range(len(devices)) for j in range(len(devices)) if i != j]
    for i, j in pairs:
        can = ctypes.c_int()
        _call(driver, "cuDeviceCanAccessPeer", ctypes.byref(can), devices[i], devices[j])
        if not can.value:
            return f"GPU {ordinals[i]} cannot access the memory of GPU {ordinals[j]}"
    contexts = []
    try:
        for device in devices:
            context = ctypes.c_void_p()
            _call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            contexts.append(context)
        for i, j in pairs:
            _call(driver, "cuCtxSetCurrent", contexts[i])
            _call(driver, "cuCtxEnablePeerAccess", contexts[j], 0, fine=(0, ALREADY_ENABLED))
    finally:
        for device in devices[: len(contexts)]:  # JAX keeps them
            driver.cuDevicePrimaryCtxRelease_v2(device)
    return None


def _call(driver: Any, name: str, *arguments: Any, fine: tuple[int, ...] = (0,)) -> None:
    code = getattr(driver, name)(*arguments)
    if code not in fine:
        raise Failed(f"{name} of the CUDA driver failed with error {code}")
