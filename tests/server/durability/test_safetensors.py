"""Our files against the safetensors package, both ways, and headers of strangers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from optserve.server.durability import safetensors as ours
from optserve.server.storage import DiskStorage, MemoryStorage
from optserve.wire.dtypes import storage_dtype
from optserve.wire.errors import CheckpointCorruptError, DtypeMismatchError, InvalidNameError

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.complex64, np.complex128]


def tensors() -> dict[str, ours.Array]:
    """Every dtype and odd shape, with every bit pattern that random bytes make (NaN payloads too); odd 16-bit sizes first."""
    random = np.random.default_rng(0)
    found: dict[str, ours.Array] = {}
    for dtype in reversed(DTYPES):
        for shape in [(3, 5), (), (1, 0, 2), (0,), (7,), (2, 1, 3, 1)]:
            count = int(np.prod(shape)) * np.dtype(dtype).itemsize
            raw = np.frombuffer(random.bytes(count), dtype).reshape(shape)
            found[f"{np.dtype(dtype).name}.{shape}/ü\"'\n"] = raw
    return found


def same(left: Mapping[str, ours.Array], right: Mapping[str, ours.Array]) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].tobytes() == right[name].tobytes()
        for name in left
    )


def written(found: Mapping[str, ours.Array], storage: DiskStorage | MemoryStorage) -> None:
    with storage.create("file") as file:
        ours.write(file, found)


def read(storage: DiskStorage | MemoryStorage, name: str = "file") -> dict[str, ours.Array]:
    with storage.open(name) as file:
        return ours.read(file, "it")


def test_round_trip_keeps_bits_shapes_dtypes_and_order() -> None:
    storage = MemoryStorage()
    written(tensors(), storage)
    found = read(storage)
    assert same(found, tensors())
    assert all(array.flags.writeable and array.flags.owndata for array in found.values())


def test_the_package_reads_our_file(tmp_path: Path) -> None:
    written(tensors(), DiskStorage(tmp_path))
    theirs = safetensors.torch.load_file(tmp_path / "file")
    assert set(theirs) == set(tensors())
    for name, array in tensors().items():
        tensor = torch.view_as_complex(theirs[name]) if array.dtype == np.complex128 else theirs[name]
        assert tuple(tensor.shape) == array.shape
        assert str(tensor.dtype) == f"torch.{array.dtype.name}"
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_we_read_the_packages_file(tmp_path: Path) -> None:
    held = {name: array for name, array in tensors().items() if array.dtype != np.complex128}  # which the format has not
    theirs = {
        name: torch.from_numpy(array.copy().reshape(-1).view(np.uint8))
        .view(getattr(torch, array.dtype.name))
        .reshape(array.shape)
        for name, array in held.items()
    }
    safetensors.torch.save_file(theirs, tmp_path / "file", metadata={"format": "pt"})
    found = read(DiskStorage(tmp_path))
    assert same({name: found[name] for name in held}, held)


def test_complex128_which_the_format_lacks_is_pairs_of_float64_that_its_metadata_names(tmp_path: Path) -> None:
    found: dict[str, ours.Array] = {
        "z": np.array([[1 + 2j, 3]]).T,
        "pairs": np.arange(4.0).reshape(2, 2),
        "0": np.array(5 - 6j),
        "deep": np.full((1,) * 64, 7j),
    }
    written(found, DiskStorage(tmp_path))
    assert same(read(DiskStorage(tmp_path)), found)
    with safetensors.safe_open(tmp_path / "file", "np") as theirs:
        assert theirs.metadata() == {"complex128": '["z", "0", "deep"]'}
        np.testing.assert_array_equal(theirs.get_tensor("z"), [[[1.0, 2.0]], [[3.0, 0.0]]], strict=True)
        np.testing.assert_array_equal(theirs.get_tensor("0"), [5.0, -6.0], strict=True)


def test_no_tensors_is_a_file_too(tmp_path: Path) -> None:
    written({}, DiskStorage(tmp_path))
    assert read(DiskStorage(tmp_path)) == {}
    assert safetensors.torch.load_file(tmp_path / "file") == {}


def test_every_tensor_is_aligned_to_its_dtype() -> None:
    storage = MemoryStorage()
    written(tensors(), storage)
    with storage.open("file") as file:
        found = ours.entries(file, "it").values()
        assert all(entry.begin % storage_dtype(entry.dtype).itemsize == 0 for entry in found)


def test_large_arrays_are_written_in_pieces_and_views_in_order() -> None:
    pieces: list[int] = []

    class Sink:
        def write(self, data: memoryview) -> None:
            pieces.append(data.nbytes)

    ours.write(Sink(), {"w": np.zeros(ours.PIECE_BYTES * 2 // 4 + 1, np.float32)})
    assert pieces[1:] == [ours.PIECE_BYTES, ours.PIECE_BYTES, 4]
    storage = MemoryStorage()
    view = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::-1]
    written({"view": view}, storage)
    np.testing.assert_array_equal(read(storage)["view"], view)


def test_what_the_format_cannot_hold_is_refused() -> None:
    storage = MemoryStorage()
    with pytest.raises(InvalidNameError, match="reserves that name"):
        written({"__metadata__": np.zeros(1, np.float32)}, storage)
    for dtype in (np.int32, np.dtype(">f4")):
        with pytest.raises(DtypeMismatchError, match="w has dtype"):
            written({"w": np.zeros(1, dtype)}, storage)


def pairs(names: object, **changes: Any) -> dict[str, Any]:
    """A file of one float64 tensor with complex128 metadata."""
    text = names if isinstance(names, str) else json.dumps(names)
    return header(**{"dtype": "F64", "shape": [2], "data_offsets": [0, 16]} | changes) | {"__metadata__": {"complex128": text}}


def header(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "too short"),
        (b"{", "Expecting property name"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe", "codec"),
        (b"[" * 100_000, "recursion|no JSON object"),
        (b'{"w": 1, "w": 2}', "a name comes twice"),
        ({"w": None}, "must have dtype, shape and data_offsets"),
        (header(extra=1), "must have dtype, shape and data_offsets"),
        (header(dtype="I32"), "has dtype 'I32'; allowed are F32, F64, F16, BF16, C64, I64"),
        (header(dtype=["F32"]), "has dtype"),
        (header(shape=[-2]), "has shape"),
        (header(shape=[2.0]), "has shape"),
        (header(shape=[True, 2]), "has shape"),
        (header(shape="2"), "has shape"),
        (header(shape=[3]), "spans 8 bytes; its shape and dtype make 12"),
        (header(shape=[1 << 62, 1 << 62]), "spans 8 bytes"),
        (header(shape=[1] * 64 + [2]), "of more than 64 dimensions"),
        (header(data_offsets=[8, 0]), "spans -8 bytes"),
        (header(data_offsets=[0, 8, 16]), "has shape"),
        (header(data_offsets=[4, 12]), "begins at byte"),
        ({**header(), "v": header()["w"]}, "'[wv]' begins at byte"),
        ({}, "the tensors end at byte"),
        ({**header(), "e": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [8, 8]}}, "impossible shape"),
        (pairs("w"), "Expecting value"),
        (pairs({"w": 1}), "it must be a list of names"),
        (pairs([1]), "it must be a list of names"),
        (pairs(["v"]), "'v' is said to be complex128"),
        (pairs(["w"], dtype="C64"), "'w' is said to be complex128"),
        (pairs(["w"], shape=[2, 1]), "'w' is said to be complex128"),
        (pairs(["w"], shape=[1] * 65 + [2]), "of more than 64 dimensions"),
    ],
)
def test_a_header_of_a_stranger_is_checked(head: bytes | dict[str, Any], message: str) -> None:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    storage = MemoryStorage()
    with storage.create("file") as file:
        file.write(len(raw).to_bytes(8, "little") + raw + bytes(16 if b"complex128" in raw else 8) if raw else b"123")
    with pytest.raises(CheckpointCorruptError, match=message):
        read(storage)


@pytest.mark.parametrize("length", [9, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_its_file_is_not_allocated(length: int) -> None:
    storage = MemoryStorage()
    with storage.create("file") as file:
        file.write(length.to_bytes(8, "little") + b"{}      ")
    with pytest.raises(CheckpointCorruptError, match="too short"):
        read(storage)
