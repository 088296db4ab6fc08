from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from optserve.client import _packing, _weights
from optserve.client._weights import Destination
from optserve.v1 import data_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire import errors, reasons
from optserve.wire.chunks import CHUNK_BYTES, Chunk
from optserve.wire.layout import Layout
from optserve.wire.methods import Item

BIG = CHUNK_BYTES // 4 + 1000
LAYOUT = (
    Layout()
    .extended(
        0, [("w", (2, BIG // 2), np.dtype(np.float32)), ("b", (3,), np.dtype(np.float32)), ("s", (), np.dtype(np.float64))]
    )
    .extended(
        1,
        [
            ("z", (2, BIG // 4), np.dtype(np.complex64)),
            ("r", (5,), np.dtype(np.float32)),
            ("zz", (2, 3), np.dtype(np.complex128)),
        ],
    )
    .extended(
        2, [("h", (5, 2), np.dtype(ml_dtypes.bfloat16)), ("e", (0,), np.dtype(np.float32)), ("t", (4, 3), np.dtype(np.float32))]
    )
)
RNG = np.random.default_rng(1)
VALUES = {place.name: RNG.normal(size=place.shape).astype(place.dtype) for place in LAYOUT.places}
VALUES["z"] += np.complex64(1j) * VALUES["z"][::-1]
VALUES["zz"] += 1j * VALUES["zz"][::-1]
END = data_pb2.StreamResponse(end=pb.StreamEnd())


def sent(names: list[str] | None = None) -> Iterator[Item]:
    wanted = None if names is None else LAYOUT.blocks_of([LAYOUT.place(name).index for name in names])
    for pieces in _packing.blocks(LAYOUT, VALUES, wanted):
        yield pieces.assembled()
    yield END


def read(destination: Destination, items: Iterator[Item], version: int = LAYOUT.version) -> None:
    _weights.read(data_pb2.WeightsBegin(layout_version=version), lambda: next(items), destination)


def received(destination: Destination, names: list[str] | None = None) -> _weights.Weights:
    read(destination, sent(names))
    return destination.finished()


def assert_equal(weights: _weights.Weights, names: list[str] | None = None) -> None:
    assert set(weights) == set(VALUES if names is None else names)
    for name, array in weights.items():
        np.testing.assert_array_equal(array, VALUES[name])
        assert array.dtype == VALUES[name].dtype
        assert array.flags.writeable


def test_new_arrays_are_the_callers_own() -> None:
    assert_equal(received(Destination(LAYOUT)))


def test_a_dict_given_back_is_filled_in_place_with_one_copy_a_chunk() -> None:
    first = received(Destination(LAYOUT))
    before = dict(first)
    for array in first.values():
        array[...] = 0
    again = Destination(LAYOUT, None, first)
    assert [len(spans) for spans in again._spans.values()] == [1] * len(LAYOUT.arrays)
    second = received(again)
    assert second is first
    assert all(second[name] is before[name] for name in before)
    assert_equal(second)


def test_swapped_views_are_not_taken_for_the_flat_array() -> None:
    layout = Layout().extended(0, [("a", (2,), np.dtype(np.float32)), ("b", (2,), np.dtype(np.float32))])
    values: dict[str, npt.NDArray[np.generic] | None] = {"a": np.ones(2, np.float32), "b": np.zeros(2, np.float32)}
    out = Destination(layout).finished()
    out["a"], out["b"] = out["b"], out["a"]
    destination = Destination(layout, None, out)
    items: Iterator[Item] = iter([*(pieces.assembled() for pieces in _packing.blocks(layout, values)), END])
    read(destination, items, layout.version)
    assert destination.finished()["a"].tolist() == [1, 1]
    assert out["b"].tolist() == [0, 0]


def test_arrays_of_the_caller_are_filled_whatever_their_memory_order() -> None:
    out: _weights.Weights = {place.name: np.zeros(place.shape, place.dtype) for place in LAYOUT.places}
    out["t"] = np.zeros((3, 4), np.float32).T
    out["b"] = np.zeros(6, np.float32)[::2]
    out["zz"] = np.zeros((3, 2), np.complex128).T
    out["z"] = np.zeros((2, BIG // 2), np.complex64)[:, ::2]
    before = dict(out)
    result = received(Destination(LAYOUT, None, out))
    assert result is out
    assert all(out[name] is before[name] for name in before)
    assert_equal(out)


def test_what_out_lacks_is_added_and_what_it_has_beyond_is_left_alone() -> None:
    extra = np.ones(2)
    out: _weights.Weights = {"b": np.zeros(3, np.float32), "extra": extra}
    received(Destination(LAYOUT, None, out))
    assert out.pop("extra") is extra
    assert_equal(out)


def test_names_bring_only_their_blocks() -> None:
    names = ["b", "h", "z"]
    assert_equal(received(Destination(LAYOUT, names), names), names)


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (np.zeros((3, 1), np.float32), errors.ShapeMismatchError),
        (np.zeros(3, np.float64), errors.DtypeMismatchError),
        (np.broadcast_to(np.zeros((), np.float32), (3,)), errors.InvalidArgumentError),
        ([0.0, 0.0, 0.0], errors.InvalidArgumentError),
    ],
)
def test_an_array_of_out_that_cannot_be_filled_is_named(array: npt.NDArray[np.generic], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"out\['b'\]"):
        Destination(LAYOUT, None, {"b": array})


@pytest.mark.parametrize(("name", "dtype"), [("b", np.complex64), ("z", np.float32), ("z", np.complex128)])
def test_a_real_array_does_not_take_a_complex_parameter_nor_the_reverse(name: str, dtype: npt.DTypeLike) -> None:
    place = LAYOUT.place(name)
    message = rf"out\['{name}'\] has dtype {np.dtype(dtype)}; the parameter has dtype {place.dtype}"
    with pytest.raises(errors.DtypeMismatchError, match=message):
        Destination(LAYOUT, None, {name: np.zeros(place.shape, dtype)})


def test_weights_of_another_layout_are_drained_and_written_nowhere() -> None:
    out = {"b": np.full(3, 7, np.float32)}
    destination = Destination(LAYOUT, None, out)  # type: ignore[arg-type]
    items = sent()
    read(destination, items, LAYOUT.version + 1)
    assert not destination.filled
    assert out["b"].tolist() == [7, 7, 7]
    assert list(items) == []


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("version", [LAYOUT.version, LAYOUT.version + 1], ids=["this layout", "another layout"])
@pytest.mark.parametrize("ends", [False, True], ids=["error", "goodbye"])
def test_an_error_among_the_weights_is_raised_as_what_it_is(place: int, version: int, ends: bool) -> None:
    detail = reasons.to_detail(errors.RoundTimeoutError("silent for so long; pull again", rank=3))
    refused = data_pb2.StreamResponse(goodbye={"error": detail}) if ends else data_pb2.StreamResponse(error=detail)
    items = list(sent())
    items.insert(place, refused)
    destination = Destination(LAYOUT)
    with pytest.raises(errors.RoundTimeoutError, match="pull again") as caught:
        read(destination, iter(items), version)
    assert caught.value.metadata == {"rank": "3"}
    assert not destination.filled


@pytest.mark.parametrize(
    "items",
    [
        [END],
        [*list(sent())[:-2], END],
        [next(sent()), next(sent())],
        [Chunk(99, 0, memoryview(b""))],
        [data_pb2.StreamResponse(pushed=data_pb2.PushResult())],
    ],
    ids=["nothing", "last missing", "twice", "no such array", "another message"],
)
def test_a_server_that_breaks_the_protocol_is_a_typed_error(items: list[Item]) -> None:
    with pytest.raises(errors.StreamError):
        read(Destination(LAYOUT), iter(items))
