"""A job's schedule: made, stepped, extended by a group, saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optserve.server.schedules.arguments import MOST_EPOCHS, epoch, number
from optserve.server.schedules.table import Call, Position, Values, checked_arguments, find
from optserve.wire.errors import InvalidArgumentError, InvalidHyperparameterError, InvalidStateDictError, UnknownScheduleError
from optserve.wire.values import Value


@dataclass(frozen=True)
class ScheduleState:
    """A schedule of a job and where it stands. `own` is what a schedule keeps besides, as JSON; empty for most."""

    name: str
    arguments: dict[str, Value]
    last_epoch: int
    base_lrs: tuple[float, ...]
    own: dict[str, Any] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        """As JSON; floats survive bit for bit."""
        arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in self.arguments.items()}
        position = {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs)}
        return {"name": self.name, "arguments": arguments, **position, "own": self.own}

    @classmethod
    def from_document(cls, document: object) -> ScheduleState:
        """The inverse; the document may come from a stranger. InvalidStateDictError if it is not one."""
        try:
            name, arguments, last_epoch, base_lrs, own = (
                document[key]  # type: ignore[index]
                for key in ("name", "arguments", "last_epoch", "base_lrs", "own")
            )
            schedule = find(name)
            if not isinstance(arguments, dict) or not isinstance(own, dict):
                raise TypeError("a field has another type than it must have")
            checked = checked_arguments(schedule, arguments)
            rates = tuple(number("base_lrs", rate) for rate in base_lrs)
            return cls(schedule.name, checked, epoch(last_epoch, 2 * MOST_EPOCHS), rates, own)
        except (UnknownScheduleError, InvalidHyperparameterError, KeyError, TypeError) as error:
            raise InvalidStateDictError(f"the state of the schedule cannot be used: {error}") from error


def create(
    name: str, arguments: Mapping[str, Value], groups: Sequence[Mapping[str, Any]]
) -> tuple[ScheduleState, list[Values]]:
    """What constructing torch's scheduler does: the state, and what changes in each group (`initial_lr`, sometimes `lr`).

    UnknownScheduleError for a name or argument that does not exist, InvalidHyperparameterError for a value.
    """
    schedule = find(name)
    given = dict(arguments)
    last_epoch = epoch(given.pop("last_epoch", -1))
    for index, group in enumerate(groups):
        if last_epoch != -1 and "initial_lr" not in group:
            raise InvalidHyperparameterError(
                f"param 'initial_lr' is not specified in param_groups[{index}] when resuming scheduler with last_epoch >= 0."
            )
    base_lrs = tuple(_base_lr(group) for group in groups)
    state = ScheduleState(schedule.name, checked_arguments(schedule, given), last_epoch, base_lrs)
    state, edits = _advance(state, groups, None, initial=True)
    for group, edit in zip(groups, edits, strict=True):
        if "initial_lr" not in group:
            edit["initial_lr"] = group["lr"]
    return state, edits


def step(
    state: ScheduleState, groups: Sequence[Mapping[str, Any]], metric: float | None = None
) -> tuple[ScheduleState, list[Values]]:
    """What one `.step()` does: the new state, and what changes in each group.

    InvalidArgumentError if the groups are not as many as the schedule knows, or for a metric that it does not take.
    """
    if metric is not None:
        raise InvalidArgumentError(f"{state.name} takes no metric; found {metric!r}")
    return _advance(state, groups, metric, initial=False)


def extend(state: ScheduleState, group: Mapping[str, Any]) -> tuple[ScheduleState, Values]:
    """The state when `group` is added in mid-run, and what changes in it: nothing, as in torch.

    Its rate is then stepped from where it stands. Its base rate is its `initial_lr`, else its `lr` now (torch keeps none).
    """
    return replace(state, base_lrs=(*state.base_lrs, _base_lr(group))), {}


def _base_lr(group: Mapping[str, Any]) -> float:
    return number("initial_lr", group.get("initial_lr", group["lr"]))


def _advance(
    state: ScheduleState, groups: Sequence[Mapping[str, Any]], metric: float | None, *, initial: bool
) -> tuple[ScheduleState, list[Values]]:
    if len(groups) != len(state.base_lrs):
        raise InvalidArgumentError(f"{state.name} knows {len(state.base_lrs)} param groups; there are {len(groups)}")
    at = Position(state.last_epoch + 1, initial)
    try:
        values, own = find(state.name).rule(Call(at, groups, state.base_lrs, state.own, state.arguments, metric))
    except ArithmeticError as error:
        raise InvalidHyperparameterError(f"{state.name} cannot be stepped to last_epoch {at.last_epoch}: {error}") from error
    for index, edit in enumerate(values):
        for key, value in edit.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidHyperparameterError(
                    f"{state.name} would set {key} of param group {index} to {value} at epoch {at.last_epoch}; nothing changed"
                )
    changed = [
        {key: value for key, value in edit.items() if repr(value) != repr(group.get(key))}  # repr: -0.0 is not 0.0
        for group, edit in zip(groups, values, strict=True)
    ]
    return replace(state, last_epoch=at.last_epoch, own=own), changed
