"""Optimizers that look at whole parameters: what they are given, where their state lives, and who runs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.server.formulas import OPTIMIZERS, Tensorwise, find
from optserve.server.store import Store, StoreState
from optserve.wire.errors import OutOfMemoryError

BACKENDS = ["numba", "numpy"]
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
TENSORWISE = sorted(name for name, optimizer in OPTIMIZERS.items() if isinstance(optimizer, Tensorwise))
Build = Callable[..., Store]
Step = Callable[..., None]
GROUP = {"lr": 0.5, "rows": True}


def shapes(group: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"rows": shape[:1], "largest": ()} if group["rows"] else {}


class Summing:
    """p -= lr · (g + sum of g), with sums of the rows and the largest gradient so far as state; it notes what it is given."""

    def __init__(self, **changes: Any) -> None:
        self.given: list[dict[str, Any]] = []
        self.optimizer = replace(
            Tensorwise(
                name="Summing",
                defaults=GROUP,
                slot_keys=("rows", "largest"),
                check=lambda _: None,
                shapes=shapes,
                update=self.update,
            ),
            **changes,
        )

    def update(self, xp: Any, group: Any, step: int, dtype: Any, p: Any, g: Any, state: Mapping[str, Any]) -> None:
        given = {"xp": xp, "group": group, "step": step, "dtype": dtype, "thread": threading.get_ident(), "state": dict(state)}
        self.given.append({**given, "p": (p.shape, p.dtype), "g": (g.shape, g.dtype, g.copy())})
        p -= group["lr"] * (g + g.sum(dtype=g.dtype))
        if state:
            state["rows"] += g.reshape(*state["rows"].shape, -1).sum(-1) if g.size else 0
            xp.maximum(state["largest"], g.max(initial=0), out=state["largest"])
        g[...] = np.nan


def tensors(dtype: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    made = {"a": random.normal(size=(3, 5)), "scalar": random.normal(size=()), "nothing": np.zeros((1, 0, 2)), "b": np.ones(7)}
    return {name: np.asarray(value).astype(dtype) for name, value in made.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_given_masters_and_scaled_gradients_in_the_state_dtype(
    backend: str, dtype: Any, build: Build, step: Step
) -> None:
    summing = Summing()
    wide = np.float64 if dtype is np.float64 else np.float32
    start, slopes = tensors(dtype), {name: value * 2 for name, value in tensors(dtype).items()}
    store = build(summing.optimizer, backend, [start], [GROUP], 1)
    step(store, [GROUP], slopes, 0.25)
    assert len(summing.given) == 4
    for given in summing.given:
        name = {(3, 5): "a", (): "scalar", (1, 0, 2): "nothing", (7,): "b"}[given["p"][0]]
        assert (given["xp"], given["step"], given["dtype"]) == (np, 1, np.dtype(dtype))
        assert given["group"] == GROUP
        assert given["p"] == (start[name].shape, wide)
        shape, kind, values = given["g"]
        assert (shape, kind) == (start[name].shape, wide)
        slope = slopes[name].astype(wide) * wide(0.25)
        np.testing.assert_array_equal(values, slope)
        content = store.export()
        expected = start[name].astype(wide) - wide(0.5) * (slope + slope.sum(dtype=wide))
        np.testing.assert_array_equal(content.values[name], expected.astype(dtype))
        if dtype not in (np.float32, np.float64):
            np.testing.assert_array_equal(content.state[f"master/{name}"], expected)
        assert {slot: array.ctypes.data % 64 for slot, array in given["state"].items()} == {"rows": 0, "largest": 0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_stay_as_they_are_and_padding_stays_zero(backend: str, build: Build) -> None:
    store = build(Summing().optimizer, backend, [tensors(ml_dtypes.bfloat16)], [GROUP])
    gradients = {0: np.ones(store.layout.arrays[0].length, np.float32)}
    store.update([GROUP], gradients)
    assert (gradients[0] == 1).all()
    with store.reading() as arrays:
        assert not arrays[0][15:32].any()
        assert arrays[0][:15].all()


def test_gradients_of_the_wire_dtype_give_the_same_bits(build: Build) -> None:
    found = []
    for dtype in (ml_dtypes.bfloat16, np.float32):
        store = build(Summing().optimizer, "numpy", [{"a": np.ones((4, 8), ml_dtypes.bfloat16)}], [GROUP])
        values = np.random.default_rng(0).normal(size=32).astype(ml_dtypes.bfloat16).astype(dtype)
        store.update([GROUP], {0: values}, 0.3)
        found.append(store.export().values["a"].tobytes())
    assert found[0] == found[1]


def test_each_parameter_has_its_own_state_shapes_and_steps(build: Build, step: Step) -> None:
    summing = Summing()
    store = build(summing.optimizer, "numpy", [tensors(np.float32)], [GROUP])
    assert store.export().steps == {}
    step(store, [GROUP], {"a": np.ones((3, 5), np.float32)})
    step(store, [GROUP], {"a": np.ones((3, 5), np.float32), "b": np.full(7, 2, np.float32)})
    content = store.export()
    assert content.steps == {"a": 2, "b": 1}
    assert sorted(content.state) == ["largest/a", "largest/b", "rows/a", "rows/b"]
    assert content.state["rows/a"].tolist() == [10.0] * 3
    assert content.state["rows/b"].tolist() == [2.0] * 7
    assert (content.state["largest/b"].shape, float(content.state["largest/b"])) == ((), 2.0)
    assert sorted(given["step"] for given in summing.given) == [1, 1, 2]


def test_without_state_no_steps_are_counted(build: Build, step: Step) -> None:
    summing = Summing()
    group = {**GROUP, "rows": False}
    store = build(summing.optimizer, "numpy", [{"a": np.ones(3, np.float32)}], [group])
    for _ in range(2):
        step(store, [group], {"a": np.ones(3, np.float32)})
    assert [given["step"] for given in summing.given] == [1, 1]
    assert (store.export().steps, store.export().state) == ({}, {})
    assert store.state_bytes == 32 * 4


def test_slots_begin_as_given_at_a_parameters_first_step(build: Build, step: Step) -> None:
    summing = Summing(initial=lambda group: {"largest": group["lr"]})
    store = build(summing.optimizer, "numpy", [{"a": np.ones(3), "b": np.ones(3)}], [GROUP])
    step(store, [GROUP], {"a": np.zeros(3)})
    step(store, [{**GROUP, "lr": 0.75}], {"a": np.zeros(3), "b": np.zeros(3)})
    content = store.export()
    assert [float(content.state[f"largest/{name}"]) for name in "ab"] == [0.5, 0.75]


def test_a_slot_that_gets_another_shape_begins_again(build: Build, step: Step) -> None:
    def reshaping(group: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"rows": shape[: group["axes"]], "largest": ()}

    summing = Summing(shapes=reshaping, initial=lambda _: {"rows": 1.0})
    group = {**GROUP, "axes": 1}
    store = build(summing.optimizer, "numpy", [{"a": np.ones((2, 2))}], [group])
    step(store, [group], {"a": np.ones((2, 2))})
    assert store.export().state["rows/a"].tolist() == [3, 3]
    group["axes"] = 2
    step(store, [group], {"a": np.ones((2, 2))})
    content = store.export()
    assert content.state["rows/a"].tolist() == [[2, 2], [2, 2]]
    assert content.steps == {"a": 2}


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_parameters_come_as_pairs_and_leave_as_complex_numbers(dtype: Any, build: Build, step: Step) -> None:
    def paired(_: Any, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"rows": shape, "largest": ()}

    summing = Summing(shapes=paired)
    start = {"a": np.full((2, 3), 1 + 2j, dtype), "scalar": np.asarray(3 - 1j).astype(dtype)}
    store = build(summing.optimizer, "numpy", [start], [GROUP])
    step_pairs(store, {"a": np.full((2, 3, 2), 0.5), "scalar": np.zeros(2)})
    assert {given["p"][0] for given in summing.given} == {(2, 3, 2), (2,)}
    assert {given["dtype"] for given in summing.given} == {np.dtype(dtype)}
    content = store.export()
    assert content.values["a"].tolist() == [[1 - 0.5 * 6.5 + (2 - 0.5 * 6.5) * 1j] * 3] * 2
    assert (content.state["rows/a"].dtype, content.state["rows/a"].shape) == (dtype, (2, 3))
    assert content.state["rows/a"].tolist() == [[0.5 + 0.5j] * 3] * 2
    assert (content.state["rows/scalar"].dtype, content.state["rows/scalar"].shape) == (dtype, ())
    assert content.state["largest/a"].dtype == np.zeros(1, dtype).real.dtype
    before = store.export()
    store.load(content, [GROUP], with_values=True)
    assert {key: value.tobytes() for key, value in store.export().state.items()} == {
        key: value.tobytes() for key, value in before.state.items()
    }


def step_pairs(store: Store, slopes: Mapping[str, np.ndarray]) -> None:
    flats = store.accumulators()
    for place in store.layout.places:
        flats[place.array_id][place.offset : place.offset + place.size] = slopes[place.name].reshape(-1)
    store.update([GROUP], flats)


# Threads


def test_parameters_are_stepped_in_parallel_the_largest_first(build: Build) -> None:
    both = threading.Barrier(2, timeout=30)
    summing, begun = Summing(), []

    def meet(*arguments: Any) -> None:
        begun.append(arguments[4].size)
        if arguments[4].size >= 90:  # the two largest
            both.wait()
        summing.update(*arguments)

    start = {name: np.ones(size, np.float32) for name, size in (("a", 3), ("b", 90), ("c", 10), ("d", 100), ("e", 50))}
    store = build(replace(summing.optimizer, update=meet), "numpy", [start], [GROUP], 2)
    store.update([GROUP], store.accumulators())
    assert len({given["thread"] for given in summing.given}) == 2
    assert set(begun[:2]) == {90, 100}
    assert sorted(begun) == [3, 10, 50, 90, 100]


def run_all(name: str, backend: str, threads: int, build: Build, step: Step, dtype: Any) -> Store:
    optimizer, random = find(name), np.random.default_rng(9)
    group = {**optimizer.defaults, "lr": 0.02, "l1": 0.01}
    start = {f"p{i}": random.normal(size=(1 + 7 * i % 31, 1 + 5 * i % 43)).astype(dtype) for i in range(9)}
    store = build(optimizer, backend, [start], [group], threads)
    for index in range(4):
        slopes = {key: random.normal(size=value.shape).astype(dtype) for key, value in start.items()}
        step(store, [group], {key: value for key, value in slopes.items() if key != f"p{index}"})
    return store


def bits(content: StoreState) -> dict[str, Any]:
    return {name: array.tobytes() for name, array in {**content.values, **content.state}.items()} | dict(content.steps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", TENSORWISE)
def test_the_bits_depend_neither_on_threads_nor_on_the_backend(name: str, dtype: Any, build: Build, step: Step) -> None:
    alone = bits(run_all(name, "numpy", 1, build, step, dtype).export())
    assert alone == bits(run_all(name, "numpy", 4, build, step, dtype).export())
    assert alone == bits(run_all(name, "numba", 2, build, step, dtype).export())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TENSORWISE)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, dtype: Any, build: Build, step: Step) -> None:
    optimizer, random = find(name), np.random.default_rng(0)
    group = {**optimizer.defaults, "lr": 0.03}
    start = {"a": random.normal(size=(4, 5)).astype(dtype), "b/c": random.normal(size=(3, 1)).astype(dtype)}
    slopes = [{key: random.normal(size=value.shape).astype(dtype) for key, value in start.items()} for _ in range(6)]
    del slopes[2]["a"]
    through, first = (build(optimizer, "numpy", [start], [group]) for _ in range(2))
    for index, entry in enumerate(slopes):
        step(through, [group], entry)
        if index == 3:
            content = first.export()
            first = build(optimizer, "numba", [{key: np.zeros_like(v) for key, v in start.items()}], [group])
            first.load(content, [group], with_values=True)
        step(first, [group], entry)
    assert bits(first.export()) == bits(through.export())


# Memory


def test_no_memory_for_state_changes_nothing(build: Build, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build(Summing().optimizer, "numpy", [tensors(np.float32)], [{**GROUP, "rows": False}])
    size, before = store.state_bytes, bits(store.export())
    zeros, left = store.backend.zeros, [3]

    def few(length: int, dtype: Any) -> np.ndarray:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        return zeros(length, dtype)

    gradients = store.accumulators()
    monkeypatch.setattr(store.backend, "zeros", few)
    for call in (lambda: store.prepare([GROUP]), lambda: store.update([GROUP], gradients)):
        left[0] = 3
        with pytest.raises(OutOfMemoryError, match="optimizer state"):
            call()
        assert (store.state_bytes, bits(store.export())) == (size, before)
    monkeypatch.undo()
    step(store, [GROUP], {"a": np.ones((3, 5), np.float32)})
    assert store.state_bytes == size + 4 * ((3 + 1) + (1 + 1) + (1 + 1) + (7 + 1))


def test_memory_that_the_step_itself_lacks_is_a_typed_error(build: Build) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("a temporary")

    store = build(Summing(update=fail).optimizer, "numpy", [{"w": np.ones(3, np.float32)}], [GROUP])
    with pytest.raises(OutOfMemoryError, match="a step of parameter 'w' of 3 elements"):
        store.update([GROUP], store.accumulators())
    assert store.export().steps == {}
