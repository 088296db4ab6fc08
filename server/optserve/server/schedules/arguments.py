"""Checks of schedule arguments: each returns the value in the form that the rule takes, or raises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from optserve.wire.errors import InvalidHyperparameterError
from optserve.wire.values import Value

Number = int | float

_LIMIT = 1 << 63
"""Of a whole number: a message has 64 bits for it."""

MOST_EPOCHS = 1 << 53
"""Where a `last_epoch` may begin: it is exact as a float this far."""


def refuse(name: str, value: object, allowed: str) -> InvalidHyperparameterError:
    return InvalidHyperparameterError(f"{name} is {value!r}; it must be {allowed}", argument=name)


def number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(name, value, "a finite number")
    if not (math.isfinite(value) if isinstance(value, float) else abs(value) < _LIMIT):
        raise refuse(name, value, "a finite number")
    return float(value)


def epoch(value: object, most: int = MOST_EPOCHS) -> int:
    """A `last_epoch`; -1 before the first step."""
    if type(value) is not int or not -1 <= value <= most:
        raise refuse("last_epoch", value, f"a whole number, -1 or more and at most {most}")
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


REQUIRED = object()


@dataclass(frozen=True)
class Argument:
    """`check` returns the value in the form that the rule takes, or raises InvalidHyperparameterError."""

    check: Callable[[str, object], Value]
    default: Value | object = REQUIRED
