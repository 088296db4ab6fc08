"""A job's schedule: made, stepped, extended by a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from optserve.server.schedules.arguments import MOST_MILESTONES
from optserve.server.schedules.definition import Functions, Groups, ScheduleState, Values, Walk
from optserve.server.schedules.table import unbegun
from optserve.wire.arguments import Factors
from optserve.wire.errors import InputError, InvalidArgumentError, MissingFunctionError

_MOST_RATES = 1 << 13
"""Of a schedule, over all schedules in it: a message and a stored result have room for what it keeps of each."""


def create(
    name: str, arguments: Mapping[str, Any], groups: Groups, factors: Sequence[Factors] = (), setting: str = ""
) -> tuple[ScheduleState, list[Values]]:
    """What constructing torch's scheduler does: the state, and what changes in each group (`initial_lr`, often `lr`, ...).

    UnknownScheduleError for a name or argument that does not exist, InvalidHyperparameterError for a value;
    InvalidArgumentError if there is more to keep than can be sent; MissingFunctionError if it calls functions, and `factors`
    are not what it calls.
    """
    state = unbegun(name, arguments)
    check_size(state, len(groups))
    walk = _walk(state, groups, None, factors)
    state = replace(state.schedule.begin(state, walk, 0), setting=setting)
    _check_answered(state, walk, f'set_lr_schedule("{state.name}", ...)', True)
    return state, _changed(walk, groups)


def step(
    state: ScheduleState, groups: Groups, metric: float | None = None, factors: Sequence[Factors] = (), setting: str = ""
) -> tuple[ScheduleState, list[Values]]:
    """What one `.step()` does: the new state, and what changes in each group.

    InvalidArgumentError if the groups are not as many as the schedule knows, or for a metric that it does not take or lacks;
    MissingFunctionError if it calls functions, and `factors` are not what it calls, or those of another `setting`.
    """
    if metric is not None and not state.schedule.takes_metric:
        raise InvalidArgumentError(f"{state.name} takes no metric; found {metric!r}")
    walk = _walk(state, groups, metric, factors)
    stepped = state.schedule.advance(state, walk, 0)
    _check_answered(state, walk, "step_schedule(...)", setting == state.setting)
    return stepped, _changed(walk, groups)


def awaited(state: ScheduleState, groups: Groups) -> list[int]:
    """The epochs at which the next step will call functions, by the schedules that have some; NOT_CALLED: it will not."""
    walk = _walk(state, groups)
    if state.functions:
        with suppress(InputError):  # the step itself will say so
            state.schedule.advance(state, walk, 0)
    return walk.functions.asked


def extend(state: ScheduleState, group: Mapping[str, Any], groups: int) -> tuple[ScheduleState, Values]:
    """The state when `group` is added to `groups` others in mid-run, and what changes in it: its rate does not.

    That is then stepped from where it stands. Its base rate is its `initial_lr`, else its `lr` now (torch keeps none).
    InvalidArgumentError if the schedule has a value for each group, and none for another.
    """
    check_size(state, groups + 1)
    return state.schedule.extend(state, group)


def check_size(state: ScheduleState, groups: int) -> None:
    """InvalidArgumentError if there is more to keep than can be sent."""
    if state.milestones > MOST_MILESTONES:
        raise InvalidArgumentError(f"{state.name} has {state.milestones} milestones; there may be {MOST_MILESTONES}")
    if state.singles * groups > _MOST_RATES:
        raise InvalidArgumentError(
            f"{state.singles} schedules of {groups} param groups are more than a message can describe; "
            f"schedules times groups may be {_MOST_RATES}"
        )


def _walk(state: ScheduleState, groups: Groups, metric: float | None = None, factors: Sequence[Factors] = ()) -> Walk:
    return Walk([dict(group) for group in groups], Functions(factors, state.functions), metric)


def _check_answered(state: ScheduleState, walk: Walk, call: str, are_its_own: bool) -> None:
    asked = walk.functions.asked
    if walk.functions.answered and (are_its_own or not asked):
        return
    if not asked:
        raise InvalidArgumentError(f"{state.name} calls no functions; the factors of {len(walk.functions.given)} came")
    called = ", ".join(str(epoch) for epoch in asked if epoch >= 0)
    raise MissingFunctionError(
        f"{state.name} calls lr_lambda at epoch {called}, and {call} brings no factors for that; functions stay with the "
        "client: pass lr_lambda=f, or a list of one a group; a list of those if several schedules in it call functions",
        awaited=",".join(map(str, asked)),
        setting=state.setting,
    )


def _changed(walk: Walk, groups: Groups) -> list[Values]:
    """What differs from the groups before."""
    return [
        {key: value for key, value in now.items() if key not in before or repr(value) != repr(before[key])}
        for now, before in zip(walk.groups, groups, strict=True)  # repr: -0.0 is not 0.0
    ]
