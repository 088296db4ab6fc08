"""Where formulas run. `select` finds a backend; each backend's own dependency is imported only then."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

from optserve.server.backends.interface import Backend, Kernel
from optserve.wire.errors import InvalidArgumentError, MissingExtraError

__all__ = ["NAMES", "Backend", "Kernel", "gpu_obstacle", "select"]

NAMES = ("auto", "cupy", "numba", "numpy")
"""What `select` takes."""


@cache
def _numba() -> Backend:
    from optserve.server.backends.numba import NumbaBackend

    return NumbaBackend()


@cache
def _numpy() -> Backend:
    from optserve.server.backends.numpy import NumpyBackend

    return NumpyBackend()


@cache
def _cupy(owns_process: bool) -> Backend:
    from optserve.server.backends.cupy.backend import CupyBackend
    from optserve.server.backends.cupy.device import CupyDevice
    from optserve.server.backends.cupy.thread import DeviceThread, end_process, refuse_all

    device = CupyDevice()
    return CupyBackend(device, DeviceThread(device, end=end_process if owns_process else refuse_all), _on_cpu())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_cupy.cache_clear)  # a forked child has neither the thread nor a device


def _on_cpu() -> Backend:
    return _numpy() if importlib.util.find_spec("numba") is None else _numba()


def gpu_obstacle() -> str | None:
    """Why "auto" takes no GPU here, and what to do about it; None if it takes one. Loads the driver: not before a fork."""
    from optserve.server.backends.cupy.device import obstacle

    return obstacle()


def select(name: str = "auto", owns_process: bool = False) -> Backend:
    """The backend of that name, one object a process; "auto" is cupy where there is a GPU, else numba, else numpy.

    `owns_process`: whether to lose the GPU ends the process, which then is nobody else's, or only all work on it.
    MissingExtraError if its dependency or its device is missing, InvalidArgumentError if there is none of that name,
    OutOfMemoryError if the device has no room for buffers. A child forked from a process that has a GPU here has none.
    """
    if name not in NAMES:
        raise InvalidArgumentError(f"unknown backend {name!r}; allowed are {', '.join(NAMES)}")
    if name == "cupy" or (name == "auto" and gpu_obstacle() is None):
        return _cupy(owns_process)
    if name == "numba" and importlib.util.find_spec("numba") is None:
        raise MissingExtraError("the numba backend needs Numba: pip install 'optserve[server]'", extra="server")
    return _numpy() if name == "numpy" else _on_cpu()
