"""An optserve server in a process of its own, for the benchmarks beside this file."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SERVE = """
import sys
from pathlib import Path
from optserve.server.app import ServerConfig, serve
sys.exit(serve(ServerConfig(address="127.0.0.1:0", address_file=Path(sys.argv[1]))))
"""


@contextmanager
def served() -> Iterator[str]:
    """Its address."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "address"
        process = subprocess.Popen([sys.executable, "-c", _SERVE, str(file)], stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while not file.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise TimeoutError("the optserve server did not start within 60 s")
                time.sleep(0.02)
            yield file.read_text().strip()
        finally:
            process.terminate()
            process.wait(60)
