"""What CyclicLR and OneCycleLR do to momentum, which is `momentum` or the first of `betas`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optserve.server.schedules.arguments import flag
from optserve.server.schedules.definition import Groups, ScheduleState, Values
from optserve.server.schedules.single import Arguments, Call, of_groups
from optserve.wire.errors import InvalidHyperparameterError

MOMENTUM = ("base_momentum", "max_momentum")


def turned(group: Mapping[str, Any], momentum: float) -> Values:
    """The group's momentum set, where it has it."""
    return {"betas": (momentum, *group["betas"][1:])} if "betas" in group else {"momentum": momentum}


def begun(groups: Groups, arguments: Arguments, last_epoch: int) -> list[Values]:
    """What the constructor writes of momentum into each group."""
    low, high = (of_groups(arguments, name, len(groups)) for name in MOMENTUM)
    if not arguments["cycle_momentum"]:
        return [{} for _ in groups]
    if not all("momentum" in group or "betas" in group for group in groups):
        raise InvalidHyperparameterError("optimizer must support momentum or beta1 with `cycle_momentum` option enabled")
    if last_epoch != -1:
        return [{} for _ in groups]
    return [
        {**turned(group, most), "max_momentum": most, "base_momentum": least}
        for group, least, most in zip(groups, low, high, strict=True)
    ]


def beta1(call: Call) -> dict[str, Any]:
    """What torch keeps of where the momentum is."""
    return {"use_beta1": "betas" in call.groups[0]} if call.arguments["cycle_momentum"] else {}


def beta1_taken(state: ScheduleState, document: Mapping[str, Any]) -> dict[str, Any]:
    if not document["cycle_momentum"]:
        return {}
    return {"use_beta1": state.own.get("use_beta1", flag("use_beta1", document["use_beta1"]))}
