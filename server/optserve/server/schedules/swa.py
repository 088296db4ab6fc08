"""SWALR: to one rate a group, and stays there. It reads the rate in the group, as `swa_lr`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optserve.server.schedules.arguments import Argument, per_group, whole, word
from optserve.server.schedules.definition import Groups, ScheduleState, Values
from optserve.server.schedules.single import Arguments, Call, Single, Taken, of_another_group, of_groups


def _swa_writes(groups: Groups, arguments: Arguments, _last_epoch: int) -> list[Values]:
    return [{"swa_lr": rate} for rate in of_groups(arguments, "swa_lr", len(groups))]


def _swa_lr(call: Call) -> tuple[list[Values], dict[str, Any]]:
    """Counted by torch's _step_count, not by last_epoch."""
    epochs = call.arguments["anneal_epochs"]
    step = call.position.step_count - 1
    if epochs == 0:
        step = max(1, step)
    before, now = (_swa_weight(call.arguments, at / max(1, epochs)) for at in (step - 1, step))
    values: list[Values] = []
    for group in call.groups:
        lr, goal = group["lr"], group["swa_lr"]
        start = goal if before == 1 else (lr - before * goal) / (1 - before)
        values.append({"lr": goal * now + start * (1 - now)})
    return values, {}


def _swa_weight(arguments: Arguments, part: float) -> float:
    part = max(0, min(1, part))
    return part if arguments["anneal_strategy"] == "linear" else (1 - math.cos(math.pi * part)) / 2


def _swa_keys(state: ScheduleState, group: Mapping[str, Any]) -> Values:
    return {} if "swa_lr" in group else {"swa_lr": of_another_group(state.arguments, "swa_lr")}


def _swa_head(state: ScheduleState) -> dict[str, Any]:
    return {"_anneal_strategy": state.arguments["anneal_strategy"], "anneal_epochs": state.arguments["anneal_epochs"]}


def _swa_taken(state: ScheduleState, document: Mapping[str, Any]) -> Taken:
    told = {"anneal_strategy": document["_anneal_strategy"], "anneal_epochs": document["anneal_epochs"]}
    return {**state.arguments, **told}, {}


SWA_LR = Single(
    name="SWALR",
    arguments={
        "swa_lr": Argument(per_group),
        "anneal_epochs": Argument(whole(0, "anneal_epochs must be equal or greater than 0, got {value}"), 10),
        "anneal_strategy": Argument(
            word(("cos", "linear"), "anneal_strategy must be one of 'cos' or 'linear', instead got {value}"), "cos"
        ),
    },
    writes=_swa_writes,
    rule=_swa_lr,
    keys_of=_swa_keys,
    head=_swa_head,
    taken=_swa_taken,
)
