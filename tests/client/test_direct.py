from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from optserve.client._direct import Context, DirectTransport
from optserve.client._transport import STREAM, Pieces
from optserve.v1 import data_pb2, jobs_pb2
from optserve.wire import errors
from optserve.wire.chunks import Chunk

LIST = "/optserve.v1.JobService/ListJobs"
PULL = "/optserve.v1.DataService/Pull"


def test_a_call_runs_in_the_callers_thread_with_its_deadline_and_ends_its_callbacks() -> None:
    ended: list[str] = []

    def handler(request: Any, context: Context) -> jobs_pb2.ListJobsResponse:
        assert isinstance(request, jobs_pb2.ListJobsRequest)
        assert context.is_active()
        left = context.time_remaining()
        assert left is not None
        assert 4 < left <= 5
        assert context.add_callback(lambda: ended.append("ended"))
        return jobs_pb2.ListJobsResponse()

    transport = DirectTransport({LIST: handler})
    assert transport.unary(LIST, jobs_pb2.ListJobsRequest(), 5) == jobs_pb2.ListJobsResponse()
    assert len(ended) == 1


def test_a_download_that_is_left_early_ends_the_handler() -> None:
    ended: list[str] = []

    def handler(_: Any, context: Context) -> Iterator[data_pb2.PullResponse]:
        context.add_callback(lambda: ended.append("callback"))
        try:
            while True:
                yield data_pb2.PullResponse()
        finally:
            ended.append("handler")

    items = DirectTransport({PULL: handler}).download(PULL, data_pb2.PullRequest(), 5)
    next(items)
    items.close()  # type: ignore[attr-defined]
    assert sorted(ended) == ["callback", "handler"]


def test_a_context_that_ended_takes_no_callback_and_runs_each_once() -> None:
    runs: list[int] = []
    context = Context()
    assert context.time_remaining() is None
    context.add_callback(lambda: runs.append(1))
    context.cancel()
    context.cancel()
    assert runs == [1]
    assert not context.add_callback(lambda: runs.append(2))
    assert not context.is_active()


def echo(requests: Iterator[Any], _: Context) -> Iterator[data_pb2.StreamResponse]:
    """Answers each request with the bytes of the chunks before its end."""
    total = 0
    for item in requests:
        if isinstance(item, Chunk):
            total += item.data.nbytes
        elif item.WhichOneof("content") == "end":
            yield data_pb2.StreamResponse(pushed=data_pb2.PushResult(seq=total))
            total = 0


def batch(*sizes: int) -> Iterator[Any]:
    for size in sizes:
        yield Pieces(0, 0, (memoryview(bytes(size)), memoryview(bytes(1))))
    yield data_pb2.StreamRequest(end={})


def test_a_stream_answers_each_request_in_turn() -> None:
    stream = DirectTransport({STREAM: echo}).stream()
    for sizes in ((3, 4), (5,), ()):
        stream.send(batch(*sizes))
        assert stream.receive(1).pushed.seq == sum(sizes) + len(sizes)  # type: ignore[union-attr]
    stream.close()
    stream.close()
    with pytest.raises(errors.ClosedError):
        stream.receive(1)


def test_a_handler_that_ends_or_asks_too_early_is_a_typed_error() -> None:
    stream = DirectTransport({STREAM: lambda *_: iter(())}).stream()
    with pytest.raises(errors.ServerUnavailableError):
        stream.receive(1)
    stream = DirectTransport({STREAM: echo}).stream()
    with pytest.raises(errors.ProtocolViolationError):
        stream.receive(1)


def test_a_closed_transport_calls_nothing_and_closes_once() -> None:
    closed: list[int] = []
    transport = DirectTransport({STREAM: echo}, lambda: closed.append(1))
    transport.close()
    transport.close()
    assert closed == [1]
    with pytest.raises(errors.ClosedError):
        transport.stream()
