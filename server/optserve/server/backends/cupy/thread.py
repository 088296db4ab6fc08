"""The one thread that owns a device, and the pinned slots through which bytes travel to it. Every wait has a deadline.

A device that reports an error, or that does not answer in time, holds state that nobody can trust any more: CUDA repeats such
an error until the process ends. So a server's process logs it and ends; its jobs go on from their checkpoints. In a process
that is somebody else's, a notebook with an embedded server, everything is refused from then on.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeVar

from optserve.server.backends.cupy.device import Device
from optserve.server.backends.interface import Array
from optserve.wire.errors import InternalError, MissingExtraError, OptserveError, OutOfMemoryError

logger = logging.getLogger("optserve.server")

Result = TypeVar("Result")

DEVICE_SECONDS = 120.0
"""For anything that a device does at one go."""

COMPILE_SECONDS = 900.0
"""For work that compiles what Tensorwise optimizers use of CuPy: dozens of kernels of one to three seconds, in each new
CUPY_CACHE_DIR."""

SLOTS, SLOT_BYTES = 16, 1 << 20
"""A chunk of the wire fits a slot."""

EXIT_CODE = 70
_LAST_WORDS_SECONDS = 5.0


def end_process(why: str) -> None:
    """Logs and ends the process, now: another thread could go on with what the device has spoilt."""
    last = threading.Timer(_LAST_WORDS_SECONDS, os._exit, [EXIT_CODE])
    last.daemon = True
    last.start()
    logger.critical("%s; the process ends, start the server again: jobs go on from their checkpoints", why)
    logging.shutdown()
    os._exit(EXIT_CODE)


def refuse_all(why: str) -> None:
    """Logs that nothing runs on the device any more in this process, which is not the server's to end."""
    logger.critical("%s; what this process's jobs hold cannot be trusted: start it again", why)


@dataclass
class Slot:
    """SLOT_BYTES of pinned host memory and of device memory. Free again when `event` has happened."""

    host: Array
    device: Array
    event: Any


class _Running(NamedTuple):
    """What the device's thread does, for how long it may, and until when that is."""

    what: str
    seconds: float
    deadline: float


class DeviceThread:
    """Runs calls on a device, one after the other in the order in which they came. Thread safe."""

    def __init__(
        self, device: Device, seconds: float = DEVICE_SECONDS, end: Callable[[str], None] = end_process, slots: int = SLOTS
    ) -> None:
        """`end` is told why the device is lost. OutOfMemoryError if there is no room for the slots, MissingExtraError if the
        device cannot be used."""
        self.in_use = False
        """Whether jobs may lie on the device: from then on, to lose it is the end."""
        self._device, self._seconds, self._end = device, seconds, end
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="optserve-compute-gpu")
        self._ident = 0
        self._begun = 0
        self._running: _Running | None = None
        self._why_lost: str | None = None
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        try:
            self._ident = self.call("its streams", self._enter)
            for slot in self.call("staging memory", lambda: [self._slot() for _ in range(slots)]):
                self._free.put(slot)
        except BaseException:
            self._executor.shutdown(wait=False)
            raise

    def _enter(self) -> int:
        self._device.enter()
        return threading.get_ident()

    def _slot(self) -> Slot:
        memory = self._device.zeros(SLOT_BYTES, "u1")  # cleared on `compute`; the first to fill it is `copy`
        return Slot(self._device.pinned(SLOT_BYTES), memory, self._device.record(self._device.compute))

    def call(self, what: str, work: Callable[[], Result], seconds: float | None = None) -> Result:
        """Does work in the device's thread and returns its result; what it put on the streams may not be done yet.

        `seconds`: how long it may take once begun, where not as long as usual. Raises what the work raises; OutOfMemoryError
        for any MemoryError, MissingExtraError for a library that CuPy misses.
        """
        with self._typed_errors(what):
            if threading.get_ident() == self._ident:
                return work()
            future = self._executor.submit(self._run, what, seconds or self._seconds, work)
            self._await(what, future.exception)
            return future.result()

    def _run(self, what: str, seconds: float, work: Callable[[], Result]) -> Result:
        self._begun, self._running = self._begun + 1, _Running(what, seconds, time.monotonic() + seconds)
        try:
            return work()
        finally:
            self._running = None

    def call_here(self, what: str, work: Callable[[], Result]) -> Result:
        """Does in the calling thread what may be done in any. Raises as `call` does."""
        with self._typed_errors(what):
            return work()

    @contextmanager
    def _typed_errors(self, what: str) -> Iterator[None]:
        if self._why_lost is not None:
            self._refuse(self._why_lost)
        try:
            yield
        except OptserveError:
            raise
        except MemoryError as error:
            raise OutOfMemoryError(f"{self._device.name} has no memory for {what}: {error}") from error
        except ImportError as error:
            library = str(error).partition("\n")[0]
            raise MissingExtraError(f"{what} needs a library: {library}; the extras cuda12 and cuda13 bring it") from error
        except self._device.failures as error:
            self._lose(f"{what}: {error}")

    def _await(self, what: str, attempt: Callable[[float], Result]) -> Result:
        """The result of `attempt(seconds)`, which raises TimeoutError until there is one.

        The device is lost when its thread works longer on something than that may take, or begins nothing.
        """
        while True:
            begun, running = self._begun, self._running
            seconds = self._seconds if running is None else max(0.0, running.deadline - time.monotonic())
            try:
                return attempt(seconds)
            except TimeoutError:
                running = self._running
                if running is not None and time.monotonic() >= running.deadline:
                    self._lose(f"{running.what} was not done within {running.seconds:g} s")
                if self._begun == begun:
                    self._lose(f"{what} did not begin within {self._seconds:g} s")

    def wait(self, what: str, event: Any) -> None:
        """Until the event has happened."""
        deadline, pause = time.monotonic() + self._seconds, 20e-6
        with self._typed_errors(what):
            while not self._device.done(event):
                if time.monotonic() > deadline:
                    self._lose(f"{what} was not done within {self._seconds:g} s")
                time.sleep(pause)
                pause = min(1e-3, 1.5 * pause)

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """A slot that nothing on the device uses any more. Set its `event` to what it is free after."""
        if threading.get_ident() == self._ident:
            raise RuntimeError("the device's thread must not wait for staging memory: those that use it wait for that thread")
        slot = self._await("a transfer", self._next_slot)
        try:
            self.wait("a transfer", slot.event)
            yield slot
        except BaseException:
            # Interrupted by a signal, perhaps: what was asked of the device's thread is still to come.
            self._executor.submit(self._reclaim, slot)
            raise
        self._free.put(slot)

    def _next_slot(self, seconds: float) -> Slot:
        try:
            return self._free.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None

    def _reclaim(self, slot: Slot) -> None:
        """In the device's thread: whatever used the slot is on the streams by now."""
        device = self._device
        for stream in (device.copy, device.fetch):
            device.await_event(device.compute, device.record(stream))
        slot.event = device.record(device.compute)
        self._free.put(slot)

    def _lose(self, why: str) -> NoReturn:
        self._why_lost = why
        if self.in_use:
            self._end(f"the device {self._device.name} is lost: {why}")
        self._refuse(why)

    def _refuse(self, why: str) -> NoReturn:
        if self.in_use:
            raise InternalError(f"the device {self._device.name} is lost: {why}")
        text = f"the device {self._device.name} cannot be used: {why}"
        raise MissingExtraError(f"{text}; set CUDA_VISIBLE_DEVICES to nothing to go without it")
