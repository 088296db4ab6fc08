"""The functions of a job's LambdaLR and MultiplicativeLR: they stay here, and the numbers that they give are sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from optserve.v1 import optimizer_pb2
from optserve.wire.arguments import SCHEDULERS, WITH_FUNCTIONS, Bounds, Factors, pairs
from optserve.wire.errors import InvalidArgumentError, InvalidHyperparameterError, MissingFunctionError
from optserve.wire.values import plain

LrLambda = Callable[[int], float]
LrLambdas = LrLambda | Sequence[LrLambda]
"""torch's lr_lambda: one function, or one a group."""

LR_LAMBDA = "lr_lambda"

_TRIES = 16
"""Somebody else may step the schedule, or set another one, between two of them."""

Answer = TypeVar("Answer")


class Given(NamedTuple):
    """What functions gave for one call, and the setting of the schedule whose functions they are."""

    factors: Sequence[optimizer_pb2.Factors] = ()
    setting: str = ""


Call = Callable[[Given], Answer]


def split(name: str, arguments: Mapping[str, object]) -> tuple[dict[str, object], list[LrLambdas]]:
    """A schedule's arguments without functions, and those in depth-first order.

    InvalidHyperparameterError for a function that is missing, no function, or where none may be, and for schedules that are
    nested too deep.
    """
    return _split(name, arguments, 1, Bounds())


def _split(name: str, arguments: Mapping[str, object], depth: int, bounds: Bounds) -> tuple[dict[str, object], list[LrLambdas]]:
    bounds.enter(depth)
    rest: dict[str, object] = {}
    functions: list[LrLambdas] = []
    calls = name.lower() in WITH_FUNCTIONS
    if calls and LR_LAMBDA not in arguments:
        raise InvalidHyperparameterError(
            f"{name} needs lr_lambda, a function of the epoch (or a list of one a group), and it is not given"
        )
    for key, value in arguments.items():
        if calls and key == LR_LAMBDA:
            functions.append(checked(value))
        elif key == SCHEDULERS:
            parts = [(part, *_split(part, inner, depth + 1, bounds)) for part, inner in pairs(key, value)]
            rest[key] = [(part, inner) for part, inner, _ in parts]
            functions += [function for *_, inner in parts for function in inner]
        elif callable(value):
            raise InvalidHyperparameterError(
                f"{name}'s {key} is a function; those never travel, but for lr_lambda of LambdaLR and MultiplicativeLR, "
                "whose numbers do"
            )
        else:
            rest[key] = value
    return rest, functions


def checked(value: Any) -> LrLambdas:
    """InvalidHyperparameterError, with torch's message, for what is no function or list of functions."""
    for one in value if isinstance(value, list | tuple) else [value]:
        if not callable(one):
            raise InvalidHyperparameterError(f"lr_lambda should be a function, but got {type(one).__name__}")
    found: LrLambdas = value
    return found


def _factors(functions: LrLambdas, epoch: int) -> Factors:
    if epoch < 0:
        return Factors(epoch)
    if callable(functions):
        return Factors(epoch, (_number(functions(epoch), epoch),), shared=True)
    return Factors(epoch, tuple(_number(function(epoch), epoch) for function in functions))


def number(metric: float | None) -> float | None:
    """A metric as it is sent: a float, a NumPy or torch scalar. InvalidArgumentError for anything else."""
    try:
        return None if metric is None else _float(metric)
    except (TypeError, OverflowError):
        raise InvalidArgumentError(f"metric is {metric!r} of type {type(metric).__name__}; it must be a number") from None


def _number(value: object, epoch: int) -> float:
    try:
        return _float(value)
    except (TypeError, OverflowError):
        raise InvalidHyperparameterError(f"lr_lambda gave {value!r} at epoch {epoch}; it must be a number") from None


def _float(value: object) -> float:
    """TypeError, OverflowError: it is none, or too large an int."""
    found = plain(value)
    if not isinstance(found, int | float):
        raise TypeError
    return float(found)


class Functions:
    """Those of one job's schedule, for a Job and the workers that joined from it. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Guards all below."""
        self._setting = ""
        self._held: list[LrLambdas] = []
        self._told = optimizer_pb2.Schedule()

    def told(self, schedule: optimizer_pb2.Schedule) -> None:
        """A reply's schedule: what the next step will call."""
        with self._lock:
            self._told = schedule

    def hold(self, setting: str, functions: Sequence[LrLambdas]) -> None:
        with self._lock:
            self._setting, self._held = setting, list(functions)

    def held(self, setting: str) -> list[LrLambdas]:
        """Those that were given for this setting of the schedule, in depth-first order."""
        with self._lock:
            return list(self._held) if setting == self._setting else []

    def create(self, functions: Sequence[LrLambdas], call: Call[Answer]) -> Answer:
        """A call that sets a schedule, with what it asks of its functions."""
        return _answered(call, Given(), lambda error: _evaluated(functions, _awaited(error)))

    def step(self, lr_lambda: object, call: Call[Answer], ask: Callable[[], optimizer_pb2.Schedule]) -> Answer:
        """A call that steps the schedule, with what it asks of the functions held here, or of `lr_lambda`, which is then held.

        `ask` gets the schedule. MissingFunctionError if it calls functions and none are here; InvalidArgumentError for an
        lr_lambda that it does not call.
        """
        if lr_lambda is not None:
            self._take(lr_lambda, ask())
        with self._lock:
            schedule = self._told
            setting, held = self._setting, list(self._held)
        fits = setting == schedule.setting and len(held) == len(schedule.awaited)

        def evaluate(error: MissingFunctionError) -> Given:
            setting, asked = error.metadata.get("setting", ""), _awaited(error)
            found = self.held(setting)
            if len(found) != len(asked):
                raise error
            return _evaluated(found, asked, setting)

        return _answered(call, _evaluated(held, schedule.awaited, setting) if fits else Given(), evaluate)

    def _take(self, lr_lambda: object, schedule: optimizer_pb2.Schedule) -> None:
        self.told(schedule)
        count = len(schedule.awaited)
        if not count:
            raise InvalidArgumentError(
                f"{schedule.name or 'the job, which has no schedule,'} calls no functions; found lr_lambda"
            )
        entries = [lr_lambda] if count == 1 else lr_lambda
        if not isinstance(entries, list | tuple) or len(entries) != count:
            raise InvalidArgumentError(
                f"{schedule.name} has {count} schedules that call functions; lr_lambda must be a list of {count}, in "
                "depth-first order, each a function or a list of one a group"
            )
        self.hold(schedule.setting, [checked(entry) for entry in entries])


def _evaluated(functions: Sequence[LrLambdas], awaited: Sequence[int], setting: str = "") -> Given:
    return Given([_factors(entry, epoch).to_proto() for entry, epoch in zip(functions, awaited, strict=True)], setting)


def _awaited(error: MissingFunctionError) -> list[int]:
    return [int(entry) for entry in error.metadata.get("awaited", "").split(",") if entry]


def _answered(call: Call[Answer], given: Given, evaluate: Callable[[MissingFunctionError], Given]) -> Answer:
    for _ in range(_TRIES):
        try:
            return call(given)
        except MissingFunctionError as error:
            given = evaluate(error)
    return call(given)
