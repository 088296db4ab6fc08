"""What a job is made of, and how it shows itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optserve.server import schedules
from optserve.server.backends import Backend
from optserve.server.jobs import spec as specs
from optserve.server.jobs.counted import CountedSteps
from optserve.server.jobs.history import History
from optserve.server.jobs.sessions import Sessions
from optserve.server.records import Position
from optserve.server.schedules import ScheduleState
from optserve.server.store import Store
from optserve.wire import errors
from optserve.wire.values import Value


class JobState:
    """Not thread safe: the rounds room holds the job's lock around every call."""

    def __init__(
        self,
        job_id: str,
        plan: specs.Plan,
        backend: Backend,
        lineage_id: str,
        parameters: Sequence[specs.Declared] | None = None,
    ) -> None:
        """`parameters` of each group, where they are not the plan's."""
        self.job_id = job_id
        self.plan = plan
        self.store = Store(plan.optimizer, backend)
        for declared in plan.parameters if parameters is None else parameters:
            self.store.add_group(declared)
        self.groups: list[dict[str, Value]] = [dict(group) for group in plan.groups]
        self.rules = plan.rules
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

    def groups_since(self, lineage_id: str, version: int) -> dict[int, bool]:
        """Indices of the groups that changed after that version, and whether they are new since; all if it is 0 or gone."""
        if lineage_id != self.position.lineage_id or not version:
            return dict.fromkeys(range(len(self.groups)), True)
        return {index: self._added_at.get(index, 0) > version for index, at in self._changed_at.items() if at > version}

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


def _number(value: Value) -> float:
    if isinstance(value, int | float):
        return float(value)
    raise errors.InvalidHyperparameterError(f"lr is {value!r}; it must be a number")
