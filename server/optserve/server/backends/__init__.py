"""Where formulas run. `select` finds a backend; each backend's own dependency is imported only then."""

from __future__ import annotations

import importlib.util
from functools import cache

from optserve.server.backends.interface import Backend, Kernel
from optserve.wire.errors import InvalidArgumentError, MissingExtraError

__all__ = ["NAMES", "Backend", "Kernel", "select"]

NAMES = ("auto", "numba", "numpy", "cupy")
"""What `select` takes."""


@cache
def _numba() -> Backend:
    from optserve.server.backends.numba import NumbaBackend

    return NumbaBackend()


@cache
def _numpy() -> Backend:
    from optserve.server.backends.numpy import NumpyBackend

    return NumpyBackend()


def select(name: str = "auto") -> Backend:
    """The backend of that name, one object a process; "auto" is numba where it is installed, else numpy.

    MissingExtraError if its dependency is missing, InvalidArgumentError if there is none of that name.
    """
    if name == "cupy":
        raise MissingExtraError("the cupy backend is not part of this version of optserve; allowed are auto, numba and numpy")
    if name not in NAMES:
        raise InvalidArgumentError(f"unknown backend {name!r}; allowed are auto, numba and numpy")
    installed = importlib.util.find_spec("numba") is not None
    if name == "numba" and not installed:
        raise MissingExtraError("the numba backend needs Numba: pip install 'optserve[server]'", extra="server")
    if name == "numpy" or not installed:
        return _numpy()
    return _numba()
