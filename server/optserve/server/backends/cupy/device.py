"""The GPU as the backend sees it, and CuPy behind it: this module alone imports CuPy, and only when it is asked to.

What is not said to be callable from any thread is called by the one thread that called `enter`. Streams run beside each other;
all memory is allocated on `compute`, so that what is freed may be used again by what comes later on that stream.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from optserve.server.backends.cupy import nvrtc
from optserve.server.backends.interface import Array
from optserve.wire.errors import MissingExtraError, OutOfMemoryError

_DONE, _NO_MEMORY, _OLD_DRIVER, _NO_DEVICE, _NOT_READY = 0, 2, 35, 100, 600
"""cudaSuccess, cudaErrorMemoryAllocation, cudaErrorInsufficientDriver, cudaErrorNoDevice, cudaErrorNotReady."""

_LEAST_CUPY = (14, 2)
"""Has arrays of bfloat16."""


class Device(Protocol):
    """One GPU, or in tests something that does as one."""

    name: str
    """As people call it."""
    xp: Any
    """Array functions that work on its arrays, on the stream `compute`."""
    processors: int
    """How many blocks of a kernel run at the same time, at least."""
    failures: tuple[type[Exception], ...]
    """Errors after which nothing on the device can be trusted: CUDA reports them again and again until the process ends."""
    copy: Any
    compute: Any
    fetch: Any

    def enter(self) -> None:
        """Makes the device the calling thread's and creates its streams: `copy` (to it), `compute`, `fetch` (from it)."""

    def image(self, source: str) -> bytes:
        """Compiles, in any thread."""

    def load(self, image: bytes, names: Sequence[str]) -> list[Any]:
        """Kernels, ready to be launched. OutOfMemoryError."""

    def launch(self, kernel: Any, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        """On `compute`. Arrays go by their address, NumPy scalars and one-element structs by value."""

    def zeros(self, length: int, dtype: npt.DTypeLike) -> Array:
        """Device memory, cleared on `compute`. OutOfMemoryError."""

    def pinned(self, nbytes: int) -> Array:
        """Host memory of exactly that size that the copy engines reach; zeros. In any thread. OutOfMemoryError."""

    def address(self, array: Array) -> int:
        """Of device memory. In any thread."""

    def upload(self, into: Array, source: Array, stream: Any) -> None:
        """As many bytes as `source` has, from host memory. If that is pinned it must stay until the stream has come there."""

    def download(self, into: Array, source: Array, stream: Any) -> None:
        """As many bytes as `into` has, to host memory, which must stay likewise."""

    def record(self, stream: Any) -> Any:
        """An event that happens when the stream has come there."""

    def await_event(self, stream: Any, event: Any) -> None:
        """What comes later on the stream begins after the event."""

    def done(self, event: Any) -> bool:
        """Whether it has happened. In any thread; raises one of `failures`."""


class CupyDevice:
    """Implements Device: the first GPU that CUDA shows this process."""

    def __init__(self) -> None:
        """MissingExtraError says why there is none, or what to install."""
        why = obstacle()
        if why is not None:
            raise MissingExtraError(why)
        import cupy  # pyright: ignore[reportMissingImports]

        self.xp = cupy
        self._runtime = cupy.cuda.runtime
        try:
            self._index = self._runtime.getDevice()
            properties = self._runtime.getDeviceProperties(self._index)
        except self._runtime.CUDARuntimeError as error:
            raise MissingExtraError(f"the device cannot be used: {error}") from error
        self.name = properties["name"].decode()
        self.processors = int(properties["multiProcessorCount"])
        self.arch = 10 * int(properties["major"]) + int(properties["minor"])
        errors = (self._runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError)
        self.failures: tuple[type[Exception], ...] = errors
        self._nvrtc = nvrtc.find(self._runtime.runtimeGetVersion() // 1000)

    def enter(self) -> None:
        self._runtime.setDevice(self._index)
        stream = self.xp.cuda.Stream
        self.copy, self.compute, self.fetch = (stream(non_blocking=True) for _ in range(3))
        self.compute.use()

    def image(self, source: str) -> bytes:
        return self._nvrtc.image(source, self.arch)

    def load(self, image: bytes, names: Sequence[str]) -> list[Any]:
        # CuPy reads the file when the first function is asked for, and keeps modules by their path: each needs one of its own.
        with tempfile.TemporaryDirectory(prefix="optserve-") as folder:
            path = Path(folder) / "optserve.cubin"
            path.write_bytes(image)
            module = self.xp.RawModule(path=str(path))
            try:
                return [module.get_function(name) for name in names]
            except self.failures as error:
                if error.status != _NO_MEMORY:  # type: ignore[attr-defined]
                    raise
                raise OutOfMemoryError(f"{self.name} has no memory for kernels: {error}") from error

    def launch(self, kernel: Any, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        kernel((blocks,), (threads,), tuple(arguments), stream=self.compute)

    def zeros(self, length: int, dtype: npt.DTypeLike) -> Array:
        wanted = length * np.dtype(dtype).itemsize
        free, total = self._runtime.memGetInfo()
        free += self.xp.get_default_memory_pool().free_bytes()
        refusal = f"{self.name} has no memory for {wanted:,} bytes: {free:,} of {total:,} are free"
        if wanted > free:
            raise OutOfMemoryError(refusal)
        try:
            return self.xp.zeros(length, dtype)  # type: ignore[no-any-return]
        except MemoryError as error:  # CuPy's own: in pieces that are each too small
            raise OutOfMemoryError(refusal) from error

    def pinned(self, nbytes: int) -> Array:
        if nbytes == 0:
            return np.zeros(0, np.uint8)
        try:
            with self.xp.cuda.Device(self._index):
                memory = self.xp.cuda.PinnedMemory(nbytes, self._runtime.hostAllocPortable)
        except self._runtime.CUDARuntimeError as error:
            if error.status != _NO_MEMORY:
                raise
            raise OutOfMemoryError(f"no pinned host memory for {nbytes:,} bytes") from error
        array = np.frombuffer(self.xp.cuda.PinnedMemoryPointer(memory, 0), np.uint8, nbytes)
        array[:] = 0
        return array

    def address(self, array: Array) -> int:
        return array.data.ptr  # type: ignore[attr-defined, no-any-return]

    def upload(self, into: Array, source: Array, stream: Any) -> None:
        kind = self._runtime.memcpyHostToDevice
        self._runtime.memcpyAsync(self.address(into), source.ctypes.data, source.nbytes, kind, stream.ptr)

    def download(self, into: Array, source: Array, stream: Any) -> None:
        kind = self._runtime.memcpyDeviceToHost
        self._runtime.memcpyAsync(into.ctypes.data, self.address(source), into.nbytes, kind, stream.ptr)

    def record(self, stream: Any) -> Any:
        return stream.record(self.xp.cuda.Event(disable_timing=True))

    def await_event(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def done(self, event: Any) -> bool:
        # Event.done takes every error for "not yet".
        status = self._runtime.eventQuery(event.ptr)
        if status not in (_DONE, _NOT_READY):
            raise self._runtime.CUDARuntimeError(status)
        return bool(status == _DONE)


_driver_loaded_by: int | None = None
"""A process id, once a device was found."""


def obstacle() -> str | None:
    """Why no formula can run on a GPU here, and what to do about it; None if it can. Loads the driver: not before a fork."""
    global _driver_loaded_by
    if _driver_loaded_by not in (None, os.getpid()):
        return "this process was forked from one that uses the GPU, where CUDA does not work; spawn it instead"
    if importlib.util.find_spec("cupy") is None:
        return (
            "CuPy is not installed: pip install 'optserve[cuda13]' for a driver of version 580 or later, "
            "'optserve[cuda12]' for one of 525 or later"
        )
    try:
        import cupy  # pyright: ignore[reportMissingImports]
    except OSError as error:
        return f"CuPy cannot be imported: {error}. It needs a writable folder: set CUPY_CACHE_DIR to one"
    except Exception as error:  # whatever a broken installation raises, in a frame of "="
        return f"CuPy cannot be imported: {' '.join(word for word in str(error).split() if word.strip('='))}"
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    if tuple(map(int, cupy.__version__.split(".")[:2])) < _LEAST_CUPY or major not in nvrtc.MAJORS:
        return (
            f"CuPy {cupy.__version__} for CUDA {major} is installed, but 14.2 or later for CUDA 12 or 13 is needed: "
            "uninstall it, then pip install 'optserve[cuda13]' or 'optserve[cuda12]'"
        )
    try:
        nvrtc.find(major)
    except MissingExtraError as error:
        return str(error)
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return _trouble(error, cupy.cuda.runtime.driverGetVersion(), major)
    _driver_loaded_by = os.getpid()
    return None


def _trouble(error: Any, driver: int, major: int) -> str:
    """What CUDA's refusal means. `driver` is the CUDA that the driver knows, 0 if there is none; `major` is CuPy's."""
    if driver == 0:
        return f"there is no NVIDIA driver: {error}"
    if error.status == _OLD_DRIVER:
        instead = "pip install 'optserve[cuda12]' in its place" if driver // 1000 == 12 else "install a later driver"
        return f"the NVIDIA driver knows CUDA {driver // 1000}.{driver % 1000 // 10}, CuPy is made for CUDA {major}: {instead}"
    if error.status == _NO_DEVICE:
        return "there is a driver, but no NVIDIA device, or CUDA_VISIBLE_DEVICES names none"
    return f"the NVIDIA driver does not start: {error}"
