"""The backends with which contract tests run: those of a CPU, the GPU's without a GPU, and where there is one, with it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from host_device import cupy_on_host
from host_kernels import needs_compiler

from optserve.server.backends import Backend, select

GPU = pytest.param("cupy", marks=pytest.mark.gpu)
NUMBA = pytest.param("numba", marks=pytest.mark.skipif(find_spec("numba") is None, reason="Numba is not installed"))
EARLY = "cupy-on-host-copies-at-once"
BACKENDS = [NUMBA, "numpy", pytest.param("cupy-on-host", marks=needs_compiler), GPU]


def backend_named(name: str) -> Backend:
    """As `select`, and the cupy backend on a device of host memory."""
    if name.startswith("cupy-on-host"):
        return cupy_on_host(name == EARLY)
    return select(name)
