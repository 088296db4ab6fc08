"""The compose file in real containers: training, a checkpoint, the server killed and started again, training that goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = "optserve-test"
JOB = "digits"
BUILD_SECONDS, WAIT_SECONDS = 600, 120

pytestmark = [pytest.mark.docker, pytest.mark.timeout(BUILD_SECONDS + 5 * WAIT_SECONDS)]

WEIGHTS_DIGEST = f"""
import hashlib
from optserve.client import connect
with connect("localhost:50051") as server:
    weights = server.job("{JOB}").pull()
print(hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest())
"""


def shell(*command: str, timeout: float = WAIT_SECONDS, **environment: str) -> str:
    """Output of a command; the test fails with all that it printed if it fails."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def compose_command() -> list[str]:
    """docker compose or docker-compose. Skips where there is no Docker API; one that DOCKER_HOST names has to answer."""
    if shutil.which("docker") is None:
        pytest.skip("the docker command is not installed")
    ping = subprocess.run(["docker", "ps"], capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    if ping.returncode:
        assert "DOCKER_HOST" not in os.environ, ping.stderr
        pytest.skip(f"no Docker-compatible API: {ping.stderr.strip()}")
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=WAIT_SECONDS, check=False)
    if plugin.returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose") is None:
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    return ["docker-compose"]


class Stack:
    """The project's containers. PORT=0 publishes a free port, so that a running server of the developer's is not in the way."""

    def __init__(self) -> None:
        self._compose = [*compose_command(), "--project-name", PROJECT, "--file", "docker/compose.yaml"]

    def compose(self, *arguments: str, timeout: float = WAIT_SECONDS, **environment: str) -> str:
        return shell(*self._compose, *arguments, timeout=timeout, PORT="0", WORKERS="2", JOB=JOB, **environment)

    def train(self, epochs: int) -> list[float]:
        """Runs both workers to the end of so many epochs and gives the accuracies that they print."""
        self.compose("up", "--detach", "--no-deps", "worker", EPOCHS=str(epochs))
        return self.finished_training()

    def finished_training(self) -> list[float]:
        workers = self.compose("ps", "--all", "--quiet", "worker").split()
        assert len(workers) == 2
        codes = shell("docker", "wait", *workers).split()
        logs = [shell("docker", "logs", worker) for worker in workers]
        assert codes == ["0", "0"], logs
        return [float(re.findall(r"^accuracy (0\.\d+|1\.0+)$", log, re.MULTILINE)[-1]) for log in logs]

    def in_server(self, *command: str) -> str:
        return self.compose("exec", "-T", "server", *command)

    def optserve(self, *arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.in_server("optserve", *arguments, "--json"))
        return found

    def weights(self) -> str:
        """A digest of the job's weights, pulled over gRPC."""
        return self.in_server("python", "-c", WEIGHTS_DIGEST)

    def kill_and_start_server(self) -> None:
        """kill -9, then a start."""
        (server,) = self.compose("ps", "--quiet", "server").split()
        self.compose("kill", "-s", "SIGKILL", "server")
        assert shell("docker", "wait", server).split() == ["137"]
        self.start_server(server)

    def start_server(self, server: str) -> None:
        """Starts the stopped container; returns when the healthcheck passes."""
        self.compose("start", "server")
        deadline = time.monotonic() + WAIT_SECONDS
        while (state := shell("docker", "inspect", "--format", "{{.State.Health.Status}}", server).strip()) != "healthy":
            assert time.monotonic() < deadline, f"the server is {state}"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def built() -> Stack:
    stack = Stack()
    stack.compose("build", "server", timeout=BUILD_SECONDS)
    return stack


@pytest.fixture
def stack(built: Stack) -> Iterator[Stack]:
    built.compose("down", "--volumes")
    try:
        yield built
    finally:
        print(built.compose("logs", "--no-color"))
        built.compose("down", "--volumes")


def test_training_in_containers_goes_on_after_the_server_was_killed(stack: Stack) -> None:
    stack.compose("up", "--detach", EPOCHS="10")
    assert min(stack.finished_training()) >= 0.9

    saved = stack.optserve("checkpoint", "save", JOB, "ten-epochs")
    saved_weights = stack.weights()
    assert saved["step"] > 0
    assert saved["step"] == stack.optserve("job", "show", JOB)["step"]

    assert min(stack.train(epochs=15)) >= 0.9
    lost = stack.optserve("job", "show", JOB)
    assert lost["step"] == saved["step"] * 15 // 10

    stack.kill_and_start_server()
    found = stack.optserve("job", "show", JOB)
    assert (found["job_id"], found["step"]) == (lost["job_id"], saved["step"])
    assert found["lineage_id"] != lost["lineage_id"]
    assert stack.weights() == saved_weights

    assert stack.optserve("checkpoint", "restore", JOB, "ten-epochs")["step"] == saved["step"]
    assert stack.weights() == saved_weights
    assert min(stack.train(epochs=20)) >= 0.9
    assert stack.optserve("job", "show", JOB)["step"] == 2 * saved["step"]
    assert stack.weights() != saved_weights


def test_server_container_has_no_rights_it_does_not_need(stack: Stack) -> None:
    stack.compose("up", "--detach", "server")
    script = "id -u; grep CapEff /proc/self/status; touch /usr/x 2>/dev/null || echo read-only"
    assert stack.in_server("sh", "-c", script).split() == ["10001", "CapEff:", "0" * 16, "read-only"]


def test_stopped_server_container_leaves_a_checkpoint_and_continues(stack: Stack) -> None:
    stack.compose("up", "--detach", EPOCHS="3")
    stack.finished_training()
    before, weights = stack.optserve("job", "show", JOB), stack.weights()
    stack.compose("stop", "server")
    (server,) = stack.compose("ps", "--all", "--quiet", "server").split()
    assert shell("docker", "wait", server).split() == ["0"]
    stack.start_server(server)
    after = stack.optserve("job", "show", JOB)
    assert (after["job_id"], after["step"]) == (before["job_id"], before["step"])
    assert stack.weights() == weights
