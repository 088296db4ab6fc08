"""How a parameter's state begins, and the scalars that it carries from step to step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from every_backend import BACKENDS

from optserve.server.backends import select
from optserve.server.formulas import Elementwise, find
from optserve.server.store import Store, StoreState
from optserve.wire.errors import OutOfMemoryError

Build = Callable[..., Store]
Step = Callable[..., None]
GROUP = {"lr": 0.1, "decay": 0.7}


def counting(p, g, s, rate, lr):
    """Its slot begins with the learning rate and counts in ones."""
    return p - rate * g, s + lr * 0.0 + 1.0


class Recorded:
    """An optimizer that carries `eta`, which begins with the learning rate and decays. It notes what scalars are made of."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, float]]] = []
        self.optimizer = Elementwise(
            name="Counting",
            defaults=GROUP,
            check=lambda _: None,
            slot_keys=("count",),
            scalar_keys=("eta", "other"),
            initial=lambda group: {"eta": group["lr"], "count": group["lr"]},
            options=lambda _: {},
            scalars=self.scalars,
            carry=lambda group, _, carried: {"eta": carried["eta"] * group["decay"]},
            formula=counting,
        )

    def scalars(self, group: Mapping[str, Any], step: int, carried: Mapping[str, float]) -> dict[str, float]:
        self.calls.append((step, dict(carried)))
        return {"rate": carried["eta"], "lr": group["lr"]}


def single(value: float) -> float:
    return float(np.float32(value))


def ones(*names: str) -> dict[str, np.ndarray]:
    return {name: np.ones(5, np.float64) for name in names}


@pytest.mark.parametrize("backend", BACKENDS)
def test_scalars_begin_as_given_and_are_carried_in_float32(backend: str, build: Build, step: Step) -> None:
    recorded = Recorded()
    store = build(recorded.optimizer, backend, [ones("a")], [GROUP])
    assert store.export().state == {}
    eta, value = single(0.1), 1.0
    for count in range(1, 6):
        step(store, [GROUP], ones("a"))
        assert recorded.calls[-1] == (count, {"eta": eta, "other": 0.0})
        value -= eta
        eta = single(eta * 0.7)
        content = store.export()
        found = content.state["eta/a"]
        assert (found.shape, found.dtype, float(found)) == ((), np.float32, eta)
        assert content.values["a"].tolist() == [value] * 5
        assert content.state["count/a"].tolist() == [count + 0.1] * 5
    assert list(content.state) == ["eta/a", "other/a", "count/a"], "torch's order: scalars before tensors"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_begins_with_the_hyperparameters_of_its_own_first_step(backend: str, build: Build, step: Step) -> None:
    recorded = Recorded()
    store = build(recorded.optimizer, backend, [ones("a", "b", "c")], [GROUP])
    step(store, [GROUP], ones("a", "c"))
    later = {**GROUP, "lr": 5.0}
    recorded.calls.clear()
    step(store, [later], ones("a", "b", "c"))
    assert recorded.calls == [
        (2, {"eta": single(single(0.1) * 0.7), "other": 0.0}),
        (1, {"eta": 5.0, "other": 0.0}),
        (2, {"eta": single(single(0.1) * 0.7), "other": 0.0}),
    ]
    content = store.export()
    assert [float(content.state[f"count/{name}"][0]) for name in "abc"] == [2.1, 6.0, 2.1]
    assert content.steps == {"a": 2, "b": 1, "c": 2}


def test_parameters_that_carry_the_same_are_stepped_together(build: Build, step: Step) -> None:
    recorded = Recorded()
    store = build(recorded.optimizer, "numpy", [ones("a", "b", "c", "d")], [GROUP])
    step(store, [GROUP], ones("a", "b", "c", "d"))
    assert len(recorded.calls) == 1
    content = store.export()
    content.state["eta/b"] = np.array(0.25, np.float32)
    content.steps["d"] = 0
    store.load(content, [GROUP], with_values=True)
    for count in (2, 3):
        recorded.calls.clear()
        step(store, [GROUP], ones("a", "b", "c", "d"))
        assert [call[0] for call in recorded.calls] == [count, count, count, count - 1]
        assert recorded.calls[0][1] == recorded.calls[2][1] != recorded.calls[1][1]


def test_what_was_loaded_without_state_is_not_stepped_with_what_has_some_at_step_0(build: Build, step: Step) -> None:
    recorded = Recorded()
    store = build(recorded.optimizer, "numpy", [ones("a", "b")], [GROUP])
    state = {"eta/a": np.array(0.5, np.float32), "other/a": np.array(0, np.float32), "count/a": np.full(5, 9.0)}
    store.load(StoreState({}, state, {"a": 0}), [GROUP], with_values=False)
    step(store, [GROUP], ones("a", "b"))
    assert recorded.calls == [(1, {"eta": 0.5, "other": 0.0}), (1, {"eta": single(0.1), "other": 0.0})]
    assert [float(store.export().state[f"count/{name}"][0]) for name in "ab"] == [10.0, 1.1]


def test_that_holds_without_scalars_too(build: Build, step: Step) -> None:
    rprop = find("rprop")
    store = build(rprop, "numpy", [ones("a", "b")], [rprop.defaults])
    store.load(StoreState({}, {"prev/a": np.zeros(5), "step_size/a": np.full(5, 9.0)}, {"a": 0}), [rprop.defaults], False)
    step(store, [rprop.defaults], {"a": np.zeros(5), "b": np.zeros(5)})
    assert [float(store.export().state[f"step_size/{name}"][0]) for name in "ab"] == [9.0, rprop.defaults["lr"]]


def test_a_scalar_beyond_float32_is_infinite_and_nobody_is_warned(build: Build, step: Step) -> None:
    group = {"lr": 1e300, "decay": 1.0}
    store = build(Recorded().optimizer, "numpy", [ones("a")], [group])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(store, [group], ones("a"))
    assert store.export().state["eta/a"] == np.inf


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_stays_zero_where_a_slot_begins_with_something_else(backend: str, dtype: Any, build: Build, step: Step) -> None:
    start = {"a": np.ones(5, dtype), "b": np.ones((2, 3), dtype)}
    store = build(Recorded().optimizer, backend, [start], [GROUP])
    step(store, [GROUP], start)
    column = store._columns[0]
    beyond = [*range(5, 32), *range(38, 64)]
    for array in (column.weights, *map(store.backend.to_host, (column.masters, column.slots["count"]))):
        assert not array[beyond].any()
        assert array[:5].all()
        assert array[32:38].all()


def test_a_slot_that_an_edit_brings_begins_as_given(build: Build, step: Step) -> None:
    def formula(p, g, a, b, *, both):
        if both:
            b = b + g
        return p - g, a + g, b

    optimizer = Elementwise(
        name="Edited",
        defaults={"both": False},
        check=lambda _: None,
        slot_keys=("a", "b"),
        initial=lambda _: {"b": 3.0},
        options=lambda group: {"both": group["both"]},
        scalars=lambda *_: {},
        formula=formula,
    )
    store = build(optimizer, "numpy", [ones("x")], [{"both": False}])
    step(store, [{"both": False}], ones("x"))
    assert list(store.export().state) == ["a/x"]
    store.prepare([{"both": True}])
    assert store.export().state["b/x"].tolist() == [3.0] * 5
    step(store, [{"both": True}], ones("x"))
    assert store.export().state["b/x"].tolist() == [4.0] * 5


# State that exists before the first step


def adagrad(**options: Any) -> dict[str, Any]:
    return {**find("adagrad").defaults, **options}


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_that_exists_from_creation_is_there_at_step_0(backend: str, build: Build, step: Step) -> None:
    groups = [adagrad(initial_accumulator_value=0.25)]
    store = build(find("adagrad"), backend, [ones("a")], groups)
    content = store.export()
    assert content.steps == {"a": 0}
    assert content.state["sum/a"].tolist() == [0.25] * 5
    assert not store.backend.to_host(store._columns[0].slots["sum"])[5:].any()
    groups[0]["initial_accumulator_value"] = 7.0
    store.prepare(groups)
    step(store, groups, ones("a"))
    assert store.export().state["sum/a"].tolist() == [1.25] * 5


def test_a_later_groups_state_begins_with_its_own_hyperparameters(build: Build) -> None:
    groups = [adagrad(), adagrad(initial_accumulator_value=2.0)]
    store = build(find("adagrad"), "numpy", [ones("a")], groups[:1])
    store.add_group([("b", (3,), np.dtype(np.float32))])
    before = store.version
    store.create_state(groups)
    assert store.version == before + 1
    store.create_state(groups)
    assert store.version == before + 1, "there was nothing to create"
    content = store.export()
    assert content.steps == {"a": 0, "b": 0}
    assert content.state["sum/b"].tolist() == [2.0] * 3
    assert content.state["sum/a"].tolist() == [0.0] * 5


def test_an_update_creates_what_nobody_prepared(build: Build, step: Step) -> None:
    store = Store(find("adagrad"), select("numpy"))
    store.add_group([("a", (5,), np.dtype(np.float64)), ("b", (5,), np.dtype(np.float64))])
    groups = [adagrad(initial_accumulator_value=2.0)]
    step(store, groups, ones("a"))
    content = store.export()
    assert content.steps == {"a": 1, "b": 0}
    assert content.state["sum/a"].tolist() == [3.0] * 5
    assert content.state["sum/b"].tolist() == [2.0] * 5


def test_what_a_state_does_not_have_is_created_again(build: Build, step: Step) -> None:
    groups = [adagrad(initial_accumulator_value=2.0)]
    store = build(find("adagrad"), "numpy", [ones("a", "b")], groups)
    step(store, groups, ones("a", "b"))
    content = store.export()
    kept = StoreState(content.values, {"sum/a": content.state["sum/a"]}, {"a": 1})
    store.load(kept, [adagrad(initial_accumulator_value=5.0)], with_values=True)
    content = store.export()
    assert content.steps == {"a": 1, "b": 0}
    assert content.state["sum/a"].tolist() == [3.0] * 5
    assert content.state["sum/b"].tolist() == [5.0] * 5


def test_no_memory_for_state_at_creation_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(find("adagrad"), select("numpy"))
    store.add_group([("a", (5,), np.dtype(np.float64))])

    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(type(store.backend), "zeros", refuse)
    with pytest.raises(OutOfMemoryError, match="optimizer state: 256 bytes"):
        store.create_state([adagrad()])
    assert store.export().steps == {}


def test_optimizers_whose_state_begins_with_the_first_step_get_none_before(build: Build) -> None:
    store = build(find("adam"), "numpy", [ones("a")], [find("adam").defaults])
    before = store.version
    store.create_state([find("adam").defaults])
    assert (store.version, store.export().steps) == (before, {})
