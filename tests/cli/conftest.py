"""A real server on port 0 with one job, for the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from optserve.cli import main
from optserve.client import Job, connect
from optserve.server.app import App, ServerConfig

Command = Callable[..., Result]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def address(data_dir: Path) -> Iterator[str]:
    app = App(ServerConfig(address="127.0.0.1:0", backend="numpy", data_dir=data_dir))
    app.start()
    try:
        yield app.address
    finally:
        app.stop(1.0)


@pytest.fixture
def job(address: str) -> Iterator[Job]:
    """A job named "j" of two groups, stepped once by its one worker."""
    with connect(address) as server:
        job = server.create_job(
            "j",
            [{"params": {"w": np.ones((3, 4), np.float32)}}, {"params": {"b": np.zeros(4, np.float32)}, "lr": 0.5}],
            optimizer="adam",
            lr=0.25,
            workers=1,
        )
        with job.join() as worker:
            worker.push_pull({"w": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)}, metrics={"loss": 2.5})
        try:
            yield job
        finally:
            job.delete()


@pytest.fixture
def optserve(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs a command against the server; stdout and stderr apart."""
    monkeypatch.setenv("OPTSERVE_SERVER", address)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])
