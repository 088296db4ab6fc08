"""Hyperparameters between Python and the wire."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping

from optserve.v1 import types_pb2 as pb
from optserve.wire.errors import InvalidHyperparameterError

Value = None | bool | int | float | str | tuple[float | None, ...]
"""What a hyperparameter may be."""


def to_value(name: str, value: object) -> pb.Value:
    """The wire form; NumPy scalars count as Python numbers, lists as tuples. InvalidHyperparameterError for anything else."""
    value = tuple(plain(entry) for entry in value) if isinstance(value, list | tuple) else plain(value)
    try:
        if value is None:
            return pb.Value()
        if isinstance(value, bool):
            return pb.Value(flag=value)
        if isinstance(value, int):
            return pb.Value(integer=value)
        if isinstance(value, float):
            return pb.Value(number=value)
        if isinstance(value, str):
            return pb.Value(text=value)
        if isinstance(value, tuple) and all(entry is None or type(entry) in (int, float) for entry in value):
            none = [index for index, entry in enumerate(value) if entry is None]
            return pb.Value(numbers=pb.NumberList(values=[0.0 if entry is None else entry for entry in value], none=none))
    except (ValueError, OverflowError) as error:  # an int of more than 64 bits, a str that is no text
        raise InvalidHyperparameterError(f"{name} is {_shown(value)}, which cannot be sent: {error}") from error
    raise InvalidHyperparameterError(
        f"{name} is {_shown(value)} of type {type(value).__name__}; "
        "allowed are None, bool, int, float, str and tuples of numbers and None"
    )


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no int of more than 4300 digits
        return "a number of too many digits to be shown"


def plain(value: object) -> object:
    """A NumPy scalar or 0-d array as a Python number."""
    item = getattr(value, "item", None)
    return item() if item is not None and getattr(value, "shape", None) == () else value


def from_value(value: pb.Value) -> Value:
    """The Python form. InvalidHyperparameterError if a list says that more numbers are None than it has."""
    match value.WhichOneof("kind"):
        case "number":
            return value.number
        case "integer":
            return value.integer
        case "flag":
            return value.flag
        case "text":
            return value.text
        case "numbers":
            return _from_numbers(value.numbers)
        case "schedules":
            raise InvalidHyperparameterError("schedules are an argument of a schedule, and no hyperparameter")
        case _:
            return None


def _from_numbers(numbers: pb.NumberList) -> tuple[float | None, ...]:
    values: list[float | None] = list(numbers.values)
    for index in numbers.none:
        if index >= len(values):
            raise InvalidHyperparameterError(f"number {index} of a tuple of {len(values)} cannot be None")
        values[index] = None
    return tuple(values)


def to_hyperparameters(values: Mapping[str, object]) -> list[pb.Hyperparameter]:
    """A mapping in its order. InvalidHyperparameterError for a name that is no text, or a value that cannot be sent."""
    return [pb.Hyperparameter(name=_text(name), value=to_value(name, value)) for name, value in values.items()]


def _text(name: object) -> str:
    if not isinstance(name, str):
        raise InvalidHyperparameterError(
            f"a hyperparameter's name is {_shown(name)} of type {type(name).__name__}; it must be a str"
        )
    return name


def from_hyperparameters(entries: Iterable[pb.Hyperparameter]) -> dict[str, Value]:
    """A mapping in its order. InvalidHyperparameterError if a name comes twice."""
    values: dict[str, Value] = {}
    for entry in entries:
        if entry.name in values:
            raise InvalidHyperparameterError(f"hyperparameter {entry.name!r} is given twice")
        values[entry.name] = from_value(entry.value)
    return values
