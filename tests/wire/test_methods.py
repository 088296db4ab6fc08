"""The table of RPCs, and how a stream's items become bytes."""

from __future__ import annotations

import pytest

from optserve.v1 import data_pb2, jobs_pb2, jobs_pb2_grpc
from optserve.wire import chunks
from optserve.wire.chunks import Chunk
from optserve.wire.methods import METHODS, serialize


def test_method_knows_its_messages_and_which_side_streams() -> None:
    pull = METHODS["/optserve.v1.DataService/Pull"]
    assert (pull.request, pull.response) == (data_pb2.PullRequest, data_pb2.PullResponse)
    assert (pull.request_streams, pull.response_streams) == (False, True)
    stream = METHODS["/optserve.v1.DataService/Stream"]
    assert (stream.request_streams, stream.response_streams) == (True, True)


@pytest.mark.parametrize("path", METHODS)
def test_path_is_the_one_that_the_method_says(path: str) -> None:
    assert METHODS[path].path == path


def test_paths_are_those_of_the_generated_stubs() -> None:
    called = []

    class Channel:
        def unary_unary(self, path: str, **_: object) -> None:
            called.append(path)

        stream_unary = unary_unary

    jobs_pb2_grpc.JobServiceStub(Channel())
    assert set(called) == {path for path in METHODS if path.startswith("/optserve.v1.JobService/")}


def test_items_of_a_stream_survive_serialisation() -> None:
    chunk = Chunk(3, 1 << 20, memoryview(b"data"))
    back = chunks.parse(data_pb2.StreamRequest, serialize(chunk))
    assert isinstance(back, Chunk)
    assert (back.array_id, back.offset, bytes(back.data)) == (3, 1 << 20, b"data")
    request = data_pb2.StreamRequest(pull=data_pb2.PullWeights())
    assert chunks.parse(data_pb2.StreamRequest, serialize(request)) == request
    assert jobs_pb2.GetJobRequest.FromString(serialize(jobs_pb2.GetJobRequest(job="j"))).job == "j"
