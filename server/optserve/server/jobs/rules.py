"""What happens to gradients before they are stepped with: a job's rules, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from optserve.server.formulas import Optimizer, Searching
from optserve.server.formulas.language import CLIP
from optserve.server.records import Rules
from optserve.v1 import jobs_pb2
from optserve.wire import errors
from optserve.wire.names import nearest
from optserve.wire.values import Value

_NAMES = [field.name for field in fields(Rules)]

MOST_ROUNDS = 1 << 20
"""Of a window."""


def from_proto(rules: jobs_pb2.StepRules, optimizer: Optimizer) -> Rules:
    """InvalidArgumentError names what is not allowed."""
    found: dict[str, Any] = {"accumulation": rules.accumulation or 1}
    found |= {name: getattr(rules, name) for name in ("clip_grad_norm", "clip_grad_value") if rules.HasField(name)}
    return checked(Rules(**found), optimizer)


def edited(rules: Rules, changes: Mapping[str, Value], optimizer: Optimizer) -> Rules:
    """The rules as an edit leaves them; None removes a clip rule. InvalidArgumentError."""
    for name in changes:
        if name not in _NAMES:
            raise errors.InvalidArgumentError(f"there is no rule {name!r}{nearest(name, _NAMES)}")
    merged: dict[str, Any] = {**asdict(rules), **changes}
    count = merged["accumulation"]
    if isinstance(count, bool) or not isinstance(count, int):
        raise errors.InvalidArgumentError(f"accumulation is {count!r}; it must be a whole number of at least 1")
    return checked(Rules(**merged), optimizer)


def checked(rules: Rules, optimizer: Optimizer) -> Rules:
    """The rules with floats. InvalidArgumentError."""
    norm = clip("clip_grad_norm", rules.clip_grad_norm)
    value = clip("clip_grad_value", rules.clip_grad_value)
    check_one(norm, value)
    if not 1 <= rules.accumulation <= MOST_ROUNDS:
        raise errors.InvalidArgumentError(f"accumulation is {rules.accumulation}; it must be from 1 to {MOST_ROUNDS} rounds")
    if rules.accumulation > 1 and isinstance(optimizer, Searching):
        raise errors.InvalidArgumentError(
            f"accumulation is {rules.accumulation}; {optimizer.name} evaluates its closure within one round, so it must be 1"
        )
    return Rules(norm, value, rules.accumulation)


def clip(name: str, value: object) -> float | None:
    """InvalidArgumentError unless it is None or a number above 0; Inf clips nothing."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value <= 0:
        raise errors.InvalidArgumentError(f"{name} is {value!r}; it must be a number above 0, or None")
    return float(value)


def check_one(norm: float | None, value: float | None) -> None:
    """InvalidArgumentError if there are both: which comes first would change the numbers."""
    if norm is not None and value is not None:
        raise errors.InvalidArgumentError(
            f"clip_grad_norm is {norm:g} and clip_grad_value is {value:g}; give one of them, and set the other one to None"
        )


def clipping(groups: Sequence[Mapping[str, Value]], value: float | None) -> list[dict[str, Value]]:
    """The groups as the store's steps take them: with the bound to which elements are clipped, if there is one."""
    bound: dict[str, Value] = {} if value is None else {CLIP: value}
    return [{**group, **bound} for group in groups]
