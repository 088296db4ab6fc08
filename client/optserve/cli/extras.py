"""The optional dependencies: what each extra brings, and what is missing here."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from optserve.wire.errors import MissingExtraError

EXTRAS: dict[str, tuple[str, ...]] = {
    "server": ("grpc_health", "grpc_reflection", "numba", "xxhash"),
    "demo": ("matplotlib", "sklearn"),
    "torch": ("torch",),
    "tensorboard": ("tensorboardX",),
    "cuda12": ("cupy",),
}
"""Modules by the extra that installs them. cuda13 brings the same module as cuda12."""

SERVER_NEEDS = ("grpc_health", "grpc_reflection")
"""A server does not start without these. numba is not among them: without it the server runs on NumPy, and says so."""


def pip_command(extra: str) -> str:
    """How to install an extra."""
    return f'pip install "optserve[{extra}]"'


def missing(modules: Iterable[str]) -> list[str]:
    """Those of the modules that are not installed; imports nothing."""
    return [module for module in modules if find_spec(module) is None]


def require(command: str, extra: str, modules: Iterable[str]) -> None:
    """MissingExtraError if `command` cannot run for want of a module."""
    if absent := missing(modules):
        raise MissingExtraError(f"`optserve {command}` needs {', '.join(absent)}: {pip_command(extra)}", extra=extra)
