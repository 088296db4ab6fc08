"""What a job refuses. A check changes nothing; it gives what the checked call leads to, or raises a typed error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optserve.server import schedules
from optserve.server.jobs import spec as specs
from optserve.server.jobs.counted import Made
from optserve.server.jobs.documents import Document
from optserve.server.jobs.state import JobState
from optserve.server.records import Changes, Restored, ScheduleLoaded, ScheduleSet, ScheduleStepped, StateLoaded
from optserve.server.schedules import ScheduleState
from optserve.server.store import StoreState
from optserve.wire import errors
from optserve.wire.values import Value


class CheckedJob(JobState):
    """A job's state with the checks of all that may change it."""

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

    def checked_schedule(self, record: ScheduleSet) -> list[dict[str, Value]]:
        """What `_turned` says of a schedule that is set now. UnknownScheduleError and others if it cannot be made."""
        if not record.name:
            if record.arguments:
                raise errors.InvalidArgumentError(f"no schedule takes no arguments; found {', '.join(record.arguments)}")
            return self.groups
        edits = schedules.create(record.name, record.arguments, self.groups, record.factors)[1]
        return self._turned(self.groups, edits)

    def checked_addition(self, hyperparameters: Mapping[str, Value]) -> None:
        """InvalidArgumentError if the optimizer takes no more groups, or the schedule has nothing for one more."""
        specs.check_groups(self.plan.optimizer, len(self.groups) + 1)
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
        content = StoreState.from_tensors({}, record.state, record.steps)
        self.store.check(content, record.groups, with_values=False, loaded=record.loaded)

    def checked_restore(self, record: Restored) -> list[dict[str, Value]]:
        """The groups as a checkpoint leaves them. CheckpointMismatchError if it does not fit."""
        document = self.checked_document(record.document)
        try:
            content = StoreState.from_tensors(record.parameters, record.state, document.steps, document.window_rounds)
            self.store.check(content, document.groups, with_values=True)
        except errors.InvalidStateDictError as error:
            raise errors.CheckpointMismatchError(f"the checkpoint does not fit the job: {error}") from error
        return document.groups

    def checked_document(self, raw: Mapping[str, Any]) -> Document:
        """CheckpointMismatchError unless a checkpoint's document is of this job's optimizer and parameters."""
        document = Document.parse(raw, self.plan.optimizer)
        document.check_fits([self.group_names(index) for index in range(len(self.groups))])
        return document
