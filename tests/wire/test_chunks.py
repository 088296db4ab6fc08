"""The hand-written chunk codec against the generated code, in both directions."""

from __future__ import annotations

import random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from optserve.v1 import checkpoints_pb2, data_pb2, jobs_pb2, optimizer_pb2, state_pb2, types_pb2
from optserve.wire import chunks
from optserve.wire.chunks import CHUNK_BYTES, MAX_MESSAGE_BYTES, Chunk, Coverage
from optserve.wire.errors import InvalidChunkError, ProtocolViolationError

STREAMED = [
    data_pb2.StreamRequest,
    data_pb2.StreamResponse,
    data_pb2.PushRequest,
    data_pb2.PullResponse,
    jobs_pb2.InitializeJobRequest,
    jobs_pb2.CreateJobFromCheckpointRequest,
    optimizer_pb2.AddGroupRequest,
    state_pb2.GetStateResponse,
    state_pb2.LoadStateRequest,
    checkpoints_pb2.DownloadCheckpointResponse,
]
ARRAY_IDS = st.integers(0, 2**32 - 1)
OFFSETS = st.integers(0, 2**64 - 1)


def as_tuple(chunk: Chunk) -> tuple[int, int, bytes]:
    return chunk.array_id, chunk.offset, bytes(chunk.data)


def field(number: int, wire_type: int, content: bytes) -> bytes:
    """One field of a message whose number is below 16."""
    return bytes([number << 3 | wire_type]) + content


def delimited(number: int, content: bytes) -> bytes:
    return field(number, 2, varint(len(content)) + content)


def varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


@pytest.mark.parametrize("kind", STREAMED, ids=lambda kind: kind.DESCRIPTOR.name)
def test_generated_code_reads_an_encoded_chunk(kind: type) -> None:
    message = kind.FromString(chunks.encode(7, 3 << 20, memoryview(b"abc")))
    assert message.WhichOneof("content") == "chunk"
    assert (message.chunk.array_id, message.chunk.offset, message.chunk.data) == (7, 3 << 20, b"abc")


@pytest.mark.parametrize("kind", STREAMED, ids=lambda kind: kind.DESCRIPTOR.name)
def test_generated_code_s_chunk_is_decoded(kind: type) -> None:
    message = kind(chunk=types_pb2.TensorChunk(array_id=7, offset=3 << 20, data=b"abc"))
    raw = message.SerializeToString()
    assert as_tuple(chunks.decode(raw)) == (7, 3 << 20, b"abc")
    assert as_tuple(chunks.parse(kind, raw)) == (7, 3 << 20, b"abc")


@given(ARRAY_IDS, OFFSETS, st.lists(st.binary(max_size=300), max_size=4))
def test_encode_and_decode_are_inverse(array_id: int, offset: int, pieces: list[bytes]) -> None:
    raw = chunks.encode(array_id, offset, *map(memoryview, pieces))
    assert as_tuple(chunks.decode(raw)) == (array_id, offset, b"".join(pieces))
    slow = data_pb2.StreamRequest.FromString(raw).chunk
    assert (slow.array_id, slow.offset, slow.data) == (array_id, offset, b"".join(pieces))


@pytest.mark.parametrize("array_id", [0, 1, 127, 128, 300, 2**14, 2**21, 2**28, 2**32 - 1])
@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 5_000, 16_383, 16_384, CHUNK_BYTES])
def test_data_begin_at_a_multiple_of_16_bytes(array_id: int, size: int) -> None:
    data = random.Random(size).randbytes(size)
    raw = chunks.encode(array_id, CHUNK_BYTES, memoryview(data))
    assert (len(raw) - size) % 16 == 0
    assert raw[len(raw) - size :] == data
    assert len(raw) <= MAX_MESSAGE_BYTES


def test_decoded_data_are_a_view_of_the_message() -> None:
    raw = chunks.encode(1, 0, memoryview(b"weights"))
    assert chunks.decode(raw).data.obj is raw


FIELDS = [field(1, 0, varint(300)), field(2, 1, (1 << 20).to_bytes(8, "little")), delimited(3, b"xx"), delimited(4, b"data")]


@given(st.permutations(FIELDS))
def test_other_encoders_may_order_the_fields_as_they_like(fields: list[bytes]) -> None:
    raw = delimited(15, b"".join(fields))
    assert as_tuple(chunks.decode(raw)) == (300, 1 << 20, b"data")
    assert as_tuple(chunks.parse(data_pb2.StreamRequest, raw)) == (300, 1 << 20, b"data")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (delimited(15, b""), (0, 0, b"")),
        (delimited(15, delimited(4, b"first") + delimited(4, b"last")), (0, 0, b"last")),
        (delimited(15, FIELDS[0]) + delimited(15, FIELDS[3]), (300, 0, b"data")),
        (delimited(1, b"") + delimited(15, FIELDS[3]), (0, 0, b"data")),
        (delimited(15, delimited(9, b"a later version's field") + FIELDS[3]), (0, 0, b"data")),
        (delimited(15, FIELDS[3]) + delimited(14, b"a later version's field"), (0, 0, b"data")),
        (delimited(15, field(1, 0, b"\xac\x82\x80\x00") + FIELDS[3]), (300, 0, b"data")),
    ],
    ids=[
        "empty",
        "field twice",
        "chunk in two parts",
        "after another content",
        "unknown inside",
        "unknown outside",
        "long varint",
    ],
)
def test_every_legal_encoding_of_a_chunk_is_parsed(raw: bytes, expected: tuple[int, int, bytes]) -> None:
    slow = data_pb2.StreamRequest.FromString(raw).chunk
    assert (slow.array_id, slow.offset, slow.data) == expected
    assert as_tuple(chunks.parse(data_pb2.StreamRequest, raw)) == expected


@pytest.mark.parametrize("cut", range(1, 40))
def test_truncated_chunk_is_a_protocol_violation(cut: int) -> None:
    raw = chunks.encode(300, 1 << 20, memoryview(b"0123456789abcdef"))
    with pytest.raises(ProtocolViolationError, match="StreamRequest"):
        chunks.parse(data_pb2.StreamRequest, raw[:-cut])


def test_message_without_content_is_a_protocol_violation() -> None:
    with pytest.raises(ProtocolViolationError, match="without content"):
        chunks.parse(data_pb2.StreamRequest, b"")


def test_message_that_is_no_chunk_is_parsed_by_the_generated_code() -> None:
    request = data_pb2.StreamRequest(open=data_pb2.StreamOpen(job_id="j", epoch=4))
    assert chunks.parse(data_pb2.StreamRequest, request.SerializeToString()) == request


def test_chunk_passes_as_it_is_in_process() -> None:
    chunk = Chunk(1, 0, memoryview(b"abc"))
    assert chunks.parse(data_pb2.StreamRequest, chunk) is chunk


def check_any_bytes(raw: bytes) -> None:
    """Whatever came, it is a chunk, a message or a typed error; and a chunk is the one that the generated code sees."""
    fast = chunks.decode(raw)
    try:
        parsed = chunks.parse(data_pb2.StreamRequest, raw)
    except ProtocolViolationError:
        assert fast is None
        return
    try:
        slow = data_pb2.StreamRequest.FromString(raw)
    except DecodeError:
        pytest.fail(f"the codec takes {raw.hex()}, the generated code refuses it")
    if isinstance(parsed, Chunk):
        assert as_tuple(parsed) == (slow.chunk.array_id, slow.chunk.offset, slow.chunk.data)
    else:
        assert parsed == slow


@given(st.binary(max_size=64))
@example(b"\x7a")
@example(b"\x7a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
@example(b"\x7a\x02\x22\xff")
@example(b"\x7a\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
def test_any_bytes_are_a_chunk_a_message_or_a_typed_error(raw: bytes) -> None:
    check_any_bytes(raw)


@given(st.lists(st.sampled_from(FIELDS), max_size=6), st.data())
def test_damaged_chunks_are_a_chunk_a_message_or_a_typed_error(fields: list[bytes], data: st.DataObject) -> None:
    raw = bytearray(delimited(15, b"".join(fields)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    check_any_bytes(bytes(raw))


def test_coverage_marks_each_block_once_and_in_any_order() -> None:
    coverage = Coverage("array 0", 2 * CHUNK_BYTES + 5)
    assert coverage.missing == {0, 1, 2}
    assert coverage.add(2 * CHUNK_BYTES, 5) == 2
    assert coverage.add(0, CHUNK_BYTES) == 0
    assert coverage.missing == {1}
    assert coverage.add(CHUNK_BYTES, CHUNK_BYTES) == 1
    assert not coverage.missing


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (3 * CHUNK_BYTES, 5, "it has 2097157 bytes"),
        (2**64 - CHUNK_BYTES, CHUNK_BYTES, "it has 2097157 bytes"),
        (2 * CHUNK_BYTES + 5, 0, "it has 2097157 bytes"),
        (2 * CHUNK_BYTES, 6, "has 6 bytes; it must have 5"),
        (0, 2 * CHUNK_BYTES, "it must have 1048576"),
        (0, CHUNK_BYTES - 1, "it must have 1048576"),
        (0, 0, "it must have 1048576"),
        (CHUNK_BYTES // 2, CHUNK_BYTES, "no multiple of 1048576"),
        (CHUNK_BYTES, CHUNK_BYTES, "came twice"),
    ],
    ids=["outside", "far outside", "at the end", "past the end", "too large", "too small", "empty", "overlapping", "repeated"],
)
def test_coverage_refuses_a_chunk_that_is_no_missing_block(offset: int, size: int, message: str) -> None:
    coverage = Coverage("array 0", 2 * CHUNK_BYTES + 5)
    coverage.add(CHUNK_BYTES, CHUNK_BYTES)
    with pytest.raises(InvalidChunkError, match=message):
        coverage.add(offset, size)
    assert coverage.missing == {0, 2}


def test_coverage_of_some_blocks_refuses_the_others() -> None:
    coverage = Coverage("array 0", 3 * CHUNK_BYTES, wanted=[0, 2])
    with pytest.raises(InvalidChunkError, match="announced as absent"):
        coverage.add(CHUNK_BYTES, CHUNK_BYTES)
    assert coverage.missing == {0, 2}


def test_empty_array_has_no_blocks_and_takes_no_chunk() -> None:
    coverage = Coverage("array 0", 0)
    assert not coverage.missing
    with pytest.raises(InvalidChunkError):
        coverage.add(0, 0)


@given(st.integers(0, 4 * CHUNK_BYTES))
def test_blocks_tile_the_array(nbytes: int) -> None:
    blocks = list(chunks.blocks(nbytes))
    assert len(blocks) == chunks.block_count(nbytes)
    assert sum(size for _, size in blocks) == nbytes
    assert [offset for offset, _ in blocks] == [index * CHUNK_BYTES for index in range(len(blocks))]


def test_array_chunks_are_views_of_all_or_only_the_wanted_blocks() -> None:
    data = memoryview(bytearray(random.Random(0).randbytes(2 * CHUNK_BYTES + 5)))
    every = list(chunks.array_chunks(3, data))
    assert [(chunk.array_id, chunk.offset, chunk.data.nbytes) for chunk in every] == [
        (3, offset, size) for offset, size in chunks.blocks(data.nbytes)
    ]
    assert b"".join(chunk.data for chunk in every) == data
    assert list(chunks.array_chunks(3, data, [2])) == every[2:]
    assert every[0].data.obj is data.obj
