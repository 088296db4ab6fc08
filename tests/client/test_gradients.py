from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from optserve.client import SparseGradient, _gradients
from optserve.client._options import PushOptions
from optserve.v1 import data_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire import errors
from optserve.wire.chunks import CHUNK_BYTES
from optserve.wire.dtypes import storage_dtype
from optserve.wire.layout import Layout
from optserve.wire.rows import ROWS_ARRAY_ID

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


def checked(layout: Layout, gradients: _gradients.Gradients | None, **options: Any) -> _gradients.Push:
    return _gradients.checked(layout, gradients, PushOptions(**options))


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
        (
            "w",
            np.zeros((3, 4), np.int64),
            errors.DtypeMismatchError,
            "gradient 'w' has dtype int64; the parameter has dtype float32 and takes float32, float64, float16, bfloat16",
        ),
        ("w", np.zeros((3, 4), bool), errors.DtypeMismatchError, "gradient 'w' has dtype bool"),
        ("w", np.zeros((3, 4), np.longdouble), errors.DtypeMismatchError, "gradient 'w' has dtype"),
        ("w", [[0.0, 0.0], [0.0]], errors.InvalidArgumentError, "gradient 'w' cannot be made an array"),
        (
            "w",
            torch.eye(3, 4).to_sparse(),
            errors.DtypeMismatchError,
            r"gradient 'w' is a sparse tensor; push SparseGradient\(grad._indices\(\)\[0\], grad._values\(\)\)",
        ),
        ("w", SparseGradient([3], np.zeros((1, 4), np.float32)), errors.InvalidArgumentError, "row 3 of 'w' is out of range"),
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
            "gradient 'z' has dtype float32; the parameter has dtype complex64 and takes complex64, complex128",
        ),
    ],
)
def test_a_gradient_that_does_not_fit_is_named(
    name: str, gradient: npt.ArrayLike | SparseGradient, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        checked(layout_of(("w", (3, 4), FLOAT32), ("z", (2,), COMPLEX64)), {name: gradient})


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
        checked(layout, {"a": one}, weight=2.0),
        checked(layout, {"a": one}, loss_scale=2.0),
        checked(layout, {"a": one}, clip_grad_norm=2.0),
        checked(layout, {"a": one}, clip_grad_value=2.0),
        checked(layout, {"a": one}, loss=2.0),
        checked(layout, {"a": one.astype(np.float16)}),
        checked(layout, {"a": SparseGradient([0, 1], one)}),
        checked(layout, {"a": SparseGradient([1, 0], two)}),
        checked(layout, {"a": SparseGradient([1], one[:1])}),
        checked(layout, {"a": SparseGradient([0], one[:1])}),
        checked(layout, None, found_inf=True),
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
    assert (push.absent, push.options.weight, list(push.chunks())) == ([0, 1], 0.0, [])


def test_a_push_says_what_it_knows_in_its_head() -> None:
    layout = layout_of(("a", (2,), FLOAT32), ("b", (2,), FLOAT64), ("c", (2, 3), COMPLEX64), ("d", (2,), FLOAT32))
    gradients = {
        "a": np.ones(2, np.float16),
        "b": np.ones(2, np.float32),
        "c": SparseGradient([1, 0, 1], np.ones((3, 3), np.complex64)),
    }
    push = checked(
        layout, gradients, weight=2, metrics={"m": 1}, loss_scale=8, clip_grad_norm=3, loss=0.5, closure=7, evaluation=2
    )
    head = push.head()
    assert (head.contribution, head.weight, head.parameter_count) == (data_pb2.CONTRIBUTION_GRADIENT, 2.0, 4)
    assert (list(head.absent), dict(head.metrics), head.layout_version) == ([3], {"m": 1.0}, layout.version)
    assert dict(head.dtypes) == {0: pb.DATA_TYPE_FLOAT16, 1: pb.DATA_TYPE_FLOAT32}
    assert list(head.sparse) == [pb.RowsEntry(parameter=2, count=2, dtype=pb.DATA_TYPE_COMPLEX64)]
    assert (head.loss_scale, head.clip_grad_norm, head.HasField("clip_grad_value")) == (8.0, 3.0, False)
    assert (head.loss, head.closure, head.evaluation) == (0.5, 7, 2)
    assert head.content_fingerprint == push.fingerprint


def test_a_head_without_options_says_nothing_of_them() -> None:
    head = checked(layout_of(("a", (2,), FLOAT32)), {"a": np.ones(2, np.float32)}).head()
    fields = [field.name for field, _ in head.ListFields()]
    assert fields == ["contribution", "weight", "parameter_count", "content_fingerprint", "layout_version"]


def test_what_the_caller_found_not_finite_is_not_looked_at() -> None:
    push = checked(layout_of(("a", (2,), FLOAT32)), {"nobody": "nothing"}, found_inf=True)
    assert (push.contribution, push.nonfinite, list(push.chunks())) == (data_pb2.CONTRIBUTION_NONFINITE, (), [])
    with pytest.raises(errors.InvalidArgumentError, match="gradients must be a dict"):
        checked(push.layout, None)


def test_an_abandoned_search_is_named_and_holds_nothing_else() -> None:
    layout = layout_of(("a", (2,), FLOAT32))
    head = _gradients.abandoned(layout, PushOptions(loss=1.0, closure=5, evaluation=3)).head()
    assert (head.contribution, head.closure, head.evaluation) == (data_pb2.CONTRIBUTION_ABANDON, 5, 3)
    assert (list(head.absent), head.HasField("loss")) == ([0], False)


def requests(push: _gradients.Push) -> list[Any]:
    return list(push.requests(push.head()))


def test_what_is_small_travels_in_the_head_whatever_the_model_has() -> None:
    layout = layout_of(("huge", (10_000_000, 16), FLOAT32)).extended(1, [("b", (3,), FLOAT32)])
    rows = SparseGradient([9_999_999, 3], np.ones((2, 16), np.float32))
    [only] = requests(checked(layout, {"huge": rows, "b": np.ones(3, np.float32)}))
    assert [chunk.array_id for chunk in only.push.inline.chunks] == [1, ROWS_ARRAY_ID]
    assert sum(len(chunk.data) for chunk in only.push.inline.chunks) == 128 + 64 + 128


@pytest.mark.parametrize(("count", "inside"), [(900, True), (1000, False)])
def test_many_rows_follow_the_head_as_chunks(count: int, inside: bool) -> None:
    layout = layout_of(("huge", (10_000_000, 16), FLOAT32))
    push = checked(layout, {"huge": SparseGradient(np.arange(count), np.ones((count, 16), np.float32))})
    assert push.nbytes == sum(piece.nbytes for pieces in push.chunks() for piece in pieces.pieces)
    assert push.nbytes == -(-8 * count // 64) * 64 + 64 * count
    assert (len(requests(push)) == 1) is inside


def test_a_sparse_gradient_that_is_not_finite_is_named() -> None:
    layout = layout_of(("a", (4,), FLOAT32), ("b", (4,), FLOAT32))
    push = checked(layout, {"a": np.ones(4, np.float32), "b": SparseGradient([2], [np.inf])})
    assert (push.contribution, push.nonfinite) == (data_pb2.CONTRIBUTION_NONFINITE, (1,))
    assert (list(push.head().sparse), list(push.chunks()), push.absent) == ([], [], [])
