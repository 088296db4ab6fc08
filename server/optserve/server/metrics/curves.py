"""The curves of a server's jobs: rounds go into a queue, and one thread writes them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from optserve.server.metrics.curve import Curve
from optserve.server.metrics.points import Points
from optserve.server.rounds.events import Event
from optserve.server.rounds.host import JobHost
from optserve.wire.errors import StorageError

logger = logging.getLogger("optserve.server")

MOST_WAITING = 4096
"""Events that wait for the disk; then the oldest go."""

FLUSH_SECONDS = 2.0
"""How long a point may lie in memory."""

RETRY_SECONDS = 30.0
"""After an error of the disk, until a job's next file is begun."""

STOP_SECONDS = 10.0


@dataclass
class _Written:
    """One job's points, and the file that they go into. For the writing thread."""

    folder: Path
    points: Points = field(default_factory=Points)
    curve: Curve | None = None
    retry_at: float = 0.0
    failed: bool = False


class Curves:
    """Writes event files under `root`, a folder a job. Nobody waits for it but close().

    An error of the disk is logged once a job; its curve has a gap then, and goes on in a new file.
    """

    def __init__(self, root: Path) -> None:
        """StorageError if the folder cannot be made."""
        self._root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write TensorBoard files to {root}: {error.strerror}") from error
        self._changed = threading.Condition()
        """Guards the queue and the two flags below it."""
        self._queue: deque[tuple[str, Event | None]] = deque(maxlen=MOST_WAITING)
        self._overflowed = False
        self._closing = False
        self._jobs: dict[str, _Written] = {}
        self._thread = threading.Thread(target=self._run, name="optserve-curves", daemon=True)
        self._thread.start()

    def watch(self, host: JobHost) -> None:
        """A job's rounds are written from now on: under its name, or its id if it has none."""
        host.events.listener = _Listener(self, host.job.name or host.job.job_id)

    def put(self, job: str, event: Event | None) -> None:
        """Notes an event, or with None that there are no more. Never waits for the disk."""
        with self._changed:
            overflows = len(self._queue) == MOST_WAITING and not self._overflowed
            self._overflowed |= overflows
            self._queue.append((job, event))
            self._changed.notify()
        if overflows:
            logger.warning("TensorBoard files have gaps: %s is slower than the jobs, and the oldest rounds go", self._root)

    def close(self) -> None:
        """Writes what waits and closes the files, STOP_SECONDS at most. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            logger.error("TensorBoard files are cut off: %s did not take them within %.0f s", self._root, STOP_SECONDS)

    # In the thread ------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        flushed_at, unflushed, closing = time.monotonic(), set[str](), False
        while not closing:
            with self._changed:
                wait = max(0.0, flushed_at + FLUSH_SECONDS - time.monotonic()) if unflushed else None
                self._changed.wait_for(lambda: self._queue or self._closing, wait)
                entries = list(self._queue)
                self._queue.clear()
                closing = self._closing
            for job, event in entries:
                self._attempt(job, event)
                unflushed.add(job)
            if closing or time.monotonic() >= flushed_at + FLUSH_SECONDS:
                self._flush(unflushed)
                flushed_at, unflushed = time.monotonic(), set()
        for job in list(self._jobs):
            self._attempt(job, None)

    def _attempt(self, job: str, event: Event | None) -> None:
        try:
            if event is None:
                self._end(job)
            else:
                self._add(job, event)
        except OSError as error:
            self._failed(job, error)

    def _add(self, job: str, event: Event) -> None:
        written = self._jobs.setdefault(job, _Written(self._root / job))
        if written.curve is None:
            written.points.restart()
        point = written.points.of(event)
        if point is None or time.monotonic() < written.retry_at:
            return
        if written.curve is None:
            written.curve = Curve(written.folder)
        written.curve.add(point)

    def _end(self, job: str) -> None:
        written = self._jobs.pop(job, None)
        if written is not None and written.curve is not None:
            written.curve.close()

    def _flush(self, jobs: set[str]) -> None:
        for job in jobs & self._jobs.keys():
            curve = self._jobs[job].curve
            try:
                if curve is not None:
                    curve.flush()
            except OSError as error:
                self._failed(job, error)

    def _failed(self, job: str, error: OSError) -> None:
        written = self._jobs.get(job)
        known = written is not None and written.failed
        if written is not None:
            curve, written.curve = written.curve, None
            written.retry_at, written.failed = time.monotonic() + RETRY_SECONDS, True
            with suppress(OSError):  # the same error once more; the file is closed all the same
                if curve is not None:
                    curve.close()
        if not known:
            text = f"job {job!r}: cannot write TensorBoard files to {self._root / job}: {error.strerror}; training goes on"
            logger.error("%s", StorageError(text))


@dataclass(frozen=True)
class _Listener:
    """One job's ear."""

    curves: Curves
    job: str

    def published(self, event: Event) -> None:
        if event.numbers is not None:
            self.curves.put(self.job, event)

    def closed(self) -> None:
        self.curves.put(self.job, None)
