"""A job: its weights, groups, schedule, state and checkpoints."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from optserve.client import _bundles, _checkpoint_files, _environment, _functions, _schedule_state, _spec, _state_dict, _weights
from optserve.client._caller import Caller
from optserve.client._connection import BULK_SECONDS, Answer, Connection
from optserve.client._functions import Functions, Given, LrLambdas
from optserve.client._groups import ReadOnlyList, advice, read_only
from optserve.client._info import Checkpoint, Event, JobInfo, Position, Schedule, group_entries
from optserve.client._spec import ParamGroup
from optserve.client._state_dict import StateDict
from optserve.client._weights import Destination, Weights
from optserve.client._worker import Worker
from optserve.client._worker_session import WorkerSession
from optserve.v1 import checkpoints_pb2, data_pb2, jobs_pb2, optimizer_pb2, state_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire.arguments import to_arguments
from optserve.wire.errors import (
    InvalidArgumentError,
    ProtocolViolationError,
    ReadOnlyError,
    UnknownParameterError,
    UnknownScheduleError,
)
from optserve.wire.layout import Layout
from optserve.wire.methods import Item
from optserve.wire.values import to_hyperparameters

_SLACK_SECONDS = 10.0
"""A call that waits on the server ends there first."""


class Job:
    """A job on a server, made by Server.create_job() or Server.job().

    Its calls are administrative: applied once, at once, whoever makes them. Thread safe. Each of them raises JobNotFoundError
    if the job was deleted, JobLostError if its state went with the server's memory, and RolledBackError, once, if the job
    stands before what this client saw.
    """

    def __init__(self, connection: Connection, info: jobs_pb2.JobInfo, caller: Caller | None = None) -> None:
        self._connection = connection
        self._caller = caller or Caller(connection, info.job_id, info.spec.name)
        self._spec = info.spec
        self._layout = Layout.from_proto(info.layout)
        self._restored: set[str] = set()
        self._functions = Functions()
        self._saw(info.position)

    def __repr__(self) -> str:
        return f"<Job {self._caller.shown} ({self._spec.optimizer}) on {self._connection.address}>"

    @property
    def name(self) -> str:
        """Empty for an unnamed job."""
        return self._spec.name

    @property
    def job_id(self) -> str:
        return self._caller.session.job_id

    @property
    def optimizer(self) -> str:
        """As it was named at creation."""
        return self._spec.optimizer

    def info(self) -> JobInfo:
        """The job as it stands, asked of the server."""
        return JobInfo.from_proto(self._get())

    def position(self) -> Position:
        """Where the job stands, asked of the server."""
        return Position.from_proto(self._get().position)

    def pull(self, names: Iterable[str] | None = None, out: Weights | None = None) -> Weights:
        """The weights of one whole version without joining: all, or those named. See Worker.pull for `out`."""
        wanted = None if names is None else list(names)
        if wanted == []:
            return {} if out is None else out
        if wanted is not None and not set(wanted) <= self._layout.by_name.keys():
            self._get()  # somebody may have added a group
        while True:
            destination = Destination(self._layout, wanted, out)
            seen = self._caller.session.seen
            request = data_pb2.PullRequest(job_id=self.job_id, parameters=wanted or (), seen=seen)
            self._saw(self._caller.download(request, partial(_read_weights, destination)))
            if destination.filled:
                return destination.finished()
            self._get()

    def wait_for_version(self, version: int, timeout_seconds: float = 60.0) -> Position:
        """Waits until the job's version is at least `version`. DeadlineExceededError after timeout_seconds."""
        request = jobs_pb2.WaitForVersionRequest(job_id=self.job_id, version=version, timeout_seconds=timeout_seconds)
        answer = self._caller.read(request, jobs_pb2.WaitForVersionResponse, timeout_seconds + _SLACK_SECONDS)
        return self._saw(answer.position)

    def join(self, name: str | None = None, rank: int | None = None, timeout_seconds: float = 300.0) -> Worker:
        """Becomes a worker; waits for the initial values and the kernels, JobNotInitializedError after timeout_seconds.

        rank: RANK of the environment if None, and without that 0 in a job of one worker, else the lowest free rank. name:
        "rank<rank>" if None, so that a replacement fences the worker that it replaces. TooManyWorkersError, RankHeldError.
        """
        rank = _environment.rank() if rank is None else operator.index(rank)
        if rank is not None and not 0 <= rank < 1 << 32:
            raise InvalidArgumentError(f"rank is {rank}; ranks count from 0")
        session = WorkerSession(self._caller, name or "", rank, self._restored)
        self._caller.told(lambda: session.join(timeout_seconds))
        return Worker(session, self._functions)

    @property
    def param_groups(self) -> ReadOnlyList:
        """torch's list of dicts, asked of the server: "params" (names) first, then the hyperparameters in torch's order.

        Read-only: assigning raises ReadOnlyError, which names the call that edits.
        """
        answer = self._caller.read(optimizer_pb2.ListGroupsRequest(job_id=self.job_id), optimizer_pb2.ListGroupsResponse)
        self._saw(answer.position)
        return read_only((group_entries(group) for group in answer.groups), "job")

    @param_groups.setter
    def param_groups(self, _: object) -> NoReturn:
        raise ReadOnlyError(advice("job"))

    def update_group(self, index: int, /, **hyperparameters: object) -> Position:
        """Edits hyperparameters of one group, from the version in the answer on.

        UnknownParameterError for the index, UnknownHyperparameterError, InvalidHyperparameterError: nothing changed.
        """
        index = operator.index(index)
        if not 0 <= index < 1 << 32:
            raise UnknownParameterError(f"there is no param group {index}; they count from 0")
        changes = to_hyperparameters(hyperparameters)
        answer = self._caller.mutate(
            lambda call: self._connection.call(
                optimizer_pb2.UpdateGroupRequest(call=call, group=index, hyperparameters=changes),
                optimizer_pb2.UpdateGroupResponse,
            )
        )
        return self._saw(answer.position)

    def add_param_group(self, param_group: ParamGroup) -> Position:
        """Adds {"params": {name: array}, "lr": ..., ...}; the arrays are the initial values."""
        group = _spec.group(param_group)
        self._layout.extended(len(self._layout.arrays), [(k, v.shape, v.dtype) for k, v in group.values.items()])
        answer = self._caller.mutate(
            lambda call: self._connection.upload(
                optimizer_pb2.AddGroupRequest, _bundles.group_items(call, group), optimizer_pb2.AddGroupResponse
            )
        )
        self._layout = Layout.from_proto(answer.layout)
        return self._saw(answer.position)

    @property
    def lr_schedule(self) -> Schedule | None:
        """The schedule and where it stands, asked of the server; None if there is none."""
        return Schedule.from_proto(self._get_schedule())

    def set_lr_schedule(self, name: str | None, /, **arguments: object) -> Schedule | None:
        """Sets or replaces the schedule by torch's class name and arguments; None removes it.

        One number for all groups, or a list of one a group where torch takes that. `schedulers` of SequentialLR and
        ChainedScheduler is a list of (class name, arguments) pairs. The functions of LambdaLR and MultiplicativeLR stay in
        this process, for this Job and the workers that joined from it; only what they give is sent, step by step.

        UnknownScheduleError for the name or an argument's, InvalidHyperparameterError for a value, InvalidArgumentError for
        more than a message can tell of: nothing changed.
        """
        if name is not None and not (isinstance(name, str) and name):
            raise UnknownScheduleError(f"schedule {name!r} is not known; it must be torch's class name as text, or None")
        rest, functions = _functions.split(name or "", arguments)
        wired = to_arguments(rest)

        def call(given: Given) -> optimizer_pb2.SetScheduleResponse:
            request = optimizer_pb2.SetScheduleRequest(name=name or "", arguments=wired, factors=given.factors)
            return self._caller.mutate(lambda identity: self._identified(request, identity, optimizer_pb2.SetScheduleResponse))

        answer = self._functions.create(functions, call)
        self._functions.hold(answer.schedule.setting, functions)
        self._functions.told(answer.schedule)
        self._saw(answer.position)
        return Schedule.from_proto(answer.schedule)

    def step_schedule(self, metric: float | None = None, *, lr_lambda: LrLambdas | None = None) -> Schedule | None:
        """Steps the schedule once, now; a worker's step_schedule() is counted over the ranks instead.

        metric: what ReduceLROnPlateau steps on; NaN is no improvement, as in torch. lr_lambda: the function of a LambdaLR or
        MultiplicativeLR that another process has set, or a list of one a group; a list of those in depth-first order if
        several schedules in it call functions. It is kept for later steps.

        InvalidArgumentError if there is no schedule, or for a metric that it does not take or lacks; MissingFunctionError if it
        calls functions and none were given here.
        """

        value = _functions.number(metric)

        def call(given: Given) -> optimizer_pb2.StepScheduleResponse:
            request = optimizer_pb2.StepScheduleRequest(metric=value, factors=given.factors, setting=given.setting)
            return self._caller.mutate(lambda identity: self._identified(request, identity, optimizer_pb2.StepScheduleResponse))

        answer = self._functions.step(lr_lambda, call, self._get_schedule)
        self._functions.told(answer.schedule)
        self._saw(answer.position)
        return Schedule.from_proto(answer.schedule)

    def load_lr_schedule_state_dict(self, state_dict: Mapping[str, Any]) -> Schedule | None:
        """Puts the schedule where a state_dict of its class stands: torch's own, or Schedule.state_dict(). The groups stay.

        As in torch the schedule is set before, with the same arguments; those that the state_dict holds are taken from it.
        InvalidStateDictError if it does not fit: nothing changed.
        """
        request = optimizer_pb2.LoadScheduleStateRequest(state=_schedule_state.to_text(state_dict))
        held = self._functions.held(self._get_schedule().setting)
        _schedule_state.check_functions(state_dict, held)
        answer = self._caller.mutate(
            lambda identity: self._identified(request, identity, optimizer_pb2.LoadScheduleStateResponse)
        )
        _schedule_state.load_functions(state_dict, held)
        self._functions.told(answer.schedule)
        self._saw(answer.position)
        return Schedule.from_proto(answer.schedule)

    def state_dict(self) -> StateDict:
        """torch's state_dict of one whole version: integer ids plus param_names, NumPy arrays, no parameters."""
        request = state_pb2.GetStateRequest(job_id=self.job_id)
        position, state_dict = self._caller.download(request, _bundles.read_state)
        self._saw(position)
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Position:
        """Replaces optimizer state and hyperparameters by those of a state_dict, ours or torch's own, matched by position.

        Arrays are anything NumPy takes, or torch tensors. InvalidStateDictError if it does not fit; then nothing changed.
        """
        names = [list(group["params"]) for group in self.param_groups]
        self._get()
        loading = _state_dict.parse(state_dict, names, self._layout)
        answer = self._caller.mutate(
            lambda call: self._connection.upload(
                state_pb2.LoadStateRequest, _bundles.state_items(call, loading), state_pb2.LoadStateResponse
            )
        )
        return self._saw(answer.position)

    def save_checkpoint(self, name: str, *, overwrite: bool = False) -> Checkpoint:
        """Saves parameters, state, groups and schedule, all or nothing; again at the same version it is the same checkpoint.

        CheckpointExistsError if the name stands for another version, unless `overwrite`; InvalidNameError, StorageError.
        """
        request = checkpoints_pb2.SaveCheckpointRequest(
            job_id=self.job_id, name=name, seen=self._caller.session.seen, overwrite=overwrite
        )
        answer = self._caller.read(request, checkpoints_pb2.SaveCheckpointResponse, BULK_SECONDS)
        return Checkpoint.from_proto(answer.checkpoint)

    def restore_checkpoint(self, name: str) -> Position:
        """Puts the job where a checkpoint stands, in a new lineage: other clients that saw more get RolledBackError once.

        CheckpointNotFoundError, CheckpointCorruptError, CheckpointMismatchError: nothing changed.
        """
        answer = self._caller.mutate(
            lambda call: self._connection.call(
                checkpoints_pb2.RestoreCheckpointRequest(call=call, name=name),
                checkpoints_pb2.RestoreCheckpointResponse,
                BULK_SECONDS,
            )
        )
        self._restored.add(answer.position.lineage_id)
        return self._saw(answer.position)

    def verify_checkpoint(self, name: str) -> Checkpoint:
        """Reads a checkpoint whole and compares sizes and hashes. CheckpointCorruptError says what is wrong."""
        request = checkpoints_pb2.VerifyCheckpointRequest(job_id=self.job_id, name=name)
        return Checkpoint.from_proto(
            self._caller.read(request, checkpoints_pb2.VerifyCheckpointResponse, BULK_SECONDS).checkpoint
        )

    def delete_checkpoint(self, name: str) -> None:
        """CheckpointNotFoundError if there is none."""
        answer = self._caller.mutate(
            lambda call: self._connection.call(
                checkpoints_pb2.DeleteCheckpointRequest(call=call, name=name), checkpoints_pb2.DeleteCheckpointResponse
            )
        )
        self._saw(answer.position)

    def download_checkpoint(self, name: str, path: str | Path) -> Path:
        """Writes a checkpoint's files (safetensors and a JSON manifest) into the new folder `path`, whole or not at all."""
        folder = Path(path)
        _checkpoint_files.check_free(folder)
        request = checkpoints_pb2.DownloadCheckpointRequest(job_id=self.job_id, name=name)
        self._caller.download(request, lambda items: _checkpoint_files.read(items, folder))
        return folder

    def checkpoints(self) -> list[Checkpoint]:
        """The job's checkpoints, oldest first."""
        request = checkpoints_pb2.ListCheckpointsRequest(job_id=self.job_id)
        answer = self._caller.read(request, checkpoints_pb2.ListCheckpointsResponse)
        return [Checkpoint.from_proto(entry) for entry in answer.checkpoints]

    def events(self, after: int = 0, wait_seconds: float = 0.0) -> list[Event]:
        """What happened with an index above `after`, waiting up to wait_seconds (at most 30) for something new.

        The server keeps the last thousand rounds, and the last thousand other events.
        """
        found: list[Event] = []
        while True:
            request = jobs_pb2.ListEventsRequest(job_id=self.job_id, after=after, wait_seconds=wait_seconds)
            answer = self._caller.read(request, jobs_pb2.ListEventsResponse, wait_seconds + 2 * _SLACK_SECONDS)
            found += [Event.from_proto(entry) for entry in answer.events]
            if not answer.events:
                return found
            after, wait_seconds = found[-1].index, 0.0  # an answer holds only what fits a message

    def delete(self) -> None:
        """Deletes the job with its state and checkpoints. Idempotent."""
        self._connection.call(jobs_pb2.DeleteJobRequest(job_id=self.job_id), jobs_pb2.DeleteJobResponse)

    def _get_schedule(self) -> optimizer_pb2.Schedule:
        answer = self._caller.read(optimizer_pb2.GetScheduleRequest(job_id=self.job_id), optimizer_pb2.GetScheduleResponse)
        self._saw(answer.position)
        return answer.schedule

    def _identified(
        self,
        request: optimizer_pb2.SetScheduleRequest | optimizer_pb2.StepScheduleRequest | optimizer_pb2.LoadScheduleStateRequest,
        identity: pb.CallIdentity,
        kind: type[Answer],
    ) -> Answer:
        request.call.CopyFrom(identity)
        return self._connection.call(request, kind)

    def _get(self) -> jobs_pb2.JobInfo:
        job = self._caller.read(jobs_pb2.GetJobRequest(job=self.job_id), jobs_pb2.GetJobResponse).job
        self._layout = Layout.from_proto(job.layout)
        self._saw(job.position)
        return job

    def _saw(self, position: pb.Position) -> Position:
        self._caller.session.saw(position)
        return Position.from_proto(position)


def _read_weights(destination: Destination, items: Iterator[Item]) -> pb.Position:
    first = next(items, None)
    if not isinstance(first, data_pb2.PullResponse) or first.WhichOneof("content") != "begin":
        raise ProtocolViolationError("weights did not begin with a begin")
    _weights.read(first.begin, lambda: next(items), destination)
    return first.begin.position
