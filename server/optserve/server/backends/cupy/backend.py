"""State on a GPU: masters, slots and accumulators in its memory, weights mirrored in pinned host memory for the transports.

Gradients come chunk by chunk: a handler fills a pinned slot, the copy engine takes it over, a kernel folds it. An update is one
launch for each run of a flat array; then the copy engine brings the weights back. Whatever is called here has been put on the
device's streams on return; what hosts are to read has come.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from optserve.server.backends.cupy import source
from optserve.server.backends.cupy.device import Device
from optserve.server.backends.cupy.source import PUT, TAKE
from optserve.server.backends.cupy.thread import COMPILE_SECONDS, SLOT_BYTES, DeviceThread
from optserve.server.backends.interface import Array, Backend, check_lengths
from optserve.server.backends.memory import put_rows
from optserve.server.backends.norms import LANES, SEGMENT
from optserve.server.formulas import Elementwise
from optserve.server.formulas.language import Program
from optserve.wire.dtypes import state_dtype

Result = TypeVar("Result")

BLOCKS_PER_PROCESSOR = 32
"""The most blocks of a launch: beyond, a thread takes more than one pack. Not measured yet: no GPU has run this."""

PIECE_BYTES = 16 << 20
"""Read back at one go, so that other jobs' gradients come in between."""

_ROWS = 1024
"""Sums of squares computed at one go."""


class _Launcher:
    """Launches kernels, and knows how large a grid they are worth."""

    def __init__(self, device: Device) -> None:
        self._device, self._most = device, device.processors * BLOCKS_PER_PROCESSOR

    def launch(self, kernel: Any, threads: int, *arguments: Any) -> None:
        """As many threads as are asked for, within reason: kernels stride over what is left."""
        blocks = min(-(-threads // source.THREADS), self._most)
        self._device.launch(kernel, max(1, blocks), source.THREADS, arguments)

    def elementwise(self, kernel: Any, size: int, arrays: Sequence[Array], *values: Any) -> None:
        """A kernel that takes `size` elements at a time of as many as the first array has: the arrays, then the values."""
        length = len(arrays[0])
        aligned = all(self._device.address(array) % source.ACCESS_BYTES == 0 for array in arrays)
        packs = length // size if aligned else 0
        self.launch(kernel, max(packs, length - packs * size), *arrays, *values, np.int64(packs), np.int64(length))


class _Kernel:
    """Implements Kernel."""

    def __init__(self, backend: CupyBackend, program: Program, name: str, dtype: np.dtype[Any]) -> None:
        self._backend, self._program = backend, program
        self._dtype, self._state = dtype, state_dtype(dtype)
        self._scalars = source.scalars_dtype(program, dtype)
        gradients = list(dict.fromkeys((self._state, dtype)))
        names = [source.kernel_name(name, dtype, gradient) for gradient in gradients]
        texts = [source.kernel(program, own, dtype, gradient) for own, gradient in zip(names, gradients, strict=True)]
        loaded = backend.load("".join([source.PRELUDE, *texts]), names)
        self._kernels = dict(zip(gradients, loaded, strict=True))

    def __call__(
        self,
        masters: Array,
        gradients: Array,
        slots: Sequence[Array],
        scalars: Mapping[str, float],
        scale: float,
        weights: Array | None,
    ) -> None:
        check_lengths(masters, gradients, slots, weights)
        kernel = self._kernels.get(gradients.dtype)
        if kernel is None:
            raise ValueError(f"gradients have dtype {gradients.dtype}; allowed are {self._dtype} and {self._state}")
        if not len(masters):
            return
        size = source.pack_size(self._state, gradients.dtype, self._dtype)
        arrays = [masters, self._backend.place(gradients), *slots, *([] if weights is None else [weights])]
        with np.errstate(all="ignore"):
            row = (scale, *(scalars[name] for name in self._program.scalars))
            values = np.array([row], self._scalars)
        self._backend.run(lambda: self._backend.launcher.elementwise(kernel, size, arrays, values))


class CupyBackend:
    """Implements Backend on one device."""

    name = "cupy"
    on_host = False
    threads = 1
    squares_at_end = True

    def __init__(self, device: Device, thread: DeviceThread, host: Backend) -> None:
        """`host` looks at host memory: whether gradients are finite. OutOfMemoryError if there is no room for buffers."""
        self._device, self._thread, self._host = device, thread, host
        self.description = f"cupy on {device.name}"
        self.xp = device.xp
        self.launcher = _Launcher(device)
        self._compiling = threading.Lock()  # guards the next
        self._elementwise: dict[tuple[Any, ...], _Kernel] = {}
        self._placing = threading.Lock()  # guards the next
        self._indices: dict[int, tuple[weakref.ref[Any], Array]] = {}
        text, names = source.shared()
        self._shared = dict(zip(names, self.load(text, names), strict=True))
        # Used on the compute stream alone, whose calls follow each other.
        self._lanes, self._halved, self._sums = (self.zeros(_ROWS * width, np.float64) for width in (LANES, source.HALVED, 1))
        thread.in_use = True

    # Memory

    def zeros(self, length: int, dtype: npt.DTypeLike) -> Array:
        return self._thread.call("an array", lambda: self._device.zeros(length, dtype))

    def host_zeros(self, length: int, dtype: npt.DTypeLike) -> Array:
        nbytes = length * np.dtype(dtype).itemsize
        return self._thread.call_here("pinned memory", lambda: self._device.pinned(nbytes)).view(dtype)

    def to_host(self, array: Array) -> Array:
        flat, host = array.reshape(-1), np.empty(array.size, array.dtype)
        for where in _pieces(flat, PIECE_BYTES):
            self._read(flat[where], host[where])
        return host.reshape(array.shape)

    def place(self, values: Array) -> Array:
        if not isinstance(values, np.ndarray):
            return values
        placed = self.zeros(values.size, values.dtype)
        self.write(placed, values.reshape(-1))
        return placed.reshape(values.shape)

    def write(self, into: Array, values: Array | float) -> None:
        flat = into.reshape(-1)
        given = values.reshape(-1) if isinstance(values, np.ndarray) else None
        for where in _pieces(flat, SLOT_BYTES):
            target = flat[where]
            with self._thread.slot() as slot, np.errstate(all="ignore"):
                host = slot.host[: target.nbytes].view(target.dtype)
                np.copyto(host, values if given is None else given[where], casting="unsafe")

                def upload(target: Array = target, host: Array = host) -> Any:
                    self._device.upload(target, host, self._device.compute)
                    return self._device.record(self._device.compute)

                slot.event = self._thread.call("a write", upload)

    def clear(self, array: Array, indices: npt.NDArray[np.intp]) -> None:
        if not len(indices):
            return
        placed, kernel = self._placed(indices), self._shared[source.CLEAR[array.dtype.itemsize]]
        self.run(lambda: self.launcher.launch(kernel, len(indices), array, placed, np.int64(len(indices))))

    def _placed(self, indices: npt.NDArray[np.intp]) -> Array:
        """The device's copy, as long as someone keeps these indices."""
        with self._placing:
            found = self._indices.get(id(indices))
            if found is not None and found[0]() is indices:
                return found[1]
            placed, key = self.place(indices), id(indices)
            self._indices[key] = (weakref.ref(indices, lambda _: self._indices.pop(key, None)), placed)
            return placed

    def publish(self, source: Array, weights: Array) -> None:
        if source.dtype == weights.dtype:
            self._read(source, weights)
            return
        for where in _pieces(weights, SLOT_BYTES):
            self._narrow(source[where], weights[where])

    def take_rows(self, source: Array, ids: Array, into: Array) -> None:
        self._move_rows(into, self._shared[TAKE[into.dtype.itemsize]], source, ids, into)

    def put_rows(self, values: Array, ids: Array, into: Array) -> None:
        self._move_rows(values, self._shared[PUT[into.dtype.itemsize]], values, ids, into)

    def _move_rows(self, rows: Array, kernel: Any, *arrays: Array) -> None:
        if rows.size:
            numbers = (np.int64(rows.shape[1]), np.int64(rows.size))
            self.run(lambda: self.launcher.launch(kernel, rows.size, *arrays, *numbers))

    def publish_rows(self, source: Array, ids: npt.NDArray[np.int64], weights: Array) -> None:
        put_rows(self.to_host(source), ids, weights)

    def _read(self, source: Array, into: Array) -> None:
        if len(into):
            self._thread.wait("reading back", self._thread.call("reading back", lambda: self._fetch(source, into)))

    def _fetch(self, array: Array, into: Array) -> Any:
        """In the device's thread: copies what `compute` has made; the event of its end."""
        device = self._device
        device.await_event(device.fetch, device.record(device.compute))
        device.download(into, array, device.fetch)
        return device.record(device.fetch)

    def _narrow(self, masters: Array, weights: Array) -> None:
        kernel, size = self._shared[source.narrow_name(weights.dtype)], source.pack_size(weights.dtype)
        with self._thread.slot() as slot:

            def fetch() -> Any:
                self.launcher.elementwise(kernel, size, [masters, slot.device])
                return self._fetch(slot.device, weights)

            slot.event = self._thread.call("reading back", fetch)
            self._thread.wait("reading back", slot.event)

    def run(self, work: Callable[[], Result], compiles: bool = False) -> Result:
        return self._thread.call("the update", work, COMPILE_SECONDS if compiles else None)

    # Kernels

    def load(self, text: str, names: Sequence[str]) -> list[Any]:
        """Compiles and loads kernels."""
        image = self._device.image(text)
        return self._thread.call("loading kernels", lambda: self._device.load(image, names))

    def kernel(self, optimizer: Elementwise, options: Mapping[str, bool], dtype: np.dtype[Any]) -> _Kernel:
        key = (optimizer, dtype, *options.items())
        found = self._elementwise.get(key)
        if found is None:
            with self._compiling:
                found = self._elementwise.get(key) or _Kernel(self, optimizer.program(options), optimizer.name, dtype)
                self._elementwise[key] = found
        return found

    def prepare(self, dtype: np.dtype[Any]) -> None:
        self._host.prepare(dtype)

    # Gradients

    def finite(self, values: Array) -> bool:
        return self._host.finite(values)

    def fold(self, into: Array, values: Array, ratio: float, first: bool) -> None:
        if len(into) != len(values):
            raise ValueError(f"{len(values)} values cannot be folded into {len(into)}")
        size = source.pack_size(into.dtype, values.dtype)
        kernel = self._shared[source.fold_name(into.dtype, values.dtype, first)]
        with np.errstate(all="ignore"):
            factor = into.dtype.type(ratio)
        for where in _pieces(values, SLOT_BYTES):
            part, target = values[where], into[where]
            with self._thread.slot() as slot:
                host = slot.host[: part.nbytes].view(part.dtype)
                np.copyto(host, part)

                def fold(target: Array = target, host: Array = host, staged: Array = slot.device) -> Any:
                    self._device.upload(staged, host, self._device.copy)
                    self._device.await_event(self._device.compute, self._device.record(self._device.copy))
                    self.launcher.elementwise(kernel, size, [target, staged], factor)
                    return self._device.record(self._device.compute)

                slot.event = self._thread.call("a gradient", fold)

    def sum_of_squares(self, values: Array) -> float:
        return sum(self._row_sums(values, SEGMENT), 0.0)

    def sums_of_squares(self, values: Array, length: int) -> list[float]:
        if length <= SEGMENT:
            return self._row_sums(values, length)
        return [self.sum_of_squares(values[begin : begin + length]) for begin in range(0, len(values), length)]

    def _row_sums(self, values: Array, length: int) -> list[float]:
        """Of each `length` elements, SEGMENT at most, in the order of backends/norms.py."""
        found: list[float] = []
        placed = self.place(values)
        for begin in range(0, len(placed), _ROWS * length):
            found += self._some_row_sums(placed[begin : begin + _ROWS * length], length)
        return found

    def _some_row_sums(self, values: Array, length: int) -> list[float]:
        squares, halve = self._shared[source.squares_name(values.dtype)], self._shared[source.HALVE]
        rows = -(-len(values) // length)
        count, device = np.int64(rows), self._device
        with self._thread.slot() as slot:
            sums = slot.host[: 8 * rows].view(np.float64)

            def measure() -> Any:
                launch = self.launcher.launch
                launch(squares, rows * LANES, values, self._lanes, count, np.int64(length), np.int64(len(values)))
                launch(halve, rows * source.HALVED, self._lanes, self._halved, count, np.int64(source.HALVED))
                launch(halve, rows, self._halved, self._sums, count, np.int64(1))
                device.download(sums, self._sums, device.compute)  # before the next norm's sums come there
                return device.record(device.compute)

            slot.event = self._thread.call("a norm", measure)
            self._thread.wait("a norm", slot.event)
            return sums.tolist()  # type: ignore[no-any-return]


def _pieces(array: Array, nbytes: int) -> Iterator[slice]:
    """Slices of at most so many bytes."""
    step = nbytes // array.dtype.itemsize
    for begin in range(0, len(array), step):
        yield slice(begin, min(begin + step, len(array)))
