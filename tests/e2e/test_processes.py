"""Servers and workers as processes: restarts, kills, and what each side says of them."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve.client import Server, connect, errors
from optserve.server.app import App

SCRIPT = Path(__file__).with_name("worker.py")
spec = importlib.util.spec_from_file_location("optserve_test_worker", SCRIPT)
assert spec is not None
assert spec.loader is not None
worker_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker_script)

SHAPES = {"w": (500, 1000), "b": (7,)}
ONES = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def zeros() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def start_worker() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start_worker(address, job, steps, rank) -> its process."""
    started: list[subprocess.Popen[str]] = []

    def start(address: str, job: str, steps: int, rank: int) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OPTSERVE_")}
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), address, job, str(steps)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def expected(server: Server, ranks: int, steps: int) -> dict[str, np.ndarray]:
    """The same run in this process, one push after the other."""
    job = server.create_job("expected", zeros(), optimizer="adam", lr=0.1, workers=ranks)
    workers = [job.join(rank=rank) for rank in range(ranks)]
    weights: dict[str, np.ndarray] = {}
    for step in range(steps):
        futures = [worker.push_pull_async(worker_script.gradients(rank, step, SHAPES)) for rank, worker in enumerate(workers)]
        weights = next(reversed([future.result(60) for future in futures]))
    for worker in workers:
        worker.leave()
    return weights


@pytest.mark.parametrize("count", [2, 4])
def test_worker_processes_train_together(server_process: Any, start_worker: Any, embedded: Server, count: int) -> None:
    with connect(server_process().address) as server:
        job = server.create_job("j", zeros(), optimizer="adam", lr=0.1, workers=count)
        processes = [start_worker(server.address, "j", 5, rank) for rank in range(count)]
        said = []
        for process in processes:
            output, complaint = process.communicate(timeout=60)
            assert process.returncode == 0, complaint
            said.append(output.split())
        wanted = worker_script.digest(expected(embedded, count, 5))
        assert said == [[wanted, "5"]] * count
        assert job.position().step == 5


class Load:
    """Workers in threads that push without pause until each has made its steps."""

    def __init__(self, address: str, job: str, count: int, steps: int, gradients: Callable[[int, int], Any]) -> None:
        self.acknowledged = [0] * count
        self.failures: list[BaseException] = []
        self.last: list[Any] = [None] * count
        self._threads = [
            threading.Thread(target=self._run, args=(address, job, rank, steps, gradients), daemon=True)
            for rank in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, address: str, job: str, rank: int, steps: int, gradients: Callable[[int, int], Any]) -> None:
        try:
            with connect(address) as server, server.job(job).join(rank=rank) as worker:
                for step in range(steps):
                    self.last[rank] = worker.push_pull(gradients(rank, step))
                    self.acknowledged[rank] += 1
        except BaseException as error:
            self.failures.append(error)

    def finish(self, seconds: float = 60) -> None:
        for thread in self._threads:
            thread.join(seconds)
        if self.failures:
            raise self.failures[0]
        assert not any(thread.is_alive() for thread in self._threads), "a worker still waits"


def test_a_restart_with_a_data_dir_loses_and_doubles_nothing(
    server_process: Any, tmp_path: Path, until: Any, same: Any, embedded: Server, no_thread_left: None
) -> None:
    """SIGTERM twice in mid-run, started again on the same port: the workers go on, bit for bit as if nothing had been."""
    process = server_process(tmp_path / "data")
    with connect(process.address) as server:
        server.create_job("j", zeros(), optimizer="adam", lr=0.1, workers=2)
    load = Load(process.address, "j", 2, 30, lambda rank, step: worker_script.gradients(rank, step, SHAPES))
    for steps in (5, 15):
        until(lambda steps=steps: min(load.acknowledged) >= steps or load.failures, "some steps are made")
        assert process.stop() == 0
        assert "saved at version" in process.output
        process.start()
    load.finish()
    with connect(process.address) as server:
        assert server.job("j").position().step == 30
        same(server.job("j").pull(), load.last[0])
    same(load.last[1], load.last[0])
    same(load.last[0], expected(embedded, 2, 30))


def test_sigterm_under_load_cuts_no_push_in_half(server_process: Any, tmp_path: Path, until: Any) -> None:
    """async: pushes are under way at every moment. Every element has seen the same whole number of steps, none twice."""
    process = server_process(tmp_path / "data")
    with connect(process.address) as server:
        server.create_job("j", zeros(), optimizer="sgd", lr=1.0, workers=3, consistency="async")
    load = Load(process.address, "j", 3, 40, lambda *_: ONES)
    until(lambda: sum(load.acknowledged) >= 20 or load.failures, "some steps are made")
    assert process.stop() == 0
    acknowledged = sum(load.acknowledged)
    assert list((tmp_path / "data").rglob("shutdown/manifest.json"))
    process.start()
    load.finish()
    assert acknowledged <= 120
    with connect(process.address) as server:
        job = server.job("j")
        assert job.position().step == 120
        for name, array in job.pull().items():
            np.testing.assert_array_equal(array, np.full(SHAPES[name], -120, np.float32))
        assert "shutdown" in [entry.name for entry in job.checkpoints()]


def test_without_a_data_dir_a_restart_is_job_lost(server_process: Any, no_thread_left: None) -> None:
    process = server_process()
    with connect(process.address) as server:
        job = server.create_job("digits", zeros(), optimizer="sgd", lr=1.0)
        worker = job.join()
        worker.push(ONES)
        assert process.stop() == 0
        assert "in memory only" in process.output
        process.start()
        for call in (
            lambda: worker.push(ONES),
            job.pull,
            lambda: job.update_group(0, lr=0.1),
            lambda: job.save_checkpoint("c"),
        ):
            with pytest.raises(errors.JobLostError, match=r"job 'digits' is lost: .* in memory only"):
                call()
        with pytest.raises(errors.JobNotFoundError):
            server.job("digits")


@pytest.mark.parametrize("saved", ["before joining", "after joining"])
def test_a_kill_rolls_back_to_the_last_checkpoint_and_says_so_once(
    server_process: Any, tmp_path: Path, saved: str, no_thread_left: None
) -> None:
    process = server_process(tmp_path / "data")
    with connect(process.address) as server:
        job = server.create_job("digits", zeros(), optimizer="sgd", lr=1.0)
        if saved == "before joining":
            job.save_checkpoint("c")
        worker = job.join()
        worker.push(ONES)
        if saved == "after joining":
            job.save_checkpoint("c")
        steps = 0 if saved == "before joining" else 1
        for _ in range(3):
            worker.push(ONES)
        version = job.position().version
        process.kill()
        process.start()
        with pytest.raises(errors.RolledBackError, match="went back to version") as caught:
            worker.push(ONES)
        assert caught.value.metadata["from"] == str(version)
        assert caught.value.metadata["step"] == str(steps)
        np.testing.assert_array_equal(job.pull()["b"], np.full(7, -steps, np.float32))  # a client is told once
        np.testing.assert_array_equal(worker.push_pull(ONES)["b"], np.full(7, -(steps + 1), np.float32))
        assert worker.last_step.step == steps + 1
        np.testing.assert_array_equal(job.pull()["w"], np.full((500, 1000), -(steps + 1), np.float32))
        worker.leave()


def test_a_kill_before_any_checkpoint_is_job_lost(server_process: Any, tmp_path: Path) -> None:
    process = server_process(tmp_path / "data")
    assert "a kill loses what came after the last checkpoint" in _start_lines(process)
    with connect(process.address) as server:
        job = server.create_job("digits", zeros(), optimizer="sgd", lr=1.0)
        with job.join() as worker:
            worker.push(ONES)
            process.kill()
            process.start()
            with pytest.raises(errors.JobLostError, match="job 'digits' is lost"):
                worker.push(ONES)


def _start_lines(process: Any) -> str:
    process.stop()
    output = process.output
    process.start()
    return output


def test_a_server_that_stays_away_is_named_with_the_time_waited(server_process: Any) -> None:
    process = server_process()
    with connect(process.address, retry_timeout_seconds=0.5) as server:
        job = server.create_job("digits", zeros(), optimizer="sgd", lr=1.0)
        with job.join() as worker:
            process.kill()
            for call in (lambda: worker.push(ONES), job.pull, server.jobs):
                with pytest.raises(
                    errors.ServerUnavailableError, match=rf"{process.address} was not there for \d\.\d s"
                ) as caught:
                    call()
                assert isinstance(caught.value, ConnectionError)


def test_a_killed_worker_is_gone_on_without_and_replaced(
    app: App, start_worker: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optserve.server.rounds import membership

    monkeypatch.setattr(membership, "RECONNECT_GRACE_SECONDS", 0.2)
    with connect(app.address) as server:
        job = server.create_job("j", zeros(), optimizer="sgd", lr=0.01, workers=2)
        with job.join(rank=0) as worker:
            other = start_worker(server.address, "j", 1000, 1)
            for _ in range(3):
                worker.push(ONES)
            assert worker.last_step.ranks == (0, 1)
            other.send_signal(signal.SIGKILL)
            until(lambda: worker.push(ONES).ranks == (0,), "the round goes on without rank 1")
            assert "dropped" in [event.kind for event in job.events()]
            replacement = start_worker(server.address, "j", 2, 1)
            until(lambda: worker.push(ONES).ranks == (0, 1), "the replacement takes part")
            worker.push(ONES)
            _, complaint = replacement.communicate(timeout=30)
            assert replacement.returncode == 0, complaint
            assert {member.name: member.epoch for member in job.info().members} == {"rank0": 1, "rank1": 2}


def test_a_worker_process_that_was_stopped_for_a_while_goes_on(app: App, start_worker: Any) -> None:
    """SIGSTOP, SIGCONT: shorter than the lease, so it is waited for."""
    with connect(app.address) as server:
        job = server.create_job("j", zeros(), optimizer="sgd", lr=0.01, workers=2)
        with job.join(rank=0) as worker:
            other = start_worker(server.address, "j", 6, 1)
            worker.push(ONES)
            other.send_signal(signal.SIGSTOP)
            waiting = worker.push_pull_async(ONES)
            other.send_signal(signal.SIGCONT)
            waiting.result(30)
            for _ in range(4):
                assert worker.push(ONES).ranks == (0, 1)
            _, complaint = other.communicate(timeout=30)
            assert other.returncode == 0, complaint
