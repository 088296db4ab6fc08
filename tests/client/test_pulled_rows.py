from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from optserve.client import _packing, _sparse, _weights
from optserve.client._weights import Destination
from optserve.v1 import data_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire import errors, rows
from optserve.wire.chunks import CHUNK_BYTES, Chunk, to_inline
from optserve.wire.layout import Layout
from optserve.wire.methods import Item
from optserve.wire.rows import ROWS_ARRAY_ID, Rows

FLOAT32, COMPLEX64 = np.dtype(np.float32), np.dtype(np.complex64)
COUNT = CHUNK_BYTES // 32  # rows of 8 float32 in a block
LAYOUT = (
    Layout()
    .extended(0, [("emb", (3 * COUNT, 8), FLOAT32), ("b", (5,), FLOAT32), ("s", (), FLOAT32)])
    .extended(1, [("z", (6, 2, 3), COMPLEX64), ("v", (9,), FLOAT32), ("none", (4, 0), FLOAT32)])
)
RNG = np.random.default_rng(1)
VALUES = {place.name: RNG.normal(size=place.shape).astype(place.dtype) for place in LAYOUT.places}
VALUES["z"] += np.complex64(1j) * VALUES["z"][::-1]
END = data_pb2.StreamResponse(end=pb.StreamEnd())
IDS = {"emb": [5, 3 * COUNT - 1, 5, 0], "z": [1, 4], "v": [8, 0, 8], "none": [3, 3]}


def parts(asked: Iterable[pb.Rows]) -> list[tuple[pb.RowsEntry, Rows]]:
    """What the server makes of the rows that are asked for."""
    found = []
    for index, ids in rows.from_deltas(LAYOUT, asked).items():
        place = LAYOUT.places[index]
        part = Rows(ids, _packing.reals(VALUES[place.name][ids]).reshape(ids.size, rows.row_size(place)))
        found.append((_sparse.entry(place, part), part))
    return found


def sent(destination: Destination) -> tuple[data_pb2.WeightsBegin, list[Item]]:
    """The begin of an answer, and what follows it."""
    answer = parts(destination.asked)
    wanted = LAYOUT.blocks_of([place.index for place in destination.places])
    chunks: list[Item] = [pieces.assembled() for pieces in _packing.blocks(LAYOUT, VALUES, wanted)]
    begin = data_pb2.WeightsBegin(layout_version=LAYOUT.version, rows=[entry for entry, _ in answer])
    return begin, [*chunks, *rows.chunks([part for _, part in answer]), END]


def received(destination: Destination) -> _weights.Weights:
    begin, items = sent(destination)
    read(begin, iter(items), destination)
    assert destination.filled
    return destination.finished()


def read(begin: data_pb2.WeightsBegin, items: Iterator[Item], destination: Destination) -> None:
    _weights.read(begin, lambda: next(items), destination)


def assert_equal(weights: _weights.Weights, ids: Mapping[str, Any], names: Iterable[str]) -> None:
    assert list(weights) == list(names)
    for name, array in weights.items():
        expected = VALUES[name][np.array(ids[name], int)] if name in ids else VALUES[name]
        np.testing.assert_array_equal(array, expected)
        assert (array.dtype, array.shape, array.flags.writeable) == (expected.dtype, expected.shape, True)


@pytest.mark.parametrize("ids", [IDS, {"emb": []}, {"emb": [7]}, {"z": np.array([0, 5], np.uint8)}], ids=str)
def test_rows_come_in_the_callers_order_with_repeats_and_the_others_whole(ids: dict[str, Any]) -> None:
    assert_equal(received(Destination(LAYOUT, None, None, ids)), ids, VALUES)


def test_names_stand_beside_rows_and_rows_win() -> None:
    ids = {"v": [3], "emb": [2, 1]}
    assert_equal(received(Destination(LAYOUT, ["s", "v"], None, ids)), ids, ["s", "v", "emb"])
    assert_equal(received(Destination(LAYOUT, [], None, ids)), ids, ["v", "emb"])


def test_only_distinct_ascending_rows_are_asked_for() -> None:
    [asked] = Destination(LAYOUT, None, None, {"emb": [5, 3, 5, 0]}).asked
    assert (asked.parameter, list(asked.deltas)) == (0, [0, 3, 2])


def test_only_blocks_of_what_comes_whole_are_waited_for() -> None:
    destination = Destination(LAYOUT, None, None, {"emb": [1]})
    assert {array_id: coverage.missing for array_id, coverage in destination.coverage().items()} == {0: {3}, 1: {0}}
    begin, items = sent(destination)
    received_bytes = sum(item.data.nbytes for item in items if isinstance(item, Chunk))
    assert received_bytes < 4096
    assert begin.rows[0].count == 1


def test_nothing_is_made_of_the_rows_that_do_not_come() -> None:
    huge = Layout().extended(0, [("emb", (1 << 40, 1 << 10), FLOAT32), ("b", (5,), FLOAT32)])
    destination = Destination(huge, ["emb"], None, {"emb": [1 << 39]})
    assert destination.asked[0].deltas == [1 << 39]
    assert destination.coverage()[0].missing == set()


@pytest.mark.parametrize("order", ["C", "apart"])
def test_rows_go_into_the_callers_arrays(order: str) -> None:
    emb = np.zeros((4, 8), np.float32) if order == "C" else np.zeros((8, 4), np.float32).T
    out: _weights.Weights = {"emb": emb, "v": np.zeros(3, np.float32), "b": np.zeros(5, np.float32)}
    before = dict(out)
    assert received(Destination(LAYOUT, None, out, IDS)) is out
    assert all(out[name] is before[name] for name in before)
    assert_equal({name: out[name] for name in VALUES}, IDS, VALUES)


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((3, 8), np.float32), errors.ShapeMismatchError, r"has shape \(3, 8\); these rows have shape \(4, 8\)"),
        (VALUES["emb"], errors.ShapeMismatchError, r"these rows have shape \(4, 8\)"),
        (np.zeros((4, 8)), errors.DtypeMismatchError, "has dtype float64; the parameter has dtype float32"),
        ([[0.0]], errors.InvalidArgumentError, "is a list"),
    ],
)
def test_an_array_that_does_not_take_the_rows_is_named(array: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"out\['emb'\] .*" + message):
        Destination(LAYOUT, None, {"emb": array}, IDS)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ({"emb": [3 * COUNT]}, errors.InvalidArgumentError, "row 98304 of 'emb' is out of range"),
        ({"emb": [-1]}, errors.InvalidArgumentError, "row -1 of 'emb'"),
        ({"emb": [0.5]}, errors.InvalidArgumentError, "the rows of 'emb' have dtype float64; they must be integers"),
        ({"emb": [[1]]}, errors.InvalidArgumentError, "they must be one-dimensional"),
        ({"s": [0]}, errors.ShapeMismatchError, "'s' is a scalar and has no rows"),
        ({"nobody": [0]}, errors.UnknownParameterError, "'nobody' is not in the job"),
        ([1, 2], errors.InvalidArgumentError, "rows must be a dict of names to numbers of rows; got list"),
    ],
)
def test_rows_that_there_are_not_are_named(ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Destination(LAYOUT, None, None, ids)


def test_more_rows_than_a_request_can_name_are_refused_at_once() -> None:
    huge = Layout().extended(0, [("emb", (1 << 40, 1), FLOAT32)])
    with pytest.raises(errors.InvalidArgumentError, match="400000 rows are more than one request can ask for"):
        Destination(huge, None, None, {"emb": np.arange(400_000) << 20})


def test_rows_inside_the_begin_are_taken_too() -> None:
    destination = Destination(LAYOUT, ["s"], None, {"emb": [4, 4]})
    begin, items = sent(destination)
    begin.inline.CopyFrom(to_inline(item for item in items if isinstance(item, Chunk)))
    read(begin, iter([]), destination)
    assert_equal(destination.finished(), {"emb": [4, 4]}, ["s", "emb"])


def test_rows_of_another_layout_are_drained_and_written_nowhere() -> None:
    out = {"emb": np.full((2, 8), 7, np.float32)}
    destination = Destination(LAYOUT, None, out, {"emb": [0, 1]})
    begin, items = sent(destination)
    begin.layout_version += 1
    left = iter(items)
    read(begin, left, destination)
    assert not destination.filled
    assert list(left) == []
    assert (out["emb"] == 7).all()


def broken(change: str) -> tuple[data_pb2.WeightsBegin, list[Item]]:
    begin, items = sent(Destination(LAYOUT, [], None, {"emb": [0, 4]}))
    if change == "announced otherwise":
        begin.rows[0].count = 3
    elif change == "of another dtype":
        begin.rows[0].dtype = pb.DATA_TYPE_FLOAT64
    elif change == "announced twice":
        begin.rows.append(begin.rows[0])
    elif change == "not announced":
        begin.ClearField("rows")
    elif change == "missing":
        del items[0]
    elif change == "twice":
        items.insert(0, items[0])
    elif change == "cut":
        chunk = items[0]
        assert isinstance(chunk, Chunk)
        items[0] = Chunk(ROWS_ARRAY_ID, 0, chunk.data[:-1])
    return begin, items


@pytest.mark.parametrize(
    "change",
    ["announced otherwise", "of another dtype", "announced twice", "not announced", "missing", "twice", "cut"],
)
def test_a_server_that_breaks_the_protocol_is_a_typed_error(change: str) -> None:
    begin, items = broken(change)
    destination = Destination(LAYOUT, [], None, {"emb": [0, 4]})
    with pytest.raises(errors.StreamError):
        read(begin, iter(items), destination)
    assert not destination.filled


def test_other_rows_than_were_asked_for_are_a_typed_error() -> None:
    begin, items = sent(Destination(LAYOUT, [], None, {"emb": [0, 5]}))
    destination = Destination(LAYOUT, [], None, {"emb": [0, 4]})
    with pytest.raises(errors.ProtocolViolationError, match="other rows of 'emb' came"):
        read(begin, iter(items), destination)
    assert not destination.filled


def test_rows_that_nobody_asked_for_are_a_typed_error() -> None:
    begin, items = sent(Destination(LAYOUT, ["s"], None, {"emb": [0]}))
    with pytest.raises(errors.ProtocolViolationError, match="were announced"):
        read(begin, iter(items), Destination(LAYOUT, ["s"]))
