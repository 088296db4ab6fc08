"""State that is not a real tensor of the parameter's shape: scalars, row vectors, complex numbers. It is checked like all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.server.formulas import Tensorwise, find
from optserve.server.store import Store, StoreState
from optserve.wire.errors import InvalidStateDictError

Build = Callable[..., Store]
Step = Callable[..., None]
Spoil = Callable[[StoreState], StoreState]

NADAM, ASGD, ADAM, RMSPROP, LARS = (find(name) for name in ("nadam", "asgd", "adam", "rmsprop", "lars"))
FACTORED = Tensorwise(
    name="Factored",
    defaults={"momentum": 0.0},
    slot_keys=("row", "column", "whole", "buffer"),
    check=lambda _: None,
    shapes=lambda group, shape: {
        **({"row": shape[:-1], "column": shape[-1:]} if len(shape) > 1 else {"whole": shape}),
        **({"buffer": shape} if group["momentum"] else {}),
    },
    update=lambda *_: None,
)
START = {"a": np.ones((4, 3), np.float32), "b": np.ones(2, np.float32), "c": np.ones((), np.float32)}


def bits(content: StoreState) -> dict[str, Any]:
    return {
        name: (array.tobytes(), array.shape, array.dtype.name) for name, array in {**content.values, **content.state}.items()
    }


def stepped(optimizer: Any, build: Build, step: Step, start: Any = START, **options: Any) -> tuple[Store, StoreState]:
    group = {**optimizer.defaults, **options}
    store = build(optimizer, "numpy", [start], [group])
    step(store, [group], {name: pairs(value) for name, value in start.items()})
    return store, store.export()


def pairs(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value).reshape(-1).view(value.real.dtype) if np.iscomplexobj(value) else value


def without(content: StoreState, *keys: str) -> StoreState:
    return replace(content, state={key: value for key, value in content.state.items() if key not in keys})


def given(key: str, value: Any) -> Spoil:
    return lambda content: replace(content, state={**content.state, key: value})


BAD: dict[str, tuple[Any, Spoil, str]] = {
    "scalar with an axis": (
        NADAM,
        given("mu_product/a", np.ones(1)),
        r"'mu_product' of 'a' has shape \(1,\); it must have \(\)",
    ),
    "scalar of integers": (ASGD, given("eta/a", np.array(1)), "has dtype int64; allowed are floating-point numbers"),
    "scalar complex": (ASGD, given("eta/a", np.array(1j)), "has dtype complex128; it is real"),
    "scalar missing": (ASGD, lambda c: without(c, "eta/a"), "'a' has ax, mu but no eta"),
    "scalars of another": (ADAM, given("eta/a", np.float32(1)), "'eta' of 'a' is not Adam's; allowed are exp_avg"),
    "scalars without tensors": (
        NADAM,
        lambda c: StoreState(c.values, {"mu_product/a": np.float32(1)}, {"a": 1}),
        "has mu_product but no exp_avg, exp_avg_sq",
    ),
    "row too long": (FACTORED, given("row/a", np.ones(3)), r"'row' of 'a' has shape \(3,\); it must have \(4,\)"),
    "row of a vector": (
        FACTORED,
        given("row/b", np.ones(2)),
        r"'row' of 'b' is not Factored's for the shape \(2,\); allowed are whole",
    ),
    "half factored": (FACTORED, lambda c: without(c, "row/a"), "'a' has column but no row"),
    "complex slot": (ADAM, given("exp_avg/a", np.ones((4, 3), np.complex64)), "has dtype complex64; it is real"),
}


@pytest.mark.parametrize("case", BAD)
def test_state_of_another_shape_or_kind_changes_nothing(case: str, build: Build, step: Step) -> None:
    optimizer, spoil, message = BAD[case]
    store, content = stepped(optimizer, build, step)
    wrong = spoil(replace(content, values={name: value + 1 for name, value in content.values.items()}))
    with pytest.raises(InvalidStateDictError, match=message):
        store.check(wrong, [optimizer.defaults], with_values=True)
    with pytest.raises(InvalidStateDictError, match=message):
        store.load(wrong, [optimizer.defaults], with_values=True)
    assert bits(store.export()) == bits(content)


@pytest.mark.parametrize("optimizer", [NADAM, ASGD, FACTORED], ids=lambda optimizer: optimizer.name)
@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_any_floating_point_numbers_are_taken(optimizer: Any, dtype: Any, build: Build, step: Step) -> None:
    """torch casts a scalar, as all state, to its parameter's dtype when it loads."""
    store, content = stepped(optimizer, build, step)
    cast = {key: value.astype(dtype) for key, value in content.state.items()}
    store.load(replace(content, state=cast), [optimizer.defaults], with_values=False)
    expected = {key: value.astype(np.float32) for key, value in cast.items()}
    assert bits(StoreState({}, store.export().state)) == bits(StoreState({}, expected))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(RMSPROP, {"centered": True}), (ADAM, {"amsgrad": True}), (LARS, {}), (FACTORED, {"momentum": 0.9})],
)
def test_what_the_hyperparameters_of_its_group_need_must_be_there(
    optimizer: Any, options: dict[str, Any], build: Build, step: Step
) -> None:
    _, content = stepped(optimizer, build, step, **options)
    optional = {"grad_avg", "max_exp_avg_sq", "momentum_buffer", "buffer"}
    poorer = {key: value for key, value in content.state.items() if key.partition("/")[0] not in optional}
    store = build(optimizer, "numpy", [START], [{**optimizer.defaults, **options}])
    with pytest.raises(InvalidStateDictError, match="but no"):
        store.load(replace(content, state=poorer), [{**optimizer.defaults, **options}], with_values=False)


def test_what_earlier_hyperparameters_needed_may_still_be_there(build: Build, step: Step) -> None:
    for optimizer, before, after in (
        (ADAM, {"amsgrad": True}, {"amsgrad": False}),
        (LARS, {"momentum": 0.9}, {"momentum": 0.0}),
    ):
        _, content = stepped(optimizer, build, step, **before)
        store = build(optimizer, "numpy", [START], [{**optimizer.defaults, **after}])
        store.load(content, [{**optimizer.defaults, **after}], with_values=True)
        assert bits(store.export()) == bits(content)


def test_parameters_of_a_group_may_have_different_slots_where_their_shapes_ask_for_it(build: Build, step: Step) -> None:
    store, content = stepped(FACTORED, build, step)
    assert sorted(content.state) == ["column/a", "row/a", "whole/b", "whole/c"]
    store.load(content, [FACTORED.defaults], with_values=True)
    assert bits(store.export()) == bits(content)


@pytest.mark.parametrize("dtypes", [(np.float32, np.float32), (np.float32, np.float64)], ids=["one array", "two arrays"])
def test_what_earlier_hyperparameters_needed_may_be_there_for_some_parameters_only(
    dtypes: tuple[Any, Any], build: Build, step: Step
) -> None:
    """torch makes none of it for a parameter whose state begins after the edit, and so does an array that has none yet."""
    start = {name: np.ones(2, dtype) for name, dtype in zip("ab", dtypes, strict=True)}
    _, content = stepped(ADAM, build, step, start, amsgrad=True)
    store, again = (build(ADAM, "numpy", [start], [ADAM.defaults]) for _ in range(2))
    store.load(without(content, "max_exp_avg_sq/b"), [ADAM.defaults], with_values=True)
    step(store, [ADAM.defaults], start)
    later = store.export()
    again.load(later, [ADAM.defaults], with_values=True)
    assert bits(again.export()) == bits(later)
    plain, _ = stepped(ADAM, build, step, start)
    step(plain, [ADAM.defaults], start)
    assert bits(StoreState(later.values)) == bits(StoreState(plain.export().values))
    np.testing.assert_array_equal(later.state["max_exp_avg_sq/a"], content.state["max_exp_avg_sq/a"])


@pytest.mark.parametrize(("optimizer", "key"), [(NADAM, "mu_product/a"), (ASGD, "eta/b")], ids=["NAdam", "ASGD"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_run_that_diverged_is_taken_back(optimizer: Any, key: str, value: float, build: Build, step: Step) -> None:
    """ASGD's eta is infinite where lr is beyond float32; what a store gives, it takes."""
    store, content = stepped(optimizer, build, step)
    diverged = given(key, np.array(value, np.float32))(content)
    store.load(diverged, [optimizer.defaults], with_values=True)
    assert bits(store.export()) == bits(diverged)


# Complex numbers

COMPLEX = {
    "a": np.array([[1 + 2j, 3 - 1j]], np.complex64),
    "b": np.asarray(2j).astype(np.complex64),
    "r": np.ones(3, np.float32),
}


@pytest.mark.parametrize("optimizer", [ADAM, NADAM, find("rprop"), find("adagrad"), LARS], ids=lambda optimizer: optimizer.name)
def test_complex_parameters_have_complex_slots_and_real_scalars(optimizer: Any, build: Build, step: Step) -> None:
    store, content = stepped(optimizer, build, step, COMPLEX)
    for key, value in content.state.items():
        slot, _, name = key.partition("/")
        if slot in optimizer.scalar_keys:
            assert (value.dtype, value.shape) == (np.float32, ())
        else:
            assert (value.dtype, value.shape) == (COMPLEX[name].dtype, COMPLEX[name].shape), key
    assert {value.dtype for value in content.values.values()} == {np.dtype(np.complex64), np.dtype(np.float32)}
    other = build(optimizer, "numba", [{name: np.zeros_like(value) for name, value in COMPLEX.items()}], [optimizer.defaults])
    other.load(content, [optimizer.defaults], with_values=True)
    assert bits(other.export()) == bits(content)
    for found in (store, other):
        step(found, [optimizer.defaults], {name: pairs(value) for name, value in COMPLEX.items()})
    assert bits(other.export()) == bits(store.export())


def test_complex_slots_of_twice_the_width_are_narrowed(build: Build, step: Step) -> None:
    store, content = stepped(ADAM, build, step, COMPLEX)
    wide = {key: value.astype(np.complex128 if np.iscomplexobj(value) else np.float64) for key, value in content.state.items()}
    store.load(replace(content, state=wide), [ADAM.defaults], with_values=False)
    assert bits(store.export()) == bits(content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exp_avg/a", np.ones((1, 2), np.float32), "has dtype float32; it is complex, the parameter has dtype complex64"),
        ("exp_avg/a", np.ones((1, 2, 2), np.float32), r"has shape \(1, 2, 2\); the parameter has shape \(1, 2\)"),
        ("exp_avg/r", np.ones(3, np.complex64), "has dtype complex64; it is real, the parameter has dtype float32"),
        ("master/a", np.ones((1, 2), np.complex64), "'master' of 'a' is not Adam's"),
    ],
)
def test_complex_and_real_slots_do_not_stand_for_each_other(
    key: str, value: Any, message: str, build: Build, step: Step
) -> None:
    store, content = stepped(ADAM, build, step, COMPLEX)
    with pytest.raises(InvalidStateDictError, match=message):
        store.load(given(key, value)(content), [ADAM.defaults], with_values=True)


def test_the_initial_values_of_a_complex_slot_are_those_of_its_parts(build: Build, step: Step) -> None:
    """As torch's: Adagrad's sum begins with v + vj."""
    group = {**find("adagrad").defaults, "initial_accumulator_value": 0.5}
    store = build(find("adagrad"), "numpy", [COMPLEX], [group])
    content = store.export()
    assert content.state["sum/a"].tolist() == [[0.5 + 0.5j] * 2]
    assert content.state["sum/b"] == 0.5 + 0.5j
    assert content.state["sum/r"].tolist() == [0.5] * 3
