"""Export and load: resumed equals uninterrupted bit for bit, and what does not fit changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.server.formulas import find
from optserve.server.store import Store, StoreState
from optserve.wire.errors import InvalidStateDictError, OutOfMemoryError

Build = Callable[..., Store]
Step = Callable[..., None]
ADAM, SGD = find("adam"), find("sgd")


def tensors(dtype: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    return {"a": random.normal(size=(4, 5)).astype(dtype), "b/c": random.normal(size=()).astype(dtype), "d": np.ones(3, dtype)}


def bits(content: StoreState) -> dict[str, Any]:
    return {name: array.tobytes() for name, array in {**content.values, **content.state}.items()} | dict(content.steps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"),
    [("adam", {"amsgrad": True}), ("adamw", {}), ("sgd", {"momentum": 0.9, "dampening": 0.1}), ("sgd", {})],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    name: str, options: dict[str, Any], dtype: Any, build: Build, step: Step
) -> None:
    group = {**find(name).defaults, "lr": 0.03, **options}
    random = np.random.default_rng(0)
    slopes = [
        {key: np.asarray(random.normal(size=v.shape)).astype(dtype) for key, v in tensors(dtype).items()} for _ in range(9)
    ]
    del slopes[2]["a"]
    through = build(find(name), "numba", [tensors(dtype)], [group])
    first = build(find(name), "numpy", [tensors(dtype)], [group])
    for index, entry in enumerate(slopes):
        step(through, [group], entry)
        if index == 4:
            content = first.export()
            first = build(find(name), "numba", [{key: np.zeros_like(v) for key, v in tensors(dtype).items()}], [group])
            first.load(content, [group], with_values=True)
        step(first, [group], entry)
    assert bits(first.export()) == bits(through.export())


def test_loading_replaces_all_state(build: Build, step: Step) -> None:
    store = build(ADAM, "numpy", [tensors(np.float32)], [ADAM.defaults])
    fresh = store.export()
    step(store, [ADAM.defaults], {key: np.ones_like(v) for key, v in tensors(np.float32).items()})
    stepped = store.export()
    store.load(fresh, [ADAM.defaults], with_values=False)
    assert store.export().steps == {}
    assert bits(store.export()) == bits(StoreState(stepped.values, {}, {}))
    store.load(stepped, [ADAM.defaults], with_values=True)
    assert bits(store.export()) == bits(stepped)


@pytest.mark.parametrize("name", ["adam", "lamb"])
def test_a_parameter_that_a_state_does_not_name_begins_again(name: str, build: Build, step: Step) -> None:
    group = find(name).defaults
    store, fresh = (build(find(name), "numpy", [tensors(np.float32)], [group]) for _ in range(2))
    slopes = {key: np.ones_like(value) for key, value in tensors(np.float32).items()}
    step(store, [group], slopes)
    store.load(fresh.export(), [group], with_values=True)
    for found in (store, fresh):
        step(found, [group], slopes)
    assert bits(store.export()) == bits(fresh.export())


def test_exported_arrays_are_copies(build: Build, step: Step) -> None:
    store = build(ADAM, "numpy", [tensors(np.float32)], [ADAM.defaults])
    step(store, [ADAM.defaults], {key: np.ones_like(v) for key, v in tensors(np.float32).items()})
    content = store.export()
    before = bits(content)
    step(store, [ADAM.defaults], {key: np.ones_like(v) for key, v in tensors(np.float32).items()})
    assert bits(content) == before


def test_a_momentum_buffer_without_a_step_is_not_begun_again(build: Build, step: Step) -> None:
    group = {**SGD.defaults, "lr": 1.0, "momentum": 0.5}
    store = build(SGD, "numpy", [{"a": np.zeros(2, np.float32)}], [group])
    store.load(StoreState({}, {"momentum_buffer/a": np.array([2.0, 4.0])}, {}), [group], with_values=False)
    step(store, [group], {"a": np.ones(2, np.float32)})
    assert store.export().values["a"].tolist() == [-2, -3]


def test_masters_survive_where_they_narrow_to_the_weights(build: Build) -> None:
    store = build(SGD, "numpy", [{"a": np.ones(2, np.float16)}], [SGD.defaults])
    master = np.array([1.0001, 7.0], np.float32)
    store.load(StoreState({}, {"master/a": master}, {}), [SGD.defaults], with_values=False)
    assert store.export().state["master/a"].tolist() == [master[0], 1.0]
    assert store.export().values["a"].tolist() == [1.0, 1.0]
    store.load(StoreState({"a": np.array([2, 7], np.float16)}, {}, {}), [SGD.defaults], with_values=True)
    assert store.export().state["master/a"].tolist() == [2.0, 7.0]


def good(build: Build, step: Step) -> tuple[Store, StoreState]:
    store = build(ADAM, "numpy", [tensors(np.float32)], [ADAM.defaults])
    step(store, [ADAM.defaults], {key: np.ones_like(v) for key, v in tensors(np.float32).items()})
    return store, store.export()


def without(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in names}


BAD: dict[str, tuple[Callable[[StoreState], StoreState], str]] = {
    "value missing": (lambda c: replace(c, values=without(c.values, "d")), "value of parameter 'd' is missing"),
    "value unknown": (lambda c: replace(c, values={**c.values, "z": np.ones(1)}), "'z', which the job does not have"),
    "value shape": (lambda c: replace(c, values={**c.values, "d": np.ones((3, 1), np.float32)}), r"shape \(3, 1\)"),
    "value dtype": (lambda c: replace(c, values={**c.values, "d": np.ones(3)}), "has dtype float64"),
    "state shape": (lambda c: replace(c, state={**c.state, "exp_avg/a": np.ones((5, 4), np.float32)}), r"\(5, 4\)"),
    "state dtype": (lambda c: replace(c, state={**c.state, "exp_avg/a": np.full((4, 5), "x")}), "dtype <U1"),
    "state of objects": (lambda c: replace(c, state={**c.state, "exp_avg/a": np.full((4, 5), None)}), "dtype object"),
    "slot unknown": (lambda c: replace(c, state={**c.state, "momentum_buffer/a": c.values["a"]}), "is not Adam's"),
    "slot of 16 bits": (lambda c: replace(c, state={**c.state, "master/a": c.values["a"]}), "is not Adam's"),
    "state of nobody": (lambda c: replace(c, state={**c.state, "exp_avg/z": np.ones(1)}), "'z', which the job"),
    "half a state": (lambda c: replace(c, state=without(c.state, "exp_avg/a")), "'a' has exp_avg_sq but no exp_avg"),
    "step without state": (lambda c: replace(c, state={}), "but no exp_avg, exp_avg_sq"),
    "no step": (lambda c: replace(c, steps=without(c.steps, "a")), "but no step"),
    "negative step": (lambda c: replace(c, steps={**c.steps, "a": -1}), "is -1"),
    "fractional step": (lambda c: replace(c, steps={**c.steps, "a": 1.5}), "is 1.5"),
    "step of nobody": (lambda c: replace(c, steps={**c.steps, "z": 1}), "'z', which the job"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_state_that_does_not_fit_changes_nothing(case: str, build: Build, step: Step) -> None:
    spoil, message = BAD[case]
    store, content = good(build, step)
    wrong = spoil(StoreState({k: v + 1 for k, v in content.values.items()}, content.state, content.steps))
    with pytest.raises(InvalidStateDictError, match=message):
        store.load(wrong, [ADAM.defaults], with_values=True)
    assert bits(store.export()) == bits(content)


def test_no_memory_while_loading_changes_nothing(build: Build, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    _, content = good(build, step)
    store = build(find("adamw"), "numpy", [tensors(np.float32)], [ADAM.defaults])
    state = {**content.state, **{f"max_exp_avg_sq/{name}": value for name, value in content.values.items()}}
    before = bits(store.export())

    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(type(store.backend), "zeros", refuse)
    with pytest.raises(OutOfMemoryError):
        store.load(replace(content, state=state), [ADAM.defaults], with_values=True)
    assert bits(store.export()) == before
