"""A server's start and stop: addresses, the data dir, what it says of itself."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve.client import connect
from optserve.server import backends
from optserve.server.app import App, ServerConfig, serve, start_line
from optserve.v1 import workers_pb2
from optserve.wire import errors

W = {"w": np.arange(4, dtype=np.float32)}


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::1]:0"])
def test_port_zero_takes_a_free_port_and_says_which(start_app: Callable[..., App], address: str) -> None:
    if address.startswith("[") and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    app = start_app(address=address)
    host, _, port = app.address.rpartition(":")
    assert host == address.rpartition(":")[0]
    assert int(port) > 0
    with connect(app.address) as server:
        assert server.jobs() == []


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:port", "127.0.0.1:70000", ":", ""])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="is not host:port"):
        App(ServerConfig(address=address, backend="numpy"))


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "10.1.2.3:0", "example.org:0", ":50051"])
def test_an_address_beyond_the_loopback_needs_insecure(address: str) -> None:
    with pytest.raises(errors.InsecureAddressError, match="--insecure"):
        App(ServerConfig(address=address, backend="numpy"))


def test_insecure_is_said_aloud(start_app: Callable[..., App]) -> None:
    app = start_app(address="0.0.0.0:0", insecure=True)
    assert "INSECURE: not encrypted, not authenticated" in start_line(app)


def test_an_address_in_use_is_a_typed_error(app: App) -> None:
    other = App(ServerConfig(address=app.address, backend="numpy"))
    with pytest.raises(errors.AddressInUseError, match=app.address):
        other.start()
    other.stop()


def test_the_address_file_is_written_whole_and_removed(start_app: Callable[..., App], tmp_path: Path) -> None:
    file = tmp_path / "address"
    app = start_app(address_file=file)
    assert file.read_text() == f"{app.address}\n"
    app.stop()
    assert list(tmp_path.iterdir()) == []


def test_stopping_twice_or_before_the_start_does_nothing(start_app: Callable[..., App]) -> None:
    app = App(ServerConfig(backend="numpy"))
    app.stop()
    app = start_app()
    app.stop()
    app.stop()


def test_a_server_in_process_does_not_listen() -> None:
    app = App(ServerConfig(address=None, backend="numpy"))
    with pytest.raises(errors.InvalidArgumentError, match="no address"):
        app.start()
    app.stop()


def test_the_start_line_says_why_no_gpu_is_used_if_it_was_to_be(
    start_app: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optserve.server.backends.gpu_obstacle", lambda: "it is elsewhere")
    monkeypatch.setattr(sys.modules["optserve.server.app.serve"], "gpu_obstacle", lambda: "it is elsewhere")
    find_spec = importlib.util.find_spec
    for installed in (True, False):
        spec = find_spec("json") if installed else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec if name == "cupy" else find_spec(name))
        assert ("no GPU is used: it is elsewhere" in start_line(start_app(backend="auto"))) == installed
        assert "no GPU" not in start_line(start_app(backend="numpy"))


def test_a_served_process_is_the_servers_own_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def refuse(name: str, owns_process: bool) -> None:
        asked.append((name, owns_process))
        raise errors.MissingExtraError("no backend here")

    monkeypatch.setattr(backends, "select", refuse)
    monkeypatch.setattr(sys.modules["optserve.server.app.serve"].allocator, "tune", lambda: True)
    for begin in (App, serve):
        with pytest.raises(errors.MissingExtraError, match="no backend here"):
            begin(ServerConfig(address=None, backend="cupy"))
    assert asked == [("cupy", False), ("cupy", True)]


def test_the_start_line_says_what_survives(start_app: Callable[..., App], tmp_path: Path) -> None:
    assert "in memory only" in start_line(start_app())
    said = start_line(start_app(data_dir=tmp_path / "data"))
    assert f"data dir {tmp_path / 'data'}: 0 jobs continued" in said
    assert "a kill loses what came after the last checkpoint" in said


def test_a_data_dir_is_one_servers_at_a_time(start_app: Callable[..., App], tmp_path: Path) -> None:
    first = start_app(data_dir=tmp_path / "data")
    with pytest.raises(errors.StorageError, match="is in use by another server"):
        App(ServerConfig(address="127.0.0.1:0", backend="numpy", data_dir=tmp_path / "data"))
    first.stop()
    start_app(data_dir=tmp_path / "data")


def test_a_start_that_fails_lets_the_data_dir_go(start_app: Callable[..., App], app: App, tmp_path: Path) -> None:
    failed = App(ServerConfig(address=app.address, backend="numpy", data_dir=tmp_path / "data"))
    with pytest.raises(errors.AddressInUseError):
        failed.start()
    failed.stop()
    start_app(data_dir=tmp_path / "data")


def test_a_data_dir_that_cannot_be_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StorageError, match="file"):
        App(ServerConfig(address="127.0.0.1:0", backend="numpy", data_dir=tmp_path / "file"))


def test_a_backend_that_is_not_there_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    backends._cupy.cache_clear()
    monkeypatch.setattr("optserve.server.backends.cupy.device.obstacle", lambda: "there is no NVIDIA driver")
    with pytest.raises(errors.MissingExtraError, match="there is no NVIDIA driver"):
        App(ServerConfig(backend="cupy"))


def test_the_next_start_continues_every_named_job(start_app: Callable[..., App], tmp_path: Path, same: Any) -> None:
    app = start_app(data_dir=tmp_path / "data")
    weights = {}
    with connect(app.address) as server:
        for name in ("a", "user/b"):
            job = server.create_job(name, W, optimizer="adam", lr=0.1)
            with job.join() as worker:
                weights[name] = worker.push_pull({"w": np.ones(4, np.float32)})
        unnamed = server.create_job(None, W, optimizer="sgd", lr=1.0)
        unnamed.save_checkpoint("c")
        app.stop()
    again = start_app(data_dir=tmp_path / "data")
    with connect(again.address) as server:
        assert [entry.name for entry in server.jobs()] == ["a", "user/b"]
        for name, expected in weights.items():
            same(server.job(name).pull(), expected)
            assert server.job(name).position().step == 1
    assert "2 jobs continued" in start_line(again)


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(
    start_app: Callable[..., App], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = start_app(data_dir=tmp_path / "data")
    with connect(app.address) as server:
        job = server.create_job("a", W, optimizer="sgd", lr=1.0)
        job.save_checkpoint("good")
        with job.join() as worker:
            worker.push({"w": np.ones(4, np.float32)})
    app.stop()
    [file] = (tmp_path / "data").rglob("shutdown/parameters.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with connect(start_app(data_dir=tmp_path / "data").address) as server:
        np.testing.assert_array_equal(server.job("a").pull()["w"], W["w"])
    assert any("'shutdown' was not used" in message for message in caplog.messages)


def test_a_deleted_job_does_not_come_back(start_app: Callable[..., App], tmp_path: Path) -> None:
    app = start_app(data_dir=tmp_path / "data")
    with connect(app.address) as server:
        job = server.create_job("a", W, optimizer="sgd", lr=1.0)
        job.save_checkpoint("c")
        job.delete()
    app.stop()
    with connect(start_app(data_dir=tmp_path / "data").address) as server:
        assert server.jobs() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_process_stops_with_exit_code_zero(server_process: Any, number: signal.Signals, tmp_path: Path) -> None:
    process = server_process(tmp_path / "data")
    with connect(process.address) as server:
        server.create_job("a", W, optimizer="sgd", lr=1.0)
        assert process._end(number) == 0
    assert f"listening on {process.address}" in process.output
    assert process.output.endswith("optserve stopped\n")
    assert "Traceback" not in process.output
    assert not (process.folder / "address").exists()


def test_a_server_process_says_in_one_line_why_it_cannot_start(app: App, tmp_path: Path) -> None:
    for arguments, message in (
        (("--address", app.address), "cannot listen on"),
        (("--address", "0.0.0.0:0"), "--insecure"),
        (("--address", "nonsense"), "is not host:port"),
    ):
        found = subprocess.run(
            [sys.executable, "-m", "optserve.cli", "serve", "--backend", "numpy", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            check=False,
        )
        assert found.returncode not in (0, -signal.SIGKILL)
        assert message in found.stderr
        assert "Traceback" not in found.stderr


def _break_saves(folder: Path, job_id: str) -> None:
    """A file where the job's folder would be."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / job_id).write_text("")


def test_a_job_that_cannot_be_saved_costs_no_other_and_is_the_stops_error(
    start_app: Callable[..., App], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, file = tmp_path / "data", tmp_path / "address"
    app = start_app(data_dir=data, address_file=file)
    with connect(app.address) as server:
        jobs = [server.create_job(name, W, optimizer="sgd", lr=1.0) for name in "abc"]
        for job in jobs[:2]:
            _break_saves(data, job.job_id)
        with pytest.raises(errors.StorageError, match=jobs[0].job_id):
            app.stop()
    assert [record.args[0] for record in caplog.records if record.levelname == "ERROR"] == ["a", "b"]
    assert not file.exists()
    for job in jobs[:2]:
        (data / "checkpoints" / job.job_id).unlink()
    with connect(start_app(data_dir=data).address) as server:
        assert [entry.name for entry in server.jobs()] == ["c"]


def test_a_server_process_whose_stop_could_not_save_says_so(server_process: Any, tmp_path: Path) -> None:
    process = server_process(tmp_path / "data")
    with connect(process.address) as server:
        _break_saves(tmp_path / "data", server.create_job("a", W, optimizer="sgd", lr=1.0).job_id)
        assert process.stop() == 1
    assert "job 'a': not saved" in process.output
    assert process.output.splitlines()[-1].startswith("error: cannot ")
    assert "optserve stopped" not in process.output
    assert "Traceback" not in process.output


def test_a_stopped_server_saves_no_more(start_app: Callable[..., App], tmp_path: Path) -> None:
    first = start_app(data_dir=tmp_path / "data")
    with connect(first.address) as server:
        server.create_job("a", W, optimizer="sgd", lr=1.0)
    first.stop()
    second = start_app(data_dir=tmp_path / "data")
    with connect(second.address) as server, server.job("a").join() as worker:
        worker.push({"w": np.ones(4, np.float32)})
    second.stop()
    first.stop()
    with connect(start_app(data_dir=tmp_path / "data").address) as server:
        assert server.job("a").position().step == 1


def test_of_two_jobs_of_one_name_the_last_saved_continues(
    start_app: Callable[..., App], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = []
    for part in ("one", "two"):
        app = start_app(data_dir=tmp_path / part)
        with connect(app.address) as server:
            ids.append(server.create_job("a", W, optimizer="sgd", lr=1.0).job_id)
        app.stop()
    (tmp_path / "one" / "checkpoints" / ids[0]).rename(tmp_path / "two" / "checkpoints" / ids[0])
    with connect(start_app(data_dir=tmp_path / "two").address) as server:
        assert [entry.job_id for entry in server.jobs()] == [ids[1]]
    assert any(f"job {ids[0]} does not continue" in message for message in caplog.messages)
    assert (tmp_path / "two" / "checkpoints" / ids[0]).is_dir()


def test_a_start_that_cannot_recover_lets_the_data_dir_go(
    start_app: Callable[..., App], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, backend: object) -> None:
        raise errors.StorageError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("optserve.server.durability.archive.Archive.recover", fail)
        with pytest.raises(errors.StorageError, match="the disk is gone"):
            App(ServerConfig(address="127.0.0.1:0", backend="numpy", data_dir=tmp_path / "data"))
    start_app(data_dir=tmp_path / "data")


def test_slow_control_calls_leave_leases_alone(start_app: Callable[..., App], monkeypatch: pytest.MonkeyPatch) -> None:
    from optserve.server.services.optimizer import OptimizerService

    free = threading.Event()
    busy = threading.Semaphore(0)

    def slow(self: object, request: object, context: object) -> None:
        busy.release()
        free.wait(20)
        raise errors.InvalidArgumentError("done")

    monkeypatch.setattr(OptimizerService, "StepSchedule", slow)
    with connect(start_app().address) as server:
        job = server.create_job("a", W, optimizer="sgd", lr=1.0)
        worker = job.join()
        calls = [threading.Thread(target=_ignored, args=(server.job("a").step_schedule,)) for _ in range(16)]
        for call in calls:
            call.start()
        for _ in range(8):
            assert busy.acquire(timeout=20)
        session = worker._session.session
        request = workers_pb2.HeartbeatRequest(job_id=job.job_id, session_id=session.session_id, epoch=session.epoch)
        try:
            server._connection.once(request, workers_pb2.HeartbeatResponse, 5.0)
        finally:
            free.set()
        for call in calls:
            call.join()
        worker.leave()


def _ignored(call: Callable[[], Any]) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        call()
