"""What the store promises around the arithmetic: values, versions, readers and writers, padding, memory."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.server.backends import select
from optserve.server.formulas import find
from optserve.server.store import Store
from optserve.server.store.steps import SLICE
from optserve.wire.errors import (
    DeadlineExceededError,
    DtypeMismatchError,
    DuplicateParameterError,
    InvalidArgumentError,
    InvalidChunkError,
    OutOfMemoryError,
    ShapeMismatchError,
    UnknownParameterError,
)

ADAM, SGD = find("adam"), find("sgd")
FLOAT32 = np.dtype(np.float32)
Build = Callable[..., Store]
Step = Callable[..., None]


def weights(store: Store, name: str) -> np.ndarray:
    return store.export().values[name]


def test_values_come_in_blocks_and_masters_are_made_when_they_are_complete() -> None:
    store = Store(SGD, select("numpy"))
    store.add_group([("a", (3,), np.dtype(np.float16)), ("b", (40,), np.dtype(np.float16))])
    raw = np.full(96, 1.5, np.float16)
    store.write_block(0, 0, memoryview(raw[:50].tobytes()))
    store.write_block(0, 100, memoryview(raw[50:].tobytes()))
    store.seal()
    assert np.array_equal(weights(store, "a"), raw[:3])
    assert np.array_equal(store.export().state["master/b"], raw[:40].astype(np.float32))
    with store.reading() as arrays:
        assert not arrays[0][3:32].any(), "padding is zero whatever came"
    with pytest.raises(InvalidChunkError, match="has its initial values"):
        store.write_block(0, 0, memoryview(b"1234"))


@pytest.mark.parametrize(("offset", "size"), [(-4, 4), (124, 8), (1 << 40, 4)])
def test_a_block_outside_its_array_is_refused(offset: int, size: int) -> None:
    store = Store(SGD, select("numpy"))
    store.add_group([("a", (32,), FLOAT32)])
    with pytest.raises(InvalidChunkError, match="do not lie in array 0"):
        store.write_block(0, offset, memoryview(bytes(size)))
    with pytest.raises(UnknownParameterError, match="array 7"):
        store.write_block(7, 0, memoryview(bytes(4)))


def test_a_group_that_cannot_be_added_leaves_the_store_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(SGD, select("numpy"))
    store.add_group([("a", (4,), FLOAT32)])
    with pytest.raises(DuplicateParameterError):
        store.add_group([("b", (4,), FLOAT32), ("a", (4,), FLOAT32)])
    monkeypatch.setattr(type(store.backend), "zeros", refuse_memory)
    with pytest.raises(OutOfMemoryError, match="flat array of"):
        store.add_group([("b", (4,), FLOAT32)])
    assert [place.name for place in store.layout.places] == ["a"]
    monkeypatch.undo()
    store.add_group([("b", (4,), FLOAT32)])
    assert store.layout.arrays[1].group == 1


def refuse_memory(*_: object) -> None:
    raise MemoryError


def test_no_memory_for_slots_or_accumulators_changes_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [dict(SGD.defaults)]
    store = build(SGD, "numpy", [{"a": np.ones(4, np.float32)}], groups)
    gradients = store.accumulators()
    monkeypatch.setattr(type(store.backend), "zeros", refuse_memory)
    groups[0]["momentum"] = 0.9
    for call in (store.accumulators, lambda: store.prepare(groups), lambda: store.update(groups, gradients)):
        with pytest.raises(OutOfMemoryError):
            call()
    assert store.state_bytes == 32 * 4
    assert np.array_equal(weights(store, "a"), np.ones(4))


def test_whole_values_are_set_or_refused(build: Build) -> None:
    start = {"a": np.ones((2, 2), ml_dtypes.bfloat16), "b": np.ones(3, ml_dtypes.bfloat16)}
    store = build(ADAM, "numpy", [start], [ADAM.defaults])
    new = np.full((2, 2), 3, ml_dtypes.bfloat16)
    for wrong, error in (
        ({"a": new, "b": new}, ShapeMismatchError),
        ({"a": new, "c": new}, UnknownParameterError),
        ({"a": new, "b": np.ones(3, np.float32)}, DtypeMismatchError),
    ):
        with pytest.raises(error):
            store.set_values(wrong)
    assert np.array_equal(weights(store, "a"), start["a"])
    store.set_values({"a": new})
    assert np.array_equal(store.export().state["master/a"], np.full((2, 2), 3, np.float32))


def test_groups_have_their_own_hyperparameters_and_dtypes(build: Build, step: Step) -> None:
    tensors = [{"a": np.ones(3, np.float32), "b": np.ones(3, np.float64)}, {"c": np.ones(3, np.float32)}]
    groups = [{**SGD.defaults, "lr": 0.5}, {**SGD.defaults, "lr": 0.25, "momentum": 0.9}]
    store = build(SGD, "numba", tensors, groups)
    step(store, groups, {name: np.ones(3, np.float64 if name == "b" else np.float32) for name in "abc"})
    content = store.export()
    assert [content.values[name][0] for name in "abc"] == [0.5, 0.5, 0.75]
    assert content.values["b"].dtype == np.float64
    assert content.steps == {"c": 1}
    assert list(content.state) == ["momentum_buffer/c"]


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_padding_stays_zero_even_where_a_step_divides_zero_by_zero(backend: str, build: Build) -> None:
    group = {**ADAM.defaults, "eps": 0.0, "amsgrad": True}
    store = build(ADAM, backend, [{"a": np.ones(5, np.float16), "b": np.ones((2, 3), np.float16)}], [group])
    gradients = {0: np.ones(64, np.float32)}
    store.update([group], gradients)
    assert np.all(np.isfinite(weights(store, "b")))
    with store.reading() as arrays:
        assert np.flatnonzero(arrays[0].astype(np.float32) != 0).tolist() == [*range(5), *range(32, 38)]
    assert gradients[0].all(), "gradients are never changed"


@pytest.mark.parametrize(
    "gradients",
    [{}, {0: np.zeros(31, np.float32)}, {0: np.zeros(32, np.float64)}, {0: np.zeros((1, 32), np.float32)}],
    ids=["none", "short", "dtype", "shape"],
)
def test_a_gradient_that_does_not_fit_changes_nothing(gradients: dict[int, Any], build: Build) -> None:
    store = build(ADAM, "numpy", [{"a": np.ones(5, np.float32)}], [ADAM.defaults])
    with pytest.raises(InvalidArgumentError, match="array 0 needs a gradient of 32 elements"):
        store.update([ADAM.defaults], gradients)
    assert store.export().steps == {}
    with pytest.raises(InvalidArgumentError, match="0 param groups"):
        store.update([], gradients)


def test_an_array_without_present_parameters_needs_no_gradient(build: Build) -> None:
    store = build(ADAM, "numpy", [{"a": np.ones(5, np.float32)}], [ADAM.defaults])
    store.update([ADAM.defaults], {}, absent=frozenset({0}))
    assert np.array_equal(weights(store, "a"), np.ones(5))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_gradients_in_the_wire_dtype_do_as_well(backend: str, dtype: Any, build: Build) -> None:
    values = np.random.default_rng(0).normal(size=100).astype(dtype)
    stores = [build(ADAM, backend, [{"a": values}], [ADAM.defaults]) for _ in range(2)]
    narrow = np.zeros(128, dtype)
    narrow[:100] = values[::-1]
    for store, gradient in zip(stores, (narrow, narrow.astype(np.float32)), strict=True):
        store.update([ADAM.defaults], {0: gradient}, 0.5)
    assert weights(stores[0], "a").tobytes() == weights(stores[1], "a").tobytes()


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_an_update_waits_for_readers_and_names_them(build: Build) -> None:
    store = build(SGD, "numpy", [{"a": np.ones(5, np.float32)}], [SGD.defaults])
    gradients = store.accumulators()
    gradients[0][:5] = 1
    hold = store.hold("rank 2 'w2'")
    with pytest.raises(DeadlineExceededError, match=r"the update waited 0\.05 s for rank 2 'w2' to let go"):
        store.update([SGD.defaults], gradients, timeout_seconds=0.05)
    updating = in_thread(lambda: store.update([SGD.defaults], gradients, timeout_seconds=30))
    time.sleep(0.05)
    assert updating.is_alive()
    with pytest.raises(DeadlineExceededError, match=r"rank 3 waited 0\.05 s to read the weights; the update is not done"):
        store.hold("rank 3", timeout_seconds=0.05)
    assert hold.arrays[0][0] == 1
    releasing = in_thread(hold.release)
    hold.release()
    updating.join(30)
    releasing.join(30)
    assert weights(store, "a")[0] == np.float32(1 - 1e-3)


def test_a_hold_is_released_once_however_often_it_is_released(build: Build) -> None:
    store = build(SGD, "numpy", [{"a": np.ones(5, np.float32)}], [SGD.defaults])
    first, second = store.hold("x"), store.hold("x")
    for _ in range(3):
        first.release()
    with pytest.raises(DeadlineExceededError, match="for x to let go"):
        store.set_values({}, timeout_seconds=0)
    second.release()
    store.set_values({}, timeout_seconds=0)


def test_what_is_read_cannot_be_written(build: Build) -> None:
    store = build(SGD, "numpy", [{"a": np.ones(5, np.float32)}], [SGD.defaults])
    with store.reading() as arrays, pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 2
    with pytest.raises(ValueError, match="read-only"):
        store.snapshot()[0][0] = 2


def test_a_snapshot_is_one_version_shared_while_someone_keeps_it(build: Build) -> None:
    store = build(SGD, "numpy", [{"a": np.ones(5, np.float32)}], [SGD.defaults])
    gradients = store.accumulators()
    gradients[0][:5] = 1
    found: list[dict[int, np.ndarray]] = []
    threads = [in_thread(lambda: found.append(store.snapshot())) for _ in range(4)]
    for thread in threads:
        thread.join(30)
    before = store.snapshot()
    assert all(entry is before for entry in found)
    store.update([SGD.defaults], gradients, timeout_seconds=0)
    after = store.snapshot()
    assert after is not before
    assert before[0][0] == 1 != after[0][0]
    alive = weakref.ref(before)
    found.clear()
    del before
    assert alive() is None


def test_state_bytes_count_weights_masters_and_slots(build: Build) -> None:
    start = {"a": np.ones(32, np.float16), "b": np.ones(64, np.float64)}
    assert build(SGD, "numpy", [start], [SGD.defaults]).state_bytes == 32 * (2 + 4) + 64 * 8
    assert build(ADAM, "numpy", [start], [ADAM.defaults]).state_bytes == 32 * (2 + 3 * 4) + 64 * 3 * 8


def test_a_small_update_stays_in_its_thread_and_a_large_one_does_not(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    for size in (SLICE, 4 * SLICE):
        store = build(SGD, "numpy", [{"a": np.ones(size, np.float32)}], [SGD.defaults], 2)
        kernel = store.backend.kernel(SGD, SGD.choices(SGD.defaults), FLOAT32)
        both = threading.Barrier(2, timeout=30)

        def spy(*arguments: Any, run: Any = kernel, both: Any = both, size: int = size) -> None:
            if size > SLICE and threading.get_ident() not in threads:
                threads.add(threading.get_ident())
                both.wait()
            threads.add(threading.get_ident())
            run(*arguments)

        monkeypatch.setattr(store.backend, "kernel", lambda *_, spy=spy: spy)
        threads.clear()
        store.update([SGD.defaults], store.accumulators())
        assert len(threads) == (1 if size == SLICE else 2)
        monkeypatch.undo()
