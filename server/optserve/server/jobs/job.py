"""`Job.apply(record)`: the one place where a job changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy.typing as npt
from google.protobuf import json_format

from optserve.server import schedules
from optserve.server.backends import Backend
from optserve.server.formulas import Optimizer
from optserve.server.jobs import parameters
from optserve.server.jobs import spec as specs
from optserve.server.jobs.checks import CheckedJob
from optserve.server.jobs.counted import CountedSteps, Made
from optserve.server.jobs.documents import Document
from optserve.server.jobs.rules import clipping
from optserve.server.records import (
    Caller,
    CheckpointDeleted,
    GroupAdded,
    GroupUpdated,
    Initialized,
    Joined,
    Left,
    ParameterRemoved,
    ParameterRenamed,
    ParameterReplaced,
    Position,
    Record,
    Restored,
    Result,
    RoundApplied,
    RulesUpdated,
    ScheduleLoaded,
    ScheduleSet,
    ScheduleStepped,
    StateLoaded,
    advanced,
)
from optserve.server.store import StoreState
from optserve.wire import dtypes, errors
from optserve.wire.values import Value


class Job(CheckedJob):
    """State of one job, changed by records only. Not thread safe: the rounds room holds the job's lock around every call."""

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
            case RulesUpdated():
                self.rules = record.rules
                value = asdict(self.rules)
            case ParameterRenamed() | ParameterReplaced() | ParameterRemoved():
                group = parameters.apply(self, record)
                self._added_at[group] = self._changed_at[group] = position.version  # so that its names are told
            case ScheduleSet():
                value = self._set_schedule(record)
            case ScheduleStepped():
                value = self._step_schedule(record)
            case ScheduleLoaded():
                value = self._load_schedule(record)
            case StateLoaded():
                content = StoreState.from_tensors({}, record.state, record.steps)
                self.store.load(content, record.groups, with_values=False, loaded=record.loaded)
                self.groups = [dict(group) for group in record.groups]
            case Restored():
                position = self._restore(record)
            case CheckpointDeleted():
                pass
            case RoundApplied():
                value = self._round(record)
                position = replace(position, step=position.step + record.decision.steps)
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
        sums, absent = record.gradients, decision.absent
        if decision.steps and record.outcome is not None:
            self.store.adopt(record.outcome)
        elif decision.steps:
            taken = clipping(groups, decision.clip_value)
            self.store.update(taken, sums.dense, decision.scale, absent, sums.sparse)
        elif decision.accumulated:
            present = frozenset(range(len(self.store.layout.places))) - absent
            self.store.window.keep(sums, present, decision.accumulated)
        self.groups = groups
        self.metrics = dict(decision.metrics) or self.metrics
        return {
            "accumulated": self.store.window.rounds,
            "clip_factor": decision.clip_factor,
            "evaluations": decision.evaluations,
            "metrics": dict(decision.metrics),
            "learning_rates": self.learning_rates,
            "grad_norm": decision.grad_norm,
            "skip_reason": decision.skip_reason,
            "ranks": list(decision.ranks),
        }

    def _restore(self, record: Restored) -> Position:
        document = self.checked_document(record.document)
        content = StoreState.from_tensors(record.parameters, record.state, document.steps, document.window_rounds)
        self.store.load(content, document.groups, with_values=True)
        self.groups, self.schedule, self.metrics = document.groups, document.schedule, document.metrics
        self.rules = document.rules
        self.counted = CountedSteps()
        self._changed_at, self._added_at = {}, {}  # those were of the lineage that ends here
        self.history.branch(record.lineage_id, document.version)
        return Position(record.lineage_id, document.version, document.step)

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
            "rules": asdict(self.rules),
            "window_rounds": self.store.window.rounds,
            "layout": {"version": self.store.layout.version, "base_version": self.store.layout.base_version},
        }

    @classmethod
    def from_document(
        cls,
        job_id: str,
        name: str | None,
        raw: Mapping[str, Any],
        values: Mapping[str, npt.NDArray[Any]],
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
            job = cls(job_id, plan, backend, lineage_id, _declared(document, values, plan.optimizer))
            job.groups, job.schedule, job.metrics = document.groups, document.schedule, document.metrics
            job.rules = document.rules
            job.store.seal()
            content = StoreState.from_tensors(values, state, document.steps, document.window_rounds)
            job.store.load(content, job.groups, with_values=True)
        except errors.InputError as error:
            raise errors.CheckpointMismatchError(f"the checkpoint's contents do not fit together: {error}") from error
        if name is None:
            job.sessions, job.schedule_steps, job.history = document.sessions, document.schedule_steps, document.history
            job.history.branch(lineage_id, document.version)
            if document.layout is not None:
                job.store.renumber(*document.layout)
        job.position = Position(lineage_id, document.version, document.step)
        job.initialized = True
        return job


def _declared(document: Document, values: Mapping[str, npt.NDArray[Any]], optimizer: Optimizer) -> list[specs.Declared]:
    """The parameters of each group, which may be others than the spec's by now. InputError if they cannot be a job's."""
    found: list[specs.Declared] = []
    for names in document.group_parameters:
        missing = [name for name in names if name not in values]
        if missing:
            raise errors.InvalidArgumentError(f"the value of parameter {missing[0]!r} is missing")
        group = [(name, values[name].shape, values[name].dtype) for name in names]
        for name, _, dtype in group:
            dtypes.to_wire(dtype, f"parameter {name!r}")
        specs.check_parameters(optimizer, group)
        found.append(group)
    specs.check_table([name for group in found for name, _, _ in group], len(found))
    return found
