"""benchmarks/gpu_kernels.py measures and reports, on a device of host memory; how fast anything is, is not tested."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host_device import cupy_on_host
from host_kernels import needs_compiler

from optserve.server.formulas import Elementwise, find

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"
    spec = importlib.util.spec_from_file_location("gpu_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "options", "dtype", "gradient", "size"),
    [
        ("adam", {}, F32, F32, 28),
        ("adam", {"amsgrad": True}, F32, F32, 36),
        ("adam", {}, BF16, BF16, 28),
        ("adam", {}, BF16, F32, 30),
        ("adam", {}, np.dtype(np.float64), np.dtype(np.float64), 56),
        ("sgd", {}, F32, F32, 12),
        ("sgd", {"momentum": 0.9}, F32, F32, 20),
    ],
)
def test_a_steps_bytes_are_those_of_its_formula(
    name: str, options: dict[str, Any], dtype: Any, gradient: Any, size: int, script: ModuleType
) -> None:
    optimizer = find(name)
    assert isinstance(optimizer, Elementwise)
    program = optimizer.program(optimizer.choices({**optimizer.defaults, **options}))
    assert script.bytes_a_parameter(program, dtype, gradient) == size


def test_a_launch_is_timed_among_others_on_the_stream_of_kernels(script: ModuleType) -> None:
    done: list[str] = []
    event = SimpleNamespace(record=lambda stream: done.append(stream), synchronize=lambda: done.append("synchronize"))
    cuda = SimpleNamespace(Event=lambda: event, get_elapsed_time=lambda *_: 30.0)
    backend = SimpleNamespace(
        xp=SimpleNamespace(cuda=cuda), _device=SimpleNamespace(compute="compute"), run=lambda work: work()
    )
    assert script.event_timer(backend)(lambda: done.append("work"), 1) == pytest.approx(0.03 / script.IN_A_ROW)
    assert done == 3 * ["compute", *script.IN_A_ROW * ["work"], "compute", "synchronize"]


@needs_compiler
def test_every_variant_has_a_row_for_every_dtype(script: ModuleType) -> None:
    backend, works = cupy_on_host(), []

    def timer(work: Callable[[], object], repeat: int) -> float:
        backend.run(work)
        works.append(work)
        return 1e-6

    rows = list(script.measure(backend, [("adam", {}), ("sgd", {"momentum": 0.9})], 10_000, 1, timer))
    kernels = [row for row in rows if "fraction_of_roof" in row]
    assert [(row["optimizer"], row["dtypes"]) for row in kernels] == [
        (name, title) for name in ("adam", "sgd") for title in script.DTYPES
    ]
    assert kernels[0]["fraction_of_roof"] == pytest.approx(28 / 8)
    assert len(works) == 1 + len(kernels)
    assert set(rows[-1]["milliseconds"]) == {"step", "upload", "download"}
    text = "\n".join(map(script.line, rows))
    assert "sgd(momentum=0.9) bf16, its gradient too" in text
    assert "cupy on host, 10,000 parameters; roof: copy kernel 0.080 TB/s" in text
