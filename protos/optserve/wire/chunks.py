"""The chunk codec: TensorChunk as field 15 of a stream's message, encoded and parsed by hand.

The bytes are a legal protobuf message (tests hold both directions against the generated code), but the tensor's bytes are
copied once on send (`b"".join`) and not at all on receive (a memoryview of what gRPC handed over). A `padding` field puts the
data at a multiple of 16 bytes, so that NumPy and the kernels read them aligned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from optserve.v1 import types_pb2 as pb
from optserve.wire.errors import InvalidChunkError, ProtocolViolationError

CHUNK_BYTES = 1 << 20
"""The grid: every chunk begins at a multiple of it and reaches to the next, or to the end of its array."""

INLINE_BYTES = 64 << 10
"""Gradients and weights up to this travel inside the messages that announce them: each message costs 0.1 ms of hand-offs."""

MAX_MESSAGE_BYTES = 2 << 20
"""No message of the contract is larger; both sides set it as gRPC's limit."""

_ALIGNMENT = 16
_OUTER = b"\x7a"  # field 15, length-delimited
_ARRAY_ID, _OFFSET, _PADDING, _DATA = 0x08, 0x11, 0x1A, 0x22  # fields 1 varint, 2 fixed64, 3 and 4 length-delimited

AnyMessage = TypeVar("AnyMessage", bound=Message)


class Chunk(NamedTuple):
    """A piece of a flat array. `offset` is in bytes; `data` is borrowed from the message it came in."""

    array_id: int
    offset: int
    data: memoryview


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


@lru_cache(maxsize=1024)
def _envelope(array_id: int, nbytes: int) -> tuple[bytes, bytes]:
    """What stands before and after the eight bytes of the offset, so that the data begin at a multiple of 16."""
    identity = bytes([_ARRAY_ID]) + _varint(array_id) + bytes([_OFFSET])
    tail = bytes([_DATA]) + _varint(nbytes)
    for filling in (b"", *(bytes([_PADDING, length]) + bytes(length) for length in range(_ALIGNMENT + 2))):
        inner = len(identity) + 8 + len(filling) + len(tail)
        head = _OUTER + _varint(inner + nbytes)
        if (len(head) + inner) % _ALIGNMENT == 0:
            return head + identity, filling + tail
    raise AssertionError("unreachable: one of 18 consecutive lengths is a multiple of 16")


def encode(array_id: int, offset: int, *pieces: memoryview) -> bytes:
    """A message whose field 15 is the chunk made of the pieces (1 MiB together at most)."""
    head, tail = _envelope(array_id, sum(piece.nbytes for piece in pieces))
    return b"".join((head, offset.to_bytes(8, "little"), tail, *pieces))


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise IndexError("varint longer than ten bytes")


def decode(raw: bytes) -> Chunk | None:
    """The chunk of a message that holds nothing else, or None: then the generated parser decides what it is."""
    if raw[:1] != _OUTER:
        return None
    try:
        length, at = _read_varint(raw, 1)
        end = at + length
        if end != len(raw):
            return None
        array_id = offset = 0
        data = memoryview(b"")
        while at < end:
            tag = raw[at]
            at += 1
            if tag == _ARRAY_ID:
                array_id, at = _read_varint(raw, at)
            elif tag == _OFFSET:
                offset = int.from_bytes(raw[at : at + 8], "little")
                at += 8
            elif tag in (_PADDING, _DATA):
                size, at = _read_varint(raw, at)
                if tag == _DATA:
                    data = memoryview(raw)[at : at + size]
                at += size
            else:
                return None
    except IndexError:
        return None
    return Chunk(array_id, offset, data) if at == end and array_id < 1 << 32 else None


def parse(kind: type[AnyMessage], raw: bytes | AnyMessage | Chunk) -> AnyMessage | Chunk:
    """A stream's message: its chunk, or the parsed message. ProtocolViolationError if it is neither.

    In process, chunks and messages pass as they are.
    """
    if not isinstance(raw, bytes):
        return raw
    chunk = decode(raw)
    if chunk is not None:
        return chunk
    try:
        message = kind.FromString(raw)
    except DecodeError as error:
        raise ProtocolViolationError(f"a {kind.__name__} of {len(raw)} bytes could not be parsed: {error}") from error
    content = message.WhichOneof("content")
    if content is None:
        raise ProtocolViolationError(f"a {kind.__name__} came without content")
    if content == "chunk":
        slow: pb.TensorChunk = message.chunk  # type: ignore[attr-defined]
        return Chunk(slow.array_id, slow.offset, memoryview(slow.data))
    return message


def to_inline(chunks: Iterable[Chunk]) -> pb.InlineChunks:
    """Small chunks as a part of another message."""
    return pb.InlineChunks(
        chunks=[pb.TensorChunk(array_id=chunk.array_id, offset=chunk.offset, data=bytes(chunk.data)) for chunk in chunks]
    )


def from_inline(inline: pb.InlineChunks) -> Iterator[Chunk]:
    """The chunks inside another message."""
    for chunk in inline.chunks:
        yield Chunk(chunk.array_id, chunk.offset, memoryview(chunk.data))


class Coverage:
    """Which grid blocks of an array, bundle or file have come, of all or of those that are wanted."""

    def __init__(self, what: str, nbytes: int, wanted: Iterable[int] | None = None) -> None:
        self.what = what
        self.nbytes = nbytes
        self.missing = set(range(block_count(nbytes)) if wanted is None else wanted)

    def add(self, offset: int, size: int) -> int:
        """Marks the block of a chunk and returns its index. InvalidChunkError if it is not one block, or came before."""
        block, rest = divmod(offset, CHUNK_BYTES)
        expected = min(CHUNK_BYTES, self.nbytes - offset)
        if expected <= 0:
            raise InvalidChunkError(f"a chunk of {self.what} begins at byte {offset}; it has {self.nbytes} bytes")
        if rest:
            raise InvalidChunkError(f"a chunk of {self.what} begins at byte {offset}, which is no multiple of {CHUNK_BYTES}")
        if size != expected:
            raise InvalidChunkError(f"the chunk of {self.what} at byte {offset} has {size} bytes; it must have {expected}")
        if block not in self.missing:
            raise InvalidChunkError(f"the chunk of {self.what} at byte {offset} came twice, or was announced as absent")
        self.missing.remove(block)
        return block


def block_count(nbytes: int) -> int:
    """Blocks of the grid that an array of so many bytes has."""
    return -(-nbytes // CHUNK_BYTES)


def blocks(nbytes: int) -> Iterator[tuple[int, int]]:
    """(offset, size) of each grid block in order."""
    for offset in range(0, nbytes, CHUNK_BYTES):
        yield offset, min(CHUNK_BYTES, nbytes - offset)


def array_chunks(array_id: int, data: memoryview, wanted: Iterable[int] | None = None) -> Iterator[Chunk]:
    """The chunks of a flat array's bytes, all or only the wanted blocks."""
    for block in range(block_count(data.nbytes)) if wanted is None else wanted:
        offset = block * CHUNK_BYTES
        yield Chunk(array_id, offset, data[offset : offset + CHUNK_BYTES])
