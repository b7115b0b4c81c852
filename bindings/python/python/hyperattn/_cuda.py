"""The CUDA context that a call needs on its thread.

The library enqueues on the context that is current. PyTorch, CuPy and JAX use each device's primary context, which is
current only on threads that have called the CUDA runtime: it is made current here for the length of a call.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any


@functools.cache
def _driver() -> Any:
    """The CUDA driver, or None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


@functools.cache
def _primary_context(index: int) -> ctypes.c_void_p | None:
    """The device's primary context, retained for the life of the process as the CUDA runtime does."""
    driver = _driver()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver is None or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    return None if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) else context


@contextlib.contextmanager
def current_context(index: int) -> Iterator[None]:
    """The device's primary context current on this thread, and the one before it afterwards.

    Where there is no driver or device nothing happens: the library then says so.
    """
    context = _primary_context(index)
    if context is None or _driver().cuCtxPushCurrent_v2(context):
        yield
        return
    try:
        yield
    finally:
        _driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
