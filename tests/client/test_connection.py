from __future__ import annotations

import threading
import time

import pytest

from optserve.client import _connection
from optserve.client._connection import Backoff
from optserve.wire import errors

AWAY = errors.ServerUnavailableError("gone")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(_connection.time, "monotonic", lambda: now[0])
    return now


class Closed(threading.Event):
    """Waits in the written clock instead of in time."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self.clock = clock
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        self.clock[0] += timeout
        return self.is_set()


def test_waits_grow_with_jitter_up_to_a_total(clock: list[float]) -> None:
    closed = Closed(clock)
    backoff = Backoff("here:1", 20, closed)

    def wait_on() -> None:
        while True:
            backoff.wait(AWAY)

    with pytest.raises(errors.ServerUnavailableError, match=r"here:1 was not there for 1\d\.\d s \(attempt \d+\): gone"):
        wait_on()
    assert sum(closed.waits) < 20
    assert closed.waits[0] <= 0.05
    assert 1 <= max(closed.waits) <= 2
    assert len(set(closed.waits)) == len(closed.waits)


def test_what_an_attempt_waited_in_a_round_is_no_part_of_the_outage(clock: list[float]) -> None:
    backoff = Backoff("here:1", 20, Closed(clock))
    for _ in range(5):
        clock[0] += 1000
        backoff.wait(AWAY)


def test_a_client_that_is_closed_waits_no_longer() -> None:
    closed = threading.Event()
    closed.set()
    began = time.monotonic()
    with pytest.raises(errors.ClosedError):
        Backoff("here:1", 20, closed).wait(AWAY)
    assert time.monotonic() - began < 1
