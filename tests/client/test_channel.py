"""The gRPC transport against a server whose handlers are written here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from optserve.client._channel import GrpcTransport
from optserve.client._transport import STREAM, Pieces
from optserve.v1 import data_pb2, jobs_pb2
from optserve.wire import errors, reasons
from optserve.wire.chunks import MAX_MESSAGE_BYTES, Chunk

LIST = "/optserve.v1.JobService/ListJobs"
INITIALIZE = "/optserve.v1.JobService/InitializeJob"
PULL = "/optserve.v1.DataService/Pull"

Serve = Callable[..., GrpcTransport]


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, handlers: dict[str, Any]) -> None:
        self._handlers = handlers

    def service(self, details: Any) -> Any:
        return self._handlers.get(details.method)


@pytest.fixture
def serve() -> Iterator[Serve]:
    ends: list[Callable[[], Any]] = []

    def start(**handlers: Any) -> GrpcTransport:
        pool = ThreadPoolExecutor(4)
        server = grpc.server(pool)
        table = {
            path: make(handlers[name])
            for name, path, make in (
                ("unary", LIST, grpc.unary_unary_rpc_method_handler),
                ("upload", INITIALIZE, grpc.stream_unary_rpc_method_handler),
                ("download", PULL, grpc.unary_stream_rpc_method_handler),
                ("stream", STREAM, grpc.stream_stream_rpc_method_handler),
            )
            if name in handlers
        }
        server.add_generic_rpc_handlers((_Handlers(table),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        transport = GrpcTransport(f"127.0.0.1:{port}")
        ends.extend((pool.shutdown, lambda: server.stop(0).wait(), transport.close))
        return transport

    yield start
    for end in reversed(ends):
        end()


def failing(code: grpc.StatusCode, reason: str = "", domain: str = reasons.DOMAIN, **metadata: str) -> Callable[..., bytes]:
    def handler(_: bytes, context: Any) -> bytes:
        if not reason:
            context.abort(code, "plain")
        info = any_pb2.Any()
        info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata))
        status = status_pb2.Status(code=code.value[0], message="told", details=[info])
        context.abort_with_status(rpc_status.to_status(status))
        raise AssertionError

    return handler


@pytest.mark.parametrize(
    ("handler", "error", "message"),
    [
        (failing(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND", job="x"), errors.JobNotFoundError, "^told$"),
        (failing(grpc.StatusCode.ABORTED, "SOMETHING_NEW"), errors.InternalError, "told.*SOMETHING_NEW is not known"),
        (failing(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND", "elsewhere"), errors.InternalError, "NOT_FOUND"),
        (
            failing(grpc.StatusCode.UNAVAILABLE),
            errors.ServerUnavailableError,
            r"127\.0\.0\.1:\d+ did not answer \(waited 0\.\d s\): plain",
        ),
        (failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS"), errors.TooManyStreamsError, "^told$"),
        (failing(grpc.StatusCode.RESOURCE_EXHAUSTED), errors.InternalError, "answered RESOURCE_EXHAUSTED: plain"),
        (failing(grpc.StatusCode.UNKNOWN), errors.InternalError, "answered UNKNOWN: plain"),
    ],
)
def test_an_rpcs_failure_becomes_an_error_of_the_tree(
    serve: Serve, handler: Any, error: type[errors.OptserveError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        serve(unary=handler).unary(LIST, jobs_pb2.ListJobsRequest(), 5)
    if error is errors.JobNotFoundError:
        assert caught.value.metadata == {"job": "x"}


def test_a_message_beyond_the_limit_is_said_to_be_too_large_whichever_side_finds_it(serve: Serve) -> None:
    large = "x" * (MAX_MESSAGE_BYTES + 1)
    answer = jobs_pb2.ListJobsResponse(jobs=[{"job_id": large}]).SerializeToString()
    transport = serve(unary=lambda *_: answer, stream=lambda *_: iter((answer,)))
    stream = transport.stream()
    for call in (
        lambda: transport.unary(LIST, jobs_pb2.ListJobsRequest(), 5),
        lambda: transport.unary(LIST, jobs_pb2.GetJobRequest(job=large), 5),
        lambda: stream.receive(5),
    ):
        with pytest.raises(errors.InvalidArgumentError, match=f"too large, {MAX_MESSAGE_BYTES} bytes are allowed"):
            call()
    stream.close()


def test_an_answer_that_does_not_come_is_a_deadline(serve: Serve) -> None:
    release = threading.Event()
    transport = serve(unary=lambda *_: release.wait(10) and b"")
    with pytest.raises(errors.DeadlineExceededError, match=r"within 0\.2 s"):
        transport.unary(LIST, jobs_pb2.ListJobsRequest(), 0.2)
    release.set()


def test_an_rpc_that_the_server_does_not_know_says_so(serve: Serve) -> None:
    with pytest.raises(errors.InternalError, match="UNIMPLEMENTED"):
        serve().unary(LIST, jobs_pb2.ListJobsRequest(), 5)


def test_pieces_arrive_as_one_legal_chunk(serve: Serve) -> None:
    got: list[jobs_pb2.InitializeJobRequest] = []

    def handler(requests: Iterator[bytes], _: Any) -> bytes:
        got.extend(jobs_pb2.InitializeJobRequest.FromString(raw) for raw in requests)
        return b""

    items = [jobs_pb2.InitializeJobRequest(begin={}), Pieces(3, 1 << 20, (memoryview(b"ab"), memoryview(b"c")))]
    answer = serve(upload=handler).upload(INITIALIZE, lambda: iter(items), 5)
    assert answer == jobs_pb2.InitializeJobResponse()
    assert (got[1].chunk.array_id, got[1].chunk.offset, got[1].chunk.data) == (3, 1 << 20, b"abc")


def test_a_download_is_parsed_and_its_failure_translated(serve: Serve) -> None:
    def handler(_: bytes, context: Any) -> Iterator[bytes]:
        yield data_pb2.PullResponse(chunk={"array_id": 2, "data": b"xyz"}).SerializeToString()
        failing(grpc.StatusCode.DATA_LOSS, "CHECKPOINT_CORRUPT")(b"", context)

    items = serve(download=handler).download(PULL, data_pb2.PullRequest(), 5)
    first = next(items)
    assert isinstance(first, Chunk)
    assert (first.array_id, bytes(first.data)) == (2, b"xyz")
    with pytest.raises(errors.CheckpointCorruptError):
        next(items)


def pong(requests: Iterator[bytes], _: Any) -> Iterator[bytes]:
    for raw in requests:
        if data_pb2.StreamRequest.FromString(raw).WhichOneof("content") == "pull":
            yield data_pb2.StreamResponse(pushed={}).SerializeToString()


PULL_WEIGHTS = data_pb2.StreamRequest(pull={})


def test_a_stream_keeps_answering_until_it_is_closed(serve: Serve) -> None:
    stream = serve(stream=pong).stream()
    for _ in range(3):
        stream.send([PULL_WEIGHTS])
        assert isinstance(stream.receive(5), data_pb2.StreamResponse)
    stream.close()
    stream.close()
    with pytest.raises(errors.ClosedError):
        stream.receive(5)


def test_a_stream_on_which_nothing_moves_is_given_up(serve: Serve) -> None:
    stream = serve(stream=pong).stream()
    stream.send([PULL_WEIGHTS])
    stream.receive(60)
    with pytest.raises(errors.DeadlineExceededError, match="stood still"):
        stream.receive(0.2)
    stream.close()


def test_a_stream_that_the_server_ends_is_unavailable(serve: Serve) -> None:
    stream = serve(stream=lambda *_: iter(())).stream()
    with pytest.raises(errors.ServerUnavailableError, match="ended the stream"):
        stream.receive(5)
    stream.close()


def test_what_goes_wrong_while_chunks_are_made_is_raised_to_the_reader(serve: Serve) -> None:
    def broken() -> Iterator[Any]:
        yield data_pb2.StreamRequest(push={})
        raise MemoryError("no room")

    stream = serve(stream=pong).stream()
    stream.send(broken())
    with pytest.raises(MemoryError, match="no room"):
        stream.receive(5)
    stream.close()


def test_chunks_are_made_when_they_are_sent(serve: Serve) -> None:
    made = 0
    block = memoryview(bytes(1 << 20))
    hold = threading.Event()

    def many() -> Iterator[Any]:
        nonlocal made
        for index in range(64):
            made = index + 1
            yield Pieces(0, index << 20, (block,))
        yield PULL_WEIGHTS

    def slow(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        next(requests)
        hold.wait(10)
        yield from pong(requests, context)

    stream = serve(stream=slow).stream()
    stream.send(many())
    threading.Event().wait(0.5)
    assert made < 32
    hold.set()
    stream.receive(10)
    assert made == 64
    stream.close()


def test_a_closed_transport_says_so(serve: Serve) -> None:
    transport = serve(unary=lambda *_: b"")
    transport.unary(LIST, jobs_pb2.ListJobsRequest(), 5)
    transport.close()
    for call in (lambda: transport.unary(LIST, jobs_pb2.ListJobsRequest(), 5), transport.stream):
        with pytest.raises(errors.ClosedError):
            call()
