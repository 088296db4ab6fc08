"""What both backends promise about arrays: folding, finiteness, norms, lengths, alignment; and that they are found."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.server import backends
from optserve.server.backends import Backend, select, threads
from optserve.server.backends.norms import LANES, SEGMENT
from optserve.server.formulas import find
from optserve.wire.dtypes import state_dtype
from optserve.wire.errors import InvalidArgumentError, MissingExtraError

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
SIZES = [0, 1, 7, 33, LANES, 20_001, 70_000]


@pytest.fixture(params=["numba", "numpy"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return select(request.param)


def values(size: int, dtype: Any, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(dtype)


def unaligned(array: np.ndarray) -> np.ndarray:
    """A read-only copy at an odd address, as a message's bytes may lie."""
    raw = b"?" + array.tobytes()
    return np.frombuffer(raw, np.uint8)[1:].view(array.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_fold_widens_multiplies_and_adds_in_the_state_dtype(backend: Backend, size: int, dtype: Any) -> None:
    into = backend.zeros(size, state_dtype(dtype))
    into[:] = np.nan
    first, second, third = (values(size, dtype, seed) for seed in range(3))
    real = into.dtype.type
    expected = first.astype(real) * real(0.3)
    backend.fold(into, unaligned(first), 0.3, True)
    assert into.tobytes() == expected.tobytes()
    expected = expected + second.astype(real)
    backend.fold(into, second, 1.0, False)
    assert into.tobytes() == expected.tobytes()
    expected = expected + third.astype(real) * real(1 / 3)
    backend.fold(into, unaligned(third), 1 / 3, False)
    assert into.tobytes() == expected.tobytes()
    backend.fold(into, first, 1.0, True)
    assert into.tobytes() == first.astype(real).tobytes()


def test_fold_refuses_other_lengths(backend: Backend) -> None:
    with pytest.raises(ValueError, match="3 values cannot be folded into 4"):
        backend.fold(np.zeros(4, np.float32), np.zeros(3, np.float32), 1.0, True)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_16_bit_pattern_is_widened_exactly(backend: Backend, dtype: Any) -> None:
    patterns = np.arange(65_536, dtype=np.uint16).view(dtype)
    into = np.zeros(65_536, np.float32)
    backend.fold(into, patterns, 1.0, True)
    expected = patterns.astype(np.float32)
    same = (into.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(into) & np.isnan(expected))
    assert same.all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_masters_are_narrowed_to_nearest_even(backend: Backend, dtype: Any) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 200_000, np.uint32)
    masters = np.concatenate([bits.view(np.float32), np.float32([0, -0.0, np.inf, -np.inf, np.nan, 65504, 65520, 1e-8, 6e-8])])
    masters = np.concatenate([masters, patterns_halfway(dtype)]).astype(np.float32)
    weights = np.zeros(len(masters), dtype)
    sgd = find("sgd")
    kernel = backend.kernel(sgd, sgd.choices(sgd.defaults), np.dtype(dtype))
    kernel(masters.copy(), np.zeros_like(masters), (), {"lr": 0.0}, 1.0, weights)
    with np.errstate(all="ignore"):
        expected = masters.astype(dtype)
    finite = ~np.isnan(masters)
    assert np.array_equal(weights.view(np.uint16)[finite], expected.view(np.uint16)[finite])
    assert np.isnan(weights.astype(np.float32)[~finite]).all()


def patterns_halfway(dtype: Any) -> np.ndarray:
    """Exactly between neighbours, where rounding to even shows."""
    every = np.arange(0, 0x7800, dtype=np.uint16)
    low, high = (part.view(dtype).astype(np.float64) for part in (every, every + np.uint16(1)))
    return ((low + high) / 2).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_finite_is_exact(backend: Backend, size: int, dtype: Any) -> None:
    array = values(size, dtype)
    largest = ml_dtypes.finfo(dtype).max
    array[::3], array[1::3] = largest, -largest
    assert backend.finite(unaligned(array))
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for place in {0, size // 2, size - 1} if size else ():
            spoilt = array.copy()
            spoilt[place] = bad
            assert not backend.finite(spoilt)


def test_finite_makes_no_large_temporaries(backend: Backend) -> None:
    array = np.ones(4_000_000, np.float32)
    backend.finite(array)
    tracemalloc.start()
    backend.finite(array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [*SIZES, SEGMENT + 5, 3 * SEGMENT])
def test_the_sum_of_squares_is_exact_enough_and_the_same_everywhere(
    size: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = values(size, dtype)
    found = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(threads, "core_count", lambda cores=cores: cores)
        found += [select(name).sum_of_squares(unaligned(array)) for name in ("numba", "numpy")]
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(float(np.sum(np.square(array, dtype=np.float64))), rel=1e-13)


def test_the_sum_of_squares_of_huge_and_broken_values(backend: Backend) -> None:
    assert backend.sum_of_squares(np.full(10, 3e38, np.float32)) == pytest.approx(9e77)
    assert backend.sum_of_squares(np.full(10, 1e200)) == np.inf
    assert backend.sum_of_squares(np.float32([1, np.inf])) == np.inf
    assert np.isnan(backend.sum_of_squares(np.float32([1, np.nan])))


def test_a_kernel_takes_unaligned_read_only_gradients_and_refuses_other_lengths(backend: Backend) -> None:
    adam = find("adam")
    kernel = backend.kernel(adam, adam.choices(adam.defaults), np.dtype(np.float32))
    gradient = values(20_001, np.float32)
    results = []
    for given in (gradient, unaligned(gradient)):
        masters, slots = np.ones(20_001, np.float32), [np.zeros(20_001, np.float32) for _ in range(2)]
        kernel(masters, given, slots, adam.values(adam.defaults, 1, {}), 0.1, None)
        results.append([array.tobytes() for array in (masters, *slots)])
    assert results[0] == results[1]
    short = np.zeros(20_000, np.float32)
    for arguments in ((short, gradient, slots), (masters, short, slots), (masters, gradient, [slots[0], short])):
        with pytest.raises(ValueError, match="slices of other lengths"):
            kernel(*arguments, adam.values(adam.defaults, 1, {}), 1.0, None)
    with pytest.raises(ValueError, match="gradients have dtype float64"):
        kernel(masters, gradient.astype(np.float64), slots, adam.values(adam.defaults, 1, {}), 1.0, None)


def test_kernels_are_compiled_once(backend: Backend) -> None:
    adam, dtype = find("adam"), np.dtype(np.float32)
    options = adam.choices(adam.defaults)
    found: list[object] = []
    workers = [threading.Thread(target=lambda: found.append(backend.kernel(adam, options, dtype))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(set(map(id, found))) == 1
    assert backend.kernel(find("adamw"), options, dtype) is not found[0]


def test_backends_are_selected_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "gpu_obstacle", lambda: "no GPU here")
    assert select() is select("auto") is select("numba")
    assert [select(name).name for name in ("numba", "numpy")] == ["numba", "numpy"]
    with pytest.raises(InvalidArgumentError, match="unknown backend 'numbo'; allowed are auto, cupy, numba, numpy"):
        select("numbo")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None if name == "numba" else find_spec(name))
    assert select("auto").name == "numpy"
    with pytest.raises(MissingExtraError, match=r"pip install 'optserve\[server\]'"):
        select("numba")


def test_a_gpu_is_taken_where_nothing_is_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "gpu_obstacle", lambda: None)
    monkeypatch.setattr(backends, "_cupy", lambda _: select("numpy"))
    assert select("auto") is select("cupy") is select("numpy")
    assert select("numba").name == "numba"


_WITHOUT_A_DEVICE = """
import os
from optserve.server import backends
from optserve.server.backends.cupy import backend, device, thread
device.CupyDevice = lambda: None
backend.CupyBackend = lambda _device, thread, _host: thread
thread.DeviceThread = lambda _device, end: (end.__name__,)
"""


def test_only_a_servers_own_process_ends_with_its_gpu() -> None:
    code = "print(*backends._cupy(True), *backends._cupy(False))"
    done = subprocess.run([sys.executable, "-c", _WITHOUT_A_DEVICE + code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["end_process", "refuse_all"]


def test_a_forked_child_does_not_take_its_parents_device_for_its_own() -> None:
    code = """
found = backends._cupy(False)
assert backends._cupy(False) is found
child = os.fork()
if not child:
    os._exit(backends._cupy(False) is found)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", _WITHOUT_A_DEVICE + code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_without_cupy_the_error_says_which_extra_is_for_which_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None if name == "cupy" else find_spec(name))
    expected = r"CuPy is not installed: pip install 'optserve\[cuda13\]' for a driver of version 580 or later, .*cuda12"
    with pytest.raises(MissingExtraError, match=expected):
        select("cupy")
    assert select("auto").name in ("numba", "numpy")


def test_the_first_error_of_a_thread_is_raised_after_all_have_stopped() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 3:
            raise RuntimeError("item 3")
        done.append(item)

    with pytest.raises(RuntimeError, match="item 3"):
        threads.each(work, range(100), 2)
    assert set(done) <= set(range(100)) - {3}
    done.clear()
    threads.each(done.append, range(100), 3)
    assert sorted(done) == list(range(100))
