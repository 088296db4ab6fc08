"""Schedule arguments between Python and the wire: hyperparameters' values, and the schedules that a schedule is made of."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optserve.v1 import optimizer_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire.errors import InvalidArgumentError, InvalidHyperparameterError
from optserve.wire.values import Value, from_value, to_value

SCHEDULERS = "schedulers"
"""The argument of SequentialLR and ChainedScheduler."""

WITH_FUNCTIONS = ("lambdalr", "multiplicativelr")
"""Schedules of a function, in lower case."""

MOST_DEEP, MOST_SCHEDULES = 8, 64
"""Schedules in schedules: how deep, the outermost counted, and how many in all."""

Entry = tuple[str, Mapping[str, "ScheduleValue"]]
"""A schedule inside another one: torch's class name, and its arguments."""

ScheduleValue = Value | tuple[Entry, ...]
"""What a schedule's argument may be."""


NOT_CALLED = -1
"""In place of an epoch: a function that a step does not call."""


@dataclass(frozen=True)
class Factors:
    """What one schedule's functions gave at `epoch`: a number for each group, or one for all (`shared`).

    Of a step that does not call them, `epoch` is NOT_CALLED.
    """

    epoch: int
    values: tuple[float, ...] = ()
    shared: bool = False

    def of(self, groups: int) -> tuple[float, ...]:
        """One a group. InvalidArgumentError with torch's message if they are not so many."""
        if self.shared and len(self.values) == 1:
            return self.values * groups
        if len(self.values) != groups:
            raise InvalidArgumentError(f"Expected {groups} lr_lambdas, but got {len(self.values)}")
        return self.values

    def to_proto(self) -> optimizer_pb2.Factors:
        return optimizer_pb2.Factors(epoch=self.epoch, values=self.values, shared=self.shared)

    @classmethod
    def from_proto(cls, factors: optimizer_pb2.Factors) -> Factors:
        return cls(factors.epoch, tuple(factors.values), factors.shared)


class Bounds:
    """Counts the schedules of a tree, of which each is entered once. InvalidHyperparameterError beyond what is allowed."""

    def __init__(self) -> None:
        self._found = 0

    def enter(self, depth: int) -> None:
        self._found += 1
        if depth > MOST_DEEP or self._found > MOST_SCHEDULES:
            raise InvalidHyperparameterError(
                f"schedules may be {MOST_DEEP} deep in one another and {MOST_SCHEDULES} in all; these are more"
            )


def to_arguments(arguments: Mapping[str, object]) -> list[pb.Hyperparameter]:
    """A mapping in its order. InvalidHyperparameterError for what cannot be sent, or is nested too deep."""
    return _to(arguments, 1, Bounds())


def _to(arguments: Mapping[str, object], depth: int, bounds: Bounds) -> list[pb.Hyperparameter]:
    bounds.enter(depth)
    found = []
    for name, value in arguments.items():
        if name == SCHEDULERS:
            entries = [
                pb.ScheduleEntry(name=entry, arguments=_to(inner, depth + 1, bounds)) for entry, inner in pairs(name, value)
            ]
            found.append(pb.Hyperparameter(name=name, value=pb.Value(schedules=pb.ScheduleList(entries=entries))))
        else:
            found.append(pb.Hyperparameter(name=name, value=to_value(name, value)))
    return found


def pairs(name: str, value: object) -> list[tuple[str, Mapping[str, Any]]]:
    """A list of schedules in schedules as (name, arguments) pairs. InvalidHyperparameterError if it is none."""
    if not isinstance(value, list | tuple) or not all(map(_is_pair, value)):
        raise InvalidHyperparameterError(
            f"{name} is {reprlib.repr(value)}; it must be a list of (class name, arguments) like "
            '[("StepLR", {"step_size": 30})]'
        )
    return [(entry[0], entry[1]) for entry in value]


def _is_pair(entry: object) -> bool:
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        return False
    name, arguments = entry
    return isinstance(name, str) and isinstance(arguments, Mapping) and all(isinstance(key, str) for key in arguments)


def from_arguments(entries: Iterable[pb.Hyperparameter]) -> dict[str, ScheduleValue]:
    """A mapping in its order. InvalidHyperparameterError if a name comes twice, or schedules are nested too deep."""
    return _from(entries, 1, Bounds())


def _from(entries: Iterable[pb.Hyperparameter], depth: int, bounds: Bounds) -> dict[str, ScheduleValue]:
    bounds.enter(depth)
    found: dict[str, ScheduleValue] = {}
    for entry in entries:
        if entry.name in found:
            raise InvalidHyperparameterError(f"argument {entry.name!r} is given twice")
        if entry.value.WhichOneof("kind") == "schedules":
            inner = entry.value.schedules.entries
            found[entry.name] = tuple((part.name, _from(part.arguments, depth + 1, bounds)) for part in inner)
        else:
            found[entry.name] = from_value(entry.value)
    return found
