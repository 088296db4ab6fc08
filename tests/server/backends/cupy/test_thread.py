"""The device's one thread: what happens when the device fails, hangs or cannot be used at all, and when it just takes long."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from host_device import DeviceError, HostDevice, backend_on, new_device
from host_kernels import needs_compiler

from optserve.server.backends.cupy.backend import CupyBackend
from optserve.server.backends.cupy.thread import EXIT_CODE, DeviceThread, refuse_all
from optserve.wire.errors import InternalError, MissingExtraError

pytestmark = needs_compiler

Work = Callable[[CupyBackend, Any], object]
WORKS: dict[str, Work] = {
    "fold": lambda backend, array: backend.fold(array, np.zeros(8, np.float32), 1.0, True),
    "to_host": lambda backend, array: backend.to_host(array),
    "clear": lambda backend, array: backend.clear(array, np.array([1])),
    "zeros": lambda backend, _: backend.zeros(8, np.float32),
    "host_zeros": lambda backend, _: backend.host_zeros(8, np.float32),
}


class Lost:
    """A backend that says what it would end the process for."""

    def __init__(self, seconds: float = 5.0, **options: Any) -> None:
        self.said: list[str] = []
        self.device = new_device()
        self.backend = backend_on(self.device, seconds=seconds, end=self.said.append, **{"slots": 2, **options})
        self.array = self.backend.zeros(8, np.float32)


def broken(device: HostDevice) -> Callable[..., Any]:
    """Pinned memory of a device that has failed."""

    def pinned(nbytes: int) -> np.ndarray:
        raise DeviceError("an illegal address")

    device.error = DeviceError("an illegal address")
    return pinned


@pytest.mark.parametrize("name", WORKS)
def test_a_broken_device_is_the_end_once_and_refuses_everything_from_then_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = Lost()
    monkeypatch.setattr(it.device, "pinned", broken(it.device))
    with pytest.raises(InternalError, match=r"the device host is lost: .*: an illegal address"):
        WORKS[name](it.backend, it.array)
    monkeypatch.undo()
    it.device.error = None
    for work in WORKS.values():
        with pytest.raises(InternalError, match=r"the device host is lost: .*: an illegal address"):
            work(it.backend, it.array)
    assert len(it.said) == 1
    assert "an illegal address" in it.said[0]


def test_an_error_that_shows_only_at_the_end_of_a_transfer_ends_the_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Lost()
    done = it.device.done

    def fails(event: Any) -> bool:
        it.device.error = DeviceError("misaligned")
        return done(event)

    monkeypatch.setattr(it.device, "done", fails)
    with pytest.raises(InternalError, match="reading back: misaligned"):
        it.backend.to_host(it.array)
    assert len(it.said) == 1


def test_a_transfer_that_does_not_end_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Lost(seconds=0.2)
    monkeypatch.setattr(it.device, "done", lambda _: False)
    with pytest.raises(InternalError, match=r"reading back was not done within 0\.2 s"):
        it.backend.to_host(it.array)
    assert len(it.said) == 1


def test_a_slot_that_does_not_become_free_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Lost(seconds=0.2, slots=1)
    it.backend.fold(it.array, np.zeros(8, np.float32), 1.0, True)
    monkeypatch.setattr(it.device, "done", lambda _: False)
    with pytest.raises(InternalError, match=r"a transfer was not done within 0\.2 s"):
        it.backend.fold(it.array, np.zeros(8, np.float32), 1.0, True)
    assert len(it.said) == 1


def test_a_call_that_does_not_return_ends_the_process() -> None:
    it, release = Lost(seconds=0.2), threading.Event()
    with pytest.raises(InternalError, match=r"the update was not done within 0\.2 s"):
        it.backend.run(lambda: release.wait(20))
    release.set()
    assert len(it.said) == 1


def test_a_thread_that_begins_nothing_ends_the_process() -> None:
    it, release = Lost(seconds=0.2), threading.Event()
    it.backend._thread._executor.submit(release.wait, 20)
    with pytest.raises(InternalError, match=r"an array did not begin within 0\.2 s"):
        it.backend.zeros(8, np.float32)
    release.set()
    assert len(it.said) == 1


def test_compiling_may_take_long_and_others_wait_for_it() -> None:
    it, release, begun = Lost(seconds=0.1, slots=1), threading.Event(), threading.Event()
    ended: list[str] = []

    def compiles() -> None:
        begun.set()
        assert release.wait(20)

    def waits(name: str, work: Callable[[], object]) -> None:
        work()
        ended.append(name)

    works = {
        "compiling": lambda: it.backend.run(compiles, compiles=True),
        "a call": lambda: it.backend.zeros(8, np.float32),
        "a slot": lambda: it.backend.fold(it.array, np.ones(8, np.float32), 1.0, True),
        "the next slot": lambda: it.backend.fold(it.array, np.ones(8, np.float32), 1.0, True),
    }
    threads = [threading.Thread(target=waits, args=found) for found in works.items()]
    threads[0].start()
    assert begun.wait(20)
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.4)
    assert (ended, it.said) == ([], [])
    release.set()
    for thread in threads:
        thread.join(20)
    assert sorted(ended) == sorted(works)
    assert it.said == []


def test_a_queue_that_moves_is_waited_for() -> None:
    it = Lost(seconds=0.2)
    for _ in range(8):
        it.backend._thread._executor.submit(it.backend._thread._run, "a part", 0.2, lambda: time.sleep(0.05))
    assert len(it.backend.zeros(8, np.float32)) == 8
    assert it.said == []


def test_a_device_that_cannot_be_used_is_an_error_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def refused(*_: Any) -> None:
        raise DeviceError("all devices are busy")

    for call in ("enter", "record", "load"):
        device = new_device()
        monkeypatch.setattr(device, call, refused)
        with pytest.raises(MissingExtraError, match=r"the device host cannot be used: .*: all devices are busy"):
            backend_on(device, end=said.append)
    assert said == []


def test_the_first_copy_into_a_slot_comes_after_its_memory_was_cleared() -> None:
    backend = backend_on(new_device(copies_at_once=True), slots=1)
    into = backend.zeros(8, np.float32)
    backend.fold(into, np.ones(8, np.float32), 1.0, True)
    assert backend.to_host(into).tolist() == [1.0] * 8


def test_a_slot_whose_user_was_interrupted_is_free_only_after_what_it_had_asked_for() -> None:
    device = new_device()
    thread = DeviceThread(device, seconds=5, slots=1)
    release = threading.Event()

    def upload() -> None:
        assert release.wait(20)
        device.upload(slot.device, slot.host, device.copy)

    def interrupted() -> None:
        slot.host[:] = 1
        thread._executor.submit(upload)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), thread.slot() as slot:
        interrupted()
    release.set()
    with thread.slot() as again:
        assert again is slot
        assert (slot.device._values == 1).all()


def test_the_process_ends_with_a_reason_and_without_cleaning_up() -> None:
    code = "import atexit; from optserve.server.backends.cupy.thread import end_process; atexit.register(print, 'cleaned up')"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}; end_process('it is lost')"], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (EXIT_CODE, "")
    assert ended.stderr == "it is lost; the process ends, start the server again: jobs go on from their checkpoints\n"


def test_a_process_that_is_somebody_elses_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL):
        refuse_all("it is lost")
    assert caplog.messages == ["it is lost; what this process's jobs hold cannot be trusted: start it again"]
