"""A store of LBFGS: a search changes nothing until its outcome is adopted; then parameters and state are torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from every_backend import BACKENDS
from host_device import backend_on, new_device
from host_kernels import needs_compiler

from optserve.server.formulas import find
from optserve.server.store import Search, Store, StoreState
from optserve.wire.errors import InvalidArgumentError, InvalidStateDictError, OutOfMemoryError
from optserve.wire.rows import Rows, Sums

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Values = dict[str, np.ndarray]
Build = Callable[..., Store]

VECTORS = ("d", "prev_flat_grad", "old_dirs", "old_stps")
WOLFE = {"line_search_fn": "strong_wolfe"}
STARTS: dict[str, dict[str, Any]] = {
    "float32": {"a": ((5, 7), np.float32), "scalar": ((), np.float32), "nothing": ((1, 0, 2), np.float32)},
    "float64": {"a": ((40,), np.float64), "b": ((3, 1), np.float64)},
    "complex": {"z": ((4, 3), np.complex64), "a": ((2,), np.float32)},
    "mixed": {
        "a": ((5,), np.float32), "wide": ((6,), np.float64), "half": ((33,), ml_dtypes.bfloat16), "z": ((3,), np.complex128),
    },
    "float16": {"a": ((5, 7), np.float16), "b": ((3,), np.float16)},
    "bfloat16": {"a": ((5, 7), ml_dtypes.bfloat16), "b": ((3,), ml_dtypes.bfloat16)},
}  # fmt: skip


def group_of(**options: Any) -> dict[str, Any]:
    optimizer = find("lbfgs")
    group = {**optimizer.defaults, **options}
    optimizer.check(group)
    return optimizer.complete(group)


def start(case: str) -> Values:
    random = np.random.default_rng(0)
    found = {}
    for name, (shape, dtype) in STARTS[case].items():
        value = np.asarray(random.normal(size=shape))
        found[name] = (value + 1j * random.normal(size=shape) if np.dtype(dtype).kind == "c" else value).astype(dtype)
    return found


def target(name: str, value: Any) -> Any:
    wave = torch.cos(torch.arange(value.numel(), dtype=torch.float64) + len(name)).reshape(value.shape)
    return wave * (1 + 0.5j) if value.is_complex() else wave


def loss_of(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """In float64, convex, and not a quadratic."""
    total = torch.zeros((), dtype=torch.float64)
    for index, (name, part) in enumerate(parts.items()):
        wide = part.to(torch.complex128 if part.is_complex() else torch.float64)
        away = wide - target(name, wide)
        size = torch.view_as_real(away) if away.is_complex() else away
        total = total + (index + 1) * (size**2).sum() + (size**4).sum()
    return total


def evaluate(values: Mapping[str, np.ndarray]) -> tuple[float, Values]:
    """The loss and gradients of the parameters' own dtypes."""
    parts = {}
    for name, value in values.items():
        wide = value.astype(np.float32) if value.dtype.itemsize == 2 else value
        parts[name] = torch.tensor(wide).requires_grad_()
    loss = loss_of(parts)
    loss.backward()
    slopes = {name: part.grad.resolve_conj().numpy() for name, part in parts.items() if part.grad is not None}
    return float(loss.detach()), {name: slope.astype(values[name].dtype) for name, slope in slopes.items()}


def named(store: Store, flats: Mapping[int, np.ndarray]) -> Values:
    return {place.name: place.shaped(flats[place.array_id]).copy() for place in store.layout.places}


def sums_of(store: Store, gradients: Values, factor: float = 1.0) -> Sums:
    """`factor` times the gradients, in accumulators whose padding and absent parameters hold garbage."""
    flats = store.accumulators()
    for flat in flats.values():
        store.backend.write(flat, np.nan)
    for place in store.layout.places:
        if place.name in gradients:
            slope = np.ravel(gradients[place.name])
            part = flats[place.array_id][place.offset : place.offset + place.size]
            store.backend.fold(part, slope.view(slope.real.dtype) if slope.dtype.kind == "c" else slope, factor, True)
    return Sums(flats, {})


def searched(store: Store, group: dict[str, Any]) -> tuple[Search, int]:
    """A finished search, and how often it asked."""
    search, asked = store.search([group]), 0
    with store.reading() as arrays:
        values = named(store, arrays)
    while True:
        asked += 1
        loss, slopes = evaluate(values)
        if search.evaluated(loss, sums_of(store, slopes, 0.5), 2.0, frozenset(), None):
            return search, asked
        values = named(store, search.trial)


def step(store: Store, group: dict[str, Any], times: int = 1) -> None:
    for _ in range(times):
        store.adopt(searched(store, group)[0].outcome)


def bits(content: StoreState) -> dict[str, Any]:
    everything = {**content.values, **content.tensors}
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in everything.items()}


def values_of(store: Store) -> Values:
    with store.reading() as arrays:
        return named(store, arrays)


class Stock:
    """torch's LBFGS; 16-bit parameters are float32, whose gradients are taken where the narrowed ones are."""

    def __init__(self, values: Values, options: Mapping[str, Any]) -> None:
        self.narrow = {name: value.dtype for name, value in values.items() if value.dtype.itemsize == 2}
        self.parameters = {
            name: torch.tensor(value.astype(np.float32) if name in self.narrow else value).requires_grad_()
            for name, value in values.items()
        }
        self.optimizer = torch.optim.LBFGS(list(self.parameters.values()), **options)

    def closure(self) -> torch.Tensor:
        values = {name: part.detach().numpy() for name, part in self.parameters.items()}
        narrowed = {name: value.astype(self.narrow[name]) if name in self.narrow else value for name, value in values.items()}
        loss, slopes = evaluate(narrowed)
        for name, part in self.parameters.items():
            part.grad = torch.tensor(slopes[name].astype(values[name].dtype))
        return torch.tensor(loss, dtype=torch.float64)

    def step(self) -> None:
        self.optimizer.step(self.closure)

    @property
    def values(self) -> Values:
        return {name: part.detach().numpy() for name, part in self.parameters.items()}


@pytest.mark.parametrize("options", [{"lr": 0.05, "max_iter": 4}, {"max_iter": 3, "history_size": 3, **WOLFE}], ids=str)
@pytest.mark.parametrize("case", ["float32", "float64", "complex", "mixed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fifty_steps_equal_torch(case: str, options: dict[str, Any], backend: str, build: Build) -> None:
    """torch's `max` of an empty vector is left out: the empty parameter is among others."""
    values, group = start(case), group_of(**options)
    store, stock = build(find("lbfgs"), backend, [values], [group]), Stock(values, options)
    for _ in range(50):
        step(store, group)
        stock.step()
        found = values_of(store)
        for name, theirs in stock.values.items():
            tolerance = 1e-9 if case == "float64" else 4e-3 if name == "half" else 1e-3
            np.testing.assert_allclose(found[name].astype(theirs.dtype), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ["float16", "bfloat16"])
def test_masters_of_16_bits_are_moved_and_the_weights_narrowed(case: str, build: Build) -> None:
    values, options = start(case), {"max_iter": 4, **WOLFE}
    store, stock = build(find("lbfgs"), "numpy", [values], [group_of(**options)]), Stock(values, options)
    for _ in range(3):
        step(store, group_of(**options))
        stock.step()
    content = store.export()
    for name, theirs in stock.values.items():
        master = content.state[f"master/{name}"]
        np.testing.assert_allclose(master, theirs, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(content.values[name], master.astype(content.values[name].dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", sorted(STARTS))
def test_every_backend_gives_the_same_bits(case: str, backend: str, build: Build) -> None:
    group = group_of(max_iter=4, history_size=3, **WOLFE)
    found = []
    for name in ("numpy", backend):
        store = build(find("lbfgs"), name, [start(case)], [group])
        step(store, group, 3)
        found.append(bits(store.export()))
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_search_changes_nothing_before_its_outcome_is_adopted(backend: str, build: Build) -> None:
    group = group_of(max_iter=4, **WOLFE)
    store = build(find("lbfgs"), backend, [start("mixed")], [group])
    step(store, group)
    before, version = bits(store.export()), store.version
    search, asked = searched(store, group)
    again, _ = searched(store, group)
    assert asked > 3
    assert (bits(store.export()), store.version) == (before, version)
    assert {name: array.tobytes() for name, array in search.outcome.items()} == {
        name: array.tobytes() for name, array in again.outcome.items()
    }
    store.adopt(search.outcome)
    assert bits(store.export()) != before
    assert store.version == version + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_outcome_is_plain_arrays_and_gives_another_store_the_same_bits(backend: str, build: Build) -> None:
    """As a log that is replayed. A history that is full loses its oldest pairs there too."""
    group = group_of(max_iter=3, history_size=4, **WOLFE)
    first, second = (build(find("lbfgs"), backend, [start("mixed")], [group]) for _ in range(2))
    for _ in range(4):
        outcome = searched(first, group)[0].outcome
        assert {type(array) for array in outcome.values()} == {np.ndarray}
        assert not any(array.dtype.hasobject for array in outcome.values())
        first.adopt(outcome)
        second.adopt({name: array.copy() for name, array in outcome.items()})
        assert bits(first.export()) == bits(second.export())
    assert len(first.export().extras["old_dirs"]) == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["mixed", "bfloat16"])
def test_a_store_that_was_restored_goes_on_with_the_same_bits(case: str, backend: str, build: Build) -> None:
    group = group_of(max_iter=3, history_size=4)
    store, other = (build(find("lbfgs"), backend, [start(case)], [group]) for _ in range(2))
    step(store, group, 2)
    content = store.export()
    assert store.state_bytes > other.state_bytes
    other.load(StoreState.from_tensors(content.values, content.tensors, content.steps, 0), [group], with_values=True)
    assert bits(other.export()) == bits(content)
    assert store.state_bytes == other.state_bytes
    for each in (store, other):
        step(each, group, 2)
    assert bits(store.export()) == bits(other.export())
    store.load(StoreState(), [group], with_values=False)
    assert store.export().extras == {}


def test_trials_are_the_weights_that_were_adopted_in_the_wire_dtype_with_zero_padding(build: Build) -> None:
    group = group_of(lr=0.01, max_iter=2)
    store = build(find("lbfgs"), "numpy", [start("mixed")], [group])
    search = store.search([group])
    with store.reading() as arrays:
        loss, slopes = evaluate(named(store, arrays))
        shapes = {array_id: (array.shape, array.dtype) for array_id, array in arrays.items()}
    assert not search.evaluated(loss, sums_of(store, slopes), 1.0, frozenset(), None)
    first = {array_id: array.copy() for array_id, array in search.trial.items()}
    assert {array_id: (array.shape, array.dtype) for array_id, array in first.items()} == shapes
    search = store.search([group_of(lr=0.01, max_iter=1)])
    assert search.evaluated(loss, sums_of(store, slopes), 1.0, frozenset(), None)
    store.adopt(search.outcome)
    with store.reading() as arrays:
        for array_id, array in arrays.items():
            assert array.tobytes() == first[array_id].tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_scaled_clipped_zero_where_absent_and_dense_where_sparse(backend: str, build: Build) -> None:
    values = {"a": np.zeros((3, 2), np.float32), "b": np.zeros(4, np.float32), "c": np.zeros((5, 2), np.float32)}
    group = group_of(max_iter=1)
    store = build(find("lbfgs"), backend, [values], [group])
    dense = sums_of(store, {"a": np.float32([[1, -2], [3, -4], [0.5, 0]])}).dense
    rows = Rows(np.array([1, 4]), np.array([[1, -9], [0.25, 2]], np.float32))
    search = store.search([group])
    assert search.evaluated(1.0, Sums(dense, {2: rows}), 0.5, frozenset({1}), 1.25)
    slopes = search.outcome["prev_flat_grad"]
    expected = {"a": [0.5, -1, 1.25, -1.25, 0.25, 0], "b": [0] * 4, "c": [0, 0, 0.5, -1.25, 0, 0, 0, 0, 0.125, 1]}
    np.testing.assert_array_equal(slopes, np.concatenate([np.float32(entry) for entry in expected.values()]))
    np.testing.assert_allclose(search.outcome["x"], -slopes / np.abs(slopes).sum(), rtol=1e-6)


def test_a_missing_array_is_refused_and_a_step_without_a_closure_too(build: Build) -> None:
    group = group_of()
    store = build(find("lbfgs"), "numpy", [start("mixed")], [group])
    before = bits(store.export())
    with pytest.raises(InvalidArgumentError, match="array 0 needs a gradient of"):
        store.search([group]).evaluated(1.0, Sums({}, {}), 1.0, frozenset(), None)
    with pytest.raises(InvalidArgumentError, match=r"LBFGS needs a closure: call worker\.step\(closure\)"):
        store.update([group], store.accumulators())
    assert bits(store.export()) == before
    with pytest.raises(TypeError, match="Adam does not search"):
        build(find("adam"), "numpy", [start("float32")], [dict(find("adam").defaults)]).search([{}])


@needs_compiler
def test_no_memory_for_a_history_is_told_and_nothing_is_changed(build: Build) -> None:
    device, group = new_device(), group_of(lr=0.01, max_iter=2)
    store = build(find("lbfgs"), backend_on(device), [{"a": np.ones(100_000, np.float32)}], [group])
    before = bits(store.export())
    room, device.capacity = device.capacity, device.used + 500_000
    with pytest.raises(OutOfMemoryError, match="no memory"):
        step(store, group)
    assert bits(store.export()) == before
    device.capacity = room
    step(store, group)
    assert bits(store.export()) != before


def broken(extras: Mapping[str, np.ndarray], **changed: Any) -> StoreState:
    found = {name: array for name, array in {**extras, **changed}.items() if array is not None}
    return StoreState({}, {}, {}, extras=found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"exp_avg": np.zeros(3)}, "state 'exp_avg' is not LBFGS's; allowed are func_evals"),
        ({"d": np.zeros(7)}, r"state 'd' has shape \(7,\); the parameters have 43 elements"),
        ({"d": np.zeros((43, 1))}, r"state 'd' has shape \(43, 1\)"),
        ({"d": np.zeros(43, np.complex64)}, "state 'd' has dtype complex64; it must be real"),
        ({"d": np.zeros(43, np.int64)}, "state 'd' has dtype int64; it must be real"),
        ({"old_stps": np.zeros((3, 7))}, "state 'old_stps' has shape .* rows as long as the parameters, 43 elements"),
        ({"old_stps": np.zeros((2, 43))}, "the state has 3 of old_dirs, 2 of old_stps, 3 of ro; these must be equally many"),
        ({"ro": np.zeros(1)}, "1 of ro; these must be equally many"),
        ({"ro": np.zeros((3, 1))}, r"state 'ro' has shape \(3, 1\); it must be a list of numbers"),
        ({"t": np.zeros(2)}, r"state 't' has shape \(2,\); it must be a single number"),
        ({"n_iter": np.array(1.5)}, "state 'n_iter' is 1.5; it must be a whole number, 0 or more"),
        ({"func_evals": np.array(-1.0)}, "state 'func_evals' is -1.0; it must be"),
        ({"func_evals": np.array(np.nan)}, "state 'func_evals' is nan; it must be"),
        ({"func_evals": None}, "the state has .* but no func_evals"),
        ({"prev_loss": None}, "but no prev_loss"),
        (dict.fromkeys([*VECTORS, "t", "ro", "H_diag", "prev_loss", "al"]), "func_evals, n_iter but no t, H_diag"),
    ],
    ids=str,
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused(changed: dict[str, Any], message: str, build: Build) -> None:
    group = group_of(max_iter=4)
    store = build(find("lbfgs"), "numpy", [start("float64")], [group])
    step(store, group)
    content = store.export()
    assert len(content.extras["old_dirs"]) == 3
    before = bits(content)
    with pytest.raises(InvalidStateDictError, match=message):
        store.load(broken(content.extras, **changed), [group], with_values=False)
    assert bits(store.export()) == before
    store.load(broken(content.extras, al=None), [group], with_values=False)


def test_other_optimizers_have_no_such_state(build: Build) -> None:
    group = dict(find("adam").defaults)
    store = build(find("adam"), "numpy", [start("float32")], [group])
    with pytest.raises(InvalidStateDictError, match="Adam has no state beside the parameters'; 'd' was found"):
        store.load(broken({"d": np.zeros(36)}), [group], with_values=False)
