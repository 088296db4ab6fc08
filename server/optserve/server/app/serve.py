"""A server as a process: its signals, its start line, its exit code."""

from __future__ import annotations

import importlib.util
import signal
import threading
from dataclasses import replace
from importlib import metadata

from optserve.server.app import allocator
from optserve.server.app.app import App
from optserve.server.app.config import ServerConfig
from optserve.server.backends import gpu_obstacle

_HOUSEKEEPING_SECONDS = 1.0


def start_line(app: App) -> str:
    """What a server says of itself when it starts."""
    parts = [f"optserve {metadata.version('optserve')} listening on {app.address}", f"backend {app.backend.description}"]
    if app.backend.name == "numpy" and app.config.backend == "auto":
        parts[-1] += ' (numba is not installed: updates are several times slower; pip install "optserve[server]")'
    if app.config.backend == "auto" and app.backend.on_host and importlib.util.find_spec("cupy") is not None:
        parts.append(f"no GPU is used: {gpu_obstacle()}")
    if app.config.insecure:
        parts.append("INSECURE: not encrypted, not authenticated")
    if app.config.data_dir is None:
        parts.append("state and checkpoints are in memory only: they end with this process (--data-dir keeps them)")
    else:
        jobs = len(app.registry.all())
        parts.append(f"data dir {app.config.data_dir}: {jobs} {'job' if jobs == 1 else 'jobs'} continued")
        if app.config.curves_folder is not None:
            parts.append(f"TensorBoard files in {app.config.curves_folder}")
        parts.append("state is in memory: a kill loses what came after the last checkpoint, a stop saves one")
    return "\n  ".join(parts)


def serve(config: ServerConfig) -> int:
    """Runs a server until SIGTERM or SIGINT; the process's exit code. Only in the main thread."""
    allocator.tune()
    app = App(replace(config, owns_process=True))
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        app.start()
        print(start_line(app), flush=True)
        while not stopping.wait(_HOUSEKEEPING_SECONDS):
            app.housekeeping()
    finally:
        app.stop()
    print("optserve stopped", flush=True)
    return 0
