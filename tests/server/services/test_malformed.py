"""Malformed streams and requests: the reason says what was wrong, and nothing changes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from optserve.v1 import (
    checkpoints_pb2,
    data_pb2,
    jobs_pb2,
    optimizer_pb2,
    state_pb2,
    types_pb2,
    workers_pb2,
)

MIB = 1 << 20
ARRAYS = {"w": np.arange(600_000, dtype=np.float32), "b": np.zeros(3, np.float32)}
END = types_pb2.StreamEnd()
FLAT = np.zeros(600_032, np.float32).tobytes()


def chunk(offset: int, size: int | None = None, array_id: int = 0) -> types_pb2.TensorChunk:
    size = min(MIB, len(FLAT) - offset) if size is None else size
    return types_pb2.TensorChunk(array_id=array_id, offset=offset, data=bytes(size))


BAD_CHUNKS = {
    "another array": ([chunk(0, array_id=3)], "INVALID_CHUNK", "array 3"),
    "outside its array": ([chunk(3 * MIB, MIB)], "INVALID_CHUNK", "begins at byte 3145728; it has 2400128 bytes"),
    "beyond any array": ([chunk(1 << 62, 16)], "INVALID_CHUNK", "begins at byte 4611686018427387904"),
    "overlapping": ([chunk(0), chunk(MIB // 2, MIB)], "INVALID_CHUNK", "no multiple of 1048576"),
    "repeated": ([chunk(0), chunk(0)], "INVALID_CHUNK", "came twice"),
    "too large": ([chunk(0, MIB + 4)], "INVALID_CHUNK", "1048580 bytes; it must have 1048576"),
    "too small": ([chunk(0, MIB - 4)], "INVALID_CHUNK", "1048572 bytes; it must have 1048576"),
    "empty": ([chunk(0, 0)], "INVALID_CHUNK", "0 bytes"),
    "missing": ([chunk(0), chunk(2 * MIB)], "INCOMPLETE_STREAM", "1 "),
    "none": ([], "INCOMPLETE_STREAM", "3 "),
}


@pytest.fixture
def job(foreign: Any) -> Any:
    return foreign.ready(ARRAYS)


def unchanged(foreign: Any, call: Callable[[], Any]) -> Any:
    before, weights = foreign.position(), foreign.pull()
    found = call()
    assert foreign.position() == before
    assert foreign.pull() == weights
    return found


@pytest.mark.parametrize("case", BAD_CHUNKS, ids=str)
def test_push_with_chunks_that_do_not_fit(job: Any, failed: Any, case: str) -> None:
    chunks, reason, message = BAD_CHUNKS[case]

    def items() -> Iterator[data_pb2.PushRequest]:
        yield data_pb2.PushRequest(begin=job.begin(ARRAYS))
        for entry in chunks:
            yield data_pb2.PushRequest(chunk=entry)
        yield data_pb2.PushRequest(end=END)

    found = unchanged(job, lambda: failed(lambda: job.data.Push(items(), timeout=20)))
    assert found.reason == reason
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in found.message
    assert job.push(ARRAYS).position.step == 1


@pytest.mark.parametrize("case", BAD_CHUNKS, ids=str)
def test_stream_with_chunks_that_do_not_fit(job: Any, open_stream: Callable[..., Any], case: str) -> None:
    chunks, reason, message = BAD_CHUNKS[case]

    def send() -> Any:
        stream = open_stream(job)
        stream.receive("opened")
        stream.send(push=job.begin(ARRAYS))
        for entry in chunks:
            stream.send(chunk=entry)
        stream.send(end=END)
        return stream.failure()

    found = unchanged(job, send)
    assert found.reason == reason
    assert message in found.message
    assert job.push(ARRAYS).position.step == 1


@pytest.mark.parametrize("case", BAD_CHUNKS, ids=str)
def test_initial_values_with_chunks_that_do_not_fit(foreign: Any, failed: Any, case: str) -> None:
    chunks, reason, message = BAD_CHUNKS[case]
    foreign.create(ARRAYS)

    def items() -> Iterator[jobs_pb2.InitializeJobRequest]:
        begin = jobs_pb2.InitializeBegin(job_id=foreign.job.job_id, session_id=foreign.session_id)
        yield jobs_pb2.InitializeJobRequest(begin=begin)
        for entry in chunks:
            yield jobs_pb2.InitializeJobRequest(chunk=entry)
        yield jobs_pb2.InitializeJobRequest(end=END)

    found = failed(lambda: foreign.jobs.InitializeJob(items(), timeout=20))
    assert found.reason == reason
    assert message in found.message
    assert not foreign.jobs.GetJob(jobs_pb2.GetJobRequest(job="j"), timeout=20).job.initialized
    foreign.initialize()
    np.testing.assert_array_equal(foreign.weights()["w"], ARRAYS["w"])


def test_a_push_stream_that_is_cut_changes_nothing(job: Any, failed: Any) -> None:
    def items() -> Iterator[data_pb2.PushRequest]:
        yield data_pb2.PushRequest(begin=job.begin(ARRAYS))
        yield data_pb2.PushRequest(chunk=chunk(0))

    found = unchanged(job, lambda: failed(lambda: job.data.Push(items(), timeout=20)))
    assert found.reason == "INCOMPLETE_STREAM"
    assert job.push(ARRAYS).position.step == 1


ORDERS = {
    "chunk first": ([data_pb2.PushRequest(chunk=chunk(0))], "PROTOCOL_VIOLATION"),
    "end first": ([data_pb2.PushRequest(end=END)], "PROTOCOL_VIOLATION"),
    "nothing": ([], "INCOMPLETE_STREAM"),
    "no content": ([data_pb2.PushRequest()], "PROTOCOL_VIOLATION"),
}


@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_a_push_that_does_not_begin(job: Any, failed: Any, case: str) -> None:
    items, reason = ORDERS[case]
    assert unchanged(job, lambda: failed(lambda: job.data.Push(iter(items), timeout=20))).reason == reason


def test_a_second_begin_among_the_chunks(job: Any, failed: Any) -> None:
    begin = data_pb2.PushRequest(begin=job.begin(ARRAYS))
    items = [begin, data_pb2.PushRequest(chunk=chunk(0)), begin]
    found = unchanged(job, lambda: failed(lambda: job.data.Push(iter(items), timeout=20)))
    assert found.reason == "PROTOCOL_VIOLATION"
    assert "'begin' came among the chunks" in found.message


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x7a\x05\x08\x00", b"\x0a\xff\x01abc", b"\x7a\x00", b""], ids=repr)
def test_bytes_that_are_no_message(job: Any, channel: grpc.Channel, failed: Any, raw: bytes) -> None:
    push = channel.stream_unary("/optserve.v1.DataService/Push")
    assert unchanged(job, lambda: failed(lambda: push(iter([raw]), timeout=20))).reason == "PROTOCOL_VIOLATION"
    begin = data_pb2.PushRequest(begin=job.begin(ARRAYS)).SerializeToString()
    found = unchanged(job, lambda: failed(lambda: push(iter([begin, raw]), timeout=20)))
    assert found.reason in ("PROTOCOL_VIOLATION", "INVALID_CHUNK")


STREAMS = {
    "push before open": data_pb2.StreamRequest(push=data_pb2.PushBegin()),
    "pull before open": data_pb2.StreamRequest(pull=data_pb2.PullWeights()),
    "chunk before open": data_pb2.StreamRequest(chunk=chunk(0)),
}


@pytest.mark.parametrize("case", STREAMS, ids=str)
def test_a_stream_that_does_not_open(job: Any, failed: Any, case: str) -> None:
    found = failed(lambda: next(job.data.Stream(iter([STREAMS[case]]), timeout=20)))
    assert found.reason == "PROTOCOL_VIOLATION"
    assert "'open'" in found.message


@pytest.mark.parametrize("content", ["open", "chunk", "end"])
def test_a_stream_that_goes_on_in_the_wrong_order(job: Any, open_stream: Callable[..., Any], content: str) -> None:
    stream = open_stream(job)
    stream.receive("opened")
    stream.send(**{content: {"open": data_pb2.StreamOpen(), "chunk": chunk(0), "end": END}[content]})
    found = stream.failure()
    assert found.reason == "PROTOCOL_VIOLATION"
    assert repr(content) in found.message


def test_a_stream_of_a_session_that_did_not_join(job: Any, open_stream: Callable[..., Any]) -> None:
    assert open_stream(job.another()).failure().reason == "NOT_JOINED"
    assert open_stream(job, epoch=99).failure().reason == "FENCED"
    assert open_stream(job, job_id=str(uuid.uuid4())).failure().reason == "JOB_NOT_FOUND"


@pytest.mark.parametrize(
    ("fields", "reason", "message"),
    [
        ({"weight": -1.0}, "INVALID_ARGUMENT", "weight is -1.0"),
        ({"weight": float("nan")}, "INVALID_ARGUMENT", "weight is nan"),
        ({"weight": float("inf")}, "INVALID_ARGUMENT", "weight is inf"),
        ({"contribution": data_pb2.CONTRIBUTION_UNSPECIFIED}, "INVALID_ARGUMENT", "contribution is 0"),
        ({"contribution": 77}, "INVALID_ARGUMENT", "contribution is 77"),
        ({"absent": [2]}, "UNKNOWN_PARAMETER", "parameter 2"),
        ({"parameter_count": 3}, "UNKNOWN_PARAMETER", "3"),
        ({"call": types_pb2.CallIdentity()}, "JOB_NOT_FOUND", "no job"),
    ],
    ids=str,
)
def test_a_push_whose_head_is_wrong(job: Any, failed: Any, fields: dict[str, Any], reason: str, message: str) -> None:
    found = unchanged(job, lambda: failed(lambda: job.push(ARRAYS, **fields)))
    assert found.reason == reason
    assert message in found.message


def test_a_call_without_an_identity(job: Any, failed: Any) -> None:
    for call, message in (
        (job.identity(seq=0), "call.seq is 0"),
        (job.identity(session_id=""), "session_id is ''"),
    ):
        found = failed(lambda call=call: job.push(ARRAYS, call=call))
        assert found.reason == "INVALID_ARGUMENT"
        assert message in found.message


def test_exactly_once_reasons(job: Any, failed: Any) -> None:
    job.push(ARRAYS, content_fingerprint=1)
    repeat = job.identity(seq=1)
    assert failed(lambda: job.push(ARRAYS, call=repeat, content_fingerprint=2)).reason == "SEQUENCE_CONFLICT"
    assert failed(lambda: job.push(ARRAYS, call=job.identity(seq=9))).reason == "SEQUENCE_GAP"
    assert failed(lambda: job.push(ARRAYS, call=job.identity(epoch=job.epoch + 1))).reason == "FENCED"
    assert failed(lambda: job.push(ARRAYS, call=job.identity(session_id="x"))).reason == "NOT_JOINED"


def test_every_method_that_names_a_job_says_that_it_is_not_there(foreign: Any, failed: Any) -> None:
    missing = str(uuid.uuid4())
    call = types_pb2.CallIdentity(job_id=missing, session_id="s", seq=1)
    opening = data_pb2.StreamRequest(open=data_pb2.StreamOpen(job_id=missing, session_id="s", epoch=1))
    calls = {
        "GetJob": lambda: foreign.jobs.GetJob(jobs_pb2.GetJobRequest(job=missing)),
        "InitializeJob": lambda: foreign.jobs.InitializeJob(
            iter([jobs_pb2.InitializeJobRequest(begin=jobs_pb2.InitializeBegin(job_id=missing, session_id="s"))])
        ),
        "WaitForVersion": lambda: foreign.jobs.WaitForVersion(jobs_pb2.WaitForVersionRequest(job_id=missing)),
        "ListEvents": lambda: foreign.jobs.ListEvents(jobs_pb2.ListEventsRequest(job_id=missing)),
        "DeleteJob": lambda: foreign.jobs.DeleteJob(jobs_pb2.DeleteJobRequest(job_id=missing)),
        "Join": lambda: foreign.workers.Join(workers_pb2.JoinRequest(job_id=missing, session_id="s")),
        "Heartbeat": lambda: foreign.workers.Heartbeat(workers_pb2.HeartbeatRequest(job_id=missing, session_id="s")),
        "Leave": lambda: foreign.workers.Leave(workers_pb2.LeaveRequest(job_id=missing, session_id="s")),
        "Stream": lambda: next(foreign.data.Stream(iter([opening]))),
        "Push": lambda: foreign.data.Push(iter([data_pb2.PushRequest(begin=data_pb2.PushBegin(call=call))])),
        "Pull": lambda: next(foreign.data.Pull(data_pb2.PullRequest(job_id=missing))),
        "ListGroups": lambda: foreign.optimizer.ListGroups(optimizer_pb2.ListGroupsRequest(job_id=missing)),
        "AddGroup": lambda: foreign.optimizer.AddGroup(
            iter([optimizer_pb2.AddGroupRequest(begin=optimizer_pb2.AddGroupBegin(call=call))])
        ),
        "UpdateGroup": lambda: foreign.optimizer.UpdateGroup(optimizer_pb2.UpdateGroupRequest(call=call)),
        "SetSchedule": lambda: foreign.optimizer.SetSchedule(optimizer_pb2.SetScheduleRequest(call=call)),
        "StepSchedule": lambda: foreign.optimizer.StepSchedule(optimizer_pb2.StepScheduleRequest(call=call)),
        "LoadScheduleState": lambda: foreign.optimizer.LoadScheduleState(
            optimizer_pb2.LoadScheduleStateRequest(call=call, state="{}")
        ),
        "GetSchedule": lambda: foreign.optimizer.GetSchedule(optimizer_pb2.GetScheduleRequest(job_id=missing)),
        "GetState": lambda: next(foreign.state.GetState(state_pb2.GetStateRequest(job_id=missing))),
        "LoadState": lambda: foreign.state.LoadState(
            iter([state_pb2.LoadStateRequest(begin=state_pb2.LoadStateBegin(call=call))])
        ),
        "SaveCheckpoint": lambda: foreign.checkpoints.SaveCheckpoint(
            checkpoints_pb2.SaveCheckpointRequest(job_id=missing, name="c")
        ),
        "ListCheckpoints": lambda: foreign.checkpoints.ListCheckpoints(checkpoints_pb2.ListCheckpointsRequest(job_id=missing)),
        "VerifyCheckpoint": lambda: foreign.checkpoints.VerifyCheckpoint(
            checkpoints_pb2.VerifyCheckpointRequest(job_id=missing, name="c")
        ),
        "RestoreCheckpoint": lambda: foreign.checkpoints.RestoreCheckpoint(
            checkpoints_pb2.RestoreCheckpointRequest(call=call, name="c")
        ),
        "DownloadCheckpoint": lambda: next(
            foreign.checkpoints.DownloadCheckpoint(checkpoints_pb2.DownloadCheckpointRequest(job_id=missing, name="c"))
        ),
        "DeleteCheckpoint": lambda: foreign.checkpoints.DeleteCheckpoint(
            checkpoints_pb2.DeleteCheckpointRequest(call=call, name="c")
        ),
    }
    for name, attempt in calls.items():
        found = failed(attempt)
        assert found.reason == "JOB_NOT_FOUND", name
        assert missing in found.message, name
        assert found.code is grpc.StatusCode.NOT_FOUND, name


SPECS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no groups": ({"groups": []}, "INVALID_ARGUMENT", "empty parameter list"),
    "no workers": ({"workers": 0}, "INVALID_ARGUMENT", "workers is 0"),
    "quorum": ({"quorum": 2}, "INVALID_ARGUMENT", "quorum is 2; the job has 1 workers"),
    "consistency": ({"consistency": 9}, "INVALID_ARGUMENT", "consistency is 9; allowed are sync, async"),
    "on_missing": ({"on_missing": 9}, "INVALID_ARGUMENT", "on_missing is 9"),
    "lease": ({"lease_seconds": -1.0}, "INVALID_ARGUMENT", "lease_seconds is -1.0"),
    "round timeout": ({"round_timeout_seconds": float("nan")}, "INVALID_ARGUMENT", "round_timeout_seconds is nan"),
    "name": ({"name": "a/b/c"}, "INVALID_NAME", "'a/b/c'"),
    "path": ({"name": "../x"}, "INVALID_NAME", "'../x'"),
    "optimizer": ({"optimizer": "adm"}, "UNKNOWN_OPTIMIZER", "did you mean 'Adam'? known: "),
    "negative lr": ({"defaults": {"lr": -1.0}}, "INVALID_HYPERPARAMETER", "-1.0"),
    "unknown default": ({"defaults": {"momentun": 1.0}}, "UNKNOWN_HYPERPARAMETER", "did you mean 'momentum'"),
}


@pytest.mark.parametrize("case", SPECS, ids=str)
def test_a_spec_that_is_not_allowed_creates_nothing(foreign: Any, failed: Any, case: str) -> None:
    fields, reason, message = SPECS[case]
    found = failed(lambda: foreign.create(ARRAYS, **fields))
    assert found.reason == reason
    assert message in found.message
    assert not foreign.jobs.ListJobs(jobs_pb2.ListJobsRequest(), timeout=20).jobs


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        (types_pb2.Parameter(name="w", shape=[-1], dtype=1), "INVALID_ARGUMENT"),
        (types_pb2.Parameter(name="w", shape=[2]), "DTYPE_MISMATCH"),
        (types_pb2.Parameter(name="w", shape=[2], dtype=99), "DTYPE_MISMATCH"),
        (types_pb2.Parameter(shape=[2], dtype=1), "INVALID_ARGUMENT"),
        (types_pb2.Parameter(name="w", shape=[1 << 45], dtype=1), "OUT_OF_MEMORY"),
        (types_pb2.Parameter(name="w", shape=[1 << 62, 1 << 62], dtype=1), "INVALID_ARGUMENT"),
        (types_pb2.Parameter(name="w", shape=[1] * 100, dtype=1), "INVALID_ARGUMENT"),
    ],
    ids=lambda entry: str(entry).replace("\n", " ")[:40],
)
def test_a_parameter_that_is_not_allowed_creates_nothing(foreign: Any, failed: Any, parameter: Any, reason: str) -> None:
    groups = [jobs_pb2.GroupSpec(parameters=[parameter])]
    found = failed(lambda: foreign.create({}, groups=groups))
    assert found.reason == reason
    assert not foreign.jobs.ListJobs(jobs_pb2.ListJobsRequest(), timeout=20).jobs


def test_a_parameter_named_twice_creates_nothing(foreign: Any, failed: Any, build: Any) -> None:
    found = failed(lambda: foreign.create({}, groups=[build.group(ARRAYS), build.group({"b": ARRAYS["b"]})]))
    assert found.reason == "DUPLICATE_PARAMETER"
    assert "'b'" in found.message


def test_ids_are_checked(foreign: Any, failed: Any) -> None:
    for job_id, session_id in (("", "s"), ("../../etc", "s"), (str(uuid.uuid4()), ""), (str(uuid.uuid4()), "s" * 1000)):
        request = jobs_pb2.CreateJobRequest(job_id=job_id, session_id=session_id, spec=foreign.spec(ARRAYS))
        assert failed(lambda request=request: foreign.jobs.CreateJob(request, timeout=20)).reason == "INVALID_ARGUMENT"
    assert not foreign.jobs.ListJobs(jobs_pb2.ListJobsRequest(), timeout=20).jobs
    foreign.create(ARRAYS)
    foreign.initialize()
    request = workers_pb2.JoinRequest(job_id=foreign.job.job_id)
    assert failed(lambda: foreign.workers.Join(request, timeout=20)).reason == "INVALID_ARGUMENT"


BUNDLES: dict[str, tuple[dict[str, Any], str]] = {
    "no values": ({"entries": []}, "UNKNOWN_PARAMETER"),
    "outside": ({"entries": [{"offset": 64}]}, "INVALID_ARGUMENT"),
    "unaligned": ({"entries": [{"offset": 4}]}, "INVALID_ARGUMENT"),
    "other shape": ({"entries": [{"shape": [3]}]}, "SHAPE_MISMATCH"),
    "other dtype": ({"entries": [{"dtype": types_pb2.DATA_TYPE_BFLOAT16}]}, "DTYPE_MISMATCH"),
    "no dtype": ({"entries": [{"dtype": 0}]}, "DTYPE_MISMATCH"),
    "negative shape": ({"entries": [{"shape": [-2]}]}, "INVALID_ARGUMENT"),
    "too many bytes": ({"bundle_bytes": 1 << 50}, "INVALID_ARGUMENT"),
}


@pytest.mark.parametrize("case", BUNDLES, ids=str)
def test_a_group_whose_bundle_does_not_fit_is_not_added(job: Any, failed: Any, build: Any, case: str) -> None:
    fields, reason = BUNDLES[case]
    admin = job.another()
    added = {"v": np.ones(2, np.float32)}
    plain = {"parameter": "v", "shape": [2], "dtype": types_pb2.DATA_TYPE_FLOAT32}
    entries = [types_pb2.BundleEntry(**{**plain, **entry}) for entry in fields.get("entries", [{}])]
    begin = optimizer_pb2.AddGroupBegin(
        call=admin.identity(), group=build.group(added), entries=entries, bundle_bytes=fields.get("bundle_bytes", 64)
    )
    items = [
        optimizer_pb2.AddGroupRequest(begin=begin),
        optimizer_pb2.AddGroupRequest(chunk=types_pb2.TensorChunk(data=bytes(64))),
        optimizer_pb2.AddGroupRequest(end=END),
    ]
    assert unchanged(job, lambda: failed(lambda: admin.optimizer.AddGroup(iter(items), timeout=20))).reason == reason
    groups = job.optimizer.ListGroups(optimizer_pb2.ListGroupsRequest(job_id=job.job.job_id), timeout=20).groups
    assert len(groups) == 1
