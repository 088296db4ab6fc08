"""Calls on a running job that are no pushes: groups, rules, schedule, state and checkpoints, each applied exactly once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from optserve.server.jobs import Job
from optserve.server.jobs import spec as specs
from optserve.server.jobs.history import rolled_back
from optserve.server.jobs.rules import edited
from optserve.server.records import (
    Caller,
    CheckpointDeleted,
    GroupAdded,
    GroupUpdated,
    Restored,
    Result,
    RulesUpdated,
    ScheduleLoaded,
    ScheduleSet,
    ScheduleStepped,
    StateLoaded,
)
from optserve.server.rounds.host import JobHost
from optserve.wire import errors
from optserve.wire.values import Value


class Administration:
    """What edits one job beside the pushes, a worker's counted step of the schedule too.

    Each call checks, then commits one record, under the host's lock.
    """

    def __init__(self, host: JobHost) -> None:
        self._host = host

    @property
    def _job(self) -> Job:
        return self._host.job

    def admit(self, caller: Caller, seen: tuple[str, int]) -> Result | None:
        """The stored result of a call that was applied before. Typed errors if the caller may not call."""
        self._host.check_initialized()
        sessions = self._job.sessions
        if caller.epoch or sessions.is_worker(caller.session_id):
            sessions.check_member(caller.session_id, caller.epoch)
        repeated = sessions.repeated(caller)
        if repeated is None:
            self._job.check_seen(*seen)
        return repeated

    def _admit_turn(self, caller: Caller, seen: tuple[str, int], check: Callable[[], list[dict[str, Value]]]) -> Result | None:
        """`admit`, and the check of what a schedule will do, which gives the groups after it; all that these need is there.

        A schedule that turns momentum on needs state, so this may wait for readers.
        """
        while True:
            repeated = self.admit(caller, seen)
            if repeated:
                return repeated
            groups = check()
            if not self._job.store.lacks_state(groups) or not self._host.is_read:
                break
            self._host.await_readers()  # lets the lock go: what was checked may have changed
        if groups is not self._job.groups:
            self._host.prepare(groups)
        return None

    def update_group(self, caller: Caller, seen: tuple[str, int], group: int, changes: Mapping[str, Value]) -> Result:
        with self._host.changed:
            self._host.await_readers()
            repeated = self.admit(caller, seen)
            if repeated:
                return repeated
            groups = self._job.edited({group: changes})
            self._host.prepare(groups)
            result = self._host.record(GroupUpdated(caller, group, groups[group]))
            self._host.publish_edits({group: changes})
            return result

    def add_group(self, caller: Caller, seen: tuple[str, int], record: GroupAdded) -> Result:
        with self._host.changed:
            self._host.await_readers()
            repeated = self.admit(caller, seen)
            if repeated:
                return repeated
            declared = [(name, array.shape, array.dtype) for name, array in record.parameters]
            layout = self._job.store.layout.extended(len(self._job.groups), declared)
            specs.check_table([place.name for place in layout.places], len(self._job.groups) + 1)
            self._job.checked_addition(record.hyperparameters)
            result = self._host.commit(record, "group", f"group {len(self._job.groups)} added with {len(declared)} parameters")
            self._host.prepare(self._job.groups)
            return result

    def update_rules(self, caller: Caller, seen: tuple[str, int], changes: Mapping[str, Value]) -> Result:
        with self._host.changed:
            repeated = self.admit(caller, seen)
            if repeated:
                return repeated
            job = self._job
            rules = edited(job.rules, changes, job.plan.optimizer)
            waiting = job.store.window.rounds
            if waiting and rules.accumulation != job.rules.accumulation:
                raise errors.InvalidArgumentError(
                    f"accumulation is changed to {rules.accumulation} in the middle of a window: {waiting} of "
                    f"{job.rules.accumulation} rounds are summed up; change it right after a step"
                )
            self._host.prepare(job.groups, rules)
            text = ", ".join(f"{name}={value!r}" for name, value in changes.items())
            return self._host.commit(RulesUpdated(caller, rules), "rules", f"rules: {text}")

    def set_schedule(self, caller: Caller, seen: tuple[str, int], record: ScheduleSet) -> Result:
        with self._host.changed:
            repeated = self._admit_turn(caller, seen, lambda: self._job.checked_schedule(record))
            if repeated:
                return repeated
            return self._host.commit(record, "schedule", f"schedule {record.name or 'removed'}", name=record.name)

    def step_schedule(self, caller: Caller, seen: tuple[str, int], record: ScheduleStepped) -> Result:
        with self._host.changed:
            repeated = self._admit_turn(caller, seen, lambda: self._job.checked_step(record))
            if repeated:
                return repeated
            is_new = not 0 < record.count <= self._job.schedule_steps
            result = self._host.record(record)
            if is_new:  # else another rank was first, and only the caller's result is new
                self._host.publish_edits(record.changes)
                self._host.publish("schedule", "schedule stepped", count=record.count)
            return result

    def load_schedule_state(self, caller: Caller, seen: tuple[str, int], record: ScheduleLoaded) -> Result:
        with self._host.changed:
            repeated = self.admit(caller, seen)
            if repeated:
                return repeated
            self._job.checked_schedule_state(record)
            return self._host.commit(record, "schedule", "schedule's state_dict loaded")

    def load_state(self, caller: Caller, seen: tuple[str, int], record: StateLoaded) -> Result:
        with self._host.changed:
            self._host.await_readers()
            repeated = self.admit(caller, seen)
            if repeated:
                return repeated
            self._job.checked_state(record)
            self._host.prepare(record.groups)
            return self._host.commit(record, "state", "state_dict loaded")

    def delete_checkpoint(self, caller: Caller, seen: tuple[str, int], name: str, delete: Callable[[], None]) -> Result:
        """Calls `delete` once, whatever is repeated."""
        with self._host.changed:
            repeated = self.admit(caller, seen)
            if repeated:
                return repeated
            delete()
            return self._host.commit(CheckpointDeleted(caller, name), "checkpoint", f"checkpoint {name!r} deleted", name=name)

    def restore(self, caller: Caller, seen: tuple[str, int], name: str, read: Callable[[], Restored]) -> Result:
        """Puts the job where a checkpoint stands; a round that gathers ends with RolledBackError."""
        with self._host.changed:
            repeated = self.admit(caller, seen)
        if repeated:
            return repeated
        record = read()  # long: workers go on meanwhile
        with self._host.changed:
            self._host.await_readers()
            repeated = self.admit(caller, seen)
            if repeated:
                return repeated
            self._job.store.prepare(self._job.checked_restore(record))
            before = self._job.position.version
            result = self._host.commit(record, "restored", f"restored checkpoint {name!r}", name=name)
            now, steps = self._job.position, self._job.schedule_steps
            why = f"checkpoint {name!r} was restored: the job went from version {before} back to {now.version}"
            self._host.on_reset(rolled_back(why, before, now.version, now, schedule_steps=steps))
            return result
