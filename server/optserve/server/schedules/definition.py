"""What a schedule is, where one stands, and what one call of it works on.

`Schedule` has the moves by which torch's schedulers call each other: constructing, `.step()`, the initial step, the restart
that SequentialLR makes at a milestone, and its undoing of initial steps. `Single` is a schedule of its own (`single.py`),
`Composed` one of others (`composed.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optserve.server.schedules.arguments import Argument
from optserve.wire.arguments import NOT_CALLED, Factors
from optserve.wire.errors import InvalidHyperparameterError
from optserve.wire.values import Value

Groups = Sequence[Mapping[str, Any]]
"""Param groups, by torch's keys."""

Values = dict[str, Value]
"""What a schedule gives a group, by torch's keys."""

GROUP_KEYS = frozenset({"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"})
"""What schedules write into a group beside the optimizer's own keys: finite numbers, all of them."""


class Functions:
    """The clients' functions during one call: they answer with the factors that came with it, and note what was asked.

    A function whose factor did not come answers 1; its call is then not applied.
    """

    def __init__(self, given: Sequence[Factors], count: int) -> None:
        self.given = given
        self.asked = [NOT_CALLED] * count
        """By the schedules that have functions, in depth-first order: the epoch at which each called them."""

    def ask(self, index: int, epoch: int, groups: int) -> tuple[float, ...]:
        if self.asked[index] not in (NOT_CALLED, epoch):
            raise InvalidHyperparameterError(
                f"lr_lambda would be called at the epochs {self.asked[index]} and {epoch} at once; leave last_epoch out"
            )
        self.asked[index] = epoch
        if index < len(self.given) and self.given[index].epoch == epoch:
            return self.given[index].of(groups)
        return (1.0,) * groups

    @property
    def answered(self) -> bool:
        """Whether exactly what was asked had come."""
        return [entry.epoch for entry in self.given] == self.asked


@dataclass
class Walk:
    """One call's way through a tree of schedules. `groups` are copies, edited on the way as torch edits its own."""

    groups: list[dict[str, Any]]
    functions: Functions
    metric: float | None = None


@dataclass(frozen=True)
class ScheduleState:
    """A schedule of a job and where it stands."""

    schedule: Schedule
    arguments: dict[str, Any]
    """As checked, without a composed one's `schedulers`: those are `parts`."""
    last_epoch: int = -1
    step_count: int | None = None
    """torch's _step_count; None where torch has none."""
    base_lrs: tuple[float, ...] = ()
    last_lrs: tuple[float, ...] = ()
    """torch's _last_lr: what the schedule itself left last, whatever was edited since."""
    own: dict[str, Any] = field(default_factory=dict)
    """What a schedule keeps besides, as JSON; empty for most."""
    parts: tuple[ScheduleState, ...] = ()
    setting: str = ""
    """Which call set it. Functions that a client holds are those of one setting."""

    @property
    def name(self) -> str:
        return self.schedule.name

    @property
    def functions(self) -> int:
        """How many schedules of the tree call functions."""
        return self.schedule.calls_functions + sum(part.functions for part in self.parts)

    @property
    def milestones(self) -> int:
        """How many milestones the schedules of the tree have."""
        return len(self.arguments.get("milestones", ())) + sum(part.milestones for part in self.parts)

    @property
    def singles(self) -> int:
        """How many schedules of the tree are no composed ones."""
        return sum(part.singles for part in self.parts) or 1


def _anything(_arguments: Mapping[str, Any]) -> None:
    """Whatever each argument allows."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """One of torch's schedulers. `name` is its class, `arguments` are in torch's order, without `last_epoch`.

    `first` is the number of schedules with functions that come before this one in depth-first order.
    """

    name: str
    arguments: Mapping[str, Argument]
    takes_last_epoch: bool = True
    takes_metric: bool = False
    calls_functions: bool = False
    check: Callable[[Mapping[str, Any]], None] = _anything
    """Raises InvalidHyperparameterError for arguments that do not go together."""

    def begin(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        """What constructing torch's scheduler does, the initial step included. `state` has arguments and last_epoch."""
        raise NotImplementedError

    def advance(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        """torch's step()."""
        raise NotImplementedError

    def advance_initially(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        """torch's _initial_step()."""
        raise NotImplementedError

    def restart(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        """torch's _update_lr(0), by which SequentialLR turns to its next schedule."""
        raise NotImplementedError

    def undo(self, state: ScheduleState) -> ScheduleState:
        """What SequentialLR does to the schedules that it is made of: one epoch back, the rates stay."""
        raise NotImplementedError

    def extend(self, state: ScheduleState, group: Mapping[str, Any]) -> tuple[ScheduleState, Values]:
        """The state when `group` is added in mid-run, and what changes in it."""
        raise NotImplementedError

    def to_torch(self, state: ScheduleState) -> dict[str, Any]:
        """torch's state_dict, JSON-able: a Counter is its pairs."""
        raise NotImplementedError

    def from_torch(self, state: ScheduleState, document: Mapping[str, Any]) -> ScheduleState:
        """The state with what torch's state_dict says in place of its own; keys and types are the document's to have.

        What the state_dict holds only in derived form stays as it is; the caller compares.
        """
        raise NotImplementedError


def edit(walk: Walk, values: Sequence[Mapping[str, Any]], name: str, epoch: int) -> None:
    """Writes into the groups what a schedule gives them. InvalidHyperparameterError for what is not finite."""
    for index, (group, found) in enumerate(zip(walk.groups, values, strict=True)):
        for key, value in found.items():
            if not all(math.isfinite(entry) for entry in (value if isinstance(value, tuple) else (value,))):
                raise InvalidHyperparameterError(
                    f"{name} would set {key} of param group {index} to {value} at epoch {epoch}; nothing changed"
                )
        group.update(found)


def rates(walk: Walk) -> tuple[Any, ...]:
    """The groups' rates of now, as torch's _last_lr has them."""
    return tuple(group["lr"] for group in walk.groups)
