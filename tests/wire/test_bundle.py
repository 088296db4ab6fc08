"""Bundles: tensors in, the same tensors out, and nothing but typed errors for what does not fit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from optserve.v1 import types_pb2 as pb
from optserve.wire import bundle
from optserve.wire.chunks import CHUNK_BYTES, Chunk
from optserve.wire.errors import DtypeMismatchError, IncompleteStreamError, InvalidArgumentError, InvalidChunkError

LIMIT = 1 << 30


def tensors() -> list[bundle.Tensor]:
    random = np.random.default_rng(0)
    return [
        ("w", "", random.standard_normal((700, 501)).astype(np.float32)),
        ("w", "exp_avg", random.standard_normal((3, 4))),
        ("h", "", random.standard_normal((5,)).astype(np.float16)),
        ("b", "", random.standard_normal((2, 3)).astype(ml_dtypes.bfloat16).T),
        ("s", "", np.float32(3.5).reshape(())),
        ("e", "", np.zeros((1, 0, 2), np.float32)),
        ("z", "", random.standard_normal(12).astype(np.float32).view(np.complex64).reshape(2, 3).T),
        ("z", "mu_product", np.float32(0.5).reshape(())),
        ("zz", "exp_avg", random.standard_normal(10).view(np.complex128)),
    ]


def test_bundle_round_trip_keeps_every_bit_shape_and_dtype() -> None:
    entries, nbytes = bundle.table(tensors())
    chunks = list(bundle.chunks(tensors()))
    assert sum(chunk.data.nbytes for chunk in chunks) == nbytes
    receiver = bundle.Receiver(entries, nbytes, LIMIT)
    for chunk in reversed(chunks):
        receiver.add(chunk)
    for (name, slot, sent), (got_name, got_slot, got) in zip(tensors(), receiver.tensors(), strict=True):
        assert (got_name, got_slot, got.dtype, got.shape) == (name, slot, sent.dtype, sent.shape)
        assert got.tobytes() == np.ascontiguousarray(sent).tobytes()


def test_bundle_tensors_begin_at_multiples_of_64() -> None:
    entries, nbytes = bundle.table(tensors())
    assert [entry.offset % 64 for entry in entries] == [0] * len(entries)
    assert nbytes % 64 == 0


def test_bundle_chunks_lie_on_the_grid() -> None:
    *full, last = bundle.chunks([("w", "", np.zeros(CHUNK_BYTES, np.float32))] * 2)
    assert [chunk.offset for chunk in [*full, last]] == [index * CHUNK_BYTES for index in range(8)]
    assert {chunk.data.nbytes for chunk in [*full, last]} == {CHUNK_BYTES}


def test_empty_bundle_is_whole_from_the_start() -> None:
    assert list(bundle.chunks([])) == []
    assert bundle.Receiver([], 0, LIMIT).tensors() == []


def test_array_of_a_dtype_that_is_not_held_is_refused_by_name() -> None:
    with pytest.raises(DtypeMismatchError, match="w1 exp_avg has dtype int32"):
        bundle.table([("w1", "exp_avg", np.zeros(3, np.int32))])


def test_bundle_that_ends_early_is_incomplete() -> None:
    entries, nbytes = bundle.table(tensors())
    receiver = bundle.Receiver(entries, nbytes, LIMIT)
    receiver.add(next(bundle.chunks(tensors())))
    with pytest.raises(IncompleteStreamError, match="1 chunks missing"):
        receiver.tensors()


def test_bundle_refuses_chunks_that_do_not_belong() -> None:
    entries, nbytes = bundle.table(tensors())
    receiver = bundle.Receiver(entries, nbytes, LIMIT)
    first = next(bundle.chunks(tensors()))
    receiver.add(first)
    with pytest.raises(InvalidChunkError, match="came twice"):
        receiver.add(first)
    with pytest.raises(InvalidChunkError, match="names array 1"):
        receiver.add(Chunk(1, CHUNK_BYTES, memoryview(b"")))
    with pytest.raises(InvalidChunkError, match="begins at byte"):
        receiver.add(Chunk(0, 4 * CHUNK_BYTES, memoryview(b"x")))


def test_bundle_larger_than_the_limit_is_refused_before_it_is_allocated() -> None:
    with pytest.raises(InvalidArgumentError, match="at most 1024"):
        bundle.Receiver([], 1 << 50, 1024)


def entry(shape: tuple[int, ...], offset: int = 0, dtype: int = pb.DATA_TYPE_FLOAT32) -> pb.BundleEntry:
    return pb.BundleEntry(parameter="w", slot="exp_avg", shape=shape, dtype=dtype, offset=offset)


@pytest.mark.parametrize(
    "bad",
    [
        entry((17,)),
        entry((1,), offset=64),
        entry((1,), offset=2**64 - 64),
        entry((1,), offset=4),
        entry((-1,)),
        entry((-2, -2)),
        entry((2**62, 2**62)),
        entry((0, 2**62, 2**62)),
        entry((1,) * 100),
    ],
    ids=[
        "past the end",
        "at the end",
        "far outside",
        "unaligned",
        "negative",
        "negative twice",
        "huge",
        "huge and empty",
        "100-d",
    ],
)
def test_bundle_refuses_an_entry_that_does_not_fit(bad: pb.BundleEntry) -> None:
    with pytest.raises(InvalidArgumentError, match="'w' exp_avg"):
        bundle.Receiver([bad], 64, LIMIT)


@pytest.mark.parametrize("dtype", [pb.DATA_TYPE_UNSPECIFIED, 99])
def test_bundle_refuses_an_unknown_dtype(dtype: int) -> None:
    with pytest.raises(DtypeMismatchError, match="unknown data type"):
        bundle.Receiver([entry((1,), dtype=dtype)], 64, LIMIT)
