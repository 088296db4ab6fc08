"""`optserve doctor`: can this machine run a server, and how fast a one?"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path

import click

from optserve.cli import exits
from optserve.cli.extras import EXTRAS, SERVER_NEEDS, missing, pip_command
from optserve.cli.options import connected, example
from optserve.cli.output import print_json, print_rich, size
from optserve.wire.errors import OptserveError

_SMALL_SHM = 256 << 20
"""Docker's default /dev/shm has 64 MiB."""

_USED = "what `optserve serve` uses for its updates"
_PROBE_SECONDS = 60.0
_NUMBA_PROBE = """
import time, numpy, numba
begin = time.perf_counter()
numba.njit(nogil=True)(lambda values: values * 2)(numpy.ones(8, numpy.float32))
print(f"{time.perf_counter() - begin:.2f}")
"""
_NO_GPU = "no GPU: "
_GPU_PROBE = f"""
import sys
from optserve.server import backends
from optserve.wire.errors import OptserveError
why = backends.gpu_obstacle()
try:
    print({_NO_GPU!r} + why if why else backends.select("cupy").description)
except OptserveError as error:
    sys.exit(str(error))
"""


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `state`: "ok", "note" (works, worth knowing) or "bad" (no server can run here)."""

    state: str
    value: str
    note: str = ""


def _python() -> Finding:
    state = "ok" if sys.version_info >= (3, 11) else "bad"
    return Finding(state, f"{platform.python_implementation()} {platform.python_version()}", sys.executable)


def _distribution(name: str) -> Callable[[], Finding]:
    def look() -> Finding:
        try:
            return Finding("ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            return Finding("bad", "missing", f"pip install {name}")

    return look


def _probe(code: str) -> tuple[bool, str]:
    """Runs code in a process of its own, for a broken compiler or driver may take it down: (ended well, its last line)."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False, f"it did not end within {_PROBE_SECONDS:.0f} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"it ended with code {done.returncode}"


def _numba() -> Finding:
    if missing(["numba"]):
        return Finding("note", "missing", pip_command("server"))
    version = metadata.version("numba")
    works, line = _probe(_NUMBA_PROBE)
    return Finding("ok", version, f"compiled a small kernel in {line} s") if works else Finding("bad", version, line)


def _backend() -> Finding:
    try:
        from optserve.server import backends
    except ImportError as error:
        return Finding("bad", "none", f"{error}; {pip_command('server')}")
    gpu = _gpu()
    if gpu.state != "note":
        return replace(gpu, value="cupy")
    name = backends.select("numpy" if missing(["numba"]) else "numba").name
    if name == "numba":
        return Finding("ok", name, _USED)
    return Finding("note", name, f"NUMBA IS MISSING: updates run on NumPy, several times slower; {pip_command('server')}")


@cache
def _gpu() -> Finding:
    """Why no GPU is used: CuPy, NVRTC, driver, device, in this order. In a process of its own, which compiles every kernel.

    "bad" if there is one that does not work, for a server takes it.
    """
    if missing(["cupy"]) and not (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
        return Finding("note", "not used", "there is no NVIDIA driver on this machine, and no CuPy")
    works, line = _probe(_GPU_PROBE)
    if not works:
        return Finding("bad", "does not work", f"{line}; without it: optserve serve --backend numba")
    if line.startswith(_NO_GPU):
        return Finding("note", "not used", line.removeprefix(_NO_GPU))
    return Finding("ok", line, _USED)


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Finding("ok", str(usable), f"{os.cpu_count()} in the machine, {platform.machine()}")


def _memory() -> Finding:
    if sys.platform != "linux":
        return Finding("note", "unknown", f"not looked up on {platform.system()}")
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    capped = limit.read_text().strip() if limit.exists() else "max"
    note = f"of {size(total)}" + (f", this container may use {size(int(capped))}" if capped != "max" else "")
    return Finding("ok", f"{size(available)} available", note)


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("note", "none", "shared memory between processes needs Linux; TCP works everywhere")
    usage = shutil.disk_usage(folder)
    if usage.total < _SMALL_SHM:
        return Finding(
            "note", f"{size(usage.free)} free", "small for shared memory between processes; docker run --shm-size=2g"
        )
    return Finding("ok", f"{size(usage.free)} free", f"of {size(usage.total)}")


def _extra(name: str) -> Callable[[], Finding]:
    def look() -> Finding:
        absent = missing(EXTRAS[name])
        if absent:
            state = "bad" if name == "server" and missing(SERVER_NEEDS) else "note"
            return Finding(state, "missing", f"{pip_command(name)} brings {', '.join(absent)}")
        return Finding("ok", "installed")

    return look


LOOKS: dict[str, Callable[[], Finding]] = {
    "python": _python,
    "optserve": _distribution("optserve"),
    "numpy": _distribution("numpy"),
    "grpc": _distribution("grpcio"),
    "protobuf": _distribution("protobuf"),
    "ml_dtypes": _distribution("ml_dtypes"),
    "numba": _numba,
    "backend": _backend,
    "gpu": _gpu,
    "cores": _cores,
    "memory": _memory,
    "dev_shm": _shared_memory,
    "extra server": _extra("server"),
    "extra demo": _extra("demo"),
    "extra tensorboard": _extra("tensorboard"),
    "extra torch": _extra("torch"),
}


def _server(address: str) -> Finding:
    try:
        with connected(address) as server:
            info = server.info()
    except OptserveError as error:
        return Finding("bad", "not reachable", str(error))
    return Finding("ok", "reachable", f"{address}: optserve {info.version}, backend {info.backend}, jobs: {info.jobs}")


def examine(address: str | None) -> dict[str, Finding]:
    """Looks at everything. A look that breaks is itself a finding, for this is what one runs on a broken machine."""
    findings: dict[str, Finding] = {}
    _gpu.cache_clear()
    for name, look in LOOKS.items():
        try:
            findings[name] = look()
        except Exception as error:
            findings[name] = Finding("bad", "failed", " ".join(f"{type(error).__name__}: {error}".split()))
    if address is not None:
        findings["server"] = _server(address)
    return findings


def _print(findings: dict[str, Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": Text("ok", "green"), "note": Text("--", "yellow"), "bad": Text("NO", "bold red")}
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, finding in findings.items():
        table.add_row(marks[finding.state], Text(name), Text(finding.value), Text(finding.note, "dim"))
    print_rich(table)


@click.command(epilog=example("optserve doctor", "optserve doctor --server localhost:50051 --json"))
@click.option(
    "--server", metavar="ADDRESS", envvar="OPTSERVE_SERVER", show_envvar=True, help="Also ask the server at this host:port."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def doctor(ctx: click.Context, server: str | None, as_json: bool) -> None:
    """Look at this machine: versions, kernels, GPU, memory, extras.

    Exits with 0 if a server could run here (and the one asked for answers), else with 1.
    """
    findings = examine(server)
    ready = all(finding.state != "bad" for finding in findings.values())
    if as_json:
        print_json({"ready": ready, "findings": {name: asdict(finding) for name, finding in findings.items()}})
    else:
        _print(findings)
        click.echo("ready: a server can run here" if ready else "not ready: see NO above")
    ctx.exit(exits.OK if ready else exits.FAILED)
