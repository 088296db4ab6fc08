from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from optserve.client import SparseGradient, _sparse
from optserve.v1 import types_pb2 as pb
from optserve.wire import errors
from optserve.wire.layout import Layout, Place

INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]


def place_of(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Place:
    return Layout().extended(0, [("emb", shape, np.dtype(dtype))]).places[0]


def checked(place: Place, rows: Any, values: Any) -> _sparse.Rows:
    return _sparse.checked(place, SparseGradient(rows, values))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(50,), (50, 3), (50, 2, 5)])
def test_rows_that_repeat_are_summed_as_torchs_coalesce_does(dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    ids, values = rng.integers(0, 50, 400), rng.normal(size=(400, *shape[1:])).astype(dtype)
    part = checked(place_of(shape, dtype), ids, values)
    of_torch = torch.sparse_coo_tensor(
        torch.from_numpy(ids)[None], torch.from_numpy(values), shape, check_invariants=True
    ).coalesce()
    assert part.ids.tolist() == of_torch.indices()[0].tolist()
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == np.float32 else {"rtol": 1e-13, "atol": 1e-14}  # torch adds in any order
    np.testing.assert_allclose(part.values.reshape(-1, *shape[1:]), of_torch.values().numpy(), **close)
    in_order = np.zeros(shape, dtype)
    for row, value in zip(ids, values, strict=True):
        in_order[row] += value
    np.testing.assert_array_equal(part.values.reshape(-1, *shape[1:]), in_order[part.ids])
    assert part.values.dtype == dtype


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_repeated_rows_of_16_bits_are_summed_in_float32(dtype: npt.DTypeLike) -> None:
    place = place_of((5, 2), dtype)
    values = np.array([[1, 2], [1 / 128, 0], [1 / 128, 0]]).astype(dtype)
    part = checked(place, [3, 1, 3], values)
    assert (part.ids.tolist(), part.values.dtype) == ([1, 3], np.float32)
    assert part.values.tolist() == [[1 / 128, 0], [1 + 1 / 128, 2]]
    alone = checked(place, [3, 1], values[:2])
    assert (alone.ids.tolist(), alone.values.dtype) == ([1, 3], np.dtype(dtype))
    assert alone.values.astype(float).tolist() == [[1 / 128, 0], [1, 2]]


@pytest.mark.parametrize(
    ("own", "given", "sent"),
    [
        (np.float32, np.float16, np.float16),
        (np.float32, np.float64, np.float32),
        (np.float64, np.float32, np.float32),
        (ml_dtypes.bfloat16, np.float64, np.float32),
        (ml_dtypes.bfloat16, np.float16, np.float16),
        (np.complex64, np.complex128, np.float32),
        (np.complex128, np.complex64, np.float32),
    ],
)
def test_values_travel_in_their_own_dtype_unless_that_is_wider_than_the_state(
    own: npt.DTypeLike, given: npt.DTypeLike, sent: npt.DTypeLike
) -> None:
    place = place_of((4, 3), own)
    values = np.arange(6).reshape(2, 3).astype(given)
    part = checked(place, [2, 0], values)
    assert part.values.dtype == sent
    assert part.values.shape == (2, 6 if place.is_complex else 3)
    entry = _sparse.entry(place, part)
    complex_types = {np.dtype(np.float32): pb.DATA_TYPE_COMPLEX64, np.dtype(np.float64): pb.DATA_TYPE_COMPLEX128}
    assert entry.count == 2
    assert (entry.dtype == complex_types.get(part.values.dtype)) is place.is_complex


def test_doubles_are_summed_before_they_are_narrowed() -> None:
    values = np.array([[1.0], [2.0**-24], [2.0**-24]])
    assert checked(place_of((2, 1)), [0, 0, 0], values).values.tolist() == [[1 + 2.0**-23]]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_numbers_of_rows_may_have_any_integer_dtype(dtype: npt.DTypeLike) -> None:
    part = checked(place_of((5, 1)), np.array([4, 0], dtype), np.array([[1], [2]], np.float32))
    assert (part.ids.dtype, part.ids.tolist(), part.values.tolist()) == (np.int64, [0, 4], [[2], [1]])


@pytest.mark.parametrize("rows", [[], np.zeros(0, np.int32), ()])
@pytest.mark.parametrize("shape", [(5, 2), (0, 2), (5, 0), (5,)])
def test_no_rows_are_legal(rows: Any, shape: tuple[int, ...]) -> None:
    part = checked(place_of(shape), rows, np.zeros((0, *shape[1:]), np.float32))
    assert part.ids.size == part.values.size == 0


def test_rows_and_values_of_torch_are_taken_coalesced_or_not() -> None:
    emb = torch.nn.Embedding(5, 2, sparse=True)
    emb(torch.tensor([3, 1, 3])).sum().backward()
    grad = emb.weight.grad
    assert grad is not None
    part = checked(place_of((5, 2)), grad._indices()[0], grad._values())
    assert (part.ids.tolist(), part.values.tolist()) == ([1, 3], [[1, 1], [2, 2]])


def test_ascending_rows_are_borrowed_from_the_caller() -> None:
    values = np.ones((2, 3), np.float32)
    assert np.shares_memory(checked(place_of((5, 3)), [1, 3], values).values, values)


VALUES = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("rows", "values", "error", "message"),
    [
        ([0, 1, 2], VALUES, errors.ShapeMismatchError, r"has 3 rows and values of shape \(2, 3\).* must have shape \(3, 3\)"),
        ([0, 1], VALUES[:, :2], errors.ShapeMismatchError, r"values of shape \(2, 2\); the parameter has shape \(5, 3\)"),
        ([0, 1], VALUES[0], errors.ShapeMismatchError, r"values of shape \(3,\)"),
        ([], [], errors.ShapeMismatchError, r"values of shape \(0,\).* must have shape \(0, 3\)"),
        (
            [0, 5],
            VALUES,
            errors.InvalidArgumentError,
            "row 5 of 'emb' is out of range; the parameter has 5 rows",
        ),
        ([0, -1], VALUES, errors.InvalidArgumentError, "row -1 of 'emb' is out of range"),
        (np.array([0, 2**64 - 1], np.uint64), VALUES, errors.InvalidArgumentError, "row 9223372036854775807 of 'emb'"),
        (
            [0.0, 1.0],
            VALUES,
            errors.InvalidArgumentError,
            "rows of gradient 'emb' have dtype float64; they must be",
        ),
        ([True, False], VALUES, errors.InvalidArgumentError, "have dtype bool"),
        (np.zeros(0), VALUES[:0], errors.InvalidArgumentError, "have dtype float64"),
        ([[0, 1]], VALUES, errors.InvalidArgumentError, r"have shape \(1, 2\); they must be one-dimensional"),
        (1, VALUES, errors.InvalidArgumentError, r"have shape \(\)"),
        ([[0], [1, 2]], VALUES, errors.InvalidArgumentError, "the rows of gradient 'emb' cannot be made an array"),
        ([0, 1], [[0.0], [0.0, 1.0]], errors.InvalidArgumentError, "the values of gradient 'emb' cannot be made an array"),
        ([0, 1], VALUES.astype(np.int32), errors.DtypeMismatchError, "gradient 'emb' has dtype int32"),
        ([0, 1], VALUES.astype(np.complex64), errors.DtypeMismatchError, "gradient 'emb' has dtype complex64"),
        ([0, 1], torch.zeros(2, 3, dtype=torch.bfloat16), errors.DtypeMismatchError, "the values of gradient 'emb' cannot be"),
        ([0, 1], torch.zeros(2, 3, requires_grad=True), errors.InvalidArgumentError, "the values of gradient 'emb' cannot be"),
        (None, VALUES, errors.InvalidArgumentError, r"have shape \(\)"),
    ],
)
def test_what_does_not_fit_is_named(rows: Any, values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        checked(place_of((5, 3)), rows, values)


def test_a_scalar_has_no_rows() -> None:
    with pytest.raises(errors.ShapeMismatchError, match="'emb' is a scalar and has no rows"):
        checked(place_of(()), [0], [1.0])
