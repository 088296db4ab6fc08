from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from optserve.client import Server, connect
from optserve.server.app import App, ServerConfig

StartServer = Callable[..., App]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPTSERVE_SERVER", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Starts servers on the loopback; start(port=0, data_dir=None) -> App."""
    apps: list[App] = []

    def start(port: int = 0, data_dir: Path | None = None) -> App:
        app = App(ServerConfig(address=f"127.0.0.1:{port}", data_dir=data_dir, backend="numpy"))
        apps.append(app)
        app.start()
        return app

    yield start
    for app in apps:
        app.stop(1.0)


@pytest.fixture(params=["embedded", "tcp"])
def server(request: pytest.FixtureRequest, start_server: StartServer) -> Iterator[Server]:
    address = None if request.param == "embedded" else start_server().address
    with connect(address) as found:
        yield found


@pytest.fixture
def embedded() -> Iterator[Server]:
    with connect() as found:
        yield found
