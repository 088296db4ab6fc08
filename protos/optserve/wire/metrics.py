"""Metrics: numbers by name that travel with a push."""

from __future__ import annotations

from collections.abc import Mapping
from typing import SupportsFloat

from optserve.wire.errors import InvalidArgumentError
from optserve.wire.values import plain

MOST_METRICS = 256
MOST_NAME_BYTES = 128
"""Of one push, so that the ranks' metrics fit an event and a job's description."""


def checked(metrics: Mapping[str, object]) -> dict[str, float]:
    """A copy with floats; NaN and Inf are allowed, for a loss may be that. InvalidArgumentError names what is not."""
    if not isinstance(metrics, Mapping):
        raise InvalidArgumentError(f"metrics must be numbers by name; got {type(metrics).__name__}")
    if len(metrics) > MOST_METRICS:
        raise InvalidArgumentError(f"{len(metrics)} metrics came with a push; {MOST_METRICS} are the most")
    return {_name(name): _number(name, value) for name, value in metrics.items()}


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise InvalidArgumentError(f"a metric's name is of type {type(name).__name__}; it must be a str")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"a metric's name is {name!r}, which is no text: {error}") from None
    if not 0 < size <= MOST_NAME_BYTES:
        raise InvalidArgumentError(f"a metric's name has {size} bytes ({name[:32]!r}); allowed are 1 to {MOST_NAME_BYTES}")
    return name


def _number(name: str, value: object) -> float:
    number = plain(value)
    try:
        if not isinstance(number, SupportsFloat):
            raise TypeError
        return float(number)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # a tensor of several elements
        raise InvalidArgumentError(f"metric {name!r} is of type {type(value).__name__}; it must be one number") from None
