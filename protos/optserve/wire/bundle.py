"""A bundle: several tensors that travel as one byte range, in chunks of array 0, with a table of contents before them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from optserve.v1 import types_pb2 as pb
from optserve.wire import dtypes
from optserve.wire.chunks import CHUNK_BYTES, Chunk, Coverage
from optserve.wire.errors import IncompleteStreamError, InvalidArgumentError, InvalidChunkError, OutOfMemoryError

_ALIGNMENT = 64

Tensor = tuple[str, str, npt.NDArray[np.generic]]
"""(parameter, slot, array); slot is empty for the parameter itself."""


def table(tensors: Sequence[Tensor]) -> tuple[list[pb.BundleEntry], int]:
    """The table of contents and the bundle's bytes."""
    entries: list[pb.BundleEntry] = []
    end = 0
    for parameter, slot, array in tensors:
        dtype = dtypes.to_wire(array.dtype, f"{parameter} {slot}".strip())
        entries.append(pb.BundleEntry(parameter=parameter, slot=slot, shape=array.shape, dtype=dtype, offset=end))
        end = -(-(end + array.nbytes) // _ALIGNMENT) * _ALIGNMENT
    return entries, end


def chunks(tensors: Sequence[Tensor]) -> Iterator[Chunk]:
    """The bundle's chunks in order."""
    buffer = bytearray()
    offset = 0
    for _, _, array in tensors:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        for piece in (raw, memoryview(bytes(-array.nbytes % _ALIGNMENT))):
            while piece.nbytes:
                room = CHUNK_BYTES - len(buffer)
                buffer += piece[:room]
                piece = piece[room:]
                if len(buffer) == CHUNK_BYTES:
                    yield Chunk(0, offset, memoryview(bytes(buffer)))
                    offset += CHUNK_BYTES
                    buffer.clear()
    if buffer:
        yield Chunk(0, offset, memoryview(bytes(buffer)))


class Receiver:
    """Puts a bundle's chunks together and hands out its tensors as views."""

    def __init__(self, entries: Sequence[pb.BundleEntry], nbytes: int, limit: int) -> None:
        """InvalidArgumentError if the bundle is larger than `limit` bytes, or an entry does not fit in. OutOfMemoryError."""
        if nbytes > limit:
            raise InvalidArgumentError(f"the bundle has {nbytes} bytes; at most {limit} fit the job's parameters and state")
        for entry in entries:
            what = f"{entry.parameter!r} {entry.slot}".strip()
            size = dtypes.checked_bytes(what, entry.shape, dtypes.from_wire(entry.dtype, what))
            if entry.offset % _ALIGNMENT or entry.offset + size > nbytes:
                raise InvalidArgumentError(f"{what} does not fit the bundle of {nbytes} bytes")
        self._entries = entries
        try:
            self._buffer = np.zeros(nbytes, np.uint8)
        except MemoryError as error:
            raise OutOfMemoryError(f"no memory for a bundle of {nbytes} bytes") from error
        self._coverage = Coverage("the bundle", nbytes)

    def add(self, chunk: Chunk) -> None:
        """InvalidChunkError if it does not belong."""
        if chunk.array_id:
            raise InvalidChunkError(f"a chunk names array {chunk.array_id}; a bundle is array 0")
        self._coverage.add(chunk.offset, chunk.data.nbytes)
        self._buffer[chunk.offset : chunk.offset + chunk.data.nbytes] = np.frombuffer(chunk.data, np.uint8)

    def tensors(self) -> list[Tensor]:
        """What was received. IncompleteStreamError if something is missing."""
        if self._coverage.missing:
            raise IncompleteStreamError(f"the bundle ended with {len(self._coverage.missing)} chunks missing")
        found: list[Tensor] = []
        for entry in self._entries:
            dtype = dtypes.from_wire(entry.dtype, entry.parameter)
            size = math.prod(entry.shape) * dtype.itemsize
            raw = self._buffer[entry.offset : entry.offset + size]
            found.append((entry.parameter, entry.slot, raw.view(dtype).reshape(tuple(entry.shape))))
        return found
