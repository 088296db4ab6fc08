"""Steps of some rows: as torch's with sparse gradients, and no other row changes by a bit."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from every_backend import BACKENDS, backend_named
from host_kernels import has_compiler
from oracle import Configuration, Stock

from optserve.server.backends import select
from optserve.server.backends.memory import HostMemory
from optserve.server.formulas import OPTIMIZERS, Elementwise, find
from optserve.server.store import Store, StoreState, rows, steps
from optserve.wire.errors import InvalidArgumentError, OutOfMemoryError
from optserve.wire.rows import Rows, row_size, summed

Build = Callable[..., Store]
BFLOAT16 = ml_dtypes.bfloat16
STEPS = 50
SHAPES = {"dense": (5, 3), "emb": (1500, 16), "deep": (40, 3, 2), "thin": (70,)}
SPARSE_ADAM = [case for case in oracle.configurations() if case.optimizer == "SparseAdam" and case.description != "Tensor lr"]
"""But for an lr that is a tensor: torch then computes the step size in float32, whatever the parameters are."""
CASES = [
    *SPARSE_ADAM,
    Configuration("SparseAdam", {"lr": 0.02, "betas": (0.5, 0.7), "eps": 0.01, "maximize": True}),
    Configuration("SGD", {"lr": 0.1}),
    Configuration("SGD", {"lr": 0.1, "maximize": True}),
    Configuration("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    Configuration("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    Configuration("Adagrad", {"lr": 0.1}),
    Configuration("Adagrad", {"lr": 0.1, "lr_decay": 0.05, "initial_accumulator_value": 0.3, "eps": 1e-3, "maximize": True}),
]
FLAT = {case: bool(case.options.get("momentum")) for case in CASES}
cases = pytest.mark.parametrize("case", CASES, ids=str)


def start(case: Configuration, dtype: Any) -> dict[str, np.ndarray]:
    found = oracle.initial(SHAPES, dtype)
    if case.ours.no_dense:
        del found["dense"]
    return found


def pushed(values: Mapping[str, np.ndarray], step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows in any order, some of them repeatedly; of "thin" at every third step none, of "deep" at every fifth no gradient."""
    random = np.random.default_rng(step)
    found = {}
    for name, value in values.items():
        if name == "dense" or (name == "deep" and step % 5 == 4):
            continue
        count = 0 if name == "thin" and step % 3 == 2 else int(random.integers(1, 2 * len(value)))
        ids = random.integers(0, len(value), count)
        found[name] = (ids, random.normal(size=(count, *value.shape[1:])))
    return found


def give(
    store: Store, group: Mapping[str, Any], given: Mapping[str, Any], dense: np.ndarray | None, scale: float = 1.0
) -> None:
    """One step: rows by name, and the dense parameter's gradient."""
    layout, flats = store.layout, {}
    sparse = {}
    for name, (ids, slopes) in given.items():
        place = layout.place(name)
        state = np.float64 if place.dtype == np.float64 else np.float32
        sparse[place.index] = summed(ids, slopes.astype(state).reshape(len(ids), row_size(place)))
    absent = {place.index for place in layout.places} - sparse.keys()
    if dense is not None:
        place = layout.place("dense")
        flats = store.accumulators()
        store.backend.write(flats[place.array_id], np.nan)  # what is not its own is not looked at
        begin, end = store._columns[place.array_id].bounds(0)
        store.backend.write(flats[place.array_id][begin:end], 0.0)
        store.backend.fold(flats[place.array_id][place.offset : place.offset + place.size], np.ravel(dense), 1.0, True)
        absent.remove(place.index)
    store.update([group], flats, scale, frozenset(absent), sparse)


def run(case: Configuration, backend: Any, dtype: Any, build: Build, threads: int = 2, steps: int = STEPS) -> Store:
    first, group = start(case, dtype), case.group
    store = build(case.ours, backend, [first], [group], threads)
    for step in range(steps):
        dense = oracle.wave((5, 3), step).astype(first["dense"].dtype) if "dense" in first else None
        give(store, group, pushed(first, step), dense)
    return store


def run_torch(case: Configuration, dtype: Any, steps: int = STEPS) -> Stock:
    first = start(case, dtype)
    stock = Stock(case.optimizer, case.options, first)
    for step in range(steps):
        gradients: dict[str, Any] = {
            name: oracle.in_rows(ids, torch.from_numpy(values.astype(dtype)), first[name].shape)
            for name, (ids, values) in pushed(first, step).items()
        }
        if "dense" in first:
            gradients["dense"] = oracle.wave((5, 3), step).astype(dtype)
        stock.step(gradients)
    return stock


def bits(content: StoreState) -> dict[str, Any]:
    return {name: array.tobytes() for name, array in {**content.values, **content.state}.items()} | dict(content.steps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@cases
def test_fifty_steps_equal_torch(case: Configuration, backend: str, dtype: Any, build: Build) -> None:
    oracle.compare(run(case, backend, dtype, build).export(), run_torch(case, dtype), case, oracle.TOLERANCES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@cases
def test_masters_and_state_of_bfloat16_are_those_of_float32(case: Configuration, backend: str, build: Build) -> None:
    """And what is narrowed of them are the weights, of all rows."""
    content = run(case, backend, BFLOAT16, build).export()
    wide = build(case.ours, "numpy", [{k: v.astype(np.float32) for k, v in start(case, BFLOAT16).items()}], [case.group])
    for step in range(STEPS):
        first = start(case, np.float32)
        dense = oracle.wave((5, 3), step).astype(BFLOAT16) if "dense" in first else None
        give(wide, case.group, pushed(first, step), dense)
    expected = wide.export()
    for name, value in content.values.items():
        master = content.state.pop(f"master/{name}")
        assert master.tobytes() == expected.values[name].tobytes(), name
        assert value.tobytes() == master.astype(BFLOAT16).tobytes(), name
    assert bits(StoreState({}, content.state, content.steps)) == bits(StoreState({}, expected.state, expected.steps))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16])
@cases
def test_backends_threads_and_blocks_agree_bit_for_bit(
    case: Configuration, dtype: Any, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [bits(run(case, backend, dtype, build, threads, 8).export()) for backend, threads in (("numba", 1), ("numpy", 2))]
    monkeypatch.setattr(rows, "HOST_BLOCK", 50)
    monkeypatch.setattr(steps, "ROWS_SLICE", 100)
    found += [bits(run(case, backend, dtype, build, threads, 8).export()) for backend, threads in (("numba", 3), ("numpy", 2))]
    if has_compiler:
        monkeypatch.setattr(rows, "DEVICE_BLOCK", 170)
        found.append(bits(run(case, "cupy-on-host-copies-at-once", dtype, build, 1, 8).export()))
    assert all(entry == found[0] for entry in found[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("case", [case for case in CASES if not FLAT[case]], ids=str)
def test_all_other_rows_keep_every_bit(case: Configuration, dtype: Any, backend: str, build: Build) -> None:
    """Whatever they hold, of weights and of state; and of weights that someone set apart from their masters."""
    first = oracle.initial({"a": (9, 5), "b": (9, 5)}, dtype)
    first["a"][3] = np.nan
    first["b"][8] = np.inf
    store = build(case.ours, backend, [first], [case.group])
    every = np.arange(9)
    give(store, case.group, {name: (every, np.full((9, 5), 0.3)) for name in "ab"}, None)
    before = store.export()
    give(store, case.group, {"a": (np.array([7, 0, 7]), np.ones((3, 5)))}, None)
    after = store.export()
    moved, kept = [0, 7], [1, 2, 3, 4, 5, 6, 8]
    for found, old in ((after.values, before.values), (after.state, before.state)):
        for key, array in found.items():
            if key.endswith("b"):
                assert array.tobytes() == old[key].tobytes(), key
            else:
                assert array[kept].tobytes() == old[key][kept].tobytes(), key
                assert all(array[row].tobytes() != old[key][row].tobytes() for row in moved), key
    if case.ours.counts_steps and before.steps:
        assert (after.steps["a"], after.steps["b"]) == (2, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["sgd", "adagrad", "momentum"])
def test_rows_are_stepped_as_a_dense_gradient_that_is_zero_elsewhere(
    name: str, backend: str, build: Build, step: Callable[..., None]
) -> None:
    """Bit for bit, where that leaves the others alone; with a scale, and with the values clipped."""
    optimizer = find("sgd" if name == "momentum" else name)
    group = {**optimizer.defaults, "lr": 0.1, "clip_grad_value": 0.4, **({"momentum": 0.9} if name == "momentum" else {})}
    first = oracle.initial({"a": (9, 5), "b": (9, 5)}, np.float32)
    stores = [build(optimizer, backend, [first], [group]) for _ in range(2)]
    random = np.random.default_rng(0)
    for _ in range(6):
        ids, values = random.integers(0, 9, 12), random.normal(size=(12, 5)).astype(np.float32)
        whole = np.zeros((9, 5), np.float32)
        found = summed(ids, values)
        whole[found.ids] = found.values
        give(stores[0], group, {"a": (ids, values)}, None, 1 / 3)
        step(stores[1], [group], {"a": whole}, 1 / 3)
    assert bits(stores[0].export()) == bits(stores[1].export())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_nothing_are_stepped(backend: str, build: Build) -> None:
    """torch's process ends there."""
    for name, options in (("sparseadam", {}), ("sgd", {"momentum": 0.9})):
        group = {**find(name).defaults, **options}
        store = build(
            find(name), backend, [{"empty": np.zeros((4, 0), np.float32), "none": np.zeros((0, 3), np.float32)}], [group]
        )
        give(
            store,
            group,
            {"empty": (np.array([1, 3]), np.zeros((2, 0))), "none": (np.zeros(0, np.int64), np.zeros((0, 3)))},
            None,
        )
        assert store.export().steps == {"empty": 1, "none": 1}


@pytest.mark.parametrize("case", [CASES[0], Configuration("Adagrad", {})], ids=str)
def test_no_rows_are_a_step_that_moves_nothing(case: Configuration, build: Build) -> None:
    first = oracle.initial({"a": (9, 5)}, np.float32)
    store = build(case.ours, "numpy", [first], [case.group])
    stock = Stock(case.optimizer, case.options, first)
    for ids in ([], [3], []):
        values = np.ones((len(ids), 5), np.float32)
        give(store, case.group, {"a": (np.array(ids, np.int64), values)}, None)
        stock.step({"a": oracle.in_rows(np.array(ids, np.int64), torch.from_numpy(values), (9, 5))})
    assert store.export().steps == {"a": 3}
    oracle.compare(store.export(), stock, case, oracle.TOLERANCES[np.float32])


BAD: dict[str, tuple[int, Rows, str]] = {
    "beyond": (
        0,
        Rows(np.array([1, 9]), np.ones((2, 5), np.float32)),
        "row 9 of 'a' is out of range; the parameter has 9",
    ),
    "negative": (0, Rows(np.array([-1, 3]), np.ones((2, 5), np.float32)), "row -1 of 'a' is out of range"),
    "repeated": (0, Rows(np.array([3, 3]), np.ones((2, 5), np.float32)), "rows of 'a' do not ascend"),
    "descending": (0, Rows(np.array([3, 1]), np.ones((2, 5), np.float32)), "rows of 'a' do not ascend"),
    "too few values": (0, Rows(np.array([1, 3]), np.ones((1, 5), np.float32)), r"\(1, 5\) for \(2,\) numbers of int64"),
    "too wide": (0, Rows(np.array([1]), np.ones((1, 6), np.float32)), r"must be float32 \(1, 5\)"),
    "other dtype": (0, Rows(np.array([1]), np.ones((1, 5), np.float64)), r"must be float32 \(1, 5\)"),
    "numbers of floats": (0, Rows(np.array([1.0]), np.ones((1, 5), np.float32)), "numbers of float64"),  # type: ignore[arg-type]
    "of a scalar": (1, Rows(np.array([0]), np.ones((1, 1), np.float32)), "rows of 's' came"),
    "of no parameter": (7, Rows(np.array([0]), np.ones((1, 5), np.float32)), "rows of parameter 7 came; the job has 2"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["sgd", "sparseadam", "adagrad"])
def test_rows_that_do_not_fit_change_nothing(name: str, case: str, build: Build) -> None:
    index, wrong, message = BAD[case]
    first = oracle.initial({"a": (9, 5), "s": ()}, np.float32)
    store = build(find(name), "numpy", [first], [find(name).defaults])
    before = bits(store.export())
    with pytest.raises(InvalidArgumentError, match=message):
        store.update([find(name).defaults], {}, 1.0, frozenset({0, 1} - {index}), {index: wrong})
    assert bits(store.export()) == before


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_rows_of_complex_parameters_are_pairs(name: str, build: Build, step: Callable[..., None]) -> None:
    optimizer, random = find(name), np.random.default_rng(0)
    first = {"a": (random.normal(size=(9, 5)) + 1j * random.normal(size=(9, 5))).astype(np.complex64)}
    stores = [build(optimizer, "numpy", [first], [optimizer.defaults]) for _ in range(2)]
    values = random.normal(size=(2, 10)).astype(np.float32)
    stores[0].update([optimizer.defaults], {}, 1.0, frozenset(), {0: Rows(np.array([2, 5]), values)})
    whole = np.zeros((9, 10), np.float32)
    whole[[2, 5]] = values
    step(stores[1], [optimizer.defaults], {"a": whole.reshape(-1)})
    assert bits(stores[0].export()) == bits(stores[1].export())


def test_no_memory_for_rows_changes_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options in (("sparseadam", {}), ("sgd", {"momentum": 0.9}), ("adagrad", {"initial_accumulator_value": 1.0})):
        group = {**find(name).defaults, **options}
        store = build(find(name), "numpy", [oracle.initial({"a": (9, 5)}, np.float32)], [group])
        before = bits(store.export())

        def refuse(*_: object) -> None:
            raise MemoryError

        with monkeypatch.context() as patched:
            patched.setattr(HostMemory, "zeros", refuse)
            with pytest.raises(OutOfMemoryError, match=r"no memory for (rows|the gradient) of 'a'"):
                give(store, group, {"a": (np.array([1]), np.ones((1, 5)))}, None)
        assert bits(store.export()) == before
        give(store, group, {"a": (np.array([1]), np.ones((1, 5)))}, None)
        assert bits(store.export()) != before


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as found:
        return int(found.read().split()[1]) * 4096


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_a_step_costs_what_its_rows_cost(backend: str) -> None:
    """Nothing as large as the parameter is allocated, and no state is touched but that of the rows: memory that the system has
    not given yet stays so, but for the pages (2 MB each, at most) of the rows."""
    optimizer, shape = find("sparseadam"), (2_000_000, 16)
    before = resident_bytes()
    store = Store(optimizer, select(backend))
    store.add_group([("emb", shape, np.dtype(np.float32))])
    store.prepare([optimizer.defaults])
    given = Rows(np.arange(1000), np.ones((1000, 16), np.float32))
    store.update([optimizer.defaults], {}, 1.0, frozenset(), {0: given})
    tracemalloc.start()
    try:
        for _ in range(3):
            store.update([optimizer.defaults], {}, 1.0, frozenset(), {0: given})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert store.state_bytes == 3 * 4 * 32_000_000
    assert resident_bytes() - before < 96 << 20  # kernels are compiled, too


# Teeth


def first_only(ids: np.ndarray, values: np.ndarray) -> Rows:
    """Of a row that comes repeatedly, what came first."""
    found, at = np.unique(ids, return_index=True)
    return Rows(found, values[at])


MISTAKES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "the next row": lambda ids, count: (ids + 1) % count,
    "the first rows": lambda ids, _: np.arange(len(ids)),
    "the rows in reverse": lambda ids, _: ids[::-1].copy(),
    "repeats not summed": lambda ids, _: ids,
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("at", ["take_rows", "put_rows"])
@pytest.mark.parametrize("case", [case for case in CASES if not FLAT[case]], ids=str)
def test_a_mistake_is_found(case: Configuration, at: str, mistake: str, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, right = run_torch(case, np.float32, 4), getattr(HostMemory, at)

    def wrong(backend: Any, source: np.ndarray, ids: np.ndarray, into: np.ndarray) -> None:
        right(backend, source, MISTAKES[mistake](ids, len(source if at == "take_rows" else into)), into)

    monkeypatch.setattr(HostMemory, at, wrong)
    if mistake == "repeats not summed":
        oracle.compare(run(case, "numpy", np.float32, build, steps=4).export(), stock, case, oracle.TOLERANCES[np.float32])
        monkeypatch.setitem(globals(), "summed", first_only)
    with pytest.raises(AssertionError):
        oracle.compare(run(case, "numpy", np.float32, build, steps=4).export(), stock, case, oracle.TOLERANCES[np.float32])


def test_every_optimizer_with_rows_is_among_the_cases() -> None:
    taking = {optimizer.name for optimizer in OPTIMIZERS.values() if isinstance(optimizer, Elementwise) and optimizer.sparse}
    assert taking == {case.optimizer for case in CASES}
    assert backend_named("numpy").on_host
