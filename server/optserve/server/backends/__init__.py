"""Where formulas run. `select` finds a backend; each backend's own dependency is imported only then."""

from __future__ import annotations

import importlib.util
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
def _cupy() -> Backend:
    from optserve.server.backends.cupy.backend import CupyBackend
    from optserve.server.backends.cupy.device import CupyDevice
    from optserve.server.backends.cupy.thread import DeviceThread

    device = CupyDevice()
    return CupyBackend(device, DeviceThread(device), _on_cpu())


def _on_cpu() -> Backend:
    return _numpy() if importlib.util.find_spec("numba") is None else _numba()


def gpu_obstacle() -> str | None:
    """Why "auto" takes no GPU here, and what to do about it; None if it takes one. Loads the driver: not before a fork."""
    from optserve.server.backends.cupy.device import obstacle

    return obstacle()


def select(name: str = "auto") -> Backend:
    """The backend of that name, one object a process; "auto" is cupy where there is a GPU, else numba, else numpy.

    MissingExtraError if its dependency or its device is missing, InvalidArgumentError if there is none of that name,
    OutOfMemoryError if the device has no room for buffers. A process that has a GPU here must not be forked.
    """
    if name not in NAMES:
        raise InvalidArgumentError(f"unknown backend {name!r}; allowed are {', '.join(NAMES)}")
    if name == "cupy" or (name == "auto" and gpu_obstacle() is None):
        return _cupy()
    if name == "numba" and importlib.util.find_spec("numba") is None:
        raise MissingExtraError("the numba backend needs Numba: pip install 'optserve[server]'", extra="server")
    return _numpy() if name == "numpy" else _on_cpu()
