"""The server as another language sees it: generated stubs and nothing of optserve's own client or chunk codec."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from optserve.server.app import App
from optserve.v1 import (
    checkpoints_pb2_grpc,
    data_pb2,
    data_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    optimizer_pb2_grpc,
    server_pb2_grpc,
    state_pb2_grpc,
    types_pb2,
    workers_pb2,
    workers_pb2_grpc,
)

MIB = 1 << 20
TYPES = {
    "float32": types_pb2.DATA_TYPE_FLOAT32,
    "float64": types_pb2.DATA_TYPE_FLOAT64,
    "float16": types_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": types_pb2.DATA_TYPE_BFLOAT16,
    "complex64": types_pb2.DATA_TYPE_COMPLEX64,
    "complex128": types_pb2.DATA_TYPE_COMPLEX128,
}
WIDTHS = {
    types_pb2.DATA_TYPE_FLOAT32: 4,
    types_pb2.DATA_TYPE_FLOAT64: 8,
    types_pb2.DATA_TYPE_FLOAT16: 2,
    types_pb2.DATA_TYPE_BFLOAT16: 2,
}
"""Bytes of an element of a flat array."""
END = types_pb2.StreamEnd()


@dataclass
class Failure:
    """What a failed call says: its gRPC status, and the ErrorInfo in the status details."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    metadata: dict[str, str]


def failure(error: grpc.RpcError) -> Failure:
    status = rpc_status.from_call(error)
    assert status is not None, f"no status details: {error}"
    info = error_details_pb2.ErrorInfo()
    assert len(status.details) == 1
    assert status.details[0].Unpack(info)
    assert status.message == error.details()
    return Failure(error.code(), status.message, info.reason, info.domain, dict(info.metadata))


def value(item: Any) -> types_pb2.Value:
    if isinstance(item, bool):
        return types_pb2.Value(flag=item)
    if isinstance(item, int):
        return types_pb2.Value(integer=item)
    if isinstance(item, float):
        return types_pb2.Value(number=item)
    if isinstance(item, tuple):
        return types_pb2.Value(numbers=types_pb2.NumberList(values=item))
    return types_pb2.Value(text=item)


def values(items: Mapping[str, Any]) -> list[types_pb2.Hyperparameter]:
    return [types_pb2.Hyperparameter(name=name, value=value(item)) for name, item in items.items()]


def group(parameters: Mapping[str, Any], **hyperparameters: Any) -> jobs_pb2.GroupSpec:
    return jobs_pb2.GroupSpec(
        hyperparameters=values(hyperparameters),
        parameters=[
            types_pb2.Parameter(name=name, shape=array.shape, dtype=TYPES[array.dtype.name])
            for name, array in parameters.items()
        ],
    )


def flats(layout: types_pb2.Layout, arrays: Mapping[str, Any]) -> dict[int, bytes]:
    """Each flat array's bytes: the parameters at their offsets, zeros between."""
    found = {}
    for array in layout.arrays:
        width = WIDTHS[array.dtype]
        flat = bytearray(array.length * width)
        for parameter in layout.parameters:
            if parameter.array_id == array.array_id:
                raw = np.ascontiguousarray(arrays[parameter.name]).tobytes()
                flat[parameter.offset * width : parameter.offset * width + len(raw)] = raw
        found[array.array_id] = bytes(flat)
    return found


def chunks(layout: types_pb2.Layout, arrays: Mapping[str, Any]) -> Iterator[types_pb2.TensorChunk]:
    for array_id, flat in flats(layout, arrays).items():
        for offset in range(0, len(flat), MIB):
            yield types_pb2.TensorChunk(array_id=array_id, offset=offset, data=flat[offset : offset + MIB])


def parameters(layout: types_pb2.Layout, found: Mapping[int, bytes], like: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters cut out of the flat arrays."""
    cut = {}
    widths = {array.array_id: WIDTHS[array.dtype] for array in layout.arrays}
    for parameter in layout.parameters:
        dtype = like[parameter.name].dtype
        begin = parameter.offset * widths[parameter.array_id]
        size = int(np.prod(parameter.shape, dtype=int)) * dtype.itemsize
        raw = found[parameter.array_id][begin : begin + size]
        cut[parameter.name] = np.frombuffer(raw, dtype).reshape(tuple(parameter.shape))
    return cut


@dataclass
class Foreign:
    """One client, one job, one worker, in generated messages."""

    channel: grpc.Channel
    session_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    seq: int = 0
    epoch: int = 0
    job: jobs_pb2.JobInfo | None = None
    arrays: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.jobs = jobs_pb2_grpc.JobServiceStub(self.channel)
        self.workers = workers_pb2_grpc.WorkerServiceStub(self.channel)
        self.data = data_pb2_grpc.DataServiceStub(self.channel)
        self.optimizer = optimizer_pb2_grpc.OptimizerServiceStub(self.channel)
        self.state = state_pb2_grpc.StateServiceStub(self.channel)
        self.checkpoints = checkpoints_pb2_grpc.CheckpointServiceStub(self.channel)
        self.server = server_pb2_grpc.ServerServiceStub(self.channel)

    @property
    def layout(self) -> types_pb2.Layout:
        return self.job.layout

    def spec(self, arrays: Mapping[str, Any], **fields: Any) -> jobs_pb2.JobSpec:
        settings = {"name": "j", "optimizer": "sgd", "workers": 1, "groups": [group(arrays)], **fields}
        settings["defaults"] = values(settings.get("defaults", {"lr": 1.0}))
        return jobs_pb2.JobSpec(**settings)

    def create(self, arrays: Mapping[str, Any], **fields: Any) -> jobs_pb2.JobInfo:
        """A job without values yet."""
        request = jobs_pb2.CreateJobRequest(
            job_id=str(uuid.uuid4()), session_id=self.session_id, spec=self.spec(arrays, **fields)
        )
        answer = self.jobs.CreateJob(request, timeout=20)
        assert answer.created
        self.job, self.arrays = answer.job, arrays
        return answer.job

    def initialize_items(self) -> Iterator[jobs_pb2.InitializeJobRequest]:
        begin = jobs_pb2.InitializeBegin(job_id=self.job.job_id, session_id=self.session_id)
        yield jobs_pb2.InitializeJobRequest(begin=begin)
        for chunk in chunks(self.layout, self.arrays):
            yield jobs_pb2.InitializeJobRequest(chunk=chunk)
        yield jobs_pb2.InitializeJobRequest(end=END)

    def initialize(self) -> types_pb2.Position:
        return self.jobs.InitializeJob(self.initialize_items(), timeout=20).position

    def join(self, **fields: Any) -> workers_pb2.JoinResponse:
        answer = self.workers.Join(
            workers_pb2.JoinRequest(job_id=self.job.job_id, session_id=self.session_id, **fields), timeout=20
        )
        self.epoch, self.seq = answer.epoch, answer.last_seq
        return answer

    def ready(self, arrays: Mapping[str, Any], **fields: Any) -> Foreign:
        """Created, initialised, joined."""
        self.create(arrays, **fields)
        self.initialize()
        self.join()
        return self

    def another(self) -> Foreign:
        """Another client that knows the job."""
        other = Foreign(self.channel)
        other.job, other.arrays = self.job, self.arrays
        return other

    def identity(self, **fields: Any) -> types_pb2.CallIdentity:
        given = {"job_id": self.job.job_id, "session_id": self.session_id, "epoch": self.epoch, "seq": self.seq + 1, **fields}
        return types_pb2.CallIdentity(**given)

    def begin(self, gradients: Mapping[str, Any], **fields: Any) -> data_pb2.PushBegin:
        given = {
            "call": self.identity(),
            "contribution": data_pb2.CONTRIBUTION_GRADIENT,
            "weight": 1.0,
            "parameter_count": len(self.layout.parameters),
            "absent": [index for index, entry in enumerate(self.layout.parameters) if entry.name not in gradients],
            **fields,
        }
        return data_pb2.PushBegin(**given)

    def push_items(self, gradients: Mapping[str, Any], **fields: Any) -> Iterator[data_pb2.PushRequest]:
        yield data_pb2.PushRequest(begin=self.begin(gradients, **fields))
        for chunk in chunks(self.layout, gradients):
            yield data_pb2.PushRequest(chunk=chunk)
        yield data_pb2.PushRequest(end=END)

    def push(self, gradients: Mapping[str, Any], **fields: Any) -> data_pb2.PushResult:
        result = self.data.Push(self.push_items(gradients, **fields), timeout=20).result
        self.seq = result.seq
        return result

    def pull(self, names: Iterable[str] = ()) -> dict[int, bytes]:
        """The flat arrays' blocks that came, in their places."""
        answers = list(self.data.Pull(data_pb2.PullRequest(job_id=self.job.job_id, parameters=names), timeout=20))
        assert answers[0].WhichOneof("content") == "begin"
        assert answers[-1].WhichOneof("content") == "end"
        assert {answer.WhichOneof("content") for answer in answers[1:-1]} <= {"chunk"}
        found: dict[int, bytearray] = {}
        for answer in answers[1:-1]:
            flat = found.setdefault(answer.chunk.array_id, bytearray())
            assert len(flat) == answer.chunk.offset or names
            flat.extend(answer.chunk.data)
        return {array_id: bytes(flat) for array_id, flat in found.items()}

    def weights(self) -> dict[str, Any]:
        return parameters(self.layout, self.pull(), self.arrays)

    def position(self) -> types_pb2.Position:
        return self.jobs.GetJob(jobs_pb2.GetJobRequest(job=self.job.job_id), timeout=20).job.position


class Stream:
    """A worker's kept stream: requests from a queue, answers one by one."""

    def __init__(self, foreign: Foreign, **opening: Any) -> None:
        import queue

        self._queue: queue.Queue[data_pb2.StreamRequest | None] = queue.Queue()
        self._call = foreign.data.Stream(iter(self._queue.get, None), timeout=60)
        given = {"job_id": foreign.job.job_id, "session_id": foreign.session_id, "epoch": foreign.epoch, **opening}
        self.send(open=data_pb2.StreamOpen(**given))

    def send(self, **content: Any) -> None:
        self._queue.put(data_pb2.StreamRequest(**content))

    def push(self, foreign: Foreign, gradients: Mapping[str, Any], **fields: Any) -> None:
        self.send(push=foreign.begin(gradients, **fields))
        for chunk in chunks(foreign.layout, gradients):
            self.send(chunk=chunk)
        self.send(end=END)

    def receive(self, content: str) -> Any:
        answer = next(self._call)
        assert answer.WhichOneof("content") == content, answer
        return getattr(answer, content)

    def receive_weights(self, foreign: Foreign) -> tuple[data_pb2.WeightsBegin, dict[str, Any]]:
        begin = self.receive("weights")
        found: dict[int, bytearray] = {}
        while (answer := next(self._call)).WhichOneof("content") == "chunk":
            flat = found.setdefault(answer.chunk.array_id, bytearray())
            assert len(flat) == answer.chunk.offset
            flat.extend(answer.chunk.data)
        assert answer.WhichOneof("content") == "end"
        return begin, parameters(foreign.layout, {key: bytes(flat) for key, flat in found.items()}, foreign.arrays)

    def failure(self) -> Failure:
        """How the stream ended."""
        try:
            answer = next(self._call)
        except grpc.RpcError as error:
            return failure(error)
        raise AssertionError(f"the stream goes on with {answer}")

    def half_close(self) -> None:
        self._queue.put(None)

    def close(self) -> None:
        self._queue.put(None)
        self._call.cancel()


@pytest.fixture
def channel(app: App) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(app.address) as found:
        yield found


@pytest.fixture
def foreign(channel: grpc.Channel) -> Foreign:
    """A client that knows the contract only."""
    return Foreign(channel)


@pytest.fixture
def open_stream() -> Iterator[Any]:
    """open_stream(foreign, **StreamOpen fields) -> Stream, cancelled at the end."""
    made: list[Stream] = []

    def start(foreign: Foreign, **opening: Any) -> Stream:
        made.append(Stream(foreign, **opening))
        return made[-1]

    yield start
    for stream in made:
        stream.close()


@pytest.fixture(scope="session")
def failed() -> Any:
    """failed(call) -> Failure: the call must fail with an ErrorInfo of optserve."""

    def check(call: Any) -> Failure:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        found = failure(caught.value)
        assert found.domain == "optserve"
        return found

    return check


@pytest.fixture(scope="session")
def build() -> Any:
    """The plain functions above, for tests."""

    class Build:
        group = staticmethod(group)
        values = staticmethod(values)
        chunks = staticmethod(chunks)
        end = END

    return Build
