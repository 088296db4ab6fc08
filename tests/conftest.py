"""Servers for the tests: in this process over gRPC, embedded, and as a process of its own. None leaves anything behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from optserve.client import Server, connect
from optserve.server.app import App, ServerConfig
from optserve.server.backends import gpu_obstacle

DEADLINE_SECONDS = 20.0
"""For whatever should take a moment, on a busy machine."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long form of a test is run where it is asked for; what needs a GPU is skipped where there is none, and says why."""
    long = [item for item in items if item.get_closest_marker("long")]
    if long and "long" not in config.option.markexpr:
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    why = gpu_obstacle() if on_gpu else None
    for item in on_gpu if why is not None else ():
        item.add_marker(pytest.mark.skip(reason=f"no GPU: {why}"))


_KEPT_THREADS = ("optserve-compute",)
"""The process's compute pool is shared by all servers and stays."""


def _until(ready: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.005)
    return found


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    """until(condition, what it is, seconds): looks again and again, fails at the deadline; the condition's value."""
    return _until


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """Fails if the test left a thread running."""
    before = set(threading.enumerate())

    def left() -> list[str]:
        new = [thread for thread in threading.enumerate() if thread not in before]
        return [thread.name for thread in new if not thread.name.startswith(_KEPT_THREADS)]

    yield
    _until(lambda: not left(), f"threads end: {left()}")


@pytest.fixture
def start_app(no_thread_left: None, tmp_path: Path) -> Iterator[Callable[..., App]]:
    """start_app(**ServerConfig) -> an App that listens on port 0 of this process. Stopped at the end."""
    apps: list[App] = []

    def start(**config: Any) -> App:
        settings = {"address": "127.0.0.1:0", "backend": "numpy", **config}
        app = App(ServerConfig(**settings))
        apps.append(app)
        if settings["address"] is not None:
            app.start()
        return app

    yield start
    for app in apps:
        app.stop(2.0)
    assert not list(tmp_path.rglob(".tmp-*")), "a checkpoint was left half written"


@pytest.fixture
def app(start_app: Callable[..., App]) -> App:
    """A server that listens in this process, with NumPy kernels."""
    return start_app()


@pytest.fixture
def client(app: App) -> Iterator[Server]:
    """A connection to `app` over gRPC."""
    with connect(app.address, timeout_seconds=DEADLINE_SECONDS) as server:
        yield server


@pytest.fixture
def embedded(no_thread_left: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A connection to the server embedded in this process."""
    monkeypatch.delenv("OPTSERVE_SERVER", raising=False)
    with connect() as server:
        yield server


@pytest.fixture(params=["grpc", "embedded"])
def server(request: pytest.FixtureRequest) -> Server:
    """Both ways to a server."""
    found: Server = request.getfixturevalue("client" if request.param == "grpc" else "embedded")
    return found


@dataclass
class ServerProcess:
    """`optserve serve` as a process: started, stopped, killed and started again on the same port."""

    folder: Path
    data_dir: Path | None = None
    arguments: tuple[str, ...] = ()
    address: str = "127.0.0.1:0"
    output: str = ""
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def start(self) -> str:
        """Its address."""
        address_file = self.folder / "address"
        address_file.unlink(missing_ok=True)
        data = () if self.data_dir is None else ("--data-dir", str(self.data_dir))
        command = (sys.executable, "-m", "optserve.cli", "serve", "--address", self.address, "--address-file")
        self._process = subprocess.Popen(
            [*command, str(address_file), "--backend", "numpy", *data, *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={name: value for name, value in os.environ.items() if not name.startswith("OPTSERVE_")},
        )
        _until(lambda: address_file.exists() or self._process.poll() is not None, "the server starts", 60)
        if not address_file.exists():
            raise AssertionError(f"the server did not start: {self._process.communicate()[0]}")
        self.address = address_file.read_text().strip()
        return self.address

    def _end(self, number: int) -> int:
        assert self._process is not None
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            self.output = process.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            self.output = process.communicate()[0]
            raise
        return process.returncode

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """SIGKILL: nothing is said, nothing is saved."""
        return self._end(signal.SIGKILL)

    def close(self) -> None:
        """Kills what a failed test left running."""
        if self._process is not None:
            self.kill()


@pytest.fixture
def server_process(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """server_process(data_dir=None, arguments=()) -> a ServerProcess that was started."""
    made: list[ServerProcess] = []

    def start(data_dir: Path | None = None, arguments: tuple[str, ...] = ()) -> ServerProcess:
        folder = tmp_path / f"server{len(made)}"
        folder.mkdir()
        made.append(ServerProcess(folder, data_dir, arguments))
        made[-1].start()
        return made[-1]

    yield start
    for process in made:
        process.close()


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """torch's others spin on the cores, and on small arrays cost more than they save."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def same() -> Callable[[Any, Any], None]:
    """Two dicts of arrays and Python's numbers are equal bit for bit."""

    def check(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        assert list(found) == list(expected)
        for name, array in expected.items():
            if isinstance(array, int):
                assert (type(found[name]), found[name]) == (type(array), array), name
                continue
            assert found[name].dtype == array.dtype, name
            assert found[name].shape == array.shape, name
            assert found[name].tobytes() == array.tobytes(), name

    return check
