"""From a job's rounds to the points of its curves: one point a step. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optserve.server.rounds.decide import NO_WEIGHT
from optserve.server.rounds.events import Event, Round


@dataclass(frozen=True)
class Point:
    """Values by tag at `step`; `time_seconds` counts from 1970. With `begins`, all that there is from that step on is void."""

    step: int
    time_seconds: float
    values: Mapping[str, float]
    begins: int | None = None


class Points:
    """One job's points.

    A step's point is at the number of the step. Where several rounds lead to one step (accumulation) it has the means of their
    metrics. A round without any gradient says something of the weights as they are, so its metrics stand at the last step. Of
    other rounds that are skipped only their number since that step is told, at the step that they were for.
    """

    def __init__(self) -> None:
        self._lineage = ""
        self._begins = True
        self._sums: dict[str, tuple[float, int]] = {}
        self._skipped = 0

    def restart(self) -> None:
        """The next point begins a file."""
        self._begins = True

    def of(self, event: Event) -> Point | None:
        """The point that an event gives, if it gives one."""
        numbers = event.numbers
        if numbers is None:
            return None
        if event.position.lineage_id != self._lineage:
            self._lineage, self._begins = event.position.lineage_id, True
            self._forget()
        values = self._values(event, numbers)
        if not values:
            return None
        step = event.position.step + (numbers.skip_reason not in ("", NO_WEIGHT))
        begins = step + (numbers.skip_reason == NO_WEIGHT) if self._begins else None
        self._begins = False
        return Point(step, event.time_seconds, values, begins)

    def _values(self, event: Event, numbers: Round) -> Mapping[str, float]:
        if numbers.skip_reason == NO_WEIGHT:
            return event.metrics
        if numbers.skip_reason:
            self._skipped += 1
            return {"optserve/skipped": float(self._skipped)}
        for name, value in event.metrics.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)
        if numbers.accumulated:
            return {}
        means = {name: total / count for name, (total, count) in self._sums.items()}
        rates = {f"optserve/lr/group{index}": rate for index, rate in enumerate(numbers.learning_rates)}
        own = {
            "optserve/grad_norm": numbers.grad_norm,
            "optserve/clip_factor": numbers.clip_factor,
            "optserve/skipped": float(self._skipped),
        }
        self._forget()
        return {**means, **own, **rates}

    def _forget(self) -> None:
        self._sums, self._skipped = {}, 0
