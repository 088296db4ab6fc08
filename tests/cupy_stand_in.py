"""What the server uses of CuPy, with CuPy's names and signatures, in host memory: for the code that calls CuPy.

Everything is done at once. Whether CuPy is as it is here was looked up in CuPy 14.2; a GPU tells whether that is enough.
"""

from __future__ import annotations

import ctypes
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from host_kernels import loaded


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"error {status}")
        self.status = status


class CUDADriverError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"driver error {status}")
        self.status = status


class Runtime:
    """cupy.cuda.runtime. `statuses`: what the calls of that name fail with."""

    CUDARuntimeError = CUDARuntimeError
    hostAllocPortable, memcpyHostToDevice, memcpyDeviceToHost = 1, 1, 2  # noqa: N815 - CUDA's

    def __init__(self) -> None:
        self.statuses: dict[str, int] = {}
        self.free, self.driver, self.devices = 1 << 30, 13000, 1

    def _check(self, call: str) -> None:
        if call in self.statuses:
            raise CUDARuntimeError(self.statuses[call])

    def runtimeGetVersion(self) -> int:
        return 13020

    def driverGetVersion(self) -> int:
        return self.driver

    def getDeviceCount(self) -> int:
        self._check("getDeviceCount")
        return self.devices

    def getDevice(self) -> int:
        return 0

    def setDevice(self, index: int, /) -> None:
        assert index == 0

    def getDeviceProperties(self, index: int, /) -> dict[str, Any]:
        self._check("getDeviceProperties")
        return {"name": b"stand-in", "multiProcessorCount": 2, "major": 9, "minor": 0}

    def memGetInfo(self) -> tuple[int, int]:
        return self.free, 1 << 31

    def eventQuery(self, event: int, /) -> int:
        assert event
        return self.statuses.get("eventQuery", 0)

    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int, /) -> None:
        assert kind in (1, 2)
        assert stream
        self._check("memcpyAsync")
        ctypes.memmove(dst, src, size)


class Stream:
    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: Any = None) -> None:
        assert non_blocking
        self.ptr = id(self)

    def use(self) -> Stream:
        return self

    def record(self, event: Event | None = None) -> Event:
        assert event is not None
        return event

    def wait_event(self, event: Event) -> None:
        assert event.ptr


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.ptr = id(self)


class Array:
    """cupy.ndarray."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.data = types.SimpleNamespace(ptr=values.ctypes.data)
        self.shape, self.dtype, self.size, self.nbytes = values.shape, values.dtype, values.size, values.nbytes

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: slice) -> Array:
        return Array(self._values[key])

    def reshape(self, *shape: Any) -> Array:
        return Array(self._values.reshape(*shape))

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")


class RawModule:
    """A module of a path is read when its first function is asked for, and never again. `refused`: CUDA's status for that."""

    refused = 0
    _loaded: ClassVar[dict[str, Path]] = {}

    def __init__(self, *, code: str | None = None, path: str | None = None) -> None:
        assert code is None
        assert path is not None
        self._path = path

    def get_function(self, name: str, /) -> Any:
        if self.refused:
            raise CUDADriverError(self.refused)
        if self._path not in self._loaded:
            self._loaded[self._path] = Path(Path(self._path).read_text())
        launch = loaded(self._loaded[self._path], [name])[name]

        def kernel(grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, stream: Any = None) -> None:
            assert isinstance(args, tuple)
            assert stream.ptr
            launch(grid[0], block[0], [a._values if isinstance(a, Array) else a for a in args])

        return kernel


class PinnedMemory:
    """`refused`: CUDA's status for the next one."""

    refused = 0

    def __init__(self, size: int, flags: int = 0) -> None:
        if self.refused:
            raise CUDARuntimeError(self.refused)
        assert flags == Runtime.hostAllocPortable
        self._memory = ctypes.create_string_buffer(size + 64)
        self.size, self.ptr = size, -(-ctypes.addressof(self._memory) // 64) * 64


def pinned_memory_pointer(mem: PinnedMemory, offset: int, /) -> Any:
    """PinnedMemoryPointer: a buffer."""
    memory = (ctypes.c_char * mem.size).from_address(mem.ptr + offset)
    memory._keeps = mem
    return memory


class _Device:
    def __init__(self, index: int) -> None:
        assert index == 0

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `import cupy` find it: the module."""
    module = types.ModuleType("cupy")
    module.__spec__ = ModuleSpec("cupy", None)
    runtime = Runtime()
    cuda = types.SimpleNamespace(
        runtime=runtime,
        driver=types.SimpleNamespace(CUDADriverError=CUDADriverError),
        Stream=Stream,
        Event=Event,
        Device=_Device,
        PinnedMemory=PinnedMemory,
        PinnedMemoryPointer=pinned_memory_pointer,
    )
    pool = types.SimpleNamespace(free_bytes=lambda: 1 << 20)
    found = {"cuda": cuda, "RawModule": RawModule, "get_default_memory_pool": lambda: pool, "zeros": _zeros}
    module.__dict__.update(found, __version__="14.2.0")
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def _zeros(shape: int, dtype: Any = float) -> Array:
    return Array(np.zeros(shape, dtype))
