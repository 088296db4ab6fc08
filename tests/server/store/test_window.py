"""The running sum of the rounds that wait for a step: what it adds, what it leaves alone, and that it is state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from every_backend import BACKENDS
from host_kernels import has_compiler

from optserve.server.backends import select
from optserve.server.backends.memory import HostMemory
from optserve.server.formulas import find
from optserve.server.store import Store, StoreState
from optserve.wire.errors import InvalidStateDictError, OutOfMemoryError, RanksDisagreeError
from optserve.wire.rows import Rows, Sums

Build = Callable[..., Store]
SGD = find("sgd")
GROUP = {**SGD.defaults, "lr": 0.5}
SHAPES = {"a": (5, 7), "b": (40,), "c": (6, 3), "s": ()}
DTYPES = {"a": np.float32, "b": np.float64, "c": np.float32, "s": ml_dtypes.bfloat16}


def start() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    return {name: np.asarray(random.normal(size=shape)).astype(DTYPES[name]) for name, shape in SHAPES.items()}


def made(backend: str, build: Build) -> Store:
    return build(SGD, backend, [start()], [GROUP])


def slope(name: str, seed: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).normal(size=SHAPES[name])).astype(
        np.float64 if DTYPES[name] is np.float64 else np.float32
    )


def round_of(store: Store, dense: Mapping[str, np.ndarray], sparse: Mapping[str, Any]) -> tuple[Sums, frozenset[int]]:
    """A round's sums in arrays that hold NaN wherever no parameter was sent."""
    flats = store.accumulators()
    for flat in flats.values():
        store.backend.write(flat, np.nan)
    for name, value in dense.items():
        place = store.layout.place(name)
        column = store._columns[place.array_id]
        begin, end = column.bounds(column.position_of(place.index))
        store.backend.write(flats[place.array_id][begin:end], 0.0)
        store.backend.write(flats[place.array_id][place.offset : place.offset + place.size], value.reshape(-1))
    wanted = {store.layout.place(name).array_id for name in dense}
    rows = {store.layout.place(name).index: Rows(np.array(ids), np.array(values)) for name, (ids, values) in sparse.items()}
    present = {store.layout.place(name).index for name in dense} | rows.keys()
    return Sums({array_id: flat for array_id, flat in flats.items() if array_id in wanted}, rows), frozenset(present)


def add(store: Store, dense: Mapping[str, np.ndarray], sparse: Mapping[str, Any], scale: float) -> None:
    """One round of the window."""
    window = store.window
    sums, present = window.added(*round_of(store, dense, sparse), scale)
    window.keep(sums, present, window.rounds + 1)


def found(store: Store) -> dict[str, Any]:
    content = store.export()
    return {key: (array.dtype.name, array.shape, array.tobytes()) for key, array in content.window.items()} | {
        "rounds": content.window_rounds
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_are_summed_in_their_order(backend: str, build: Build) -> None:
    """Over the parameters that are there: what has never been sent is absent, what was sent once is 0 in the other rounds."""
    store = made(backend, build)
    add(store, {"a": slope("a", 1), "b": slope("b", 1)}, {}, 0.5)
    add(store, {"b": slope("b", 2), "s": slope("s", 2)}, {}, 1 / 3)
    add(store, {"a": slope("a", 3)}, {}, 0.25)
    content = store.export()
    thirds = (np.float64(1 / 3), np.float32(1 / 3))
    expected = {
        "sum/a": np.float32(0.25) * slope("a", 3) + np.float32(0.5) * slope("a", 1),
        "sum/b": thirds[0] * slope("b", 2) + 0.5 * slope("b", 1),
        "sum/s": np.asarray(thirds[1] * slope("s", 2)),
    }
    assert content.window_rounds == store.window.rounds == 3
    assert store.window.present == {store.layout.place(name).index for name in "abs"}
    assert content.window.keys() == expected.keys()
    for key, value in expected.items():
        assert content.window[key].dtype == value.dtype
        assert content.window[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_summed_where_there_are_any(backend: str, build: Build) -> None:
    store = made(backend, build)
    ones = np.ones((2, 7), np.float32)
    add(store, {}, {"a": ([1, 3], ones)}, 0.5)
    add(store, {"c": slope("c", 1)}, {"a": (np.zeros(0, np.int64), np.zeros((0, 7), np.float32))}, 0.5)
    add(store, {}, {"a": ([0, 3], 2 * ones)}, 0.25)
    content = store.export()
    assert content.window["ids/a"].tolist() == [0, 1, 3]
    assert content.window["rows/a"].tolist() == [[0.5] * 7, [0.5] * 7, [1.0] * 7]
    assert sorted(content.window) == ["ids/a", "rows/a", "sum/c"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_is_that_of_the_mean(backend: str, build: Build) -> None:
    """Of the last round's sums, with what the window holds, and the parameters that were in any of its rounds."""
    store, before = made(backend, build), start()
    add(store, {"a": slope("a", 1), "s": slope("s", 1)}, {"c": ([2], np.ones((1, 3), np.float32))}, 1.0)
    sums, present = store.window.added(*round_of(store, {"a": slope("a", 2)}, {}), 0.5)
    absent = frozenset(range(4)) - present
    store.update([GROUP], sums.dense, 0.5, absent, sums.sparse)
    after = store.export()
    mean = np.float32(0.5) * (np.float32(0.5) * slope("a", 2) + slope("a", 1))
    np.testing.assert_array_equal(after.values["a"], before["a"] - np.float32(0.5) * mean)
    assert after.values["b"].tobytes() == before["b"].tobytes()
    moved = before["c"].copy()
    moved[2] -= np.float32(0.25)
    np.testing.assert_array_equal(after.values["c"], moved)
    assert after.values["s"] != before["s"]
    assert after.window == {}
    assert (after.window_rounds, store.window.rounds, store.window.present) == (0, 0, frozenset())


def test_what_is_not_kept_is_forgotten(build: Build) -> None:
    """A round that is skipped, for instance."""
    store = made("numpy", build)
    add(store, {"a": slope("a", 1)}, {"c": ([2], np.ones((1, 3), np.float32))}, 1.0)
    before = found(store)
    store.window.added(*round_of(store, {"a": slope("a", 2)}, {"c": ([2], np.full((1, 3), 1e38, np.float32))}), 1e10)
    assert found(store) == before
    store.window.added(*round_of(store, {"b": slope("b", 2)}, {}), 1.0)
    assert found(store) == before


def test_the_sum_is_the_same_wherever_it_is_computed(build: Build) -> None:
    results = []
    for backend in ["numba", "numpy", *(["cupy-on-host", "cupy-on-host-copies-at-once"] if has_compiler else [])]:
        store = made(backend, build)
        for seed in range(5):
            names = [name for index, name in enumerate("abs") if (seed + index) % 3]
            dense = {name: slope(name, seed) for name in names}
            add(store, dense, {"c": ([seed % 3, 4], slope("c", seed)[:2])}, 1 / (seed + 3))
        results.append(found(store))
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_that_was_saved_goes_on_with_the_same_bits(backend: str, build: Build) -> None:
    def first(store: Store) -> None:
        add(store, {"a": slope("a", 1), "s": slope("s", 1)}, {"c": ([2, 5], np.ones((2, 3), np.float32))}, 1 / 3)

    def rest(store: Store) -> None:
        sums, present = store.window.added(*round_of(store, {"b": slope("b", 2)}, {"c": ([0, 2], slope("c", 2)[:2])}), 1 / 7)
        store.update([GROUP], sums.dense, 0.5, frozenset(range(4)) - present, sums.sparse)

    whole, saved, again = (made(backend, build) for _ in range(3))
    first(whole)
    first(saved)
    content = saved.export()
    add(again, {"b": slope("b", 9)}, {"a": ([0], np.ones((1, 7), np.float32))}, 1.0)  # what is to be replaced
    again.check(content, [GROUP], with_values=True)
    again.load(content, [GROUP], with_values=True)
    assert found(again) == found(saved) == found(whole)
    rest(whole)
    rest(again)
    one, other = whole.export(), again.export()
    assert {k: v.tobytes() for k, v in one.values.items()} == {k: v.tobytes() for k, v in other.values.items()}


def test_a_state_dict_leaves_the_sum_alone(build: Build) -> None:
    """As torch's load_state_dict leaves the gradients."""
    store = made("numpy", build)
    add(store, {"a": slope("a", 1)}, {}, 1.0)
    before = found(store)
    store.load(StoreState(), [GROUP], with_values=False)
    assert found(store) == before
    store.load(replace(store.export(), window={}, window_rounds=0), [GROUP], with_values=True)
    assert found(store) == {"rounds": 0}


def test_complex_sums_are_complex(build: Build) -> None:
    first = {"z": np.ones((3, 2), np.complex64)}
    store = build(SGD, "numpy", [first], [GROUP])
    pairs = np.arange(12, dtype=np.float32)
    flats = store.accumulators()
    flats[0][:12] = pairs
    sums, present = store.window.added(Sums(flats, {}), frozenset({0}), 1.0)
    store.window.keep(sums, present, 1)
    whole = store.export()
    assert whole.window["sum/z"].tolist() == pairs.view(np.complex64).reshape(3, 2).tolist()
    other = build(SGD, "numpy", [first], [GROUP])
    sums, present = other.window.added(Sums({}, {0: Rows(np.array([1]), pairs[:4].reshape(1, 4))}), frozenset({0}), 1.0)
    other.window.keep(sums, present, 1)
    some = other.export()
    assert some.window["rows/z"].tolist() == pairs[:4].view(np.complex64).reshape(1, 2).tolist()
    for content in (whole, some):
        store.load(content, [GROUP], with_values=True)
        assert {k: v.tobytes() for k, v in store.export().window.items()} == {k: v.tobytes() for k, v in content.window.items()}


@pytest.mark.parametrize("sparse_first", [False, True])
def test_a_gradient_of_another_kind_changes_nothing(sparse_first: bool, build: Build) -> None:
    store = made("numpy", build)
    kinds = [({"a": slope("a", 1)}, {}), ({}, {"a": ([1], np.ones((1, 7), np.float32))})]
    first, second = reversed(kinds) if sparse_first else kinds
    add(store, *first, 1.0)
    before = found(store)
    now, then = ("dense", "sparse") if sparse_first else ("sparse", "dense")
    with pytest.raises(RanksDisagreeError, match=f"'a' is {now} in this round and {then} in the 1 before") as caught:
        store.window.added(*round_of(store, *second), 1.0)
    assert caught.value.metadata == {"parameter": "a"}
    assert found(store) == before


def test_no_memory_for_the_sum_changes_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made("numpy", build)
    given = round_of(store, {"a": slope("a", 1)}, {})

    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(HostMemory, "zeros", refuse)
    with pytest.raises(OutOfMemoryError, match="no memory for a flat array"):
        store.window.added(*given, 1.0)
    monkeypatch.undo()
    assert found(store) == {"rounds": 0}


def test_the_memory_is_made_once_and_freed_when_nothing_is_accumulated(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made("numpy", build)
    calls: list[int] = []
    right = HostMemory.zeros
    monkeypatch.setattr(HostMemory, "zeros", lambda self, length, dtype: calls.append(length) or right(self, length, dtype))
    given = [round_of(store, {"a": slope("a", seed)}, {}) for seed in range(4)]
    calls.clear()
    for _ in range(2):
        sums, present = store.window.added(*given[0], 1.0)
        store.window.keep(sums, present, 1)
        sums, present = store.window.added(*given[1], 1.0)
        store.update([GROUP], sums.dense, 0.5, frozenset(range(4)) - present)
    assert len(calls) == 1
    store.update([GROUP], given[2][0].dense, 1.0, frozenset(range(4)) - given[2][1])
    assert store.window._dense == {}


def test_what_a_window_keeps_is_its_own(build: Build) -> None:
    """The round's arrays take the next round's gradients."""
    store = made("numpy", build)
    sums, present = store.window.added(*round_of(store, {"a": slope("a", 1)}, {}), 1.0)
    store.window.keep(sums, present, 1)
    before = found(store)
    for flat in sums.dense.values():
        flat[:] = 7
    assert found(store) == before


def test_the_sum_is_not_changed_while_someone_reads(build: Build) -> None:
    """An export copies it, for instance."""
    store = made("numpy", build)
    kept = threading.Thread(target=add, args=(store, {"a": slope("a", 1)}, {}, 1.0))
    with store.reading("an export"):
        kept.start()
        kept.join(0.1)
        assert kept.is_alive()
        assert store.window.rounds == 0
    kept.join(20)
    assert store.window.rounds == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_of_what_is_present(backend: str, build: Build) -> None:
    """All else holds NaN here."""
    store = made(backend, build)
    ids = np.array([1, 4])
    sums, present = round_of(
        store, {"a": slope("a", 1), "b": slope("b", 1), "s": slope("s", 1)}, {"c": (ids, slope("c", 1)[:2])}
    )
    parts = [slope("a", 1), slope("b", 1), slope("s", 1), slope("c", 1)[:2]]
    expected = sum(float(np.sum(part.astype(np.float64) ** 2)) for part in parts)
    assert store.sum_of_squares(sums, present) == pytest.approx(expected, rel=1e-14)
    without = present - {store.layout.place("b").index, store.layout.place("c").index}
    assert store.sum_of_squares(sums, without) == pytest.approx(
        float(np.sum(slope("a", 1).astype(np.float64) ** 2) + slope("s", 1).astype(np.float64) ** 2), rel=1e-14
    )
    assert store.sum_of_squares(Sums({}, {}), frozenset()) == 0.0
    assert store.sum_of_squares(sums, present) == made("numpy", build).sum_of_squares(
        round_of(made("numpy", build), {n: slope(n, 1) for n in "abs"}, {"c": (ids, slope("c", 1)[:2])})[0], present
    )


def test_every_kernel_is_compiled_before_it_is_needed(build: Build) -> None:
    store = made("numba", build)
    store.window.prepare()
    kernels = dict(select("numba")._kernels)
    for seed in range(3):
        add(store, {"a": slope("a", 1), **({"b": slope("b", 1)} if seed else {})}, {}, 0.5)
    assert select("numba")._kernels == kernels


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "no such parameter": ({"sum/x": np.ones(3)}, 1, "the running sum has 'sum/x'; allowed are sum, ids and rows"),
    "no such kind": ({"exp/a": np.ones((5, 7))}, 1, "the running sum has 'exp/a'"),
    "no kind": ({"a": np.ones((5, 7))}, 1, "the running sum has 'a'"),
    "another shape": ({"sum/a": np.ones((7, 5))}, 1, r"'sum/a' of the running sum has shape \(7, 5\); it must have \(5, 7\)"),
    "complex": ({"sum/a": np.ones((5, 7), np.complex64)}, 1, "dtype complex64; it must be real"),
    "integers": ({"sum/a": np.ones((5, 7), np.int32)}, 1, "dtype int32; it must be real"),
    "not finite": ({"sum/a": np.full((5, 7), np.nan)}, 1, "'sum/a' of the running sum holds NaN or Inf"),
    "rows not finite": ({"ids/a": np.array([1]), "rows/a": np.full((1, 7), np.inf)}, 1, "'rows/a' of the running sum holds"),
    "of no rounds": ({"sum/a": np.ones((5, 7))}, 0, "a running sum of no rounds has sum/a"),
    "less than none": ({}, -1, "of -1 rounds"),
    "no count": ({}, 1.5, "of 1.5 rounds"),  # type: ignore[dict-item]
    "both": ({"sum/a": np.ones((5, 7)), "ids/a": np.array([1])}, 1, "'a' is both whole and in rows"),
    "ids alone": ({"ids/a": np.array([1])}, 1, "has 'ids/a' but no 'rows/a'"),
    "rows alone": ({"rows/a": np.ones((1, 7))}, 1, "has 'rows/a' but no 'ids/a'"),
    "repeated": ({"ids/a": np.array([1, 1]), "rows/a": np.ones((2, 7))}, 1, "ascending numbers of rows"),
    "floats": ({"ids/a": np.array([1.0]), "rows/a": np.ones((1, 7))}, 1, "ascending numbers of rows, int64"),
    "matrix": ({"ids/a": np.array([[1]]), "rows/a": np.ones((1, 7))}, 1, "ascending numbers of rows, int64"),
    "of a scalar": ({"ids/s": np.array([0]), "rows/s": np.ones(1)}, 1, "'ids/s' of the running sum"),
    "beyond": ({"ids/a": np.array([5]), "rows/a": np.ones((1, 7))}, 1, "row 5 of 'a' is out of range"),
    "too few": ({"ids/a": np.array([1, 2]), "rows/a": np.ones((1, 7))}, 1, r"has shape \(1, 7\); it must have \(2, 7\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_sum_that_does_not_fit_changes_nothing(case: str, build: Build) -> None:
    window, rounds, message = BAD[case]
    store = made("numpy", build)
    add(store, {"a": slope("a", 1)}, {}, 1.0)
    before = found(store)
    wrong = replace(store.export(), window=window, window_rounds=rounds)
    for refused in (store.check, store.load):
        with pytest.raises(InvalidStateDictError, match=message):
            refused(wrong, [GROUP], with_values=True)
    assert found(store) == before
