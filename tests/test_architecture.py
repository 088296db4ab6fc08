"""Imports go one way (the room table of the design), each outside library stays at its edge, and nothing executes data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("protos", "server", "client")

ROOMS: dict[str, tuple[str, ...]] = {
    "formulas": (),
    "schedules": (),
    "storage": (),
    "records": (),
    "backends": ("formulas",),
    "store": ("backends",),
    "jobs": ("store", "schedules", "records"),
    "rounds": ("jobs",),
    "durability": ("jobs", "records", "storage"),
    "segments": ("backends",),
    "metrics": ("rounds",),
    "services": ("rounds", "durability"),
    "interceptors": ("rounds", "durability"),
    "app": ("services", "interceptors", "segments", "metrics", "rounds", "durability"),
}
"""What each room of the server may import besides wire; the rest follows downward. formulas may not import even wire."""

AREAS: dict[str, tuple[str, ...]] = {
    "v1": (),
    "wire": ("v1",),
    "client": ("wire",),
    "torch": ("client",),
    "embedded": ("client", "server.app"),
    "cli": ("embedded",),
    "server": (),
    **{f"server.{room}": tuple(f"server.{below}" for below in below_it) for room, below_it in ROOMS.items()},
}

GRPC = ("server.services", "server.interceptors", "server.app", "v1")
EDGES: dict[str, tuple[str, ...]] = {
    "grpc": (*GRPC, "optserve.client._channel"),
    "cupy": ("optserve.server.backends.cupy.device",),
    "numba": ("optserve.server.backends.numba",),
    "llvmlite": ("optserve.server.backends.numba",),
    "torch": ("torch",),
    "tensorboardX": ("optserve.server.metrics.curve",),
}
"""Outside library to the areas and modules that may import it. The generated service stubs count as grpc."""

EXECUTES_DATA = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
EXECUTES_TEXT = {"eval", "exec", "__import__"}
COMPILERS = ("optserve.server.backends.numba", "optserve.server.backends.numpy")
"""What they execute is the text that they made from a formula of this repository; nothing of it comes from a client."""
DRAWERS = {"utils", "util", "common", "misc", "helpers", "helper", "manager", "cmd"}
MOST_LINES = 400


@dataclass(frozen=True)
class Import:
    name: str
    line: int
    function: str | None
    """The innermost function that holds the import."""


def allowed(area: str) -> set[str]:
    """The areas that an area may import: itself, what the table names, and everything below that."""
    reached = {area}
    waiting = list(AREAS[area])
    if area.startswith("server.") and area != "server.formulas":
        waiting.append("wire")
    while waiting:
        below = waiting.pop()
        if below not in reached:
            reached |= allowed(below)
    return reached


def area_of(name: str) -> str | None:
    """The area of a dotted name of ours; None for other people's."""
    parts = name.split(".")
    if parts[0] != "optserve" or len(parts) == 1:
        return None
    return ".".join(parts[1:3]) if parts[1] == "server" else parts[1]


def imports_of(tree: ast.AST, package: str, function: str | None = None) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            yield from (Import(f"{base}.{alias.name}", node.lineno, function) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (
                Import(str(given.value), node.lineno, function) for given in node.args if isinstance(given, ast.Constant)
            )
        name = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        yield from imports_of(node, package, name)


def library_of(name: str) -> str:
    """The outside library that a name stands for."""
    if name.startswith("grpc_") or (name.startswith("optserve.v1.") and "_pb2_grpc" in name):
        return "grpc"
    return name.split(".")[0]


def import_faults(module: str, found: Import) -> Iterator[str]:
    area, other = area_of(module) or "", area_of(found.name)
    lazy_embedded = area == "client" and other == "embedded" and found.function == "connect"
    if other is not None and other not in allowed(area) and not lazy_embedded:
        yield f"{module}:{found.line} imports {found.name}, which {area} may not"
    edge = EDGES.get(library_of(found.name))
    if edge is not None and area not in edge and module not in edge:
        yield f"{module}:{found.line} imports {found.name} away from its edge"
    if found.name.split(".")[0] in EXECUTES_DATA:
        yield f"{module}:{found.line} imports {found.name}, which executes what it reads"


def call_faults(module: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).removeprefix("builtins.")
            if called in EXECUTES_TEXT and not (called == "exec" and module in COMPILERS):
                yield f"{module}:{node.lineno} calls {called}"
            if any(entry.arg == "allow_pickle" and ast.unparse(entry.value) != "False" for entry in node.keywords):
                yield f"{module}:{node.lineno} allows pickles"


def faults(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What a module's source breaks."""
    if area_of(module) not in AREAS:
        return [f"{module} is in no room of the table"]
    tree = ast.parse(source)
    package = module if is_package else module.rpartition(".")[0]
    found = [fault for entry in imports_of(tree, package) for fault in import_faults(module, entry)]
    return found + list(call_faults(module, tree))


def path_faults(path: str, lines: int) -> list[str]:
    """What a Python file's path (relative to the root) and length break."""
    found = [
        f"{path} is called {part}: a drawer for anything"
        for part in Path(path).with_suffix("").parts
        if part.strip("_") in DRAWERS
    ]
    if path.endswith("/optserve/__init__.py"):
        found.append(f"{path} would end the namespace package")
    if lines > MOST_LINES:
        found.append(f"{path} has {lines} lines; {MOST_LINES} are the most")
    return found


def written_files(*folders: str) -> list[Path]:
    files = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in files if not path.stem.endswith(("_pb2", "_pb2_grpc"))]


def modules() -> dict[str, Path]:
    found = {}
    for folder in FOLDERS:
        for path in written_files(folder):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@pytest.mark.parametrize("module", modules())
def test_module_imports_only_what_its_room_may(module: str) -> None:
    path = modules()[module]
    assert faults(module, path.read_text(), is_package=path.stem == "__init__") == []


def test_every_room_of_the_server_is_in_the_table() -> None:
    found = {path.stem for path in (ROOT / "server/optserve/server").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__pycache__"} <= set(ROOMS)


def test_files_are_short_and_named_for_what_they_hold() -> None:
    files = written_files(*FOLDERS, "tests", "benchmarks", "examples")
    assert [
        fault for path in files for fault in path_faults(str(path.relative_to(ROOT)), len(path.read_text().splitlines()))
    ] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("optserve.wire.chunks", "from optserve.server.store import flat"),
        ("optserve.wire.chunks", "from optserve.client import connect"),
        ("optserve.client._job", "import optserve.server.app"),
        ("optserve.client._job", "from optserve import embedded"),
        ("optserve.client._job", "def elsewhere():\n    import optserve.embedded"),
        ("optserve.client._job", "import importlib\nimportlib.import_module('optserve.server.app')"),
        ("optserve.torch.adam", "import optserve.server.formulas"),
        ("optserve.server", "from optserve.server import app"),
        ("optserve.server.app", "from optserve.client import connect"),
        ("optserve.server.app", "import optserve.embedded"),
        ("optserve.server.formulas.adam", "from optserve.wire import errors"),
        ("optserve.server.formulas.adam", "from ...wire import errors"),
        ("optserve.server.backends.numpy", "from optserve.server import store"),
        ("optserve.server.backends.numpy", "from ..schedules import table"),
        ("optserve.server.store.flat", "import optserve.server.records"),
        ("optserve.server.jobs.job", "from optserve.server.rounds.fold import fold"),
        (
            "optserve.server.jobs.job",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import optserve.server.durability",
        ),
        ("optserve.server.rounds.gather", "import optserve.server.storage"),
        ("optserve.server.rounds.host", "from optserve.server.metrics import Curves"),
        ("optserve.server.metrics.curves", "import tensorboardX"),
        ("optserve.server.services.job", "from optserve.server.segments import staging"),
        ("optserve.server.cellar.wine", ""),
        ("optserve.annex", ""),
        ("optserve.server.jobs.job", "import grpc"),
        ("optserve.server.jobs.job", "from optserve.v1 import jobs_pb2_grpc"),
        ("optserve.client._job", "from grpc_status import rpc_status"),
        ("optserve.server.backends.numpy", "import numba"),
        ("optserve.server.backends.numba", "import cupy"),
        ("optserve.server.backends.cupy.backend", "import cupy"),
        ("optserve.cli.doctor", "def versions():\n    import torch"),
        ("optserve.server.durability.log", "import pickle"),
        ("optserve.server.durability.log", "from marshal import loads"),
        ("optserve.server.backends.norms", "exec('x = 1')"),
        ("optserve.server.backends.numpy", "import builtins\nbuiltins.eval('1')"),
        ("optserve.client._job", "import numpy as np\nnp.load('x', allow_pickle=True)"),
    ],
)
def test_checker_finds_a_fault(module: str, source: str) -> None:
    assert faults(module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("optserve.wire.chunks", "from optserve.v1 import types_pb2 as pb\nfrom google.protobuf.message import Message"),
        ("optserve.client._connect", "def connect():\n    from optserve import embedded"),
        ("optserve.client._channel", "import grpc\nfrom optserve.v1 import jobs_pb2_grpc"),
        (
            "optserve.server.store.flat",
            "from optserve.server.formulas.definition import Optimizer\nfrom optserve.wire import errors",
        ),
        ("optserve.server.services.job", "import grpc\nfrom ..jobs.job import Job"),
        ("optserve.server.backends.numba", "def load(text):\n    import numba\n    exec(text, {})"),
        ("optserve.server.backends.cupy.device", "def begin():\n    import cupy"),
        ("optserve.embedded", "from optserve.server.app import App\nfrom optserve.client import Server"),
        ("optserve.cli.serve", "from optserve.server.app import App\nfrom optserve.client import connect"),
        ("optserve.torch.adam", "import torch\nfrom optserve.client import connect"),
    ],
)
def test_checker_accepts_what_the_table_allows(module: str, source: str) -> None:
    assert faults(module, source) == []


@pytest.mark.parametrize(
    ("path", "lines"),
    [
        ("client/optserve/client/utils.py", 1),
        ("client/optserve/client/_helpers.py", 1),
        ("server/optserve/server/common/flat.py", 1),
        ("server/optserve/__init__.py", 1),
        ("server/optserve/server/app.py", 401),
    ],
)
def test_checker_finds_a_fault_in_a_path(path: str, lines: int) -> None:
    assert path_faults(path, lines) != []


def test_checker_accepts_an_ordinary_path() -> None:
    assert path_faults("server/optserve/server/jobs/job.py", 400) == []
