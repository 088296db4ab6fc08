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
from optserve.server.jobs.counted import CountedSteps, Made
from optserve.server.jobs.documents import Document
from optserve.server.jobs.history import History
from optserve.server.jobs.sessions import Sessions
from optserve.server.records import (
    Caller,
    Changes,
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
    ScheduleLoaded,
    ScheduleSet,
    ScheduleStepped,
    StateLoaded,
    advanced,
)
from optserve.server.schedules import ScheduleState
from optserve.server.store import Store, StoreState
from optserve.wire import errors
from optserve.wire.values import Value


class Job:
    """State of one job. Not thread safe: the rounds room holds the job's lock around every call."""

    def __init__(self, job_id: str, plan: specs.Plan, backend: Backend, lineage_id: str) -> None:
        self.job_id = job_id
        self.plan = plan
        self.store = Store(plan.optimizer, backend)
        for parameters in plan.parameters:
            self.store.add_group(parameters)
        self.groups: list[dict[str, Value]] = [dict(group) for group in plan.groups]
        self._changed_at: dict[int, int] = {}
        self._added_at: dict[int, int] = {}
        """Versions by group; 0 is not noted."""
        self.schedule: ScheduleState | None = None
        self.schedule_steps = 0
        self.counted = CountedSteps()
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
        return list(self.store.layout.names_by_group.get(index, ()))

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

    def checked_load(self, index: int, saved: Mapping[str, Value]) -> dict[str, Value]:
        """The group as a state_dict's leaves it: what an older one does not name stays, but l1 is what it says or not there.

        torch gives `differentiable` to each group that is added after a load, even if the optimizer has no such switch.
        """
        group = {name: value for name, value in self.checked_group(index).items() if name != "l1"}
        known = {name: value for name, value in saved.items() if name != "differentiable" or name in group}
        return specs.saved(self.plan.optimizer, {**group, **known}, self.schedule is not None)

    def edited(self, changes: Changes) -> list[dict[str, Value]]:
        """The groups as these changes leave them; typed errors if they may not be so."""
        if not changes:
            return self.groups
        merged = {index: self.checked_update(index, entries) for index, entries in changes.items()}
        return [merged.get(index, group) for index, group in enumerate(self.groups)]

    def groups_since(self, lineage_id: str, version: int) -> dict[int, bool]:
        """Indices of the groups that changed after that version, and whether they are new since; all if it is 0 or gone."""
        if lineage_id != self.position.lineage_id or not version:
            return dict.fromkeys(range(len(self.groups)), True)
        return {index: self._added_at.get(index, 0) > version for index, at in self._changed_at.items() if at > version}

    def checked_schedule(self, record: ScheduleSet) -> list[dict[str, Value]]:
        """What `_turned` says of a schedule that is set now. UnknownScheduleError and others if it cannot be made."""
        if not record.name:
            if record.arguments:
                raise errors.InvalidArgumentError(f"no schedule takes no arguments; found {', '.join(record.arguments)}")
            return self.groups
        edits = schedules.create(record.name, record.arguments, self.groups, record.factors)[1]
        return self._turned(self.groups, edits)

    def checked_addition(self, hyperparameters: Mapping[str, Value]) -> None:
        """InvalidArgumentError if the schedule has nothing for one more group."""
        if self.schedule is not None:
            schedules.extend(self.schedule, hyperparameters, len(self.groups))

    def checked_schedule_state(self, record: ScheduleLoaded) -> None:
        """InvalidStateDictError if it is the state_dict of another schedule; InvalidArgumentError if there is no schedule."""
        schedules.load(self._scheduled(), record.state, self.groups)

    def _scheduled(self) -> ScheduleState:
        if self.schedule is None:
            raise errors.InvalidArgumentError("the job has no schedule; set one with set_lr_schedule")
        return self.schedule

    def _turned(self, groups: list[dict[str, Value]], edits: Sequence[Mapping[str, Value]]) -> list[dict[str, Value]]:
        """The groups after a schedule's edits if these turn more than rates, else the groups as they are given.

        InvalidHyperparameterError if the optimizer takes no such momentum or betas.
        """
        own = self.plan.optimizer.defaults.keys() - {"lr"}
        if not any(own & edit.keys() for edit in edits):
            return groups
        pairs = zip(groups, edits, strict=True)
        return [specs.edited(self.plan.optimizer, {**group, **edit}, {}) for group, edit in pairs]

    def checked_step(self, record: ScheduleStepped) -> list[dict[str, Value]]:
        """What `_turned` says of a step of the schedule, after the changes that come with it.

        Refuses one that cannot be made, and a worker's counted one that does not fit the other ranks'.
        """
        count = record.count
        if 0 < count <= self.schedule_steps:
            self.counted.check(count, Made(record.setting, record.metric, record.factors, record.changes))
            return self.groups
        schedule = self._scheduled()
        if count > self.schedule_steps + 1:
            raise errors.SequenceGapError(
                f"schedule step {count} came after step {self.schedule_steps}; step {self.schedule_steps + 1} is next"
            )
        groups = self.edited(record.changes)
        return self._turned(groups, schedules.step(schedule, groups, record.metric, record.factors, record.setting)[1])

    def checked_state(self, record: StateLoaded) -> None:
        """InvalidStateDictError if a state_dict does not fit."""
        if len(record.groups) != len(self.groups):
            raise errors.InvalidStateDictError(
                f"{len(record.groups)} groups were loaded; the job has {len(self.groups)} by now"
            )
        self.store.check(StoreState({}, dict(record.state), dict(record.steps)), record.groups, with_values=False)

    def checked_restore(self, record: Restored) -> list[dict[str, Value]]:
        """The groups as a checkpoint leaves them. CheckpointMismatchError if it does not fit."""
        document = self.checked_document(record.document)
        try:
            content = StoreState(dict(record.parameters), dict(record.state), document.steps)
            self.store.check(content, document.groups, with_values=True)
        except errors.InvalidStateDictError as error:
            raise errors.CheckpointMismatchError(f"the checkpoint does not fit the job: {error}") from error
        return document.groups

    def apply(self, record: Record) -> Result:
        """Changes the job as the record says and stores the result for its caller. The record was checked before."""
        position = advanced(self.position)
        value: dict[str, Any] = {}
        before = [dict(group) for group in self.groups]
        match record:
            case Initialized():
                self.store.seal()
                self.store.create_state(self.groups)
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
                value = self._set_schedule(record)
            case ScheduleStepped():
                value = self._step_schedule(record)
            case ScheduleLoaded():
                value = self._load_schedule(record)
            case StateLoaded():
                self.store.load(StoreState({}, dict(record.state), dict(record.steps)), record.groups, with_values=False)
                self.groups = [dict(group) for group in record.groups]
            case Restored():
                position = self._restore(record)
            case CheckpointDeleted():
                pass
            case RoundApplied():
                value = self._round(record)
                position = replace(position, step=position.step + (not record.decision.skipped))
        self.position = position
        self._note_changes(before)
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

    def _note_changes(self, before: Sequence[Mapping[str, Value]]) -> None:
        for index, group in enumerate(self.groups):
            if index >= len(before):
                self._added_at[index] = self._changed_at[index] = self.position.version
            elif group != before[index]:
                self._changed_at[index] = self.position.version

    def _add_group(self, record: GroupAdded) -> None:
        self.store.add_group([(name, array.shape, array.dtype) for name, array in record.parameters])
        self.store.set_values(dict(record.parameters))
        group = dict(record.hyperparameters)
        if self.schedule is not None:
            self.schedule, edits = schedules.extend(self.schedule, group, len(self.groups))
            group |= edits
        self.groups.append(group)
        self.store.create_state(self.groups)

    def _set_schedule(self, record: ScheduleSet) -> dict[str, Any]:
        self.schedule, self.counted = None, CountedSteps()
        if record.name:
            setting = f"{self.position.lineage_id}/{self.position.version}"
            self.schedule, edits = schedules.create(record.name, record.arguments, self.groups, record.factors, setting)
            self._edit(edits)
        return self.schedule_document()

    def _step_schedule(self, record: ScheduleStepped) -> dict[str, Any]:
        count = record.count
        if not 0 < count <= self.schedule_steps:
            schedule, groups = self._scheduled(), self.edited(record.changes)
            self.schedule, edits = schedules.step(schedule, groups, record.metric, record.factors, record.setting)
            self.groups = groups
            self._edit(edits)
            if count:
                self.schedule_steps = count
                self.counted.note(count, Made(schedule.setting, record.metric, record.factors, record.changes))
        return self.schedule_document(count)

    def _load_schedule(self, record: ScheduleLoaded) -> dict[str, Any]:
        self.schedule = schedules.load(self._scheduled(), record.state, self.groups)
        return self.schedule_document()

    def _edit(self, edits: Sequence[Mapping[str, Value]]) -> None:
        for group, edit in zip(self.groups, edits, strict=True):
            group.update(edit)

    def _round(self, record: RoundApplied) -> dict[str, Any]:
        decision = record.decision
        groups = self.edited(decision.changes)
        if not decision.skipped:
            self.store.update(groups, record.gradients, decision.scale, decision.absent)
        self.groups = groups
        self.metrics = dict(decision.metrics) or self.metrics
        return {
            "learning_rates": self.learning_rates,
            "grad_norm": decision.grad_norm,
            "skip_reason": decision.skip_reason,
            "ranks": list(decision.ranks),
        }

    def schedule_document(self, count: int = 0) -> dict[str, Any]:
        """The schedule, the learning rates and the epochs at which the next step calls functions, JSON-able; for a worker whose
        last counted step was `count`, its next one.
        """
        if self.schedule is None:
            return {"schedule": None, "learning_rates": self.learning_rates, "awaited": []}
        made = self.counted.find(count + 1) if count else None
        awaited = made.epochs if made else schedules.awaited(self.schedule, self.groups)
        document = schedules.to_document(self.schedule)
        return {"schedule": document, "learning_rates": self.learning_rates, "awaited": awaited}

    def _restore(self, record: Restored) -> Position:
        document = self.checked_document(record.document)
        content = StoreState(dict(record.parameters), dict(record.state), document.steps)
        self.store.load(content, document.groups, with_values=True)
        self.groups, self.schedule, self.metrics = document.groups, document.schedule, document.metrics
        self.counted = CountedSteps()
        self._changed_at, self._added_at = {}, {}  # those were of the lineage that ends here
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
            "schedule": schedules.to_document(self.schedule) if self.schedule else None,
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
                added = [(entry, parameters[entry].shape, parameters[entry].dtype) for entry in names]
                specs.check_parameters(plan.optimizer, added)
                job.store.add_group(added)
            job.groups, job.schedule, job.metrics = document.groups, document.schedule, document.metrics
            document.check_fits([job.group_names(index) for index in range(len(job.groups))])
            job.store.seal()
            job.store.load(StoreState(dict(parameters), dict(state), document.steps), job.groups, with_values=True)
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
