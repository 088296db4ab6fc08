"""Jobs, workers, optimizer, state and checkpoints through the generated stubs; health and reflection."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from optserve.server.app import App
from optserve.v1 import (
    checkpoints_pb2,
    data_pb2,
    jobs_pb2,
    optimizer_pb2,
    server_pb2,
    state_pb2,
    types_pb2,
    workers_pb2,
)

SERVICES = [f"optserve.v1.{name}Service" for name in ("Checkpoint", "Data", "Job", "Optimizer", "Server", "State", "Worker")]
ARRAYS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.float32)}
ONES = {name: np.ones_like(array) for name, array in ARRAYS.items()}
END = types_pb2.StreamEnd()


@pytest.fixture
def job(foreign: Any) -> Any:
    return foreign.ready(ARRAYS)


def test_health_answers_for_the_server_and_every_service(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", *SERVICES):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=20)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services_and_knows_their_files(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest
    asked = [request(list_services=""), request(file_containing_symbol="optserve.v1.DataService")]
    listed, described = stub.ServerReflectionInfo(iter(asked), timeout=20)
    names = {service.name for service in listed.list_services_response.service}
    assert set(SERVICES) | {"grpc.health.v1.Health"} <= names
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(raw) for raw in described.file_descriptor_response.file_descriptor_proto
    ]
    assert "optserve/v1/data.proto" in {file.name for file in files}


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/optserve.v1.JobService/Nothing")(b"", timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_get_server_describes_it(foreign: Any, app: App) -> None:
    found = foreign.server.GetServer(server_pb2.GetServerRequest(), timeout=20)
    assert found.backend == "numpy"
    assert found.version
    assert uuid.UUID(found.start_id)
    assert not found.has_data_dir
    assert (found.jobs, found.streams, found.max_streams) == (0, 0, 256)


def test_a_job_is_described(job: Any) -> None:
    found = job.jobs.GetJob(jobs_pb2.GetJobRequest(job="j"), timeout=20).job
    assert found.initialized
    assert found.spec.optimizer == "SGD"
    assert found.spec.lease_seconds == 30
    assert found.spec.round_timeout_seconds == 1800
    assert found.position.version == 2
    assert [(member.name, member.rank, member.alive) for member in found.members] == [("rank0", 0, True)]
    assert [(entry.name, tuple(entry.shape), entry.offset) for entry in found.layout.parameters] == [
        ("w", (2, 3), 0),
        ("b", (3,), 32),
    ]
    assert [(place.begin, place.end, place.endpoint) for place in found.layout.placements] == [(0, 64, "")]
    assert [entry.name for entry in found.groups[0].hyperparameters][:2] == ["lr", "momentum"]
    assert found.state_bytes == 256


def test_jobs_are_listed_by_name_without_layouts(foreign: Any) -> None:
    for name in ("b", "user/a", "a"):
        foreign.create(ARRAYS, name=name)
    found = foreign.jobs.ListJobs(jobs_pb2.ListJobsRequest(), timeout=20).jobs
    assert [entry.spec.name for entry in found] == ["a", "b", "user/a"]
    assert not any(entry.layout.arrays for entry in found)


def test_creating_again_with_the_same_id_is_the_same_call(foreign: Any) -> None:
    spec = foreign.spec(ARRAYS)
    request = jobs_pb2.CreateJobRequest(job_id=str(uuid.uuid4()), session_id=foreign.session_id, spec=spec)
    first, again = (foreign.jobs.CreateJob(request, timeout=20) for _ in range(2))
    assert first.created
    assert again.created
    assert first.job.job_id == again.job.job_id
    foreign.job, foreign.arrays = first.job, ARRAYS
    foreign.initialize()
    assert not foreign.jobs.CreateJob(request, timeout=20).created


def test_initialising_again_changes_nothing(foreign: Any) -> None:
    foreign.create(ARRAYS)
    first = foreign.initialize()
    assert foreign.initialize() == first
    np.testing.assert_array_equal(foreign.weights()["w"], ARRAYS["w"])


def test_join_waits_for_the_initial_values_up_to_its_deadline(foreign: Any, failed: Any) -> None:
    foreign.create(ARRAYS)
    request = workers_pb2.JoinRequest(job_id=foreign.job.job_id, session_id="other")
    found = failed(lambda: foreign.workers.Join(request, timeout=1.0))
    assert found.reason == "JOB_NOT_INITIALIZED"
    assert "'j'" in found.message
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(foreign.workers.Join(request, timeout=20)))
    waiting.start()
    foreign.initialize()
    waiting.join(20)
    assert answers[0].rank == 0


@pytest.mark.parametrize("attempt", ["Pull", "ListGroups", "GetState", "SaveCheckpoint", "UpdateGroup"])
def test_before_the_initial_values_a_job_cannot_be_read_or_changed(foreign: Any, failed: Any, attempt: str) -> None:
    foreign.create(ARRAYS)
    job_id = foreign.job.job_id
    calls = {
        "Pull": lambda: next(foreign.data.Pull(data_pb2.PullRequest(job_id=job_id), timeout=20)),
        "GetState": lambda: next(foreign.state.GetState(state_pb2.GetStateRequest(job_id=job_id), timeout=20)),
        "SaveCheckpoint": lambda: foreign.checkpoints.SaveCheckpoint(
            checkpoints_pb2.SaveCheckpointRequest(job_id=job_id, name="c"), timeout=20
        ),
        "UpdateGroup": lambda: foreign.optimizer.UpdateGroup(
            optimizer_pb2.UpdateGroupRequest(call=foreign.identity()), timeout=20
        ),
    }
    if attempt == "ListGroups":
        assert foreign.optimizer.ListGroups(optimizer_pb2.ListGroupsRequest(job_id=job_id), timeout=20).groups
    else:
        assert failed(calls[attempt]).reason == "JOB_NOT_INITIALIZED"


def test_wait_for_version(job: Any, failed: Any) -> None:
    request = jobs_pb2.WaitForVersionRequest(job_id=job.job.job_id, version=3, timeout_seconds=0.05)
    found = failed(lambda: job.jobs.WaitForVersion(request, timeout=20))
    assert found.reason == "DEADLINE_EXCEEDED"
    assert "version 3" in found.message
    request.timeout_seconds = 20
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(job.jobs.WaitForVersion(request, timeout=20)))
    waiting.start()
    job.push(ONES)
    waiting.join(20)
    assert answers[0].position.version == 3


def test_events_tell_what_happened(job: Any) -> None:
    job.push(ONES, metrics={"loss": 0.5})
    request = jobs_pb2.ListEventsRequest(job_id=job.job.job_id)
    events = job.jobs.ListEvents(request, timeout=20).events
    assert [event.kind for event in events] == ["initialized", "joined", "round"]
    assert [event.index for event in events] == [1, 2, 3]
    assert dict(events[-1].metrics) == {"loss": 0.5}
    request.after = 3
    request.wait_seconds = 20
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(job.jobs.ListEvents(request, timeout=20)))
    waiting.start()
    job.push(ONES)
    waiting.join(20)
    assert [event.index for event in answers[0].events] == [4]


def test_a_cancelled_wait_frees_its_thread(job: Any, app: App, until: Callable[..., Any]) -> None:
    request = jobs_pb2.WaitForVersionRequest(job_id=job.job.job_id, version=99, timeout_seconds=3600)
    call = job.jobs.WaitForVersion.future(request, timeout=3600)
    host = app.registry.find("j").host
    until(lambda: len(host.changed._waiters) == 1, "the call waits")
    call.cancel()
    until(lambda: not host.changed._waiters, "the wait ends")


def test_deleting_is_repeatable_and_final(job: Any, failed: Any) -> None:
    request = jobs_pb2.DeleteJobRequest(job_id=job.job.job_id)
    for _ in range(2):
        job.jobs.DeleteJob(request, timeout=20)
    assert failed(lambda: job.push(ONES)).reason == "JOB_NOT_FOUND"
    job.ready(ARRAYS)


def test_an_unnamed_job_ends_with_its_creators_leave(foreign: Any) -> None:
    foreign.create(ARRAYS, name="")
    foreign.initialize()
    request = workers_pb2.HeartbeatRequest(job_id=foreign.job.job_id, session_id=foreign.session_id)
    foreign.workers.Heartbeat(request, timeout=20)
    foreign.workers.Leave(workers_pb2.LeaveRequest(job_id=foreign.job.job_id, session_id=foreign.session_id), timeout=20)
    assert not foreign.jobs.ListJobs(jobs_pb2.ListJobsRequest(), timeout=20).jobs


def test_an_unnamed_job_ends_with_its_creators_lease(foreign: Any, app: App, until: Callable[..., Any]) -> None:
    foreign.create(ARRAYS, name="", lease_seconds=0.05)
    foreign.initialize()

    def gone() -> bool:
        app.housekeeping()
        return not app.registry.all()

    until(gone, "the job ends")


def test_groups_are_edited_once(job: Any, build: Any, failed: Any) -> None:
    admin = job.another()
    request = optimizer_pb2.UpdateGroupRequest(
        call=admin.identity(), group=0, hyperparameters=build.values({"lr": 0.25, "momentum": 0.5})
    )
    first = job.optimizer.UpdateGroup(request, timeout=20)
    assert job.optimizer.UpdateGroup(request, timeout=20) == first
    groups = job.optimizer.ListGroups(optimizer_pb2.ListGroupsRequest(job_id=job.job.job_id), timeout=20).groups
    shown = {entry.name: entry.value for entry in groups[0].hyperparameters}
    assert shown["lr"].number == 0.25
    assert list(groups[0].parameters) == ["w", "b"]
    request.call.seq = 2
    request.group = 1
    found = failed(lambda: job.optimizer.UpdateGroup(request, timeout=20))
    assert found.reason == "UNKNOWN_PARAMETER"
    assert "there is no group 1" in found.message


def test_a_schedule_is_set_stepped_read_and_removed(job: Any, build: Any, failed: Any) -> None:
    admin = job.another()

    def set_schedule(name: str, **arguments: Any) -> Any:
        request = optimizer_pb2.SetScheduleRequest(call=admin.identity(), name=name, arguments=build.values(arguments))
        answer = job.optimizer.SetSchedule(request, timeout=20)
        admin.seq += 1
        return answer.schedule

    assert failed(lambda: set_schedule("SteppLR", gamma=0.5)).reason == "UNKNOWN_SCHEDULE"
    assert failed(lambda: set_schedule("StepLR", step_size=1, steps=1)).reason == "UNKNOWN_SCHEDULE"
    assert failed(lambda: set_schedule("StepLR", step_size=0)).reason == "INVALID_HYPERPARAMETER"
    schedule = set_schedule("StepLR", step_size=1, gamma=0.5)
    assert (schedule.name, schedule.last_epoch, list(schedule.learning_rates)) == ("StepLR", 0, [1.0])
    step = optimizer_pb2.StepScheduleRequest(call=admin.identity())
    for _ in range(2):
        schedule = job.optimizer.StepSchedule(step, timeout=20).schedule
        assert (schedule.last_epoch, list(schedule.learning_rates)) == (1, [0.5])
    admin.seq += 1
    read = optimizer_pb2.GetScheduleRequest(job_id=job.job.job_id)
    assert job.optimizer.GetSchedule(read, timeout=20).schedule == schedule
    assert list(job.push(ONES).learning_rates) == [0.5]
    set_schedule("")
    assert job.optimizer.GetSchedule(read, timeout=20).schedule.name == ""
    step.call.CopyFrom(admin.identity())
    assert failed(lambda: job.optimizer.StepSchedule(step, timeout=20)).reason == "INVALID_ARGUMENT"


def test_state_goes_out_and_in(foreign: Any) -> None:
    foreign.ready(ARRAYS, optimizer="adam", defaults={"lr": 0.1})
    foreign.push(ONES)
    items = list(foreign.state.GetState(state_pb2.GetStateRequest(job_id=foreign.job.job_id), timeout=20))
    begin = items[0].begin
    assert begin.has_step
    assert dict(begin.steps) == {"w": 1.0, "b": 1.0}
    assert [(entry.slot, entry.parameter) for entry in begin.entries] == [
        ("exp_avg", "w"),
        ("exp_avg_sq", "w"),
        ("exp_avg", "b"),
        ("exp_avg_sq", "b"),
    ] or {(entry.slot, entry.parameter) for entry in begin.entries} == {
        (slot, name) for slot in ("exp_avg", "exp_avg_sq") for name in ARRAYS
    }
    assert items[-1].WhichOneof("content") == "end"
    foreign.push(ONES)
    admin = foreign.another()
    load = state_pb2.LoadStateBegin(
        call=admin.identity(), groups=begin.groups, steps=begin.steps, entries=begin.entries, bundle_bytes=begin.bundle_bytes
    )
    requests = [
        state_pb2.LoadStateRequest(begin=load),
        *(state_pb2.LoadStateRequest(chunk=item.chunk) for item in items[1:-1]),
        state_pb2.LoadStateRequest(end=END),
    ]
    first = foreign.state.LoadState(iter(requests), timeout=20)
    assert foreign.state.LoadState(iter(requests), timeout=20) == first
    again = list(foreign.state.GetState(state_pb2.GetStateRequest(job_id=foreign.job.job_id), timeout=20))
    assert again[0].begin.steps == begin.steps
    assert [item.chunk for item in again[1:-1]] == [item.chunk for item in items[1:-1]]


def test_a_checkpoint_is_saved_listed_verified_downloaded_and_restored(job: Any, failed: Any) -> None:
    job_id = job.job.job_id
    save = checkpoints_pb2.SaveCheckpointRequest(job_id=job_id, name="c-1")
    saved = job.checkpoints.SaveCheckpoint(save, timeout=20).checkpoint
    assert job.checkpoints.SaveCheckpoint(save, timeout=20).checkpoint == saved
    assert saved.position == job.position()
    weights = job.weights()
    job.push(ONES)
    assert failed(lambda: job.checkpoints.SaveCheckpoint(save, timeout=20)).reason == "CHECKPOINT_EXISTS"
    listed = job.checkpoints.ListCheckpoints(checkpoints_pb2.ListCheckpointsRequest(job_id=job_id), timeout=20).checkpoints
    assert list(listed) == [saved]
    verify = checkpoints_pb2.VerifyCheckpointRequest(job_id=job_id, name="c-1")
    assert job.checkpoints.VerifyCheckpoint(verify, timeout=20).checkpoint == saved

    download = checkpoints_pb2.DownloadCheckpointRequest(job_id=job_id, name="c-1")
    items = list(job.checkpoints.DownloadCheckpoint(download, timeout=20))
    files = items[0].begin.files
    assert sum(file.size for file in files) == saved.size
    assert items[-1].WhichOneof("content") == "end"
    received = dict.fromkeys(range(len(files)), b"")
    for item in items[1:-1]:
        received[item.chunk.array_id] += item.chunk.data
    assert {index: len(raw) for index, raw in received.items()} == {i: file.size for i, file in enumerate(files)}

    admin = job.another()
    restore = checkpoints_pb2.RestoreCheckpointRequest(call=admin.identity(), name="c-1")
    position = job.checkpoints.RestoreCheckpoint(restore, timeout=20).position
    assert (position.version, position.step) == (saved.position.version, saved.position.step)
    assert position.lineage_id != saved.position.lineage_id
    assert job.checkpoints.RestoreCheckpoint(restore, timeout=20).position == position
    for name, found in job.weights().items():
        np.testing.assert_array_equal(found, weights[name])

    upload = jobs_pb2.CreateJobFromCheckpointBegin(
        job_id=str(uuid.uuid4()), session_id=admin.session_id, name="again", files=files
    )
    request = jobs_pb2.CreateJobFromCheckpointRequest
    requests = [request(begin=upload), *(request(chunk=item.chunk) for item in items[1:-1]), request(end=END)]
    made = job.jobs.CreateJobFromCheckpoint(iter(requests), timeout=20).job
    assert made.spec.name == "again"
    assert made.initialized
    assert job.jobs.CreateJobFromCheckpoint(iter(requests), timeout=20).job.job_id == made.job_id
    upload.job_id = str(uuid.uuid4())
    requests[0] = request(begin=upload)
    assert failed(lambda: job.jobs.CreateJobFromCheckpoint(iter(requests), timeout=20)).reason == "JOB_EXISTS"

    delete = checkpoints_pb2.DeleteCheckpointRequest(call=admin.identity(seq=2), name="c-1")
    for _ in range(2):
        job.checkpoints.DeleteCheckpoint(delete, timeout=20)
    delete.call.seq = 3
    assert failed(lambda: job.checkpoints.DeleteCheckpoint(delete, timeout=20)).reason == "CHECKPOINT_NOT_FOUND"


def test_a_client_that_saw_more_than_the_job_has_is_told(job: Any, failed: Any) -> None:
    job_id = job.job.job_id
    job.checkpoints.SaveCheckpoint(checkpoints_pb2.SaveCheckpointRequest(job_id=job_id, name="c"), timeout=20)
    job.push(ONES)
    seen = job.push(ONES).position
    admin = job.another()
    restore = checkpoints_pb2.RestoreCheckpointRequest(call=admin.identity(), name="c")
    position = job.checkpoints.RestoreCheckpoint(restore, timeout=20).position
    for call in (
        lambda: next(job.data.Pull(data_pb2.PullRequest(job_id=job_id, seen=seen), timeout=20)),
        lambda: job.push(ONES, call=job.identity(seen=seen)),
        lambda: job.checkpoints.SaveCheckpoint(
            checkpoints_pb2.SaveCheckpointRequest(job_id=job_id, name="d", seen=seen), timeout=20
        ),
    ):
        found = failed(call)
        assert found.reason == "ROLLED_BACK"
        assert (found.metadata["from"], found.metadata["to"]) == ("4", "2")
        assert found.metadata["lineage_id"] == position.lineage_id
    assert job.push(ONES, call=job.identity(seen=position)).position.step == 1


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 200, "a\0b"])
def test_a_checkpoint_name_that_is_a_path_is_refused(job: Any, failed: Any, name: str) -> None:
    save = checkpoints_pb2.SaveCheckpointRequest(job_id=job.job.job_id, name=name)
    assert failed(lambda: job.checkpoints.SaveCheckpoint(save, timeout=20)).reason == "INVALID_NAME"
    restore = checkpoints_pb2.RestoreCheckpointRequest(call=job.another().identity(), name=name)
    assert failed(lambda: job.checkpoints.RestoreCheckpoint(restore, timeout=20)).reason == "INVALID_NAME"
