"""What a user gets from `pip install`: the right files, a worker without the server's dependencies, on any platform."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SERVER_ONLY = (
    "numba",
    "llvmlite",
    "xxhash",
    "grpc_health",
    "grpc_reflection",
    "sklearn",
    "matplotlib",
    "tensorboardX",
    "torch",
)
LINUX_ONLY = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog", "readline", "_posixshmem")
LINUX_ONLY_CALLS = ("fork", "register_at_fork", "sched_getaffinity", "getuid", "posix_fallocate", "pwrite", "setsid", "killpg")


def python(*arguments: str, executable: str = sys.executable, **environment: str) -> str:
    """Runs Python apart from this process and gives its output; the test fails with its error otherwise."""
    done = subprocess.run(
        [executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_three_folders_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        str(path.relative_to(ROOT / folder))
        for folder in ("protos", "server", "client")
        for path in (ROOT / folder / "optserve").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("optserve/")} == sources
    assert all(name.startswith("optserve-") for name in names - sources)
    assert "optserve/__init__.py" not in names
    assert {"optserve/v1/types.proto", "optserve/v1/types_pb2.pyi", "optserve/v1/data_pb2_grpc.py"} <= names


def test_every_package_says_that_it_is_typed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packages = {name.split("/")[1] for name in names if name.startswith("optserve/") and name.count("/") > 1}
    assert packages >= {"v1", "wire", "server", "client", "cli"}
    assert [package for package in sorted(packages) if f"optserve/{package}/py.typed" not in names] == []


@pytest.mark.timeout(300)
def test_wheel_installs_and_imports_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    python("-m", "venv", "--without-pip", str(tmp_path / "venv"))
    fresh = tmp_path / "venv" / "bin" / "python"
    python("-m", "pip", "--python", str(fresh), "install", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel))
    # The dependencies are this environment's: its packages are on the path, its .pth files (the editable install) are not read.
    packages = sysconfig.get_path("purelib")
    imported = "import optserve.client, optserve.cli, optserve.server.app as app; print(app.__file__)"
    assert python("-c", imported, executable=str(fresh), PYTHONPATH=packages).startswith(str(tmp_path))
    command = tmp_path / "venv" / "bin" / "optserve"
    assert "Usage" in python(str(command), "--help", executable=str(fresh), PYTHONPATH=packages)


def blocked(modules: tuple[str, ...], calls: tuple[str, ...] = ()) -> str:
    """Python statements after which these modules cannot be imported and os lacks these calls."""
    return f"import os, sys; sys.modules.update(dict.fromkeys({modules!r})); [delattr(os, call) for call in {calls!r}]; "


def test_worker_needs_no_server_dependency() -> None:
    modules = (*SERVER_ONLY, "optserve.server", "optserve.embedded")
    python("-c", blocked(modules) + "import optserve.client")


@pytest.mark.parametrize("package", ["optserve.client", "optserve.cli"])
def test_package_imports_without_what_only_linux_has(package: str) -> None:
    python("-c", blocked((*LINUX_ONLY, "optserve.server"), LINUX_ONLY_CALLS) + f"import {package}")


def test_block_is_a_block() -> None:
    script = blocked(("numba", "optserve.server"), ("fork",)) + "import importlib.util as util\n"
    script += "for name in ('numba', 'optserve.server.app'):\n"
    script += "    try: __import__(name)\n    except ImportError: print('blocked')\n"
    script += "print(hasattr(os, 'fork'))"
    assert python("-c", script).split() == ["blocked", "blocked", "False"]
