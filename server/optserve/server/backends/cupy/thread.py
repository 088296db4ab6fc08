"""The one thread that owns a device, and the pinned slots through which bytes travel to it. Every wait has a deadline.

A device that reports an error, or that does not answer in time, holds state that nobody can trust any more: CUDA repeats such
an error until the process ends. So the process logs it and ends; its jobs go on from their checkpoints.
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
from typing import Any, NoReturn, TypeVar

from optserve.server.backends.cupy.device import Device
from optserve.server.backends.interface import Array
from optserve.wire.errors import InternalError, MissingExtraError, OptserveError, OutOfMemoryError

logger = logging.getLogger("optserve.server")

Result = TypeVar("Result")

DEVICE_SECONDS = 120.0
"""For anything that a device does at one go: the longest is compiling what Tensorwise optimizers use of CuPy."""

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


@dataclass
class Slot:
    """SLOT_BYTES of pinned host memory and of device memory. Free again when `event` has happened."""

    host: Array
    device: Array
    event: Any = None


class DeviceThread:
    """Runs calls on a device, one after the other in the order in which they came. Thread safe."""

    def __init__(
        self, device: Device, seconds: float = DEVICE_SECONDS, end: Callable[[str], None] = end_process, slots: int = SLOTS
    ) -> None:
        """OutOfMemoryError if there is no room for the slots."""
        self._device, self._seconds, self._end = device, seconds, end
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="optserve-compute-gpu")
        self._ident = 0
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
        return Slot(self._device.pinned(SLOT_BYTES), self._device.zeros(SLOT_BYTES, "u1"))

    def call(self, what: str, work: Callable[[], Result]) -> Result:
        """Does work in the device's thread and returns its result; what it put on the streams may not be done yet.

        Raises what the work raises; OutOfMemoryError for any MemoryError, MissingExtraError for a library that CuPy misses.
        """
        if threading.get_ident() == self._ident:
            return work()
        future = self._executor.submit(work)
        try:
            return future.result(self._seconds)
        except OptserveError:
            raise
        except MemoryError as error:
            raise OutOfMemoryError(f"{self._device.name} has no memory for {what}: {error}") from error
        except ImportError as error:
            raise MissingExtraError(f"{what} needs a library: {error}; the extras cuda12 and cuda13 bring it") from error
        except TimeoutError:
            if future.done():
                raise
            self._lost(f"{what} did not begin within {self._seconds:g} s")
        except self._device.failures as error:
            self._lost(f"{what}: {error}")

    def wait(self, what: str, event: Any) -> None:
        """Until the event has happened."""
        deadline, pause = time.monotonic() + self._seconds, 20e-6
        try:
            while not self._device.done(event):
                if time.monotonic() > deadline:
                    self._lost(f"{what} was not done within {self._seconds:g} s")
                time.sleep(pause)
                pause = min(1e-3, 1.5 * pause)
        except self._device.failures as error:
            self._lost(f"{what}: {error}")

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """A slot that nothing on the device uses any more. Set its `event` to what it is free after."""
        if threading.get_ident() == self._ident:
            raise RuntimeError("the device's thread must not wait for staging memory: those that use it wait for that thread")
        try:
            slot = self._free.get(timeout=self._seconds)
        except queue.Empty:
            self._lost(f"no staging memory was free within {self._seconds:g} s")
        try:
            if slot.event is not None:
                self.wait("a transfer", slot.event)
            slot.event = None
            yield slot
        finally:
            self._free.put(slot)

    def _lost(self, why: str) -> NoReturn:
        text = f"the device {self._device.name} is lost: {why}"
        self._end(text)
        raise InternalError(text)
