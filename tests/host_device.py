"""A device of host memory, for the cupy backend's own code without a GPU. It is as strict as CUDA allows.

Kernels are the generated ones, compiled by g++. Streams are as late as they may be: what is put on one is done when somebody
asks for an event that depends on it, and no sooner. So what does not wait for what it needs reads what was there before. Copies
are late too, or as early as they may be: then one that does not wait writes over what is still to be read. Arrays refuse to
become NumPy's by themselves, as CuPy's do, and refuse everything outside of the device's thread.
"""

from __future__ import annotations

import atexit
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from host_kernels import Launch, library, loaded
from numpy.lib.mixins import NDArrayOperatorsMixin

from optserve.server.backends import select
from optserve.server.backends.cupy.backend import CupyBackend
from optserve.server.backends.cupy.thread import DeviceThread
from optserve.server.backends.memory import aligned_zeros
from optserve.wire.errors import OutOfMemoryError


class DeviceError(RuntimeError):
    """What CUDA would report."""


class Stream:
    """Work in the order in which it came, done up to where somebody asked, or at once."""

    def __init__(self, at_once: bool = False) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._begun, self._at_once = 0, at_once

    @property
    def end(self) -> int:
        """How much work has come."""
        return self._begun + len(self._waiting)

    def put(self, work: Callable[[], None]) -> None:
        self._waiting.append(work)
        if self._at_once:
            self.until(self.end)

    def until(self, end: int) -> None:
        while self._begun < end:
            self._begun += 1
            self._waiting.popleft()()


class HostDevice:
    """Implements Device."""

    name = "host"
    processors = 2
    failures = (DeviceError,)

    def __init__(self, folder: Path, capacity: int = 1 << 30, copies_at_once: bool = False) -> None:
        """Libraries are kept in the folder. `capacity` is the memory's, in bytes. `copies_at_once`: as early as they may be."""
        self.xp = _Functions(self)
        self._copies_at_once = copies_at_once
        self.capacity, self.used = capacity, 0
        self.error: DeviceError | None = None
        self.blocks: deque[int] = deque(maxlen=16)
        """Of the last launches."""
        self._folder = folder
        self._thread = 0
        self._lock = threading.RLock()  # guards the streams' work

    def enter(self) -> None:
        self._thread = threading.get_ident()
        self.copy, self.compute, self.fetch = Stream(self._copies_at_once), Stream(), Stream(self._copies_at_once)

    def check_thread(self) -> None:
        assert threading.get_ident() == self._thread, "not in the device's thread"

    def image(self, source: str) -> bytes:
        return str(library(source, self._folder)).encode()

    def load(self, image: bytes, names: Sequence[str]) -> list[Launch]:
        self.check_thread()
        return list(loaded(Path(image.decode()), names).values())

    def launch(self, kernel: Launch, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        assert 0 < blocks < 2**31
        given = [a._values if isinstance(a, DeviceArray) else a.copy() for a in arguments]
        for index, argument in enumerate(arguments):
            is_value = isinstance(argument, np.generic) or (isinstance(argument, np.ndarray) and argument.dtype.names)
            assert isinstance(argument, DeviceArray) or is_value, f"argument {index} is a {type(argument).__name__}"
        self.blocks.append(blocks)
        self._put(self.compute, lambda: kernel(blocks, threads, given))

    def zeros(self, length: int, dtype: npt.DTypeLike) -> Any:
        self.check_thread()
        nbytes = length * np.dtype(dtype).itemsize
        if self.used + nbytes > self.capacity:
            raise OutOfMemoryError(f"{self.name} has no memory for {nbytes:,} bytes: {self.capacity - self.used:,} are free")
        array = aligned_zeros(length, dtype)
        self.used += nbytes
        weakref.finalize(array.base, self._freed, nbytes)
        _bytes(array).fill(0xFF)
        self._put(self.compute, lambda: _bytes(array).fill(0))
        return DeviceArray(self, array)

    def _freed(self, nbytes: int) -> None:
        self.used -= nbytes

    def pinned(self, nbytes: int) -> np.ndarray:
        return aligned_zeros(nbytes, np.uint8)

    def address(self, array: Any) -> int:
        return array._values.ctypes.data

    def upload(self, into: Any, source: np.ndarray, stream: Stream) -> None:
        assert isinstance(source, np.ndarray)
        target, nbytes = _bytes(into._values), source.nbytes
        self._put(stream, lambda: np.copyto(target[:nbytes], _bytes(source)))

    def download(self, into: np.ndarray, source: Any, stream: Stream) -> None:
        assert isinstance(into, np.ndarray)
        found, nbytes = _bytes(source._values), into.nbytes
        self._put(stream, lambda: np.copyto(_bytes(into), found[:nbytes]))

    def record(self, stream: Stream) -> Any:
        self.check_thread()
        return stream, stream.end

    def await_event(self, stream: Stream, event: Any) -> None:
        before, end = event
        self._put(stream, lambda: before.until(end))

    def done(self, event: Any) -> bool:
        self._fail()
        with self._lock:
            event[0].until(event[1])
        return True

    def wrap(self, result: Any) -> Any:
        """Results stay on the device, single numbers too."""
        return DeviceArray(self, np.asarray(result)) if isinstance(result, np.ndarray | np.generic) else result

    def finish(self) -> None:
        """Does all that `compute` holds, as what reads an array on it would."""
        self.check_thread()
        self._fail()
        with self._lock:
            self.compute.until(self.compute.end)

    def _put(self, stream: Stream, work: Callable[[], None]) -> None:
        self.check_thread()
        self._fail()
        with self._lock:
            stream.put(work)

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


class DeviceArray(NDArrayOperatorsMixin):
    """An array of a HostDevice: slices and shapes anywhere, values in the device's thread alone."""

    def __init__(self, device: HostDevice, values: np.ndarray) -> None:
        self._device, self._values = device, values

    shape = property(lambda self: self._values.shape)
    dtype = property(lambda self: self._values.dtype)
    size = property(lambda self: self._values.size)
    nbytes = property(lambda self: self._values.nbytes)
    ndim = property(lambda self: self._values.ndim)
    T = property(lambda self: DeviceArray(self._device, self._values.T))

    def __len__(self) -> int:
        return len(self._values)

    def __bool__(self) -> bool:
        raise AssertionError("waits for the device")

    __float__ = __int__ = __bool__

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("implicit conversion of a device's array to a NumPy array")

    def __getitem__(self, key: Any) -> DeviceArray:
        return DeviceArray(self._device, np.asarray(self._values[_plain(key)]))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._device.finish()
        self._values[_plain(key)] = _plain(value)

    def reshape(self, *shape: Any) -> DeviceArray:
        return DeviceArray(self._device, self._values.reshape(*shape))

    def view(self, dtype: npt.DTypeLike) -> DeviceArray:
        return DeviceArray(self._device, self._values.view(dtype))

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        self._device.finish()
        return self._device.wrap(getattr(self._values, name)(*arguments, **_plain(options)))

    def astype(self, dtype: npt.DTypeLike) -> Any:
        return self._call("astype", dtype)

    def item(self) -> Any:
        """Waits, as CuPy's does: for searches, whose numbers decide what is done next."""
        return self._call("item")

    def max(self, **options: Any) -> Any:
        return self._call("max", **options)

    def sum(self, **options: Any) -> Any:
        return self._call("sum", **options)

    def mean(self, **options: Any) -> Any:
        return self._call("mean", **options)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **options: Any) -> Any:
        self._device.finish()
        given = {"out": _plain(out), **options} if out else options
        result = getattr(ufunc, method)(*_plain(inputs), **_plain(given))
        return out[0] if out else self._device.wrap(result)


class _Functions:
    """NumPy's functions for a device's arrays, as the module `cupy` has them."""

    def __init__(self, device: HostDevice) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)

        def function(*arguments: Any, **options: Any) -> Any:
            self._device.finish()
            result = found(*_plain(arguments), **_plain(options))
            out = options.get("out")
            return out if out is not None else self._device.wrap(result)

        return function


def _plain(value: Any) -> Any:
    """With NumPy arrays in the place of the device's, at whatever depth."""
    if isinstance(value, DeviceArray):
        return value._values
    if isinstance(value, tuple | list):
        return type(value)(_plain(entry) for entry in value)
    return {key: _plain(entry) for key, entry in value.items()} if isinstance(value, dict) else value


@cache
def _folder() -> Path:
    """Of libraries; gone with the process."""
    folder = tempfile.TemporaryDirectory(prefix="optserve-kernels-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def backend_on(device: HostDevice, **thread: Any) -> CupyBackend:
    """The real backend on such a device; `thread` are DeviceThread's arguments."""
    return CupyBackend(device, DeviceThread(device, **thread), select("numpy"))


def new_device(**options: Any) -> HostDevice:
    return HostDevice(_folder(), **options)


@cache
def cupy_on_host(copies_at_once: bool = False) -> CupyBackend:
    """One of either kind for the whole test run."""
    return backend_on(new_device(copies_at_once=copies_at_once))
