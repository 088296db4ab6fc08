from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from optserve.client import SparseGradient, _gradients, _packing
from optserve.v1 import data_pb2
from optserve.wire import dtypes
from optserve.wire.chunks import CHUNK_BYTES
from optserve.wire.layout import Layout
from optserve.wire.rows import ROWS_ARRAY_ID

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
COMPLEX64, COMPLEX128 = np.dtype(np.complex64), np.dtype(np.complex128)
REALS = [FLOAT32, FLOAT64, FLOAT16, BFLOAT16]
BIG = CHUNK_BYTES // 4 + 1000


def sent(push: _gradients.Push) -> dict[int, bytes]:
    """Each array's blocks, which must be all of them in order."""
    found: dict[int, bytes] = {}
    for pieces in push.chunks():
        raw = bytes(pieces.assembled().data)
        assert pieces.offset == len(found.get(pieces.array_id, b""))
        found[pieces.array_id] = found.get(pieces.array_id, b"") + raw
    assert push.nbytes == sum(map(len, found.values()))
    return found


def flat(layout: Layout, values: dict[str, Any], kinds: dict[int, np.dtype[np.generic]]) -> dict[int, bytes]:
    """The flat arrays, each in its one of these dtypes."""
    wide = {array.array_id: np.zeros(array.length) for array in layout.arrays}
    for place in layout.places:
        if place.name in values:
            exact = values[place.name].astype(np.complex128 if place.is_complex else np.float64)
            reals = np.ascontiguousarray(exact).reshape(-1).view(np.float64)
            wide[place.array_id][place.offset : place.offset + place.size] = reals
    return {array_id: array.astype(kinds[array_id]).tobytes() for array_id, array in wide.items()}


def drawn(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    rng = np.random.default_rng(3)
    real = rng.normal(size=shape)
    return (real + 1j * rng.normal(size=shape) if dtypes.is_complex(dtype) else real).astype(dtype)


@pytest.mark.parametrize(("own", "given"), list(itertools.product(REALS, REALS)))
def test_a_gradient_travels_in_its_own_dtype_unless_that_is_wider_than_the_state(
    own: np.dtype[np.generic], given: np.dtype[np.generic]
) -> None:
    layout = Layout().extended(0, [("w", (2, BIG), own), ("b", (3,), own)])
    values = {"w": drawn((BIG, 2), given).T, "b": drawn((3,), given)}
    push = _gradients.checked(layout, values)
    expected = given if given.itemsize <= dtypes.state_dtype(own).itemsize else FLOAT32
    assert dict(push.dtypes) == ({} if expected == own else {0: expected})
    assert sent(push) == flat(layout, values, {0: expected})


@pytest.mark.parametrize(("own", "given"), list(itertools.product([COMPLEX64, COMPLEX128], repeat=2)))
def test_a_complex_gradient_travels_as_pairs_of_such_reals(own: np.dtype[np.generic], given: np.dtype[np.generic]) -> None:
    layout = Layout().extended(0, [("z", (2, BIG), own), ("b", (3,), dtypes.storage_dtype(own))])
    values = {"z": drawn((2, BIG), given), "b": drawn((3,), dtypes.storage_dtype(given))}
    push = _gradients.checked(layout, values)
    narrower = min(dtypes.storage_dtype(own), dtypes.storage_dtype(given), key=lambda dtype: dtype.itemsize)
    assert sent(push) == flat(layout, values, {0: narrower})


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        (FLOAT32, (FLOAT16, FLOAT16), FLOAT16),
        (FLOAT32, (FLOAT16, BFLOAT16), FLOAT32),
        (FLOAT32, (BFLOAT16, FLOAT32), FLOAT32),
        (FLOAT32, (FLOAT16, FLOAT64), FLOAT32),
        (FLOAT64, (FLOAT16, BFLOAT16), FLOAT32),
        (FLOAT64, (FLOAT16, FLOAT64), FLOAT64),
        (BFLOAT16, (BFLOAT16, FLOAT64), FLOAT32),
    ],
)
def test_gradients_that_share_an_array_travel_in_what_holds_them_all(
    own: np.dtype[np.generic], given: tuple[np.dtype[np.generic], ...], expected: np.dtype[np.generic]
) -> None:
    layout = Layout().extended(0, [("a", (BIG,), own), ("b", (70,), own), ("none", (0, 2), own)])
    values = {"a": drawn((BIG,), given[0]), "b": drawn((70,), given[1]), "none": np.zeros((0, 2))}
    push = _gradients.checked(layout, values)
    assert sent(push) == flat(layout, values, {0: expected})


def test_gradients_without_elements_say_nothing_of_a_dtype() -> None:
    layout = Layout().extended(0, [("none", (0, 2), FLOAT32)])
    push = _gradients.checked(layout, {"none": np.zeros((0, 2), np.float16)})
    assert (dict(push.dtypes), sent(push)) == ({}, {})


@pytest.mark.parametrize(
    ("own", "given"), [(FLOAT32, FLOAT64), (FLOAT16, FLOAT64), (BFLOAT16, FLOAT64), (COMPLEX64, COMPLEX128)]
)
@pytest.mark.parametrize("at", [0, 299_999])
def test_what_is_not_finite_once_it_is_narrowed_is_not_finite(
    own: np.dtype[np.generic], given: np.dtype[np.generic], at: int
) -> None:
    layout = Layout().extended(0, [("w", (300_000,), own)])
    gradient = np.ones(300_000, given)
    assert _gradients.checked(layout, {"w": gradient}).contribution == data_pb2.CONTRIBUTION_GRADIENT
    gradient[at] = 1e39
    push = _gradients.checked(layout, {"w": gradient})
    assert (push.contribution, push.nonfinite) == (data_pb2.CONTRIBUTION_NONFINITE, (0,))


def test_no_converted_copy_is_larger_than_a_chunk() -> None:
    layout = Layout().extended(0, [("w", (4 * CHUNK_BYTES,), FLOAT32)])
    gradient = np.ones(4 * CHUNK_BYTES)
    for pieces in _gradients.checked(layout, {"w": gradient}).chunks():
        [piece] = pieces.pieces
        assert (piece.nbytes, np.frombuffer(piece, np.float32).base.obj.nbytes) == (CHUNK_BYTES, CHUNK_BYTES)  # type: ignore[union-attr]


def test_blocks_are_those_of_the_grid_in_the_gradients_dtype() -> None:
    per_block = CHUNK_BYTES // 2  # of float16
    layout = Layout().extended(0, [("a", (per_block,), FLOAT32), ("b", (per_block,), FLOAT32), ("c", (32,), FLOAT32)])
    push = _gradients.checked(layout, {"b": np.ones(per_block, np.float16)})
    assert [(pieces.array_id, pieces.offset) for pieces in push.chunks()] == [(0, CHUNK_BYTES)]
    assert push.nbytes == CHUNK_BYTES
    push = _gradients.checked(layout, {"c": np.ones(32, np.float16)})
    assert [(pieces.offset, len(pieces.assembled().data)) for pieces in push.chunks()] == [(2 * CHUNK_BYTES, 64)]
    assert push.nbytes == 64


def test_a_sparse_parameter_has_no_blocks_and_zeros_in_shared_ones() -> None:
    layout = Layout().extended(0, [("emb", (BIG, 8), FLOAT32), ("b", (5,), FLOAT32)])
    push = _gradients.checked(layout, {"emb": SparseGradient([7], np.ones((1, 8), np.float32)), "b": np.ones(5, np.float32)})
    chunks = [pieces.assembled() for pieces in push.chunks()]
    assert [(chunk.array_id, chunk.offset // CHUNK_BYTES) for chunk in chunks] == [(0, 8), (ROWS_ARRAY_ID, 0)]
    block = np.frombuffer(chunks[0].data, np.float32)
    assert np.flatnonzero(block).tolist() == list(range(8000, 8005))
    assert push.absent == []


def test_initial_values_cover_every_block() -> None:
    layout = Layout().extended(0, [("a", (CHUNK_BYTES // 4 + 7,), FLOAT32), ("h", (3,), BFLOAT16)])
    values: dict[str, npt.NDArray[np.generic]] = {
        "a": np.arange(CHUNK_BYTES // 4 + 7, dtype=np.float32),
        "h": np.ones(3, ml_dtypes.bfloat16),
    }
    found: dict[int, bytes] = {}
    for pieces in _packing.blocks(layout, values):
        found[pieces.array_id] = found.get(pieces.array_id, b"") + bytes(pieces.assembled().data)
    assert found == flat(layout, values, {0: FLOAT32, 1: BFLOAT16})
