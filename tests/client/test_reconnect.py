"""A server that goes away and comes back, for real: stopped and started again on its port."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve.client import Job, Server, connect
from optserve.wire import errors

GRADIENTS = {"w": np.ones(3, np.float32)}


class Restartable:
    """A server that can be stopped and started on the same port."""

    def __init__(self, start: Callable[..., Any], data_dir: Path | None) -> None:
        self._start, self._data_dir = start, data_dir
        self._app = start(data_dir=data_dir)
        self.port = int(self._app.address.rpartition(":")[2])

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._app.stop(1.0)

    def start(self) -> None:
        self._app = self._start(self.port, self._data_dir)

    def restart_later(self, seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, self.start)
        timer.start()
        return timer


@pytest.fixture
def kept(start_server: Any, tmp_path: Path) -> Restartable:
    return Restartable(start_server, tmp_path / "data")


@pytest.fixture
def forgetful(start_server: Any) -> Restartable:
    return Restartable(start_server, None)


@pytest.fixture
def client(kept: Restartable) -> Iterator[Server]:
    with connect(kept.address, retry_timeout_seconds=30) as server:
        yield server


def job_of(server: Server, workers: int = 1) -> Job:
    return server.create_job("kept", {"w": np.zeros(3, np.float32)}, optimizer="sgd", lr=1.0, workers=workers)


def test_a_worker_goes_on_after_a_restart_and_nothing_is_doubled(
    kept: Restartable, client: Server, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_of(client)
    with job.join() as worker:
        worker.push(GRADIENTS)
        kept.stop()
        timer = kept.restart_later(0.5)
        with caplog.at_level(logging.WARNING, "optserve.client"):
            step = worker.push(GRADIENTS)
        timer.join()
        assert step.step == 2
        assert "trying again for up to 30 s" in caplog.text
        assert worker.pull()["w"].tolist() == [-2, -2, -2]
        job.update_group(0, lr=0.5)
        assert worker.push_pull(GRADIENTS)["w"].tolist() == [-2.5, -2.5, -2.5]


def test_administrative_calls_wait_for_the_server_too(kept: Restartable, client: Server) -> None:
    job = job_of(client)
    job.update_group(0, lr=0.5)
    kept.stop()
    timer = kept.restart_later(0.3)
    job.update_group(0, lr=0.25)
    timer.join()
    assert job.param_groups[0]["lr"] == 0.25
    job.update_group(0, lr=0.125)
    assert job.pull()["w"].tolist() == [0, 0, 0]


def test_a_push_that_waits_in_a_round_survives_the_restart(kept: Restartable, client: Server) -> None:
    job = job_of(client, workers=2)
    with job.join() as first, job.join() as second:
        waiting = first.push_pull_async(GRADIENTS)
        time.sleep(0.3)
        kept.stop()
        timer = kept.restart_later(0.3)
        weights = second.push_pull(GRADIENTS)
        timer.join()
        assert waiting.result(timeout=30)["w"].tolist() == weights["w"].tolist() == [-1, -1, -1]


def test_a_loss_is_reported_once_and_the_client_goes_on(kept: Restartable, client: Server) -> None:
    job = job_of(client)
    job.set_lr_schedule("ExponentialLR", gamma=0.5)
    with connect(kept.address) as other, job.join() as worker:
        worker.push(GRADIENTS)
        worker.step_schedule()
        job.save_checkpoint("one")
        worker.push(GRADIENTS)
        worker.step_schedule()
        other.job("kept").restore_checkpoint("one")
        with pytest.raises(errors.RolledBackError) as caught:
            worker.push(GRADIENTS)
        job.update_group(0, lr=job.param_groups[0]["lr"])  # raised once to this client
        assert int(caught.value.metadata["to"]) < int(caught.value.metadata["from"])
        assert worker.push_pull(GRADIENTS)["w"].tolist() == [-1.5, -1.5, -1.5]
        worker.step_schedule()


def test_a_job_that_was_in_memory_only_is_lost_by_name(forgetful: Restartable) -> None:
    with connect(forgetful.address, retry_timeout_seconds=20) as server:
        job = job_of(server)
        worker = job.join()
        worker.push(GRADIENTS)
        forgetful.stop()
        forgetful.start()
        with pytest.raises(errors.JobLostError, match=r"'kept' is lost.*in memory only"):
            worker.push(GRADIENTS)
        for call in (job.pull, job.info, job.join, lambda: job.update_group(0, lr=1.0), job.state_dict):
            with pytest.raises(errors.JobLostError, match="kept"):
                call()
        with pytest.raises(errors.ClosedError):
            worker.pull()
        with pytest.raises(errors.JobNotFoundError):
            server.job("kept")


def test_a_server_that_stays_away_is_an_error_with_the_time_waited(forgetful: Restartable) -> None:
    with connect(forgetful.address, retry_timeout_seconds=0.5) as server:
        job = job_of(server)
        worker = job.join()
        forgetful.stop()
        for call in (lambda: worker.push(GRADIENTS), lambda: job.update_group(0, lr=0.5)):
            with pytest.raises(errors.ServerUnavailableError, match=rf"{forgetful.address} was not there for 0\.\d s"):
                call()


def test_closing_ends_the_wait_for_a_server(forgetful: Restartable) -> None:
    server = connect(forgetful.address, retry_timeout_seconds=60)
    job = job_of(server)
    worker = job.join()
    forgetful.stop()
    waiting = worker.push_pull_async(GRADIENTS)
    time.sleep(0.3)
    server.close()
    with pytest.raises(errors.ClosedError):
        waiting.result(timeout=10)
