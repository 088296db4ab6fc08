"""The bundle of rows, and rows as they are asked for."""

from __future__ import annotations

import random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optserve.v1 import types_pb2 as pb
from optserve.wire import dtypes, rows
from optserve.wire.chunks import CHUNK_BYTES, Chunk
from optserve.wire.errors import InvalidArgumentError, InvalidChunkError, ShapeMismatchError, UnknownParameterError
from optserve.wire.layout import Layout
from optserve.wire.rows import ROWS_ARRAY_ID, Receiver, Rows

F16, BF16, F32, F64 = (np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
C64 = np.dtype(np.complex64)
LAYOUT = Layout().extended(
    0,
    [
        ("emb", (100_000, 8), F32),
        ("half", (50, 3), BF16),
        ("line", (1000,), F64),
        ("turn", (10, 2), C64),
        ("scalar", (), F32),
        ("none", (0, 4), F32),
        ("thin", (6, 0), F32),
    ],
)
NOISE = np.random.default_rng(3)


def entry(name: str, count: int, dtype: Any = None) -> pb.RowsEntry:
    place = LAYOUT.place(name)
    return pb.RowsEntry(parameter=place.index, count=count, dtype=dtypes.to_wire(dtype or place.dtype))


def some(name: str, count: int, dtype: Any = None) -> tuple[pb.RowsEntry, Rows]:
    place = LAYOUT.place(name)
    reals = dtypes.storage_dtype(dtype or place.dtype)
    ids = NOISE.integers(0, max(1, place.shape[0]), count)
    return entry(name, count, dtype), Rows(ids, NOISE.normal(size=(count, rows.row_size(place))).astype(reals))


@settings(deadline=None)
@given(st.lists(st.sampled_from(["emb", "half", "line", "turn", "thin", "none"]), unique=True, max_size=6), st.data())
def test_a_bundle_comes_back_whatever_the_order_of_its_chunks(names: list[str], data: st.DataObject) -> None:
    most = {"emb": 40_000, "none": 0}
    found = [some(name, data.draw(st.integers(0, most.get(name, 3000)))) for name in names]
    receiver = Receiver(rows.table(LAYOUT, [head for head, _ in found]))
    chunks = list(rows.chunks([part for _, part in found]))
    assert sum(chunk.data.nbytes for chunk in chunks) == receiver.nbytes
    assert receiver.missing == len(chunks)
    assert all(chunk.array_id == ROWS_ARRAY_ID and chunk.data.nbytes <= CHUNK_BYTES for chunk in chunks)
    random.Random(0).shuffle(chunks)
    for chunk in chunks:
        receiver.add(chunk)
    assert not receiver.missing
    for (_, part), (place, ids, values) in zip(found, receiver.entries(), strict=True):
        np.testing.assert_array_equal(ids, part.ids)
        np.testing.assert_array_equal(values, part.values, strict=True)
        assert values.shape == (ids.size, rows.row_size(place))


def test_rows_may_have_another_dtype_than_their_parameter() -> None:
    head, part = some("emb", 5, F16)
    receiver = Receiver(rows.table(LAYOUT, [head]))
    for chunk in rows.chunks([part]):
        receiver.add(chunk)
    [(_, _, values)] = receiver.entries()
    np.testing.assert_array_equal(values, part.values, strict=True)


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ([pb.RowsEntry(parameter=7, count=1, dtype=pb.DATA_TYPE_FLOAT32)], UnknownParameterError, "parameter 7 .* has 7"),
        ([entry("emb", 1), entry("emb", 1)], InvalidArgumentError, "'emb' came twice"),
        ([entry("scalar", 1)], ShapeMismatchError, "'scalar' is a scalar and has no rows"),
    ],
    ids=["unknown", "twice", "scalar"],
)
def test_a_table_that_cannot_be_is_refused(entries: list[pb.RowsEntry], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rows.table(LAYOUT, entries)


@pytest.mark.parametrize("bad", ["again", "between", "short", "beyond", "long"])
def test_a_chunk_that_is_no_block_of_the_bundle_is_refused(bad: str) -> None:
    head, part = some("emb", 40_000)
    receiver = Receiver(rows.table(LAYOUT, [head]))
    first, second = list(rows.chunks([part]))[:2]
    receiver.add(first)
    chunk = {
        "again": first,
        "between": second._replace(offset=CHUNK_BYTES + 64),
        "short": second._replace(data=second.data[:-8]),
        "beyond": Chunk(ROWS_ARRAY_ID, 1 << 62, second.data),
        "long": Chunk(ROWS_ARRAY_ID, CHUNK_BYTES, first.data),
    }[bad]
    before = receiver.missing
    with pytest.raises(InvalidChunkError, match="no block of the bundle"):
        receiver.add(chunk)
    assert receiver.missing == before


@pytest.mark.parametrize("ids", [[-1], [0, 100_000], [3, -(1 << 63)], [(1 << 63) - 1]])
def test_a_row_that_the_parameter_does_not_have_is_named(ids: list[int]) -> None:
    odd = next(number for number in ids if not 0 <= number < 100_000)
    with pytest.raises(InvalidArgumentError, match=rf"row {odd} of 'emb' is out of range; the parameter has 100000 rows"):
        rows.checked_ids(LAYOUT.place("emb"), np.array(ids, np.int64))
    rows.checked_ids(LAYOUT.place("emb"), np.array([0, 99_999, 5, 5], np.int64))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize(("count", "among", "width"), [(2000, 700, 3), (3000, 4, 2), (1000, 1, 1), (7, 7, 1), (0, 1, 2)])
def test_rows_that_repeat_are_summed_in_the_order_of_coming(dtype: Any, count: int, among: int, width: int) -> None:
    noise = np.random.default_rng(0)
    ids, values = noise.integers(0, among, count), noise.normal(size=(count, width)).astype(dtype)
    before = values.copy()
    found = rows.summed(ids, values)
    assert found.ids.tolist() == sorted(set(ids.tolist()))
    assert found.values.dtype == dtype
    for row, total in zip(found.ids, found.values, strict=True):
        own = values[ids == row]
        expected = own[0]
        for value in own[1:]:
            expected = expected + value
        if len(own) <= 64:
            assert total.tobytes() == expected.astype(dtype).tobytes()
        elif dtype.itemsize > 2:
            np.testing.assert_allclose(total, own.astype(np.float64).sum(axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(values, before)


def test_numbers_too_large_to_be_packed_are_sorted_too() -> None:
    ids = np.array([1 << 62, 5, 1 << 62, (1 << 63) - 1, -3, 5])
    found = rows.summed(ids, np.arange(6, dtype=np.float32).reshape(6, 1))
    assert found.ids.tolist() == [-3, 5, 1 << 62, (1 << 63) - 1]
    assert found.values[:, 0].tolist() == [4, 6, 2, 3]


def test_rows_that_ascend_are_not_copied_and_others_are_sorted() -> None:
    ids, values = np.array([1, 4, 9]), np.ones((3, 2), np.float32)
    assert rows.summed(ids, values).values is values
    found = rows.summed(np.array([9, 1, 4]), np.arange(3, dtype=np.float32).reshape(3, 1))
    assert (found.ids.tolist(), found.values[:, 0].tolist()) == ([1, 4, 9], [1, 2, 0])


@given(st.sets(st.integers(0, 99_999), max_size=50))
def test_rows_that_are_asked_for_travel_as_deltas(chosen: set[int]) -> None:
    ids = np.array(sorted(chosen), np.int64)
    asked = pb.Rows.FromString(rows.to_deltas(0, ids).SerializeToString())
    assert rows.from_deltas(LAYOUT, [asked])[0].tolist() == ids.tolist()


def test_more_rows_than_a_request_holds_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="600000 rows are more than one request can ask for"):
        rows.to_deltas(0, np.arange(600_000) * (1 << 20))


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ([pb.Rows(parameter=9, deltas=[0])], UnknownParameterError, "rows of parameter 9"),
        ([pb.Rows(parameter=0, deltas=[0]), pb.Rows(parameter=0)], InvalidArgumentError, "'emb' are asked for twice"),
        ([pb.Rows(parameter=0, deltas=[5, 0])], InvalidArgumentError, "'emb' do not ascend"),
        ([pb.Rows(parameter=0, deltas=[99_999, 1])], InvalidArgumentError, "row 100000 of 'emb' is out of range"),
        ([pb.Rows(parameter=0, deltas=[(1 << 64) - 1])], InvalidArgumentError, "out of range; it has 100000"),
        ([pb.Rows(parameter=4, deltas=[0])], ShapeMismatchError, "'scalar' is a scalar"),
        ([pb.Rows(parameter=5, deltas=[0])], InvalidArgumentError, "'none' do not ascend, or are out of range; it has 0"),
    ],
    ids=["unknown", "twice", "again", "beyond", "huge", "scalar", "no rows"],
)
def test_rows_that_cannot_be_asked_for(asked: list[pb.Rows], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rows.from_deltas(LAYOUT, asked)
