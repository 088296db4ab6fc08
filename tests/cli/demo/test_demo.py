"""The demo end to end, as processes, in a short form."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optserve.client import connect

EPOCHS = 6


def _environment(folder: Path) -> dict[str, str]:
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    return {**os.environ, "TMPDIR": str(temporary), "MPLCONFIGDIR": str(folder / "mpl")}


def _demo(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "optserve.cli", "demo", "--epochs", str(EPOCHS), "--backend", "numpy", *arguments]


def _children_of_the_demo(folder: Path) -> list[str]:
    """Command lines of processes that were started with this test's TMPDIR."""
    mark = f"TMPDIR={folder / 'tmp'}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes() and (line := (process / "cmdline").read_bytes()):
                found.append(line.replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended meanwhile, or is another user's
    return found


def _gone(folder: Path, within_seconds: float) -> bool:
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        if not _children_of_the_demo(folder):
            return True
        time.sleep(0.05)
    return False


def test_two_workers_train_through_a_restore_and_nothing_is_left(tmp_path: Path) -> None:
    done = subprocess.run(
        _demo("--output", str(tmp_path / "out")), capture_output=True, text=True, env=_environment(tmp_path), check=False
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"accuracy 0\.\d{2,}", last)
    assert float(last.split()[1]) >= 0.93
    assert "checkpoint 'half-way': step 69" in done.stdout
    assert "restored 'half-way': step 69" in done.stdout
    for word in ("steps/s", "MB/s", "0.01 / 0.005  then  0.003 / 0.0015  then  0.0009 / 0.00045"):
        assert word in done.stdout
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tmp").iterdir()) == []
    assert _children_of_the_demo(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_ends_its_processes_and_leaves_no_files(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*_demo("--output", str(tmp_path / "out")), "--epochs", "5000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(tmp_path),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("server at ")
        time.sleep(1)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == "error: interrupted"
    assert _children_of_the_demo(tmp_path) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_processes_end_by_themselves_if_the_demo_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*_demo("--output", str(tmp_path / "out")), "--epochs", "5000"],
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(tmp_path),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("server at ")
        time.sleep(1)
        process.kill()
    assert _gone(tmp_path, within_seconds=15)


def test_workers_that_connect_to_a_server_train_the_job_to_the_end(tmp_path: Path, address: str) -> None:
    command = _demo("--connect", address, "--workers", "2", "--job", "connected")
    pair = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(tmp_path))
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=90) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    endings = {stdout.strip().splitlines()[-1] for stdout, _ in outputs}
    assert len(endings) == 1
    assert float(endings.pop().removeprefix("accuracy ")) >= 0.93
    late = subprocess.run(command, capture_output=True, text=True, env=_environment(tmp_path), check=False)
    assert "'connected' is trained already: step 138\n" in late.stdout
    assert late.stdout.strip().splitlines()[-1].startswith("accuracy 0.")
    more = subprocess.run([*command, "--epochs", "3"], capture_output=True, text=True, env=_environment(tmp_path), check=False)
    assert "'connected' is trained already: step 138, more than the 69 asked for\n" in more.stdout
    with connect(address) as server:
        server.job("connected").delete()


def test_a_connected_worker_that_is_told_to_stop_leaves_the_job(tmp_path: Path, address: str) -> None:
    command = _demo("--connect", address, "--workers", "1", "--job", "stopped", "--epochs", "5000")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(tmp_path))
    with process, connect(address) as server:
        assert process.stdout is not None
        assert process.stdout.readline() == "joined 'stopped' as rank 0 of 1\n"
        process.terminate()
        assert process.wait(timeout=30) == 130
        job = server.job("stopped")
        assert [member.alive for member in job.info().members] == [False]
        job.delete()
