"""safetensors files, streamed: eight bytes of header length, a JSON header, the tensors' bytes without gaps.

The format is https://github.com/huggingface/safetensors; any reader of it loads these files. It is written here rather than by
that package so that tensors go through Storage piece by piece, without a second copy of the model. The header keeps the
tensors' order; their bytes come widest dtype first, so that all are aligned. Reading trusts nothing in the file.

The format has complex64 but not complex128: such a tensor is written as F64 with a last axis of 2 (real, imaginary), and
`__metadata__` lists the names of those as JSON under "complex128".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from optserve.server.storage import Reader
from optserve.wire import dtypes
from optserve.wire.errors import CheckpointCorruptError, InvalidArgumentError, InvalidNameError, OutOfMemoryError

Array = npt.NDArray[np.generic]

DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
}
_LETTERS = {dtype: letters for letters, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000
"""The package's own limit."""

PIECE_BYTES = 4 << 20

_MAX_DIMENSIONS = 64  # NumPy's own limit
_METADATA = "__metadata__"
_PAIRS = "complex128"


class Sink(Protocol):
    """Takes bytes one piece after the other."""

    def write(self, data: memoryview) -> None:
        """Takes all of it."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `begin` counts from the file's first byte."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    begin: int


def write(sink: Sink, tensors: Mapping[str, Array]) -> None:
    """Writes a whole file. InvalidNameError or DtypeMismatchError for what the format or optserve cannot hold."""
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    pairs = [name for name, array in tensors.items() if array.dtype == np.complex128]
    header: dict[str, Any] = {_METADATA: {_PAIRS: json.dumps(pairs)}} if pairs else {}
    header |= dict.fromkeys(tensors)
    end = 0
    for name in order:
        array = tensors[name]
        if name == _METADATA:
            raise InvalidNameError(f"a parameter named {name!r} cannot be saved: safetensors reserves that name")
        if array.dtype != np.int64:  # row numbers, which no parameter can be
            dtypes.to_wire(array.dtype, name)
        begin, end = end, end + array.nbytes
        letters, shape = _stored(array)
        header[name] = {"dtype": letters, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise InvalidArgumentError(f"{len(tensors)} tensors need a header of {len(raw)} bytes; at most {MAX_HEADER_BYTES} fit")
    sink.write(memoryview(len(raw).to_bytes(8, "little") + raw))
    for name in order:
        data = _bytes(np.ascontiguousarray(tensors[name]))
        for start in range(0, data.nbytes, PIECE_BYTES):
            sink.write(data[start : start + PIECE_BYTES])


def entries(file: Reader, what: str) -> dict[str, Entry]:
    """The table of a file, in its order. CheckpointCorruptError names `what` if any of it does not hold."""
    length = int.from_bytes(file.read(0, 8), "little")
    if file.size < 8 or length > min(MAX_HEADER_BYTES, file.size - 8):
        raise CheckpointCorruptError(f"{what} is too short for a safetensors header")
    try:
        header = json.loads(file.read(8, length).decode(), object_pairs_hook=_without_repeats)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        metadata = header.pop(_METADATA, None)
        found = {name: _entry(name, fields, 8 + length) for name, fields in header.items()}
        end = 8 + length
        for name, entry in sorted(found.items(), key=lambda pair: (pair[1].begin, _nbytes(pair[1]))):
            if entry.begin != end:
                raise ValueError(f"{name!r} begins at byte {entry.begin} instead of {end}")
            end += _nbytes(entry)
        if end != file.size:
            raise ValueError(f"the tensors end at byte {end} of {file.size}")
        found |= _paired(found, metadata)
        for name, entry in found.items():
            if len(entry.shape) > _MAX_DIMENSIONS:
                raise ValueError(f"{name!r} has shape {entry.shape}, of more than {_MAX_DIMENSIONS} dimensions")
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{what} has no valid safetensors header: {error}") from error
    return found


def read(file: Reader, what: str) -> dict[str, Array]:
    """Every tensor, read into its own array. CheckpointCorruptError names `what`."""
    arrays: dict[str, Array] = {}
    for name, entry in entries(file, what).items():
        try:
            array = arrays[name] = np.empty(entry.shape, entry.dtype)
        except MemoryError as error:
            raise OutOfMemoryError(f"no memory for {name!r} of {what}: {_nbytes(entry)} bytes") from error
        except ValueError as error:  # (0, 2**62), for example
            raise CheckpointCorruptError(f"{what} gives {name!r} an impossible shape: {error}") from error
        if array.nbytes and file.read_into(entry.begin, _bytes(array)) != array.nbytes:
            raise CheckpointCorruptError(f"{what} ends within {name!r}")
    return arrays


def _entry(name: str, fields: object, base: int) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must have dtype, shape and data_offsets")
    shape, offsets, letters = fields["shape"], fields["data_offsets"], fields["dtype"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has shape {shape!r} and data_offsets {offsets!r}")
    if not isinstance(letters, str) or letters not in DTYPES:
        raise ValueError(f"{name!r} has dtype {letters!r}; allowed are {', '.join(DTYPES)}")
    entry = Entry(tuple(shape), DTYPES[letters], base + offsets[0])
    if offsets[1] - offsets[0] != _nbytes(entry):
        raise ValueError(f"{name!r} spans {offsets[1] - offsets[0]} bytes; its shape and dtype make {_nbytes(entry)}")
    return entry


def _stored(array: Array) -> tuple[str, list[int]]:
    """The format's name of a dtype, and the shape that the tensor has in the file."""
    if array.dtype == np.complex128:
        return "F64", [*array.shape, 2]
    return _LETTERS[array.dtype], list(array.shape)


def _paired(found: Mapping[str, Entry], metadata: object) -> dict[str, Entry]:
    """The entries that are complex128, as such."""
    if not isinstance(metadata, dict) or _PAIRS not in metadata:
        return {}
    names = json.loads(str(metadata[_PAIRS]))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{_METADATA} has {metadata[_PAIRS]!r} under {_PAIRS!r}; it must be a list of names")
    pairs: dict[str, Entry] = {}
    for name in names:
        entry = found.get(name)
        if entry is None or entry.dtype != np.float64 or entry.shape[-1:] != (2,):
            raise ValueError(f"{name!r} is said to be complex128, but is no F64 tensor with a last axis of 2")
        pairs[name] = Entry(entry.shape[:-1], np.dtype(np.complex128), entry.begin)
    return pairs


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(entry) is int and 0 <= entry < 1 << 63 for entry in value)


def _nbytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found
