"""A parameter renamed, replaced or removed: all else stays bit for bit, and the store goes on as if it had been built so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from every_backend import BACKENDS
from oracle import NAMES

from optserve.server.formulas import find
from optserve.server.store import Store, StoreState, reshaping
from optserve.wire.errors import InvalidArgumentError, OutOfMemoryError, UnknownParameterError
from optserve.wire.layout import Layout

Arrays = Mapping[str, Any]
Build = Callable[..., Store]
Step = Callable[..., None]

FIRST = {"w": ((3, 4), np.float32), "v": ((40, 2), np.float32), "half": ((5, 7), ml_dtypes.bfloat16), "u": ((2, 2), np.float32)}
SECOND = {"double": ((4, 3), np.float64), "x": ((6, 6), np.float32), "y": ((2, 9), np.float32)}


def values(shapes: Mapping[str, tuple[Any, Any]], seed: int = 3) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(dtype) for name, (shape, dtype) in shapes.items()}


def gradients(store: Store, turn: int) -> dict[str, Any]:
    """Of all parameters but those whose turn it is not: so their steps differ."""
    chosen = {place.name: (place.shape, place.dtype) for place in store.layout.places if (place.index + turn) % 4}
    return values(chosen, 10 + turn)


def group_of(optimizer: str) -> dict[str, Any]:
    return {**find(optimizer).defaults, "lr": 0.01}


@pytest.fixture
def trained(build: Build, step: Step) -> Callable[[str, str], tuple[Store, Sequence[Arrays]]]:
    def make(optimizer: str, backend: str) -> tuple[Store, Sequence[Arrays]]:
        groups = [group_of(optimizer), group_of(optimizer)]
        store = build(find(optimizer), backend, [values(FIRST), values(SECOND, 4)], groups)
        for turn in range(3):
            step(store, groups, gradients(store, turn))
        return store, groups

    return make


def assert_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def assert_same_state(found: StoreState, wanted: StoreState) -> None:
    assert found.steps == wanted.steps
    assert_same(found.values, wanted.values)
    assert_same(dict(sorted(found.state.items())), dict(sorted(wanted.state.items())))


def without(content: StoreState, name: str) -> StoreState:
    """What belongs to all other parameters."""
    return StoreState(
        {key: array for key, array in content.values.items() if key != name},
        {key: array for key, array in content.state.items() if key.partition("/")[2] != name},
        {key: count for key, count in content.steps.items() if key != name},
    )


def built(build: Build, store: Store, groups: Sequence[Arrays]) -> Store:
    """Another store that had these parameters from the start, with the same state."""
    content = store.export()
    names = store.layout.names_by_group
    tensors = [{name: content.values[name] for name in names[group]} for group in sorted(names)]
    other = build(store.optimizer, store.backend, tensors, groups)
    other.load(content, groups, with_values=True)
    return other


def assert_goes_on(build: Build, step: Step, store: Store, groups: Sequence[Arrays]) -> None:
    """As one that was built so, over steps that make state which is not there yet."""
    other = built(build, store, groups)
    assert store.layout.places == other.layout.places
    assert store.layout.arrays == other.layout.arrays
    for turn in range(3, 7):
        for each in (store, other):
            each.prepare(groups)
            step(each, groups, gradients(each, turn))
    assert_same_state(store.export(), other.export())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["w", "half", "u", "double", "y"])
@pytest.mark.parametrize("optimizer", ["adam", "asgd", "adafactor"])
def test_the_others_stay_when_one_is_removed(
    trained: Any, build: Build, step: Step, optimizer: str, backend: str, name: str
) -> None:
    store, groups = trained(optimizer, backend)
    before = store.export()
    store.reshape(reshaping.removed(store.layout, name), groups, {})
    assert_same_state(store.export(), without(before, name))
    assert_goes_on(build, step, store, groups)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", NAMES)
def test_the_others_stay_when_one_is_replaced(trained: Any, build: Build, step: Step, optimizer: str, backend: str) -> None:
    store, groups = trained(optimizer.lower(), backend)
    for name, shape, dtype in (("v", (3, 5), np.float32), ("w", (7, 3), np.float64), ("double", (4, 3), ml_dtypes.bfloat16)):
        before, value = store.export(), values({"": (shape, dtype)}, 5)[""]
        layout = reshaping.replaced(store.layout, name, value)
        store.prepare_reshape(layout, groups, {name})
        assert_same_state(store.export(), before)
        store.reshape(layout, groups, {name: value})
        after = store.export()
        assert after.values[name].tobytes() == value.tobytes()
        assert after.steps.get(name, 0) == 0
        if dtype is ml_dtypes.bfloat16:
            assert after.state[f"master/{name}"].tobytes() == value.astype(np.float32).tobytes()
        assert_same_state(without(after, name), without(before, name))
    assert_goes_on(build, step, store, groups)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", ["adam", "asgd", "adafactor", "adagrad"])
@pytest.mark.parametrize("keeps", [False, True])
def test_a_value_of_the_same_shape_lies_where_the_old_one_lay(
    trained: Any, build: Build, step: Step, optimizer: str, backend: str, keeps: bool
) -> None:
    store, groups = trained(optimizer, backend)
    before, layout = store.export(), store.layout
    for name, (shape, dtype) in {"w": FIRST["w"], "half": FIRST["half"]}.items():
        value = values({"": (shape, dtype)}, 6)[""]
        store.reshape(reshaping.replaced(store.layout, name, value), groups, {name: value}, keep_state=keeps)
        after = store.export()
        assert after.values[name].tobytes() == value.tobytes()
        assert after.steps.get(name, 0) == (before.steps[name] if keeps else 0)
        for key in before.state:
            slot, _, owner = key.partition("/")
            if owner == name and slot != "master" and keeps:
                assert after.state[key].tobytes() == before.state[key].tobytes()
    assert store.layout.places == layout.places
    assert store.layout.version == store.layout.base_version == layout.version + 2
    assert_goes_on(build, step, store, groups)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_renamed_parameter_keeps_all(trained: Any, build: Build, step: Step, backend: str) -> None:
    store, groups = trained("adam", backend)
    before, layout = store.export(), store.layout
    store.rename("v", "renamed/v")
    after = store.export()
    assert [name.replace("renamed/v", "v") for name in after.values] == list(before.values)
    assert after.values["renamed/v"].tobytes() == before.values["v"].tobytes()
    assert after.state["exp_avg/renamed/v"].tobytes() == before.state["exp_avg/v"].tobytes()
    assert after.steps["renamed/v"] == before.steps["v"]
    assert_same_state(without(after, "renamed/v"), without(before, "v"))
    assert store.layout.arrays == layout.arrays
    assert store.layout.base_version == store.layout.version == layout.version + 1
    assert_goes_on(build, step, store, groups)


def addresses(store: Store) -> dict[tuple[int, str], int]:
    """Where the arrays lie, by group and dtype."""
    with store.reading() as arrays:
        return {(store.layout.arrays[key].group, str(array.dtype)): array.ctypes.data for key, array in arrays.items()}


def test_arrays_in_which_nothing_moves_are_not_copied(trained: Any) -> None:
    store, groups = trained("adam", "numpy")
    before = addresses(store)
    store.reshape(reshaping.removed(store.layout, "half"), groups, {})
    assert addresses(store) == {key: address for key, address in before.items() if key != (0, "bfloat16")}


def test_the_last_parameter_of_a_group_stays() -> None:
    layout = Layout().extended(0, [("a", (2,), np.dtype(np.float32))]).extended(1, [("b", (2,), np.dtype(np.float64))])
    with pytest.raises(InvalidArgumentError, match="'b' is the only one of group 1"):
        reshaping.removed(layout, "b")
    for edit in (reshaping.removed, lambda found, name: reshaping.renamed(found, name, "d")):
        with pytest.raises(UnknownParameterError, match="'c' is not in the job; its parameters are 'a', 'b'"):
            edit(layout, "c")


def test_without_memory_nothing_changes(trained: Any, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    store, groups = trained("adam", "numpy")
    before, layout = store.export(), store.layout
    value = np.zeros((100, 100), np.float32)

    def full(length: int, dtype: Any) -> Any:
        raise MemoryError

    for name in ("zeros", "host_zeros"):
        with monkeypatch.context() as patch:
            patch.setattr(store.backend, name, full)
            with pytest.raises(OutOfMemoryError):
                store.reshape(reshaping.replaced(layout, "v", value), groups, {"v": value})
        assert store.layout is layout
        assert_same_state(store.export(), before)
    step(store, groups, gradients(store, 4))
