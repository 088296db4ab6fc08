"""The demo's child processes: started, listened to, and always ended."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from optserve.wire.errors import DeadlineExceededError, InternalError

_START_SECONDS = 60.0
_SILENCE_SECONDS = 120.0
_STOP_SECONDS = 10.0

Report = dict[str, Any]


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Lets SIGTERM, which would end this process at once, unwind it as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


class Children:
    """Use it by `with`: leaving it ends every process and waits for it.

    Each child's input is a pipe that nobody writes into: should this process be killed, its end tells the child to stop.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._readers: list[threading.Thread] = []
        self._reports: queue.SimpleQueue[tuple[str, Report | None]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        workers_first = reversed(self._processes.values())
        for process in workers_first:
            _end(process)
        for reader in self._readers:
            reader.join()
        for process in self._processes.values():
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def start_server(self, backend: str) -> str:
        """A server on a free port with its own data directory. Returns its address once it listens."""
        address_file = self._folder / "address"
        data = self._folder / "data"
        command = ["optserve.cli", "serve", "--address", "127.0.0.1:0", "--address-file", str(address_file)]
        process = self._start("server", [*command, "--data-dir", str(data), "--backend", backend, "--stop-at-input-end"])
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise InternalError(f"the server ended with exit code {process.returncode}: {self._last_words('server')}")
            if address_file.exists() and (address := address_file.read_text().strip()):
                return address
            time.sleep(0.02)
        raise DeadlineExceededError(f"the server did not listen within {_START_SECONDS:.0f} s: {self._last_words('server')}")

    def start_worker(self, rank: int, arguments: Sequence[str]) -> None:
        """A worker whose reports come out of `reports`."""
        name = f"worker {rank}"
        process = self._start(name, ["optserve.cli.demo.worker", "--rank", str(rank), *arguments])
        reader = threading.Thread(target=self._read, args=(name, process), name=f"optserve-demo-{rank}")
        reader.start()
        self._readers.append(reader)

    def reports(self) -> Iterator[Report]:
        """What the workers report, until all of them have ended. InternalError if one fails or all fall silent."""
        running = {name for name in self._processes if name != "server"}
        while running:
            try:
                name, report = self._reports.get(timeout=_SILENCE_SECONDS)
            except queue.Empty:
                raise DeadlineExceededError(f"no worker reported anything for {_SILENCE_SECONDS:.0f} s") from None
            if report is not None:
                yield report
            elif code := self._processes[name].wait():
                raise InternalError(f"{name} ended with exit code {code}: {self._last_words(name)}")
            else:
                running.remove(name)

    def _start(self, name: str, module: Sequence[str]) -> subprocess.Popen[str]:
        # One BLAS thread each: the processes share the cores, and the same sums come out on every machine with the same BLAS.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with (self._folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if name != "server" else log,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,  # Ctrl-C comes to this process only, which ends them in order
            )
        self._processes[name] = process
        return process

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._reports.put((name, json.loads(line)))
        self._reports.put((name, None))

    def _last_words(self, name: str) -> str:
        lines = (self._folder / f"{name}.log").read_text().strip().splitlines()
        return " | ".join(lines[-3:]) or "it said nothing"


def _end(process: subprocess.Popen[str]) -> None:
    """Asks it to stop, and after a while makes it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
