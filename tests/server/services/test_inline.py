"""Small gradients and weights inside the messages that announce them: one request, one answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from optserve.v1 import data_pb2, types_pb2

ARRAYS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.full(3, 0.5)}
ONES = {name: np.ones_like(value) for name, value in ARRAYS.items()}
LIMIT = 64 << 10


def inline(foreign: Any, build: Any, gradients: dict[str, Any] | None = None) -> types_pb2.InlineChunks:
    return types_pb2.InlineChunks(chunks=build.chunks(foreign.layout, ONES if gradients is None else gradients))


def weights_of(foreign: Any, begin: data_pb2.WeightsBegin) -> dict[str, Any]:
    found = {chunk.array_id: chunk.data for chunk in begin.inline.chunks}
    cut = {}
    for parameter in foreign.layout.parameters:
        like = ARRAYS[parameter.name]
        raw = found[parameter.array_id][parameter.offset * like.itemsize :][: like.nbytes]
        cut[parameter.name] = np.frombuffer(raw, like.dtype).reshape(like.shape)
    return cut


def test_a_small_push_and_its_weights_are_one_message_each(foreign: Any, open_stream: Callable[..., Any], build: Any) -> None:
    foreign.ready(ARRAYS)
    stream = open_stream(foreign)
    stream.receive("opened")
    for step in (1, 2):
        push = foreign.begin(ONES, inline=inline(foreign, build), want_weights=True, inline_weights_bytes=LIMIT)
        stream.send(push=push)
        pushed = stream.receive("pushed")
        foreign.seq = pushed.seq
        assert pushed.position.step == step
        assert pushed.weights.position == pushed.position
        for name, found in weights_of(foreign, pushed.weights).items():
            np.testing.assert_array_equal(found, ARRAYS[name] - step)


def test_weights_that_are_larger_than_the_worker_takes_follow_as_chunks(
    foreign: Any, open_stream: Callable[..., Any], build: Any
) -> None:
    foreign.ready(ARRAYS)
    stream = open_stream(foreign)
    stream.receive("opened")
    stream.send(push=foreign.begin(ONES, inline=inline(foreign, build), want_weights=True, inline_weights_bytes=10))
    assert not stream.receive("pushed").HasField("weights")
    _, found = stream.receive_weights(foreign)
    np.testing.assert_array_equal(found["w"], ARRAYS["w"] - 1)


def test_a_pull_takes_small_weights_in_its_begin(foreign: Any, open_stream: Callable[..., Any]) -> None:
    foreign.ready(ARRAYS)
    stream = open_stream(foreign)
    stream.receive("opened")
    stream.send(pull=data_pb2.PullWeights(inline_weights_bytes=LIMIT))
    begin = stream.receive("weights")
    for name, found in weights_of(foreign, begin).items():
        np.testing.assert_array_equal(found, ARRAYS[name])
    stream.send(pull=data_pb2.PullWeights())
    _, found = stream.receive_weights(foreign)
    np.testing.assert_array_equal(found["b"], ARRAYS["b"])


def test_a_repeated_inline_push_is_answered_with_the_stored_result(foreign: Any, build: Any) -> None:
    foreign.ready(ARRAYS)
    begin = foreign.begin(ONES, inline=inline(foreign, build))
    results = [foreign.data.Push(iter([data_pb2.PushRequest(begin=begin)]), timeout=20).result for _ in range(2)]
    assert results[0].position == results[1].position
    np.testing.assert_array_equal(foreign.weights()["w"], ARRAYS["w"] - 1)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "chunks missing"),
        ([types_pb2.TensorChunk(array_id=7, data=b"1234")], "array 7"),
        ([types_pb2.TensorChunk(array_id=0, data=b"1234")], "must have"),
        ([types_pb2.TensorChunk(array_id=0, data=bytes(128))] * 2, "came twice"),
    ],
    ids=["none", "no such array", "too short", "twice"],
)
def test_inline_chunks_are_checked_as_others_are(foreign: Any, chunks: list[Any], message: str) -> None:
    foreign.ready(ARRAYS)
    before = foreign.position()
    begin = foreign.begin(ONES, inline=types_pb2.InlineChunks(chunks=chunks))
    with pytest.raises(grpc.RpcError) as caught:
        foreign.data.Push(iter([data_pb2.PushRequest(begin=begin)]), timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in caught.value.details()
    assert foreign.position() == before
