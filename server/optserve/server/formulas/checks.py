"""The type checks of hyperparameters that torch leaves to chance: there a string lr fails in some comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def number(group: Mapping[str, Any], name: str) -> float:
    """The hyperparameter as a number, possibly NaN. TypeError if it is none, ValueError if no float64 can hold it."""
    return real(group[name], name)


def real(value: object, name: str) -> float:
    """The value as a number; `name` is how messages call it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; it must be a number")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} is an integer beyond what a float64 can hold") from None
    return value


def pair(group: Mapping[str, Any], name: str) -> tuple[float, float]:
    """The hyperparameter as two numbers."""
    value = group[name]
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; it must be a tuple of two numbers")
    if len(value) != 2:
        raise ValueError(f"{name} has {len(value)} values; it must have 2")
    return real(value[0], f"{name}[0]"), real(value[1], f"{name}[1]")


def flag(group: Mapping[str, Any], name: str) -> bool:
    """The hyperparameter as a boolean. TypeError if it is none."""
    value = group[name]
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; it must be a bool")
    return value


def execution(group: Mapping[str, Any]) -> None:
    """torch's switches of how it executes. They are kept and shown as torch does; optserve computes the same either way."""
    for name in ("foreach", "capturable", "differentiable", "fused"):
        value = group.get(name)
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; it must be a bool or None")
    if group.get("fused"):
        if group.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")
        if group.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
