"""torch's learning-rate schedules as pure functions, and one table of them.

A rule is (position, each group's values, base rates, own state, metric) → (each group's new values, own state) in torch's
recursive form: it starts from the rate that the group has now, so a rate edited by hand and a group added in mid-run go on as
under torch 2.13, bit for bit. Most schedules are a function of one group's rate, lifted to a rule by `_each`.

Deviations from torch, all of them errors where torch goes on or breaks later: NaN and Inf are no arguments; `step_size` and
`T_max` are positive, `total_iters` is not negative, milestones are whole; a step whose result is not finite changes nothing.
A group added in mid-run gets a base rate (`extend`); torch gives it none, and CosineAnnealingLR then fails at its turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optserve.server.schedules.arguments import (
    REQUIRED,
    Argument,
    Number,
    count,
    end_factor,
    milestones,
    number,
    period,
    start_factor,
)
from optserve.wire.errors import InvalidHyperparameterError, UnknownScheduleError, nearest
from optserve.wire.values import Value

Values = dict[str, Value]


@dataclass(frozen=True)
class Position:
    """`last_epoch` as torch counts it, already advanced by this step; `initial` marks the step that a constructor takes."""

    last_epoch: int
    initial: bool = False


@dataclass(frozen=True)
class Call:
    """What a rule reads: one step of one schedule. `groups` hold at least what the schedule changes ("lr")."""

    position: Position
    groups: Sequence[Mapping[str, Any]]
    base_lrs: Sequence[float]
    own: Mapping[str, Any]
    arguments: Mapping[str, Value]
    metric: float | None


Rule = Callable[[Call], tuple[list[Values], dict[str, Any]]]


def _step_lr(at: Position, lr: float, _base: float, step_size: Number, gamma: float) -> float:
    return lr if at.last_epoch == 0 or at.last_epoch % step_size != 0 else lr * gamma


def _multi_step_lr(at: Position, lr: float, _base: float, milestones: tuple[int, ...], gamma: float) -> float:
    count = milestones.count(at.last_epoch)
    return lr * gamma**count if count else lr


def _exponential_lr(at: Position, lr: float, _base: float, gamma: float) -> float:
    return lr if at.initial else lr * gamma


def _linear_lr(at: Position, lr: float, _base: float, start_factor: float, end_factor: float, total_iters: Number) -> float:
    if at.last_epoch == 0:
        return lr * start_factor
    if at.initial or at.last_epoch > total_iters:
        return lr
    rise = end_factor - start_factor
    return lr * (1.0 + rise / (total_iters * start_factor + (at.last_epoch - 1) * rise))


def _cosine_annealing_lr(at: Position, lr: float, base: float, T_max: Number, eta_min: float) -> float:  # noqa: N803
    if at.initial:
        return lr
    if (at.last_epoch - 1 - T_max) % (2 * T_max) == 0:  # out of the trough, where the ratio below would divide by zero
        return lr + (base - eta_min) * (1 - math.cos(math.pi / T_max)) / 2
    now = 1 + math.cos(math.pi * at.last_epoch / T_max)
    before = 1 + math.cos(math.pi * (at.last_epoch - 1) / T_max)
    return now / before * (lr - eta_min) + eta_min


def _each(rate: Callable[..., float]) -> Rule:
    def rule(call: Call) -> tuple[list[Values], dict[str, Any]]:
        pairs = zip(call.groups, call.base_lrs, strict=True)
        return [{"lr": rate(call.position, group["lr"], base, **call.arguments)} for group, base in pairs], dict(call.own)

    return rule


@dataclass(frozen=True)
class Schedule:
    """`arguments` in torch's order, without `last_epoch`, which every schedule takes."""

    name: str
    arguments: Mapping[str, Argument]
    rule: Rule


SCHEDULES: Mapping[str, Schedule] = {
    "steplr": Schedule("StepLR", {"step_size": Argument(period), "gamma": Argument(number, 0.1)}, _each(_step_lr)),
    "multisteplr": Schedule(
        "MultiStepLR", {"milestones": Argument(milestones), "gamma": Argument(number, 0.1)}, _each(_multi_step_lr)
    ),
    "linearlr": Schedule(
        "LinearLR",
        {
            "start_factor": Argument(start_factor, 1.0 / 3),
            "end_factor": Argument(end_factor, 1.0),
            "total_iters": Argument(count, 5),
        },
        _each(_linear_lr),
    ),
    "exponentiallr": Schedule("ExponentialLR", {"gamma": Argument(number)}, _each(_exponential_lr)),
    "cosineannealinglr": Schedule(
        "CosineAnnealingLR", {"T_max": Argument(period), "eta_min": Argument(number, 0.0)}, _each(_cosine_annealing_lr)
    ),
}


def find(name: object) -> Schedule:
    schedule = SCHEDULES.get(name.lower()) if isinstance(name, str) else None
    if schedule is None:
        known = [entry.name for entry in SCHEDULES.values()]
        raise UnknownScheduleError(f"schedule {name!r} is not known{nearest(str(name), known)}", schedule=name)
    return schedule


def checked_arguments(schedule: Schedule, given: Mapping[str, Value]) -> dict[str, Value]:
    for name in given:
        if name not in schedule.arguments:
            hint = nearest(str(name), list(schedule.arguments))
            raise UnknownScheduleError(f"{schedule.name} has no argument {name!r}{hint}", argument=name)
    checked: dict[str, Value] = {}
    for name, argument in schedule.arguments.items():
        value = given.get(name, argument.default)
        if value is REQUIRED:
            raise InvalidHyperparameterError(f"{schedule.name} needs {name}, and it is not given", argument=name)
        checked[name] = argument.check(f"{schedule.name}'s {name}", value)
    return checked
