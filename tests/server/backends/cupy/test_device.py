"""CuPy is called as it is to be called, and what is in a GPU's way is said. With a stand-in for CuPy."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cupy_stand_in
import numpy as np
import pytest
from cupy_stand_in import CUDADriverError, CUDARuntimeError, PinnedMemory, RawModule
from host_kernels import library, needs_compiler

from optserve.server.backends import select
from optserve.server.backends.cupy import device as devices
from optserve.server.backends.cupy import nvrtc
from optserve.server.backends.cupy.backend import CupyBackend
from optserve.server.backends.cupy.device import CupyDevice, obstacle
from optserve.server.backends.cupy.thread import DeviceThread
from optserve.server.formulas import find
from optserve.wire.errors import InternalError, MissingExtraError, OutOfMemoryError


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, and an NVRTC that is always found."""
    monkeypatch.setattr(devices.nvrtc, "find", lambda major: nvrtc.MAJORS if major == 13 else None)
    monkeypatch.setattr(devices, "_driver_loaded_by", None)
    return cupy_stand_in.install(monkeypatch)


def build(cupy: Any, folder: Path, **thread: Any) -> CupyBackend:
    device = CupyDevice()
    device.image = lambda text: str(library(text, folder)).encode()  # type: ignore[method-assign]
    return CupyBackend(device, DeviceThread(device, slots=2, **thread), select("numpy"))


@needs_compiler
def test_the_backend_computes_through_cupy(cupy: Any, tmp_path: Path) -> None:
    backend, adam = build(cupy, tmp_path), find("adam")
    assert backend.description == "cupy on stand-in"
    size, dtype = 5000, np.dtype(np.float16)
    start, g = (np.random.default_rng(seed).normal(size=size).astype(np.float32) for seed in range(2))
    p, m, v, total = backend.place(start), *(backend.zeros(size, np.float32) for _ in range(3))
    narrow, weights = backend.zeros(size, dtype), backend.host_zeros(size, dtype)
    scalars, choices = adam.values(adam.defaults, 1, {}), adam.choices(adam.defaults)
    backend.fold(total, g.astype(dtype), 0.5, True)
    backend.kernel(adam, choices, dtype)(p, total, [m, v], scalars, 1.0, narrow)
    backend.clear(narrow, np.array([7]))
    backend.publish(narrow, weights)
    expected, folded, published = start.copy(), np.zeros(size, np.float32), np.zeros(size, dtype)
    select("numpy").fold(folded, g.astype(dtype), 0.5, True)
    state = [np.zeros(size, np.float32) for _ in range(2)]
    select("numpy").kernel(adam, choices, dtype)(expected, folded, state, scalars, 1.0, published)
    published[7] = 0
    assert weights.tobytes() == published.tobytes()
    assert [backend.to_host(array).tobytes() for array in (p, m, v)] == [array.tobytes() for array in (expected, *state)]
    backend.publish(p, weights)
    assert weights.tobytes() == expected.astype(dtype).tobytes()
    assert backend.sum_of_squares(p) == select("numpy").sum_of_squares(expected)


@needs_compiler
@pytest.mark.parametrize("call", ["memcpyAsync", "eventQuery"])
def test_a_cuda_error_ends_the_process(call: str, cupy: Any, tmp_path: Path) -> None:
    said: list[str] = []
    backend = build(cupy, tmp_path, end=said.append)
    array = backend.zeros(8, np.float32)
    cupy.cuda.runtime.statuses[call] = 700
    with pytest.raises(InternalError, match="the device stand-in is lost: reading back: error 700"):
        backend.to_host(array)
    assert len(said) == 1


def test_an_event_that_has_not_happened_is_no_error(cupy: Any) -> None:
    device, event = CupyDevice(), cupy.cuda.Event()
    assert device.done(event)
    cupy.cuda.runtime.statuses["eventQuery"] = 600
    assert not device.done(event)


def test_memory_is_looked_for_before_it_is_asked_for(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CupyDevice()
    cupy.cuda.runtime.free = 3 << 20
    assert len(device.zeros(1 << 20, np.float32)) == 1 << 20, "the pool has 1 MiB more"
    with pytest.raises(
        OutOfMemoryError, match="stand-in has no memory for 8,388,608 bytes: 4,194,304 of 2,147,483,648 are free"
    ):
        device.zeros(1 << 20, np.float64)

    def in_pieces(*_: Any) -> None:
        raise MemoryError("Out of memory allocating 512 bytes")

    monkeypatch.setattr(cupy, "zeros", in_pieces)
    with pytest.raises(OutOfMemoryError, match="stand-in has no memory for 4 bytes"):
        device.zeros(1, np.float32)
    monkeypatch.setattr(PinnedMemory, "refused", 2)
    with pytest.raises(OutOfMemoryError, match="no pinned host memory for 1,024 bytes"):
        device.pinned(1024)
    monkeypatch.setattr(PinnedMemory, "refused", 700)
    with pytest.raises(CUDARuntimeError):
        device.pinned(1024)


def test_no_memory_for_kernels_is_a_typed_error(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CupyDevice()
    monkeypatch.setattr(RawModule, "refused", 2)
    with pytest.raises(OutOfMemoryError, match="stand-in has no memory for kernels: driver error 2"):
        device.load(b"", ["a"])
    monkeypatch.setattr(RawModule, "refused", 222)
    with pytest.raises(CUDADriverError):
        device.load(b"", ["a"])


def test_nothing_is_in_the_way_of_a_gpu(cupy: Any) -> None:
    assert obstacle() is None
    assert CupyDevice().arch == 90


@pytest.mark.parametrize(
    ("driver", "status", "said"),
    [
        (0, 35, "there is no NVIDIA driver: error 35"),
        (12040, 35, "the NVIDIA driver knows CUDA 12.4, CuPy is made for CUDA 13: pip install 'optserve[cuda12]' in its place"),
        (11080, 35, "the NVIDIA driver knows CUDA 11.8, CuPy is made for CUDA 13: install a later driver"),
        (13000, 100, "there is a driver, but no NVIDIA device, or CUDA_VISIBLE_DEVICES names none"),
        (13000, 802, "the NVIDIA driver does not start: error 802"),
    ],
)
def test_what_is_in_the_way_is_said(driver: int, status: int, said: str, cupy: Any) -> None:
    runtime = cupy.cuda.runtime
    runtime.driver, runtime.statuses["getDeviceCount"] = driver, status
    with pytest.raises(MissingExtraError, match=f"^{re.escape(said)}$"):
        CupyDevice()


def test_a_device_that_does_not_answer_at_all_cannot_be_used(cupy: Any) -> None:
    cupy.cuda.runtime.statuses["getDeviceProperties"] = 46
    with pytest.raises(MissingExtraError, match=r"^the device cannot be used: error 46$"):
        CupyDevice()


@pytest.mark.parametrize(("version", "runtime"), [("13.6.0", 13020), ("14.1.1", 12090), ("14.2.0", 11080)])
def test_an_older_cupy_is_in_the_way(version: str, runtime: int, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no bfloat16."""
    monkeypatch.setattr(cupy, "__version__", version)
    monkeypatch.setattr(cupy.cuda.runtime, "runtimeGetVersion", lambda: runtime)
    assert str(obstacle()).startswith(
        f"CuPy {version} for CUDA {runtime // 1000} is installed, but 14.2 or later for CUDA 12 or 13"
    )


def test_a_forked_child_has_no_gpu(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle() is None
    monkeypatch.setattr(devices.os, "getpid", lambda: 1)
    assert str(obstacle()).startswith("this process was forked from one that uses the GPU")


def test_a_missing_nvrtc_is_in_the_way(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(major: int) -> None:
        raise MissingExtraError(f"no NVRTC {major}")

    monkeypatch.setattr(devices.nvrtc, "find", missing)
    assert obstacle() == "no NVRTC 13"


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            "PermissionError(13, 'Permission denied', '/.cupy')",
            "[Errno 13] Permission denied: '/.cupy'. It needs a writable folder: set CUPY_CACHE_DIR to one",
        ),
        (r"ImportError('\n=====\nFailed to import CuPy.\n\n  libcudart==13\n=====\n')", "Failed to import CuPy. libcudart==13"),
        ("RuntimeError('module compiled against another NumPy')", "module compiled against another NumPy"),
    ],
)
def test_cupy_that_cannot_be_imported_is_in_the_way(
    raised: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cupy.py").write_text(f"raise {raised}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(devices, "_driver_loaded_by", None)
    importlib.invalidate_caches()
    assert obstacle() == f"CuPy cannot be imported: {said}"


def test_a_server_on_a_cpu_imports_no_cupy(tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("print('imported')")
    code = "import optserve.server.backends.cupy.backend; from optserve.server import backends; backends.select('numpy')"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == ""
