"""A job: its weights, groups and rules; with what is beside this file, its parameters, schedule, state and checkpoints."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import NoReturn

from optserve.client import _bundles, _environment, _spec, _weights
from optserve.client._groups import ReadOnlyList, advice, read_only
from optserve.client._info import Event, JobInfo, Position, group_entries
from optserve.client._job_checkpoints import CheckpointCalls
from optserve.client._job_parameters import ParameterCalls
from optserve.client._job_schedule import ScheduleCalls
from optserve.client._job_state import StateCalls
from optserve.client._pulled_rows import RowIds
from optserve.client._spec import ParamGroup
from optserve.client._weights import Destination, Weights
from optserve.client._worker import Worker
from optserve.client._worker_session import WorkerSession
from optserve.v1 import data_pb2, jobs_pb2, optimizer_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire.errors import (
    InputError,
    InvalidArgumentError,
    InvalidHyperparameterError,
    ProtocolViolationError,
    ReadOnlyError,
    StaleLayoutError,
    UnknownParameterError,
)
from optserve.wire.methods import Item
from optserve.wire.values import to_hyperparameters

_SLACK_SECONDS = 10.0
"""A call that waits on the server ends there first."""


class Job(ParameterCalls, ScheduleCalls, StateCalls, CheckpointCalls):
    """A job on a server, made by Server.create_job() or Server.job().

    Its calls are administrative: applied once, at once, whoever makes them. Thread safe. Each of them raises JobNotFoundError
    if the job was deleted, JobLostError if its state went with the server's memory, and RolledBackError, once, if the job
    stands before what this client saw.
    """

    def __repr__(self) -> str:
        return f"<Job {self._caller.shown} ({self._spec.optimizer}) on {self._connection.address}>"

    def info(self) -> JobInfo:
        """The job as it stands, asked of the server."""
        return JobInfo.from_proto(self._get())

    def position(self) -> Position:
        """Where the job stands, asked of the server."""
        return Position.from_proto(self._get().position)

    def pull(self, names: Iterable[str] | None = None, out: Weights | None = None, *, rows: RowIds | None = None) -> Weights:
        """The weights of one whole version without joining: all, or those named. See Worker.pull for `rows` and `out`.

        With names, `rows` come beside them: pull([], rows={"emb": ids}) is these rows alone.
        """
        wanted = None if names is None else _listed(names)
        if wanted == [] and not rows:
            return {} if out is None else out
        while True:
            destination = self._destination(wanted, rows, out)
            request = data_pb2.PullRequest(
                job_id=self.job_id,
                parameters=() if wanted is None else destination.names,
                seen=self._caller.session.seen,
                rows=destination.asked,
                layout_version=destination.layout.version,
            )
            with suppress(StaleLayoutError):
                self._saw(self._caller.download(request, partial(_read_weights, destination)))
            if destination.filled:
                return destination.finished()
            self._get()

    def _destination(self, names: list[str] | None, rows: RowIds | None, out: Weights | None) -> Destination:
        """In the layout that is known, or in that of now if it does not fit: somebody may have edited the parameters."""
        known = self._known_layout()
        try:
            return Destination(known, names, out, rows)
        except InputError:
            self._get()
            if self._layout == known:
                raise
            return Destination(self._layout, names, out, rows)

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

    def update_rules(self, **rules: object) -> Position:
        """Edits what happens to gradients before they are stepped with: clip_grad_norm, clip_grad_value, accumulation.

        None removes a clip rule. An edit holds from the next round on; what a push brings goes before the job's clip rules.
        InvalidArgumentError, also for another accumulation while rounds are summed up: nothing changed.
        """
        try:
            changes = to_hyperparameters(rules)
        except InvalidHyperparameterError as error:
            raise InvalidArgumentError(str(error)) from error
        answer = self._caller.mutate(
            lambda call: self._connection.call(
                optimizer_pb2.UpdateRulesRequest(call=call, rules=changes), optimizer_pb2.UpdateRulesResponse
            )
        )
        return self._saw(answer.position)

    def add_param_group(self, param_group: ParamGroup) -> Position:
        """Adds {"params": {name: array}, "lr": ..., ...}; the arrays are the initial values."""
        group = _spec.group(param_group)
        declared = [(name, value.shape, value.dtype) for name, value in group.values.items()]
        try:
            self._layout.extended(len(self._layout.arrays), declared)
        except InputError:
            self._get()  # somebody may have renamed or removed a parameter
            self._layout.extended(len(self._layout.arrays), declared)
        answer = self._caller.mutate(
            lambda call: self._connection.upload(
                optimizer_pb2.AddGroupRequest, _bundles.group_items(call, group), optimizer_pb2.AddGroupResponse
            )
        )
        return self._told(answer.layout, answer.position)

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


def _listed(names: Iterable[str]) -> list[str]:
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise InvalidArgumentError(f"names is {names!r}; it must be a list of names of parameters")
    return list(names)


def _read_weights(destination: Destination, items: Iterator[Item]) -> pb.Position:
    first = next(items, None)
    if not isinstance(first, data_pb2.PullResponse) or first.WhichOneof("content") != "begin":
        raise ProtocolViolationError("weights did not begin with a begin")
    _weights.read(first.begin, lambda: next(items), destination)
    return first.begin.position
