from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optserve.client import connect
from optserve.wire import errors

StartServer = Callable[..., Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_server_that_is_not_there_is_named_with_the_time_waited() -> None:
    address = f"127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(errors.ServerUnavailableError, match=f"no server answered at {address} within 0.4 s") as caught:
        connect(address, timeout_seconds=0.4)
    assert 0.3 < time.monotonic() - began < 5
    assert caught.value.metadata["address"] == address


def test_a_server_that_starts_late_is_waited_for(start_server: StartServer) -> None:
    import threading

    port = free_port()
    starter = threading.Timer(0.3, start_server, [port])
    starter.start()
    with connect(f"127.0.0.1:{port}", timeout_seconds=20) as server:
        assert server.info().jobs == 0
    starter.join()


def test_the_address_comes_from_the_environment(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    app = start_server()
    monkeypatch.setenv("OPTSERVE_SERVER", app.address)
    with connect() as server:
        assert server.address == app.address


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:", ":50051", "localhost:http", "localhost:0", "localhost:65536", ""]
)
def test_an_address_without_host_or_port_is_refused_at_once(address: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="host:port"):
        connect(address)


def test_shared_memory_is_said_to_come_later() -> None:
    with pytest.raises(errors.InvalidArgumentError, match="shared memory"):
        connect("localhost:1", transport="shm")


def test_an_unknown_transport_lists_the_known_ones() -> None:
    with pytest.raises(errors.InvalidArgumentError, match="did you mean 'tcp'"):
        connect("localhost:1", transport="tpc")


def test_tcp_needs_an_address() -> None:
    with pytest.raises(errors.InvalidArgumentError, match="OPTSERVE_SERVER"):
        connect(transport="tcp")


def test_connections_of_a_process_share_its_embedded_server_until_the_last_is_closed() -> None:
    with connect() as first:
        start = first.info().start_id
        first.create_job("shared", {"w": np.ones(1, np.float32)}, optimizer="sgd", lr=0.1)
        with connect() as second:
            assert second.job("shared").pull()["w"].tolist() == [1]
        assert first.job("shared").name == "shared"
    with connect() as third:
        assert third.info().start_id != start
        assert third.jobs() == []


def test_a_closed_connection_says_so(start_server: StartServer) -> None:
    server = connect(start_server().address)
    job = server.create_job("j", {"w": np.ones(1, np.float32)}, optimizer="sgd", lr=0.1)
    worker = job.join()
    server.close()
    server.close()
    for call in (server.jobs, job.info, job.pull, worker.pull, lambda: job.update_group(0, lr=1.0)):
        with pytest.raises(errors.ClosedError):
            call()


def test_closing_leaves_with_every_worker_and_ends_unnamed_jobs(start_server: StartServer) -> None:
    address = start_server().address
    with connect(address) as watcher:
        with connect(address) as server:
            worker = server.create_job("named", {"w": np.ones(1, np.float32)}, optimizer="sgd", lr=0.1).join()
            server.create_job(None, {"w": np.ones(1, np.float32)}, optimizer="sgd", lr=0.1)
            assert len(watcher.jobs()) == 2
            assert worker.rank == 0
        (left,) = watcher.jobs()
        assert left.name == "named"
        assert [event.kind for event in watcher.job("named").events()][-1] == "left"


def test_an_unnamed_job_lives_as_long_as_its_connection_not_its_lease(start_server: StartServer) -> None:
    app = start_server()
    with connect(app.address) as server:
        job = server.create_job(None, {"w": np.ones(1, np.float32)}, optimizer="sgd", lr=0.1, lease_seconds=1.0)
        time.sleep(1.5)
        app.housekeeping()
        assert job.pull()["w"].tolist() == [1]


def test_a_channel_is_made_anew_after_a_fork(start_server: StartServer) -> None:
    script = """
    import os, sys, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: just what is tried here
    import numpy as np
    from optserve.client import connect
    server = connect(sys.argv[1])
    server.create_job("forked", {"w": np.ones(1, np.float32)}, optimizer="sgd", lr=0.1)
    child = os.fork()
    if not child:
        print(server.job("forked").pull()["w"].tolist(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print(server.job("forked").name)
    server.close()
    """
    assert run(script, start_server().address) == "[1.0]\nforked"


def test_a_script_that_closes_nothing_ends(start_server: StartServer) -> None:
    script = """
    import sys
    import numpy as np
    from optserve.client import connect
    worker = connect(sys.argv[1]).create_job("j", {"w": np.ones(1, np.float32)}, optimizer="sgd", lr=0.1).join()
    print(worker.push({"w": np.ones(1, np.float32)}).step)
    """
    assert run(script, start_server().address) == "1"


def test_the_client_imports_without_the_server_and_without_linuxs_modules() -> None:
    script = """
    import sys

    class Blocker:
        blocked = {"fcntl", "resource", "termios", "pwd", "grp", "posix_ipc", "numba", "llvmlite", "xxhash",
                   "grpc_health", "grpc_reflection", "cupy", "torch"}
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in self.blocked or name.startswith("optserve.server"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return None

    for name in list(sys.modules):
        if name.split(".")[0] in Blocker.blocked:
            del sys.modules[name]
    sys.meta_path.insert(0, Blocker())
    import optserve.client, optserve.client._channel, optserve.embedded
    from optserve.client import connect, errors
    try:
        connect()
    except errors.MissingExtraError as error:
        print(error)
    """
    assert "optserve[server]" in run(script)
