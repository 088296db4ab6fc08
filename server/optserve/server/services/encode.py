"""From the server's own terms to messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from optserve.server import schedules
from optserve.server.durability.checkpoints import Info
from optserve.server.jobs import Job
from optserve.server.records import Position, Result
from optserve.server.rounds.host import JobHost
from optserve.server.rounds.tickets import Done, Waiting
from optserve.v1 import checkpoints_pb2, data_pb2, jobs_pb2, optimizer_pb2, types_pb2
from optserve.wire.arguments import to_arguments
from optserve.wire.values import to_hyperparameters


def groups(host: JobHost, with_names: bool = True) -> list[types_pb2.Group]:
    """The groups with the hyperparameters of now. With the job's lock held."""
    return [group(host.job, index, with_names) for index in range(len(host.job.groups))]


def group(job: Job, index: int, with_names: bool) -> types_pb2.Group:
    names = job.group_names(index) if with_names else []
    return types_pb2.Group(hyperparameters=to_hyperparameters(job.groups[index]), parameters=names)


def changed_groups(
    host: JobHost, request: data_pb2.PushBegin | data_pb2.PullWeights | optimizer_pb2.StepScheduleRequest
) -> types_pb2.ChangedGroups | None:
    """What the caller has not been told of the groups as they are now; None if that is nothing, or if it does not ask."""
    if not request.HasField("groups_version"):
        return None
    seen = request.seen if isinstance(request, data_pb2.PullWeights) else request.call.seen
    with host.changed:
        job = host.job
        changed = job.groups_since(seen.lineage_id, request.groups_version)
        if not changed:
            return None
        return types_pb2.ChangedGroups(
            position=job.position.to_proto(), groups={index: group(job, index, is_new) for index, is_new in changed.items()}
        )


def job_info(host: JobHost, with_layout: bool = True) -> jobs_pb2.JobInfo:
    """A job as it stands."""
    with host.changed:
        job = host.job
        return jobs_pb2.JobInfo(
            job_id=job.job_id,
            spec=_without_parameters(job.plan.spec),
            position=job.position.to_proto(),
            layout=job.store.layout.to_proto() if with_layout else None,
            groups=groups(host, with_layout),
            members=members(host),
            initialized=job.initialized,
            backend=job.store.backend.name,
            metrics=dict(job.metrics),
            state_bytes=job.store.state_bytes,
            rules=job.rules.to_proto(),
            accumulated=job.store.window.rounds,
        )


def _without_parameters(spec: jobs_pb2.JobSpec) -> jobs_pb2.JobSpec:
    """The layout names them."""
    short = jobs_pb2.JobSpec()
    short.CopyFrom(spec)
    for group in short.groups:
        del group.parameters[:]
    return short


def members(host: JobHost) -> list[types_pb2.Member]:
    return [
        types_pb2.Member(name=member.name, rank=member.rank, epoch=member.epoch, alive=host.alive(member))
        for member in sorted(host.job.sessions.members.values(), key=lambda member: member.rank)
    ]


def schedule(document: Mapping[str, Any]) -> optimizer_pb2.Schedule:
    """From `Job.schedule_document()`."""
    rates = document["learning_rates"]
    if document["schedule"] is None:
        return optimizer_pb2.Schedule(learning_rates=rates)
    state = schedules.from_document(document["schedule"])
    return optimizer_pb2.Schedule(
        name=state.name,
        arguments=to_arguments(schedules.described(state)),
        last_epoch=state.last_epoch,
        learning_rates=rates,
        awaited=document["awaited"],
        setting=state.setting,
        state=json.dumps(document["schedule"]["state"]),
    )


def push_result(host: JobHost, begin: data_pb2.PushBegin, done: Done) -> data_pb2.PushResult:
    value = done.result.value
    return data_pb2.PushResult(
        seq=begin.call.seq,
        position=done.result.position.to_proto(),
        learning_rates=value["learning_rates"],
        grad_norm=value["grad_norm"],
        skipped=bool(value["skip_reason"]),
        skip_reason=value["skip_reason"],
        ranks=value["ranks"],
        waited_for_rank=done.waited_for,
        waited_seconds=done.waited_seconds,
        changed_groups=changed_groups(host, begin),
        accumulated=value["accumulated"],
        clip_factor=value["clip_factor"],
        evaluations=value["evaluations"],
        metrics=value["metrics"],
    )


def waiting(found: Waiting) -> data_pb2.RoundWaiting:
    missing = [
        types_pb2.Member(rank=rank, alive=alive, name=member.name if member else "", epoch=member.epoch if member else 0)
        for rank, member, alive in found.missing
    ]
    return data_pb2.RoundWaiting(round=found.round, missing=missing, waited_seconds=found.waited_seconds)


def checkpoint(info: Info) -> checkpoints_pb2.Checkpoint:
    position = Position(**{key: info.position[key] for key in ("lineage_id", "version", "step")})
    return checkpoints_pb2.Checkpoint(
        name=info.name, position=position.to_proto(), size=info.size, time_seconds=info.time_seconds
    )


def position(result: Result) -> types_pb2.Position:
    return result.position.to_proto()
