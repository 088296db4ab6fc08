"""A server's start and stop: addresses, the data dir, what it says of itself."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve.client import connect
from optserve.server.app import App, ServerConfig, start_line
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


def test_a_backend_that_is_not_there_is_a_typed_error() -> None:
    with pytest.raises(errors.OptserveError, match="cupy"):
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
