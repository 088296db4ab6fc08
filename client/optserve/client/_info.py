"""What the client tells about servers, jobs and steps: frozen records made of the contract's messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optserve.client import _schedule_state
from optserve.v1 import checkpoints_pb2, data_pb2, jobs_pb2, optimizer_pb2, server_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire.arguments import ScheduleValue, from_arguments
from optserve.wire.layout import Layout
from optserve.wire.values import Value, from_hyperparameters

CONSISTENCY: Mapping[str, jobs_pb2.Consistency] = {
    "sync": jobs_pb2.CONSISTENCY_SYNC,
    "async": jobs_pb2.CONSISTENCY_ASYNC,
}
ON_NONFINITE: Mapping[str, jobs_pb2.OnNonfinite] = {
    "reject": jobs_pb2.ON_NONFINITE_REJECT,
    "skip": jobs_pb2.ON_NONFINITE_SKIP,
}
ON_MISSING: Mapping[str, jobs_pb2.OnMissing] = {
    "drop": jobs_pb2.ON_MISSING_DROP,
    "wait": jobs_pb2.ON_MISSING_WAIT,
    "fail": jobs_pb2.ON_MISSING_FAIL,
}


def _word(words: Mapping[str, int], number: int) -> str:
    """The word of an enum's number; unspecified means the first one."""
    return next((word for word, value in words.items() if value == number), next(iter(words)))


@dataclass(frozen=True)
class Position:
    """Where a job stands. `version` counts records, `step` optimizer steps; `durable_version` survives what was promised."""

    lineage_id: str
    version: int
    step: int
    durable_version: int

    @classmethod
    def from_proto(cls, position: pb.Position) -> Position:
        return cls(position.lineage_id, position.version, position.step, position.durable_version)


@dataclass(frozen=True)
class ServerInfo:
    """What a server is. `start_id` differs for every start; `backend` is "numba", "numpy" or "cupy"."""

    version: str
    start_id: str
    backend: str
    has_data_dir: bool
    jobs: int
    uptime_seconds: float
    streams: int
    max_streams: int

    @classmethod
    def from_proto(cls, server: server_pb2.GetServerResponse) -> ServerInfo:
        return cls(
            server.version,
            server.start_id,
            server.backend,
            server.has_data_dir,
            server.jobs,
            server.uptime_seconds,
            server.streams,
            server.max_streams,
        )


@dataclass(frozen=True)
class Member:
    """A worker of a job. `alive`: its lease runs."""

    name: str
    rank: int
    epoch: int
    alive: bool


@dataclass(frozen=True)
class JobInfo:
    """A job as it stood when asked. `name` is empty for an unnamed job; `layout` is empty in the list of all jobs.

    `groups` have torch's keys, with parameter names under "params"; `metrics` are the means over the ranks in the last round
    that brought any. `clip_grad_norm`, `clip_grad_value` and `accumulation` are the rules of now; `accumulated` rounds are
    summed up and wait for the step.
    """

    job_id: str
    name: str
    optimizer: str
    workers: int
    consistency: str
    on_nonfinite: str
    on_missing: str
    quorum: int
    round_timeout_seconds: float
    lease_seconds: float
    position: Position
    groups: tuple[Mapping[str, Value | list[str]], ...]
    members: tuple[Member, ...]
    metrics: Mapping[str, float]
    initialized: bool
    backend: str
    state_bytes: int
    clip_grad_norm: float | None
    clip_grad_value: float | None
    accumulation: int
    accumulated: int
    layout: Layout = field(repr=False)

    @classmethod
    def from_proto(cls, job: jobs_pb2.JobInfo) -> JobInfo:
        return cls(
            job_id=job.job_id,
            name=job.spec.name,
            optimizer=job.spec.optimizer,
            workers=job.spec.workers,
            consistency=_word(CONSISTENCY, job.spec.consistency),
            on_nonfinite=_word(ON_NONFINITE, job.spec.on_nonfinite),
            on_missing=_word(ON_MISSING, job.spec.on_missing),
            quorum=job.spec.quorum,
            round_timeout_seconds=job.spec.round_timeout_seconds,
            lease_seconds=job.spec.lease_seconds,
            position=Position.from_proto(job.position),
            groups=tuple(group_entries(group) for group in job.groups),
            members=tuple(Member(member.name, member.rank, member.epoch, member.alive) for member in job.members),
            metrics=dict(sorted(job.metrics.items())),
            initialized=job.initialized,
            backend=job.backend,
            state_bytes=job.state_bytes,
            clip_grad_norm=job.rules.clip_grad_norm if job.rules.HasField("clip_grad_norm") else None,
            clip_grad_value=job.rules.clip_grad_value if job.rules.HasField("clip_grad_value") else None,
            accumulation=job.rules.accumulation or 1,
            accumulated=job.accumulated,
            layout=Layout.from_proto(job.layout),
        )


def group_entries(group: pb.Group) -> dict[str, Value | list[str]]:
    """A group as torch shows it: params first, then the hyperparameters in torch's order."""
    return {"params": list(group.parameters), **from_hyperparameters(group.hyperparameters)}


@dataclass(frozen=True)
class Checkpoint:
    """A saved checkpoint. `time_seconds` counts from 1970."""

    name: str
    position: Position
    size_bytes: int
    time_seconds: float

    @classmethod
    def from_proto(cls, checkpoint: checkpoints_pb2.Checkpoint) -> Checkpoint:
        return cls(checkpoint.name, Position.from_proto(checkpoint.position), checkpoint.size, checkpoint.time_seconds)


@dataclass(frozen=True)
class Event:
    """Something that happened to a job. `index` counts since the server started; `time_seconds` counts from 1970.

    `metrics` are a round's: the means over the ranks.
    """

    index: int
    time_seconds: float
    kind: str
    position: Position
    message: str
    fields: Mapping[str, str]
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_proto(cls, event: jobs_pb2.Event) -> Event:
        position = Position.from_proto(event.position)
        fields, metrics = dict(event.fields), dict(sorted(event.metrics.items()))
        return cls(event.index, event.time_seconds, event.kind, position, event.message, fields, metrics)


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule and where it stands. `last_epoch` is torch's; `learning_rates` has one a group.

    `arguments` are without functions; `schedulers` are (class name, arguments) pairs.
    """

    name: str
    arguments: Mapping[str, ScheduleValue]
    last_epoch: int
    learning_rates: tuple[float, ...]
    _state: str = field(default="{}", repr=False)

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict, which a torch scheduler of that class loads and goes on from; without functions, as there."""
        return _schedule_state.from_text(self._state)

    @classmethod
    def from_proto(cls, schedule: optimizer_pb2.Schedule) -> Schedule | None:
        """None if there is none."""
        if not schedule.name:
            return None
        arguments = from_arguments(schedule.arguments)
        return cls(schedule.name, arguments, schedule.last_epoch, tuple(schedule.learning_rates), schedule.state)


@dataclass(frozen=True)
class StepInfo:
    """What came of a push.

    `lr` has one entry a group, as the step used them. `grad_norm` is the Euclidean norm of the averaged gradient over all
    groups, before it was clipped; `clip_factor` is what it was multiplied with for that. `skipped`: nothing was applied,
    `skip_reason` says why. `accumulated` rounds are summed up and wait for the step; 0 right after one. `evaluations`: how
    often the ranks called their closures for the step, 0 without. `metrics` are means over the ranks, by weight. `waited_for`
    is the rank that came last, if this worker waited for it; `ranks` are those that contributed.
    """

    step: int
    version: int
    durable_version: int
    lr: tuple[float, ...]
    grad_norm: float
    skipped: bool
    skip_reason: str
    waited_for: int | None
    waited_seconds: float
    ranks: tuple[int, ...]
    accumulated: int
    clip_factor: float
    evaluations: int
    metrics: Mapping[str, float]

    @classmethod
    def from_proto(cls, result: data_pb2.PushResult) -> StepInfo:
        return cls(
            step=result.position.step,
            version=result.position.version,
            durable_version=result.position.durable_version,
            lr=tuple(result.learning_rates),
            grad_norm=result.grad_norm,
            skipped=result.skipped,
            skip_reason=result.skip_reason,
            waited_for=result.waited_for_rank if result.HasField("waited_for_rank") else None,
            waited_seconds=result.waited_seconds,
            ranks=tuple(result.ranks),
            accumulated=result.accumulated,
            clip_factor=result.clip_factor,
            evaluations=result.evaluations,
            metrics=dict(sorted(result.metrics.items())),
        )
