"""Checks of hyperparameters: torch's that several optimizers have, and of types, which torch leaves to chance."""

from __future__ import annotations

import math
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


def integer(group: Mapping[str, Any], name: str) -> int:
    """The hyperparameter as an integer. TypeError if it is none."""
    value = group[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; it must be an int")
    return value


def entries(group: Mapping[str, Any], name: str, count: int) -> tuple[Any, ...]:
    """The hyperparameter as a tuple of so many values of any type. TypeError if it is none, ValueError for another length."""
    value = group[name]
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; it must be a tuple of {count} numbers")
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values; it must have {count}")
    return tuple(value)


def pair(group: Mapping[str, Any], name: str) -> tuple[float, float]:
    """The hyperparameter as two numbers."""
    first, second = entries(group, name, 2)
    return real(first, f"{name}[0]"), real(second, f"{name}[1]")


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


def learning_rate(group: Mapping[str, Any]) -> None:
    """torch's check of `lr` in most optimizers; as all checks written this way, it refuses NaN."""
    at_least_zero(group, "lr", "Invalid learning rate: {}")


def epsilon(group: Mapping[str, Any]) -> None:
    """torch's check of `eps` in most optimizers."""
    at_least_zero(group, "eps", "Invalid epsilon value: {}")


def weight_decay(group: Mapping[str, Any]) -> None:
    """torch's check of `weight_decay` in most optimizers."""
    at_least_zero(group, "weight_decay", "Invalid weight_decay value: {}")


def betas(group: Mapping[str, Any]) -> None:
    """torch's check of `betas` in Adam and its kin."""
    for index, beta in enumerate(pair(group, "betas")):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")


def at_least_zero(group: Mapping[str, Any], name: str, message: str) -> None:
    """ValueError with torch's message, whose {} is what was found, if the hyperparameter is negative or NaN."""
    value = number(group, name)
    if not value >= 0.0:
        raise ValueError(message.format(value))


def above_zero(group: Mapping[str, Any], name: str, message: str) -> None:
    """The same for one that must not be zero either."""
    value = number(group, name)
    if not value > 0.0:
        raise ValueError(message.format(value))


def not_nan(group: Mapping[str, Any], name: str) -> None:
    """ValueError for the NaN that torch lets pass."""
    value = number(group, name)
    if math.isnan(value):
        raise ValueError(f"Invalid {name} value: {value}")
