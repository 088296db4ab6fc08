"""Checks of schedule arguments: each returns the value in the form that the rule takes, or raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from optserve.wire.arguments import ScheduleValue
from optserve.wire.errors import InvalidHyperparameterError, UnknownScheduleError
from optserve.wire.names import nearest

Number = int | float

_LIMIT = 1 << 63
"""Of a whole number: a message has 64 bits for it."""

MOST_EPOCHS = 1 << 53
"""Where a `last_epoch` may begin: it is exact as a float this far."""

MOST_MILESTONES = 1 << 13
"""Of a schedule, over all schedules in it."""

PerGroup = Number | tuple[float, ...]
"""One number for all groups, or one a group."""


def refuse(name: str, value: object, allowed: str) -> InvalidHyperparameterError:
    return InvalidHyperparameterError(f"{name} is {value!r}; it must be {allowed}", argument=name)


def plain(name: str, value: object) -> Number:
    """A finite number that stays an int if it is one, as torch keeps it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(name, value, "a finite number")
    if not (math.isfinite(value) if isinstance(value, float) else abs(value) < _LIMIT):
        raise refuse(name, value, "a finite number")
    return value


def number(name: str, value: object) -> float:
    return float(plain(name, value))


def epoch(value: object, least: int = -1, most: int = MOST_EPOCHS) -> int:
    """A `last_epoch`; -1 before the first step."""
    if type(value) is not int or not least <= value <= most:
        raise refuse("last_epoch", value, f"a whole number, {least} or more and at most {most}")
    return value


def start_factor(name: str, value: object) -> float:
    found = number(name, value)
    if found > 1.0 or found <= 0:
        raise InvalidHyperparameterError(
            "Starting multiplicative factor expected to be greater than 0 and less or equal to 1.", argument=name
        )
    return found


def end_factor(name: str, value: object) -> float:
    found = number(name, value)
    if found > 1.0 or found < 0:
        raise InvalidHyperparameterError("Ending multiplicative factor expected to be between 0 and 1.", argument=name)
    return found


def constant_factor(name: str, value: object) -> float:
    found = number(name, value)
    if found > 1.0 or found < 0:
        raise InvalidHyperparameterError("Constant multiplicative factor expected to be between 0 and 1.", argument=name)
    return found


def count(name: str, value: object) -> Number:
    """Whole where it can be: `2e3` is torch's 2000. Fractions are legal there too (`T_max=steps / 2`)."""
    found = number(name, value)
    counted = int(value) if found.is_integer() else found  # type: ignore[call-overload]
    if not 0 <= counted < _LIMIT:
        raise refuse(name, value, "0 or more and below 2**63")
    return counted


def period(name: str, value: object) -> Number:
    found = count(name, value)
    if not found:
        raise refuse(name, value, "more than 0")
    return found


def milestones(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise refuse(name, value, "a list of whole numbers")
    counts = [count(name, entry) for entry in value]
    if not all(isinstance(entry, int) for entry in counts):
        raise refuse(name, value, "a list of whole numbers")
    return tuple(int(entry) for entry in counts)


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise refuse(name, value, "true or false")
    return value


def per_group(name: str, value: object) -> PerGroup:
    """One number, or a list of one a group; whether the list has as many as there are groups is seen when they are known."""
    if isinstance(value, list | tuple):
        return tuple(number(name, entry) for entry in value)
    return plain(name, value)


def optional(check: Callable[[str, object], ScheduleValue]) -> Callable[[str, object], ScheduleValue]:
    return lambda name, value: None if value is None else check(name, value)


def word(words: Collection[str], message: str) -> Callable[[str, object], str]:
    """One of the words; `message` is torch's, with {value} in it."""

    def check(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise InvalidHyperparameterError(message.format(value=value), argument=name)
        return value

    return check


def whole(least: int, message: str) -> Callable[[str, object], int]:
    """An int; `message` is torch's, with {value} in it."""

    def check(name: str, value: object) -> int:
        if type(value) is not int or not least <= value < _LIMIT:
            raise InvalidHyperparameterError(message.format(value=value), argument=name)
        return value

    return check


REQUIRED = object()


@dataclass(frozen=True)
class Argument:
    """`check` returns the value in the form that the rule takes, or raises InvalidHyperparameterError."""

    check: Callable[[str, object], ScheduleValue]
    default: ScheduleValue | object = REQUIRED


def checked(schedule: str, known: Mapping[str, Argument], given: Mapping[str, Any]) -> dict[str, ScheduleValue]:
    """All arguments, in torch's order. UnknownScheduleError for a name, InvalidHyperparameterError for a value."""
    for name in given:
        if name not in known:
            raise UnknownScheduleError(f"{schedule} has no argument {name!r}{nearest(str(name), list(known))}", argument=name)
    found: dict[str, ScheduleValue] = {}
    for name, argument in known.items():
        value = given.get(name, argument.default)
        if value is REQUIRED:
            raise InvalidHyperparameterError(f"{schedule} needs {name}, and it is not given", argument=name)
        found[name] = argument.check(f"{schedule}'s {name}", value)
    return found
