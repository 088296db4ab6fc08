"""Memory as the other rooms see it, on a CPU: state memory is host memory, and nothing is copied that need not be."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.server.backends import Backend, select


@pytest.fixture(params=["numba", "numpy"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return select(request.param)


def test_arrays_are_zero_and_begin_at_a_cache_line(backend: Backend) -> None:
    for make in (backend.zeros, backend.host_zeros):
        for length in (0, 1, 32, 10_000):
            for dtype in (np.float16, np.float64):
                array = make(length, dtype)
                assert (array.shape, array.dtype) == ((length,), dtype)
                assert array.ctypes.data % 64 == 0 or not length
                assert not array.any()


def test_state_memory_is_host_memory(backend: Backend) -> None:
    array = backend.zeros(5, np.float32)
    assert backend.on_host
    assert backend.threads is None
    assert backend.xp is np
    assert backend.to_host(array) is array
    assert backend.place(array) is array
    assert backend.run(lambda: array) is array


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_cast(dtype: Any, backend: Backend) -> None:
    values = np.array([1.0, -0.0, 1 / 3, 1e300, -np.inf, np.nan])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        into = backend.zeros(6, dtype)
        backend.write(into, values)
        backend.write(into[1:2], 7.5)
        small = backend.zeros(1, np.float32)
        backend.write(small, 1e300)
    with np.errstate(all="ignore"):
        expected = values.astype(dtype)
        expected[1] = 7.5
    assert into.tobytes() == expected.tobytes()
    assert small[0] == np.inf


def test_chosen_elements_are_cleared(backend: Backend) -> None:
    array = np.arange(1, 7, dtype=np.float32)
    backend.clear(array, np.array([1, 4], np.intp))
    assert array.tolist() == [1, 0, 3, 4, 0, 6]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_published_masters_are_narrowed(dtype: Any, backend: Backend) -> None:
    masters = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    weights = np.zeros(1000, dtype)
    backend.publish(masters[100:900], weights[100:900])
    expected = masters.astype(dtype)
    expected[:100] = expected[900:] = 0
    assert weights.tobytes() == expected.tobytes()


def test_what_is_the_same_memory_needs_no_publishing(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.ones(10, np.float32)
    monkeypatch.setattr(type(backend), "write", lambda *_: pytest.fail("it was copied onto itself"))
    backend.publish(weights[2:5], weights[2:5])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_rows_are_taken_and_put_where_they_belong(dtype: Any, backend: Backend) -> None:
    source = np.random.default_rng(0).normal(size=(9, 5)).astype(dtype)
    ids, into, home, weights = np.array([7, 0, 3]), np.zeros((3, 5), dtype), source.copy(), source.copy()
    backend.take_rows(source, ids, into)
    assert into.tobytes() == source[ids].tobytes()
    backend.put_rows(into[::-1].copy(), ids, home)
    backend.publish_rows(into[::-1].copy(), ids, weights)
    expected = source.copy()
    expected[ids] = source[ids[::-1]]
    assert home.tobytes() == weights.tobytes() == expected.tobytes()
    for shape, some in (((9, 0), ids), ((9, 5), ids[:0])):  # rows of nothing, and no rows
        backend.take_rows(source[:, : shape[1]].copy(), some, np.zeros((len(some), shape[1]), dtype))
        backend.put_rows(np.zeros((len(some), shape[1]), dtype), some, home[:, : shape[1]].copy())
    assert home.tobytes() == expected.tobytes()
