"""`Job.apply(record)`: the one place where a job changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt
from google.protobuf import json_format

from optserve.server import schedules
from optserve.server.backends import Backend
from optserve.server.jobs import spec as specs
from optserve.server.jobs.documents import Document
from optserve.server.jobs.history import History
from optserve.server.jobs.sessions import Sessions
from optserve.server.records import (
    Caller,
    CheckpointDeleted,
    GroupAdded,
    GroupUpdated,
    Initialized,
    Joined,
    Left,
    Position,
    Record,
    Restored,
    Result,
    RoundApplied,
    ScheduleSet,
    ScheduleStepped,
    StateLoaded,
    advanced,
)
from optserve.server.schedules import ScheduleState
from optserve.server.store import Store, StoreState
from optserve.wire import errors
from optserve.wire.values import Value

_METRICS_KEPT = 1024


class Job:
    """State of one job. Not thread safe: the rounds room holds the job's lock around every call."""

    def __init__(self, job_id: str, plan: specs.Plan, backend: Backend, lineage_id: str) -> None:
        self.job_id = job_id
        self.plan = plan
        self.store = Store(plan.optimizer, backend)
        for parameters in plan.parameters:
            self.store.add_group(parameters)
        self.groups: list[dict[str, Value]] = [dict(group) for group in plan.groups]
        self.schedule: ScheduleState | None = None
        self.schedule_steps = 0
        self.schedule_metrics: dict[int, float | None] = {}
        self.sessions = Sessions()
        self.history = History(lineage_id)
        self.position = Position(lineage_id)
        self.metrics: Mapping[str, float] = {}
        self.initialized = False

    @property
    def name(self) -> str:
        return self.plan.spec.name

    @property
    def learning_rates(self) -> list[float]:
        return [_number(group["lr"]) for group in self.groups]

    def group_names(self, index: int) -> list[str]:
        """Names of a group's parameters in order."""
        groups = {array.array_id: array.group for array in self.store.layout.arrays}
        return [place.name for place in self.store.layout.places if groups[place.array_id] == index]

    def check_seen(self, lineage_id: str, version: int) -> None:
        """RolledBackError if a client saw what the job no longer has."""
        self.history.check(lineage_id, version, self.position, schedule_steps=self.schedule_steps)

    def checked_group(self, index: int) -> dict[str, Value]:
        """UnknownParameterError if there is no such group."""
        if not 0 <= index < len(self.groups):
            raise errors.UnknownParameterError(f"the job has {len(self.groups)} param groups; there is no group {index}")
        return self.groups[index]

    def checked_update(self, index: int, changes: Mapping[str, Value]) -> dict[str, Value]:
        """The group as an edit leaves it; typed errors if it may not be so."""
        return specs.edited(self.plan.optimizer, self.checked_group(index), changes)

    def checked_schedule(self, name: str, arguments: Mapping[str, Value]) -> None:
        """UnknownScheduleError or InvalidHyperparameterError if the schedule cannot be made."""
        if name:
            schedules.create(name, arguments, self.groups)

    def checked_step(self, count: int, metric: float | None) -> None:
        """Refuses a schedule step that cannot be made, and a worker's counted one that does not fit the other ranks'."""
        if 0 < count <= self.schedule_steps:
            if self.schedule_metrics.get(count, metric) != metric:
                raise errors.RanksDisagreeError(
                    f"schedule step {count} was made with the metric {self.schedule_metrics[count]}, this rank has {metric}"
                )
            return
        if self.schedule is None:
            raise errors.InvalidArgumentError("the job has no schedule; set one with set_lr_schedule")
        if count > self.schedule_steps + 1:
            raise errors.SequenceGapError(
                f"schedule step {count} came after step {self.schedule_steps}; step {self.schedule_steps + 1} is next"
            )
        schedules.step(self.schedule, self.groups, metric)

    def checked_state(self, record: StateLoaded) -> None:
        """InvalidStateDictError if a state_dict does not fit."""
        if len(record.groups) != len(self.groups):
            raise errors.InvalidStateDictError(
                f"{len(record.groups)} groups were loaded; the job has {len(self.groups)} by now"
            )
        self.store.check(StoreState({}, dict(record.state), dict(record.steps)), with_values=False)

    def checked_restore(self, record: Restored) -> None:
        """CheckpointMismatchError if a checkpoint does not fit."""
        document = self.checked_document(record.document)
        try:
            self.store.check(StoreState(dict(record.parameters), dict(record.state), document.steps), with_values=True)
        except errors.InvalidStateDictError as error:
            raise errors.CheckpointMismatchError(f"the checkpoint does not fit the job: {error}") from error

    def apply(self, record: Record) -> Result:
        """Changes the job as the record says and stores the result for its caller. The record was checked before."""
        position = advanced(self.position)
        value: dict[str, Any] = {}
        match record:
            case Initialized():
                self.store.seal()
                self.initialized = True
            case Joined():
                self.sessions.join(record.name, record.rank, record.session_id, record.epoch)
            case Left():
                self.sessions.leave(record.name)
            case GroupAdded():
                self._add_group(record)
            case GroupUpdated():
                self.groups[record.group] = dict(record.hyperparameters)
            case ScheduleSet():
                self._set_schedule(record)
                value = self.schedule_document()
            case ScheduleStepped():
                self._step_schedule(record)
                value = self.schedule_document()
            case StateLoaded():
                self.store.load(StoreState({}, dict(record.state), dict(record.steps)), with_values=False)
                self.groups = [dict(group) for group in record.groups]
            case Restored():
                position = self._restore(record)
            case CheckpointDeleted():
                pass
            case RoundApplied():
                value = self._round(record)
                position = replace(position, step=position.step + (not record.decision.skipped))
        self.position = position
        result = Result(position, value)
        for caller in self._callers(record):
            self.sessions.store(caller, result)
        return result

    @staticmethod
    def _callers(record: Record) -> Sequence[Caller]:
        if isinstance(record, RoundApplied):
            return record.callers
        caller = getattr(record, "caller", None)
        return () if caller is None else (caller,)

    def _add_group(self, record: GroupAdded) -> None:
        self.store.add_group([(name, array.shape, array.dtype) for name, array in record.parameters])
        self.store.set_values(dict(record.parameters))
        group = dict(record.hyperparameters)
        if self.schedule is not None:
            self.schedule, edits = schedules.extend(self.schedule, group)
            group |= edits
        self.groups.append(group)

    def _set_schedule(self, record: ScheduleSet) -> None:
        if not record.name:
            self.schedule = None
            return
        self.schedule, edits = schedules.create(record.name, record.arguments, self.groups)
        self._edit(edits)

    def _step_schedule(self, record: ScheduleStepped) -> None:
        if record.count:
            if record.count <= self.schedule_steps:
                return
            self.schedule_steps = record.count
            self.schedule_metrics[record.count] = record.metric
            self.schedule_metrics.pop(record.count - _METRICS_KEPT, None)
        if self.schedule is None:
            raise errors.InternalError("a schedule step was recorded without a schedule")
        self.schedule, edits = schedules.step(self.schedule, self.groups, record.metric)
        self._edit(edits)

    def _edit(self, edits: Sequence[Mapping[str, Value]]) -> None:
        for group, edit in zip(self.groups, edits, strict=True):
            group.update(edit)

    def _round(self, record: RoundApplied) -> dict[str, Any]:
        decision = record.decision
        rates = self.learning_rates
        if not decision.skipped:
            self.store.update(self.groups, record.gradients, decision.scale, decision.absent)
        self.metrics = dict(decision.metrics) or self.metrics
        return {
            "learning_rates": rates,
            "grad_norm": decision.grad_norm,
            "skip_reason": decision.skip_reason,
            "ranks": list(decision.ranks),
        }

    def schedule_document(self) -> dict[str, Any]:
        """The schedule and the learning rates, JSON-able; {} stands for none."""
        document = self.schedule.to_document() if self.schedule else None
        return {"schedule": document, "learning_rates": self.learning_rates}

    def _restore(self, record: Restored) -> Position:
        document = self.checked_document(record.document)
        self.store.load(StoreState(dict(record.parameters), dict(record.state), document.steps), with_values=True)
        self.groups, self.schedule, self.metrics = document.groups, document.schedule, document.metrics
        self.history.branch(record.lineage_id, document.version)
        return Position(record.lineage_id, document.version, document.step)

    def checked_document(self, raw: Mapping[str, Any]) -> Document:
        """CheckpointMismatchError unless a checkpoint's document is of this job's optimizer and parameters."""
        document = Document.parse(raw, self.plan.optimizer)
        document.check_fits([self.group_names(index) for index in range(len(self.groups))])
        return document

    def to_document(self, steps: Mapping[str, int]) -> dict[str, Any]:
        """All but the tensors, JSON-able. `steps` are those that belong to the exported tensors."""
        return {
            "spec": json_format.MessageToDict(self.plan.spec, preserving_proto_field_name=True),
            "position": {"lineage_id": self.position.lineage_id, "version": self.position.version, "step": self.position.step},
            "groups": self.groups,
            "group_parameters": [self.group_names(index) for index in range(len(self.groups))],
            "schedule": self.schedule.to_document() if self.schedule else None,
            "schedule_steps": self.schedule_steps,
            "steps": dict(steps),
            "metrics": dict(self.metrics),
            "history": self.history.to_document(),
            "sessions": self.sessions.to_document(),
        }

    @classmethod
    def from_document(
        cls,
        job_id: str,
        name: str | None,
        raw: Mapping[str, Any],
        parameters: Mapping[str, npt.NDArray[Any]],
        state: Mapping[str, npt.NDArray[Any]],
        backend: Backend,
        lineage_id: str,
    ) -> Job:
        """A job as a checkpoint left it: a new one of that name, or (None) the same one with its members, results and history.

        CheckpointMismatchError if document and tensors do not fit together.
        """
        document = Document.parse(raw)
        if name is not None:
            document.spec.name = name
        try:
            plan = specs.plan(document.spec)
            job = cls(job_id, plan, backend, lineage_id)
            for names in document.group_parameters[len(plan.groups) :]:
                job.store.add_group([(entry, parameters[entry].shape, parameters[entry].dtype) for entry in names])
            job.groups, job.schedule, job.metrics = document.groups, document.schedule, document.metrics
            document.check_fits([job.group_names(index) for index in range(len(job.groups))])
            job.store.seal()
            job.store.load(StoreState(dict(parameters), dict(state), document.steps), with_values=True)
        except (KeyError, errors.InputError) as error:
            raise errors.CheckpointMismatchError(f"the checkpoint's contents do not fit together: {error}") from error
        if name is None:
            job.sessions, job.schedule_steps, job.history = document.sessions, document.schedule_steps, document.history
            job.history.branch(lineage_id, document.version)
        job.position = Position(lineage_id, document.version, document.step)
        job.initialized = True
        return job


def _number(value: Value) -> float:
    if isinstance(value, int | float):
        return float(value)
    raise errors.InvalidHyperparameterError(f"lr is {value!r}; it must be a number")
