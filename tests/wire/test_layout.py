"""Where parameters lie in the flat arrays."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optserve.v1 import types_pb2 as pb
from optserve.wire import dtypes
from optserve.wire.chunks import CHUNK_BYTES
from optserve.wire.errors import (
    DuplicateParameterError,
    InvalidArgumentError,
    ProtocolViolationError,
    StaleLayoutError,
    UnknownParameterError,
)
from optserve.wire.layout import ALIGNMENT, Layout

F32, F16, BF16, F64 = (np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))
C64, C128 = np.dtype(np.complex64), np.dtype(np.complex128)
SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)
KINDS = st.sampled_from([F32, F16, BF16, F64, C64, C128])
GROUPS = st.lists(st.lists(st.tuples(SHAPES, KINDS), min_size=1, max_size=6), max_size=3)


def build(groups: list[list[tuple[tuple[int, ...], np.dtype]]]) -> Layout:
    layout = Layout()
    for index, group in enumerate(groups):
        layout = layout.extended(index, [(f"{index}.{at}", shape, dtype) for at, (shape, dtype) in enumerate(group)])
    return layout


@given(GROUPS)
def test_parameters_are_aligned_apart_and_inside_the_array_of_their_group_and_real_dtype(groups: list) -> None:
    layout = build(groups)
    assert [place.index for place in layout.places] == list(range(len(layout.places)))
    assert [array.array_id for array in layout.arrays] == list(range(len(layout.arrays)))
    ends = dict.fromkeys(range(len(layout.arrays)), 0)
    for place in layout.places:
        array = layout.arrays[place.array_id]
        assert (array.dtype, str(array.group)) == (dtypes.storage_dtype(place.dtype), place.name.partition(".")[0])
        assert place.size * array.dtype.itemsize == math.prod(place.shape) * place.dtype.itemsize
        assert place.offset % ALIGNMENT == 0
        assert place.offset >= ends[place.array_id]
        ends[place.array_id] = place.offset + place.size
    assert all(ends[array.array_id] <= array.length and array.length % ALIGNMENT == 0 for array in layout.arrays)


@given(GROUPS)
def test_layout_survives_the_wire(groups: list) -> None:
    layout = build(groups)
    assert Layout.from_proto(pb.Layout.FromString(layout.to_proto().SerializeToString())) == layout


@given(GROUPS)
def test_an_older_layout_is_a_valid_part_of_a_newer_one(groups: list) -> None:
    older, newer = build(groups[:-1]), build(groups)
    assert newer.places[: len(older.places)] == older.places
    assert newer.arrays[: len(older.arrays)] == older.arrays
    assert newer.version == len(groups)


def test_every_placement_covers_its_whole_array_on_the_server_that_answers() -> None:
    placements = build([[((3, 4), F32), ((5,), F16)]]).to_proto().placements
    assert [(p.array_id, p.begin, p.end, p.endpoint) for p in placements] == [(0, 0, 32, ""), (1, 0, 32, "")]


def test_layout_on_another_server_is_refused() -> None:
    layout = build([[((3, 4), F32)]]).to_proto()
    layout.placements[0].endpoint = "elsewhere:50051"
    with pytest.raises(ProtocolViolationError, match="elsewhere:50051"):
        Layout.from_proto(layout)


def test_views_share_memory_with_the_arrays() -> None:
    layout = build([[((3, 4), F32), ((), F32), ((1, 0, 2), F32)]])
    flat = np.arange(layout.arrays[0].length, dtype=np.float32)
    views = layout.views({0: flat})
    assert {name: view.shape for name, view in views.items()} == {"0.0": (3, 4), "0.1": (), "0.2": (1, 0, 2)}
    views["0.1"][...] = -1
    assert flat[ALIGNMENT] == -1
    assert list(layout.views({0: flat}, ["0.1"])) == ["0.1"]


def test_a_complex_parameter_lies_as_pairs_of_reals_among_the_real_ones() -> None:
    layout = build([[((3, 2), C64), ((5,), F32), ((), C128), ((1, 0, 2), C64), ((20,), C128)]])
    assert [(array.dtype, array.length) for array in layout.arrays] == [(F32, 64), (F64, 96)]
    flats = {array.array_id: np.arange(array.length).astype(array.dtype) for array in layout.arrays}
    views = layout.views(flats)
    for place in layout.places:
        view = views[place.name]
        assert (view.dtype, view.shape) == (place.dtype, place.shape)
        assert np.shares_memory(view, flats[place.array_id]) or not place.size
    np.testing.assert_array_equal(views["0.0"], (np.arange(0, 12, 2) + 1j * np.arange(1, 12, 2)).reshape(3, 2))
    np.testing.assert_array_equal(views["0.1"], np.arange(32, 37))
    np.testing.assert_array_equal(views["0.2"], 0 + 1j)
    assert layout.padding(0, 0).tolist() == [*range(12, 32), *range(37, 64)]
    views["0.4"][0] = -1 - 2j
    assert flats[1][32:35].tolist() == [-1, -2, 34]


def test_state_of_a_16_bit_parameter_is_shaped_in_the_state_dtype() -> None:
    place = build([[((3, 4), BF16)]]).places[0]
    flat = np.arange(32, dtype=np.float32)
    np.testing.assert_array_equal(place.shaped(flat), np.arange(12, dtype=np.float32).reshape(3, 4), strict=True)


def test_layout_with_a_complex_array_is_refused() -> None:
    layout = build([[((3, 4), C64)]]).to_proto()
    layout.arrays[0].dtype = pb.DATA_TYPE_COMPLEX64
    with pytest.raises(ProtocolViolationError, match="array 0 has dtype complex64; a flat array holds reals"):
        Layout.from_proto(layout)


def test_unknown_parameter_is_named_beside_the_known_ones() -> None:
    with pytest.raises(UnknownParameterError, match=r"gradient 'w9' is not in the job; its parameters are '0\.0'"):
        build([[((3,), F32)]]).place("w9", "gradient")


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ([], InvalidArgumentError),
        ([("", (1,), F32)], InvalidArgumentError),
        ([("w", (-1,), F32)], InvalidArgumentError),
        ([("w", (2**40, 2**40), F32)], InvalidArgumentError),
        ([("w", (0, 2**40, 2**40), F32)], InvalidArgumentError),
        ([("w", (1,) * 65, F32)], InvalidArgumentError),
        ([("w", (1,), F32), ("w", (2,), F32)], DuplicateParameterError),
        ([("0.0", (1,), F32)], DuplicateParameterError),
    ],
    ids=["no parameters", "no name", "negative", "huge", "huge and empty", "65-d", "twice", "twice in two groups"],
)
def test_group_that_cannot_be_laid_out_is_refused(parameters: list, error: type[Exception]) -> None:
    with pytest.raises(error):
        build([[((3,), F32)]]).extended(1, parameters)


@given(GROUPS, st.data())
def test_the_blocks_of_other_dtypes_count_their_bytes(groups: list, data: st.DataObject) -> None:
    groups.append([((CHUNK_BYTES // 3,), F32), ((70_000, 5), F16), ((300_001,), F64), ((70_000, 3), C64), ((9,), F16)])
    layout = build(groups)
    chosen = data.draw(st.sets(st.sampled_from(range(len(layout.places)))) | st.just(set(range(len(layout.places)))))
    kinds = {array.array_id: data.draw(st.sampled_from([F32, F16, BF16, F64])) for array in layout.arrays}
    named = data.draw(st.sets(st.sampled_from(sorted(kinds))))
    grids = {array_id: kinds[array_id] for array_id in named}
    for _ in range(2):  # what is kept of the first time gives the same
        found = layout.blocks_of(chosen, grids)
        expected: dict[int, set[int]] = {}
        for place in (layout.places[index] for index in chosen):
            width = grids.get(place.array_id, layout.arrays[place.array_id].dtype).itemsize
            begin, end = place.offset * width, (place.offset + place.size) * width
            if place.size:
                touched = range(begin // CHUNK_BYTES, -(-end // CHUNK_BYTES))
                expected.setdefault(place.array_id, set()).update(touched)
        assert found == {array_id: sorted(blocks) for array_id, blocks in sorted(expected.items())}


def test_units_are_blocks_of_the_state_dtype_and_padding_is_counted_in_them() -> None:
    layout = build([[((300_001,), F16), ((300_001,), F32), ((140_000,), F64), ((0, 2), BF16)]])
    assert [array.unit for array in layout.arrays] == [262_144, 262_144, 131_072, 262_144]
    assert layout.units_of(range(4)) == {0: [0, 1], 1: [0, 1], 2: [0, 1]}
    assert layout.units_of([1]) == {1: [0, 1]}
    assert layout.blocks_of(range(4)) == {0: [0], 1: [0, 1], 2: [0, 1]}
    assert layout.arrays_of(range(4)) == {0, 1, 2, 3}
    assert layout.arrays_of([3]) == {3}
    for array_id, rest in ((0, 300_001 - 262_144), (1, 300_001 - 262_144)):
        assert layout.padding(array_id, 0).size == 0
        assert layout.padding(array_id, 1).tolist() == [*range(rest, -(-rest // 32) * 32)]
    assert layout.padding(2, 1).size == 0


@pytest.mark.parametrize(("version", "stale"), [(0, False), (2, True), (3, False), (5, False), (6, True)])
def test_a_layout_that_is_no_part_of_this_one_is_stale(version: int, stale: bool) -> None:
    layout = Layout(5, (), (), 3)
    if stale:
        with pytest.raises(StaleLayoutError, match=f"the push is of layout {version}; the job has layout 5"):
            layout.check_version(version, "the push")
    else:
        layout.check_version(version, "the push")


@given(GROUPS, st.data())
def test_blocks_of_are_the_grid_blocks_that_hold_any_element(groups: list, data: st.DataObject) -> None:
    groups.append([((CHUNK_BYTES // 3,), F32), ((70_000, 5), F32), ((1,), F64), ((70_000, 3), C64)])
    layout = build(groups)
    chosen = data.draw(st.sets(st.sampled_from(range(len(layout.places)))))
    expected: dict[int, set[int]] = {}
    for place in (layout.places[index] for index in chosen):
        begin = place.offset * dtypes.storage_dtype(place.dtype).itemsize
        end = begin + math.prod(place.shape) * place.dtype.itemsize
        touched = {
            block for block in range(10) if begin < (block + 1) * CHUNK_BYTES and end > block * CHUNK_BYTES and end > begin
        }
        if touched:
            expected.setdefault(place.array_id, set()).update(touched)
        assert place.span == (begin, end)
    assert layout.blocks_of(chosen) == {array_id: sorted(blocks) for array_id, blocks in sorted(expected.items())}
