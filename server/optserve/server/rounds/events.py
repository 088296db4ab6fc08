"""What happened to a job, for `optserve job events`: the last thousand rounds, and the last thousand other things."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from optserve.server.records import Position

_KEPT = 1000


@dataclass(frozen=True)
class Round:
    """What a round came to, in numbers. `learning_rates` has one entry a group, as the step used them."""

    learning_rates: tuple[float, ...]
    grad_norm: float
    clip_factor: float
    skip_reason: str
    accumulated: int
    """Rounds that are summed up and wait for the step; 0 after a step."""


@dataclass(frozen=True)
class Event:
    """`index` counts the job's events since the server started; `time_seconds` since 1970."""

    index: int
    time_seconds: float
    kind: str
    position: Position
    message: str
    fields: Mapping[str, str]
    metrics: Mapping[str, float] = field(default_factory=dict)
    numbers: Round | None = None
    """Of a round."""


class Listener(Protocol):
    """Hears of a job's events as they happen. The job waits meanwhile, so it must not."""

    def published(self, event: Event) -> None:
        """It happened."""

    def closed(self) -> None:
        """The job ended, or the server stops: nothing more happens."""


class EventLog:
    """Keeps events and wakes who waits for them. Owns its lock, which guards everything here."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self._changed = threading.Condition()
        self._rounds: deque[Event] = deque(maxlen=_KEPT)
        self._others: deque[Event] = deque(maxlen=_KEPT)
        self._count = 0

    def publish(
        self,
        kind: str,
        position: Position,
        message: str,
        fields: Mapping[str, str],
        metrics: Mapping[str, float],
        numbers: Round | None = None,
    ) -> None:
        """Adds one."""
        with self._changed:
            self._count += 1
            kept = self._rounds if kind == "round" else self._others
            kept.append(Event(self._count, time.time(), kind, position, message, fields, metrics, numbers))
            self._changed.notify_all()
            if self.listener is not None:
                self.listener.published(kept[-1])

    def after(self, index: int, wait_seconds: float, alive: Callable[[], bool]) -> list[Event]:
        """Events with a larger index; if there are none, waits that long for one."""
        with self._changed:
            self._changed.wait_for(lambda: self._count > index or not alive(), wait_seconds)
            found = [event for kept in (self._others, self._rounds) for event in kept if event.index > index]
            return sorted(found, key=lambda event: event.index)

    def wake(self) -> None:
        """Lets waiters look whether their caller still lives."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Lets waiters look, and tells the listener that nothing more comes. Idempotent."""
        with self._changed:
            self._changed.notify_all()
            listener, self.listener = self.listener, None
            if listener is not None:
                listener.closed()
