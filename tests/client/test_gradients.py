from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from optserve.client import _gradients, _packing
from optserve.v1 import data_pb2
from optserve.wire import errors
from optserve.wire.chunks import CHUNK_BYTES
from optserve.wire.dtypes import storage_dtype
from optserve.wire.layout import Layout

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
COMPLEX64, COMPLEX128 = np.dtype(np.complex64), np.dtype(np.complex128)
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.complex64, np.complex128]


def layout_of(*parameters: tuple[str, tuple[int, ...], np.dtype[np.generic]]) -> Layout:
    return Layout().extended(0, parameters)


def flat(layout: Layout, values: dict[str, npt.NDArray[np.generic]]) -> dict[int, bytes]:
    arrays = {array.array_id: np.zeros(array.length, array.dtype) for array in layout.arrays}
    for name, view in layout.views(arrays).items():
        if name in values:
            view[...] = values[name]
    return {array_id: array.tobytes() for array_id, array in arrays.items()}


def packed(push: _gradients.Push) -> dict[int, dict[int, bytes]]:
    found: dict[int, dict[int, bytes]] = {}
    for pieces in push.chunks():
        found.setdefault(pieces.array_id, {})[pieces.offset] = bytes(pieces.assembled().data)
    return found


def checked(layout: Layout, gradients: _gradients.Gradients, weight: float = 1.0) -> _gradients.Push:
    return _gradients.checked(layout, gradients, weight, None)


def test_blocks_are_the_flat_arrays_bytes_whatever_the_gradients_memory_order() -> None:
    rng = np.random.default_rng(0)
    layout = layout_of(
        ("c", (300, 1000), FLOAT32),
        ("d", (5,), FLOAT64),
        ("scalar", (), FLOAT32),
        ("none", (0, 3), FLOAT32),
        ("f", (500, 700), FLOAT32),
        ("z", (300, 500), COMPLEX64),
        ("zz", (3,), COMPLEX128),
    )
    values: dict[str, npt.NDArray[np.generic]] = {
        "c": rng.normal(size=(300, 1000)).astype(np.float32),
        "d": rng.normal(size=10)[::2],
        "scalar": np.array(3, np.float32),
        "none": np.zeros((0, 3), np.float32),
        "f": rng.normal(size=(700, 500)).astype(np.float32).T,
        "z": rng.normal(size=(500, 600)).astype(np.float32).view(np.complex64).reshape(500, 300).T,
        "zz": rng.normal(size=12).view(np.complex128)[::2],
    }
    got = packed(checked(layout, values))
    for array_id, raw in flat(layout, values).items():
        assert b"".join(got[array_id][offset] for offset in sorted(got[array_id])) == raw
        assert all(offset % CHUNK_BYTES == 0 for offset in got[array_id])


def test_a_block_inside_one_parameter_is_borrowed_from_it() -> None:
    layout = layout_of(("w", (CHUNK_BYTES,), FLOAT32))
    gradient = np.zeros(CHUNK_BYTES, np.float32)
    first = next(iter(checked(layout, {"w": gradient}).chunks()))
    assert len(first.pieces) == 1
    assert np.shares_memory(np.frombuffer(first.pieces[0], np.uint8), gradient)


def test_blocks_that_only_absent_parameters_touch_are_not_sent_and_shared_ones_have_zeros() -> None:
    big = CHUNK_BYTES // 4 * 2
    layout = layout_of(("a", (big,), FLOAT32), ("b", (64,), FLOAT32), ("c", (big,), FLOAT32))
    push = checked(layout, {"a": None, "b": np.ones(64, np.float32)})
    assert push.absent == [0, 2]
    got = packed(push)
    assert list(got) == [0]
    assert list(got[0]) == [2 * CHUNK_BYTES]
    block = np.frombuffer(got[0][2 * CHUNK_BYTES], np.float32)
    assert block[:64].sum() == 64
    assert block[64:].sum() == 0


@pytest.mark.parametrize(
    ("name", "gradient", "error", "message"),
    [
        (
            "w",
            np.zeros((4, 3), np.float32),
            errors.ShapeMismatchError,
            r"gradient 'w' has shape \(4, 3\); the parameter has shape \(3, 4\)",
        ),
        ("w", np.zeros((3, 4)), errors.DtypeMismatchError, "gradient 'w' has dtype float64; the parameter has dtype float32"),
        ("v", np.zeros((3, 4)), errors.UnknownParameterError, "gradient 'v' is not in the job; its parameters are 'w', 'z'"),
        (
            "w",
            np.zeros((3, 4), np.complex64),
            errors.DtypeMismatchError,
            "gradient 'w' has dtype complex64; the parameter has dtype float32",
        ),
        (
            "z",
            np.zeros((2,), np.float32),
            errors.DtypeMismatchError,
            "gradient 'z' has dtype float32; the parameter has dtype complex64",
        ),
        ("z", np.zeros(2, np.complex128), errors.DtypeMismatchError, "gradient 'z' has dtype complex128"),
    ],
)
def test_a_gradient_that_does_not_fit_is_named(
    name: str, gradient: npt.NDArray[np.generic], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        checked(layout_of(("w", (3, 4), FLOAT32), ("z", (2,), COMPLEX64)), {name: gradient})


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "heavy"])
def test_a_weight_is_finite_and_not_negative(weight: float) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="weight is"):
        checked(layout_of(("w", (1,), FLOAT32)), {}, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [1, 2])
def test_one_element_that_is_not_finite_is_found_and_its_bytes_are_not_sent(
    dtype: npt.DTypeLike, bad: float, step: int
) -> None:
    gradient = np.ones(400_001, dtype)
    gradient[400_000] = complex(0, bad) if gradient.dtype.kind == "c" else bad
    layout = layout_of(("w", gradient[::step].shape, np.dtype(dtype)))
    push = checked(layout, {"w": gradient[::step]})
    assert push.contribution == data_pb2.CONTRIBUTION_NONFINITE
    assert list(push.chunks()) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_values_are_finite(dtype: npt.DTypeLike) -> None:
    gradient = np.full(1000, ml_dtypes.finfo(storage_dtype(dtype)).max, np.dtype(dtype))
    if gradient.dtype.kind == "c":
        gradient.imag = gradient.real
    push = checked(layout_of(("w", (1000,), np.dtype(dtype))), {"w": gradient})
    assert push.contribution == data_pb2.CONTRIBUTION_GRADIENT


def test_the_fingerprint_follows_content_names_and_weight() -> None:
    layout = layout_of(("a", (2,), FLOAT32), ("b", (2,), FLOAT32))
    one, two = np.ones(2, np.float32), np.full(2, 2, np.float32)
    pushes = [
        checked(layout, {"a": one}),
        checked(layout, {"b": one}),
        checked(layout, {"a": two}),
        checked(layout, {"a": one}, 2.0),
        _gradients.skipped(layout),
    ]
    assert len({push.fingerprint for push in pushes}) == len(pushes)
    assert checked(layout, {"a": one.copy()}).fingerprint == pushes[0].fingerprint


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3, 5, 4096, 300_001])
def test_the_fingerprint_follows_signs_and_places(dtype: npt.DTypeLike, size: int) -> None:
    base = np.zeros(size, dtype)
    base[-1], base[-2] = 1, 2
    swapped = base.copy()
    swapped[[-1, -2]] = base[[-2, -1]]
    layout = layout_of(("w", (size,), np.dtype(dtype)))
    arrays = [base, -base, swapped, np.ascontiguousarray(base[::-1])]
    if base.dtype.kind == "c":
        arrays += [base * 1j, base * (1 + 1j)]
    distinct = {array.tobytes() for array in arrays}
    assert len({checked(layout, {"w": array}).fingerprint for array in arrays}) == len(distinct)


def test_the_fingerprint_is_of_the_values_not_of_how_they_lie_in_memory_by_steps() -> None:
    gradient = np.arange(40_000, dtype=np.float32)
    layout = layout_of(("w", (20_000,), FLOAT32))
    apart, together = gradient[::2], gradient[::2].copy()
    assert checked(layout, {"w": apart}).fingerprint == checked(layout, {"w": together}).fingerprint


def test_a_push_that_skips_names_everything_as_absent() -> None:
    push = _gradients.skipped(layout_of(("a", (2,), FLOAT32), ("b", (2,), FLOAT32)))
    assert (push.absent, push.weight, list(push.chunks())) == ([0, 1], 0.0, [])


def test_initial_values_cover_every_block() -> None:
    layout = layout_of(("a", (CHUNK_BYTES // 4 + 7,), FLOAT32), ("h", (3,), BFLOAT16))
    values: dict[str, npt.NDArray[np.generic]] = {
        "a": np.arange(CHUNK_BYTES // 4 + 7, dtype=np.float32),
        "h": np.ones(3, ml_dtypes.bfloat16),
    }
    found: dict[int, bytes] = {}
    for pieces in _packing.blocks(layout, values):
        found[pieces.array_id] = found.get(pieces.array_id, b"") + bytes(pieces.assembled().data)
    assert found == flat(layout, values)
