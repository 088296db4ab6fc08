"""Many readers or one writer, every wait with a deadline."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from optserve.wire.errors import DeadlineExceededError

Arrays = dict[int, npt.NDArray[np.generic]]


class Hold:
    """A reader's hold on whole arrays of one version. `arrays` are read-only, and must not be read after `release`."""

    def __init__(self, arrays: Arrays, version: int, let_go: Callable[[], None]) -> None:
        self.arrays = arrays
        self.version = version
        self._lock = threading.Lock()  # guards _let_go
        self._let_go: Callable[[], None] | None = let_go

    @property
    def released(self) -> bool:
        """Whether `arrays` may have changed since."""
        return self._let_go is None

    def release(self) -> None:
        """Ends the hold. Any thread may call it, any number of times."""
        with self._lock:
            let_go, self._let_go = self._let_go, None
        if let_go is not None:
            let_go()


class Access:
    """The store's lock. A waiting writer goes before readers that come after it, so that readers cannot starve it."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())  # guards all below
        self._readers: Counter[str] = Counter()
        self._writer = ""
        self._waiting_writers: list[str] = []

    def begin_reading(self, reader: str, timeout_seconds: float) -> None:
        """DeadlineExceededError names the writer that was waited for."""
        with self._changed:
            if not self._wait(lambda: not self._writer and not self._waiting_writers, timeout_seconds):
                found = self._writer or self._waiting_writers[0]
                raise DeadlineExceededError(f"{reader} waited {timeout_seconds:g} s to read the weights; {found} is not done")
            self._readers[reader] += 1

    def end_reading(self, reader: str) -> None:
        """By any thread, once for each `begin_reading`."""
        with self._changed:
            self._readers[reader] -= 1
            if not self._readers[reader]:
                del self._readers[reader]
            self._changed.notify_all()

    @contextmanager
    def writing(self, writer: str, timeout_seconds: float) -> Iterator[None]:
        """Alone with the arrays. DeadlineExceededError names the readers that were waited for."""
        with self._changed:
            self._waiting_writers.append(writer)
            try:
                if not self._wait(lambda: not self._writer and not self._readers, timeout_seconds):
                    found = ", ".join(sorted(self._readers)) or self._writer
                    raise DeadlineExceededError(f"{writer} waited {timeout_seconds:g} s for {found} to let go of the weights")
                self._writer = writer
            finally:
                self._waiting_writers.remove(writer)
                if not self._writer:
                    self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._writer = ""
                self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        while not ready():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._changed.wait(left)
        return True
