"""Curves in files: whole, where TensorBoard looks, and never in the way of a job."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from event_files import curves, float32, records, runs

from optserve.server.metrics import Curves
from optserve.server.metrics import curves as module
from optserve.server.metrics.curve import Curve
from optserve.server.metrics.points import Point
from optserve.server.records import Position
from optserve.server.rounds.events import Event, EventLog, Round
from optserve.wire.errors import StorageError

DEADLINE_SECONDS = 20.0


def event(step: int, loss: float, lineage: str = "a") -> Event:
    numbers = Round((0.5,), 3.0, 1.0, "", 0)
    return Event(step, 1000.0 + step, "round", Position(lineage, step, step), "", {}, {"loss": loss}, numbers)


@pytest.fixture
def start(tmp_path: Path, no_thread_left: None) -> Iterator[Callable[[], Curves]]:
    """Curves under tmp_path / "root". Closed at the end."""
    made: list[Curves] = []

    def begin() -> Curves:
        made.append(Curves(tmp_path / "root"))
        return made[-1]

    yield begin
    for entry in made:
        entry.close()


def until(ready: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not ready():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_tensorboard_shows_what_was_put(start: Callable[[], Curves], tmp_path: Path) -> None:
    found = start()
    for step in range(1, 51):
        found.put("digits", event(step, 1 / step))
        found.put("ada/net", event(step, float(step)))
    found.close()
    assert runs(tmp_path / "root") == ["ada/net", "digits"]
    shown = curves(tmp_path / "root" / "digits")
    assert shown["loss"] == [(step, float32(1 / step)) for step in range(1, 51)]
    assert shown["optserve/lr/group0"] == [(step, 0.5) for step in range(1, 51)]
    assert set(shown) == {"loss", *(f"optserve/{name}" for name in ("grad_norm", "clip_factor", "skipped", "lr/group0"))}
    assert curves(tmp_path / "root" / "ada/net")["loss"] == [(step, float(step)) for step in range(1, 51)]


def test_a_files_records_are_whole(tmp_path: Path) -> None:
    curve = Curve(tmp_path / "run")
    curve.add(Point(3, 1003.5, {"loss": 0.1, "ü / x": 2.0, "nan": math.nan, "far": 1e300}, begins=3))
    curve.close()
    (file,) = (tmp_path / "run").iterdir()
    first, void, point = records(file)
    assert first.file_version == "brain.Event:2"
    assert (void.step, void.session_log.status) == (3, void.session_log.START)
    assert (point.step, point.wall_time) == (3, 1003.5)
    values = {value.tag: value.simple_value for value in point.summary.value}
    assert math.isnan(values.pop("nan"))
    assert values == {"loss": float32(0.1), "ü / x": 2.0, "far": math.inf}


def test_points_are_in_the_file_while_the_job_goes_on(
    start: Callable[[], Curves], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    found = start()
    found.put("j", event(1, 0.5))
    until(lambda: runs(tmp_path / "root") and "loss" in curves(tmp_path / "root" / "j"), "the point is flushed")


def test_a_curve_that_goes_back_has_no_zigzag(start: Callable[[], Curves], tmp_path: Path) -> None:
    first = start()
    for step in (1, 2, 3, 4):
        first.put("j", event(step, 10.0 + step))
    for step in (3, 4):
        first.put("j", event(step, 20.0 + step, "b"))
    first.close()
    second = start()  # the server came back, and the job stands before what was written
    for step in (4, 5):
        second.put("j", event(step, 30.0 + step, "c"))
    second.close()
    assert len(list((tmp_path / "root" / "j").iterdir())) == 2
    assert curves(tmp_path / "root" / "j")["loss"] == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 34.0), (5, 35.0)]


def test_the_end_of_a_job_closes_its_file(start: Callable[[], Curves], tmp_path: Path) -> None:
    found, log = start(), EventLog()
    log.listener = module._Listener(found, "j")
    log.publish("round", Position("a", 1, 1), "", {}, {"loss": 1.0}, Round((), 3.0, 1.0, "", 0))
    log.publish("joined", Position("a", 1, 1), "", {}, {})
    log.close()
    log.close()
    log.publish("round", Position("a", 2, 2), "", {}, {"loss": 2.0}, Round((), 3.0, 1.0, "", 0))
    until(lambda: runs(tmp_path / "root") and not found._jobs, "the file is closed")
    assert curves(tmp_path / "root" / "j")["loss"] == [(1, 1.0)]


class Disk:
    """Stands in the place of Curve: fails as long as it is told to, and may be slow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = True
        self.go = threading.Event()
        self.go.set()
        self.tried = 0
        monkeypatch.setattr(module, "Curve", self._begin)

    def _begin(self, folder: Path) -> Curve:
        assert self.go.wait(DEADLINE_SECONDS)
        self.tried += 1
        if self.full:
            raise OSError(28, "No space left on device")
        return Curve(folder)


def test_an_error_of_the_disk_is_logged_once_a_job_and_the_curve_goes_on_when_it_can(
    start: Callable[[], Curves], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, found = Disk(monkeypatch), start()
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    for step in (1, 2, 3):
        found.put("j", event(step, float(step)))
    until(lambda: disk.tried == 3, "every point is tried")
    disk.full = False
    found.put("j", event(4, 4.0))
    found.close()
    (said,) = [entry for entry in caplog.records if entry.levelno == logging.ERROR]
    assert "job 'j': cannot write TensorBoard files to" in said.getMessage()
    assert "No space left on device; training goes on" in said.getMessage()
    assert curves(tmp_path / "root" / "j")["loss"] == [(4, 4.0)]


def test_a_disk_that_fails_is_let_alone_for_a_while(
    start: Callable[[], Curves], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, found = Disk(monkeypatch), start()
    for step in range(1, 101):
        found.put("j", event(step, float(step)))
    found.close()
    assert disk.tried == 1
    assert runs(tmp_path / "root") == []


def test_a_file_that_takes_no_more_is_closed(
    start: Callable[[], Curves], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full device takes what lies in memory and fails where that is to be written."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    folder = tmp_path / "root" / "j"
    folder.mkdir(parents=True)
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    (folder / "events.out.tfevents.1.optserve").symlink_to("/dev/full")
    found = start()
    found.put("j", event(1, 1.0))
    found.close()
    assert "No space left on device; training goes on" in caplog.text


def test_a_slow_disk_loses_the_oldest_and_says_so_once(
    start: Callable[[], Curves], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 10)
    disk = Disk(monkeypatch)
    disk.full = False
    disk.go.clear()
    found = start()
    found.put("j", event(1, 1.0))
    until(lambda: not found._queue, "the thread has taken the first point, and waits for the disk")
    began = time.monotonic()
    for step in range(2, 102):
        found.put("j", event(step, float(step)))
    assert time.monotonic() - began < DEADLINE_SECONDS / 4
    disk.go.set()
    found.close()
    assert curves(tmp_path / "root" / "j")["loss"] == [(step, float(step)) for step in (1, *range(92, 102))]
    assert [entry.levelno for entry in caplog.records if "have gaps" in entry.getMessage()] == [logging.WARNING]


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write TensorBoard files to .*root"):
        Curves(tmp_path / "root")
