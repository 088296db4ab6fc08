"""CUDA sources compiled by g++ and run on the host: whole kernels, thread after thread.

What CUDA has built in, `blockIdx` and its like, are variables here. Compiled as NVRTC compiles: no contraction, no fast
mathematics.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Launch = Callable[[int, int, Sequence[Any]], None]
"""launch(blocks, threads of a block, arguments): arrays go by their address, NumPy scalars and one-element structs by value."""

PLAIN = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w")
CHECKED = (*PLAIN, "-O2", "-fsanitize=alignment")
"""Misaligned accesses are reported on stderr."""

HEAD = """
#define __global__
#define __launch_bounds__(...)
struct Dim { unsigned x; };
static thread_local Dim blockIdx, threadIdx, blockDim, gridDim;
"""

TAIL = """
template <unsigned long... I> struct Indices {};
template <unsigned long N> using Below = Indices<__integer_pack(N)...>;
template <class... A, unsigned long... I> static void call(void (*kernel)(A...), void** a, Indices<I...>) {
  kernel(*static_cast<A*>(a[I])...);
}
template <class... A> static void launch(void (*kernel)(A...), unsigned grid, unsigned block, void** arguments) {
  gridDim.x = grid, blockDim.x = block;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) call(kernel, arguments, Below<sizeof...(A)>());
}
"""

has_compiler = shutil.which("g++") is not None
needs_compiler = pytest.mark.skipif(not has_compiler, reason="g++ is not installed: kernels cannot run on the host")


def library(source: str, folder: Path, flags: Sequence[str] = PLAIN) -> Path:
    """The shared library of a source; compiled once for each text."""
    path = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        launches = "".join(
            f'extern "C" void launch_{name}(unsigned grid, unsigned block, void** a) {{ launch({name}, grid, block, a); }}\n'
            for name in names(source)
        )
        text = path.with_suffix(".cpp")
        text.write_text("".join((HEAD, source, TAIL, launches)))
        command = ["g++", *flags, "-o", str(path), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, done.stderr
    return path


def names(source: str) -> list[str]:
    """Of the kernels in a source."""
    return re.findall(r"__global__ void __launch_bounds__\([\d, ]+\) (\w+)\(", source)


def loaded(path: Path, wanted: Sequence[str]) -> dict[str, Launch]:
    """Kernels of a library by name."""
    functions = ctypes.CDLL(str(path))
    return {name: _launcher(functions[f"launch_{name}"]) for name in wanted}


def compiled(source: str, folder: Path) -> dict[str, Launch]:
    """Every kernel of a source by name, with its accesses checked."""
    return loaded(library(source, folder, CHECKED), names(source))


def _launcher(function: Any) -> Launch:
    def launch(grid: int, block: int, arguments: Sequence[Any]) -> None:
        values = [np.array(a.ctypes.data, np.uint64) if _is_array(a) else np.asarray(a) for a in arguments]
        function(grid, block, (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values)))

    return launch


def _is_array(argument: Any) -> bool:
    return isinstance(argument, np.ndarray) and argument.dtype.names is None
