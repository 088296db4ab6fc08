"""OneCycleLR: up to a rate and down again, and momentum the other way.

Smith and Topin, "Super-Convergence", 2018. It writes its rates into the groups and reads them there at every step, so that
an edit of a group's `max_lr` or `min_lr` holds from the next one on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optserve.server.schedules.arguments import Argument, flag, number, optional, per_group, plain, word
from optserve.server.schedules.definition import Groups, ScheduleState, Values
from optserve.server.schedules.momentum import MOMENTUM, begun, beta1, beta1_taken, turned
from optserve.server.schedules.single import Arguments, Call, Single, Taken, of_another_group, of_groups
from optserve.wire.errors import InvalidArgumentError, InvalidHyperparameterError


def _one_cycle_check(arguments: Arguments) -> None:
    total, epochs, steps = (arguments[name] for name in ("total_steps", "epochs", "steps_per_epoch"))
    if total is not None:
        _positive("total_steps", total)
    elif epochs is None or steps is None:
        raise InvalidHyperparameterError("You must define either total_steps OR (epochs AND steps_per_epoch)")
    else:
        _positive("epochs", epochs)
        _positive("steps_per_epoch", steps)
    start = arguments["pct_start"]
    if not isinstance(start, float) or not 0 <= start <= 1:
        raise InvalidHyperparameterError(f"Expected float between 0 and 1 pct_start, but got {start}")


def _positive(name: str, value: object) -> None:
    if type(value) is not int or value <= 0:
        raise InvalidHyperparameterError(f"Expected positive integer {name}, but got {value}")


def _total_steps(arguments: Arguments) -> int:
    total = arguments["total_steps"]
    found: int = arguments["epochs"] * arguments["steps_per_epoch"] if total is None else total
    return found


def _phases(arguments: Arguments) -> list[dict[str, Any]]:
    """torch's _schedule_phases: the last step of each, and the group keys between which it goes."""
    total, start = _total_steps(arguments), arguments["pct_start"]
    up = _phase(float(start * total) - 1, "initial_lr", "max_lr", "max_momentum", "base_momentum")
    if not arguments["three_phase"]:
        return [up, _phase(total - 1, "max_lr", "min_lr", "base_momentum", "max_momentum")]
    down = _phase(float(2 * start * total) - 2, "max_lr", "initial_lr", "base_momentum", "max_momentum")
    return [up, down, _phase(total - 1, "initial_lr", "min_lr", "max_momentum", "max_momentum")]


def _phase(end: float, start_lr: str, end_lr: str, start_momentum: str, end_momentum: str) -> dict[str, Any]:
    lrs = {"start_lr": start_lr, "end_lr": end_lr}
    return {"end_step": end, **lrs, "start_momentum": start_momentum, "end_momentum": end_momentum}


def _one_cycle_writes(groups: Groups, arguments: Arguments, last_epoch: int) -> list[Values]:
    rates = of_groups(arguments, "max_lr", len(groups))
    found: list[Values] = [{} for _ in groups]
    if last_epoch == -1:
        found = [_one_cycle_rates(arguments, rate) for rate in rates]
    momenta = begun(groups, arguments, last_epoch)
    return [{**edit, **more} for edit, more in zip(found, momenta, strict=True)]


def _one_cycle_rates(arguments: Arguments, rate: float) -> Values:
    try:
        initial = rate / arguments["div_factor"]
        return {"initial_lr": initial, "max_lr": rate, "min_lr": initial / arguments["final_div_factor"]}
    except ArithmeticError as error:
        raise InvalidHyperparameterError(f"OneCycleLR cannot divide by its div_factor or final_div_factor: {error}") from error


def _one_cycle_lr(call: Call) -> tuple[list[Values], dict[str, Any]]:
    arguments, at = call.arguments, call.position.last_epoch
    total = _total_steps(arguments)
    if at > total:
        raise InvalidArgumentError(f"Tried to step {at} times. The specified number of total steps is {total}")
    begins: float = 0.0
    phases = _phases(arguments)
    for phase in phases[:-1]:
        if at <= phase["end_step"]:
            break
        begins = phase["end_step"]
    else:
        phase = phases[-1]
    part = (at - begins) / (phase["end_step"] - begins)
    anneal = _cosine if arguments["anneal_strategy"] == "cos" else _line
    values: list[Values] = []
    for group in call.groups:
        edit: Values = {"lr": anneal(group[phase["start_lr"]], group[phase["end_lr"]], part)}
        if arguments["cycle_momentum"]:
            edit |= turned(group, anneal(group[phase["start_momentum"]], group[phase["end_momentum"]], part))
        values.append(edit)
    return values, beta1(call)


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * part) + 1)


def _line(start: float, end: float, part: float) -> float:
    return (end - start) * part + start


def _one_cycle_keys(state: ScheduleState, group: Mapping[str, Any]) -> Values:
    """As if the group had been there, but for its rate and momentum, which it keeps until the next step."""
    arguments = state.arguments
    keys = _one_cycle_rates(arguments, group["max_lr"] if "max_lr" in group else of_another_group(arguments, "max_lr"))
    momenta = reversed(MOMENTUM) if arguments["cycle_momentum"] else ()
    found: Values = {name: value for name, value in keys.items() if name not in group}
    return found | {name: of_another_group(arguments, name) for name in momenta if name not in group}


def _one_cycle_head(state: ScheduleState) -> dict[str, Any]:
    return {
        "total_steps": _total_steps(state.arguments),
        "_schedule_phases": _phases(state.arguments),
        "_anneal_func_type": state.arguments["anneal_strategy"],
        "cycle_momentum": state.arguments["cycle_momentum"],
        **state.own,
    }


def _one_cycle_taken(state: ScheduleState, document: Mapping[str, Any]) -> Taken:
    told = {"anneal_strategy": document["_anneal_func_type"], "cycle_momentum": document["cycle_momentum"]}
    return {**state.arguments, **told}, beta1_taken(state, document)


ONE_CYCLE_LR = Single(
    name="OneCycleLR",
    arguments={
        "max_lr": Argument(per_group),
        "total_steps": Argument(optional(plain), None),
        "epochs": Argument(optional(plain), None),
        "steps_per_epoch": Argument(optional(plain), None),
        "pct_start": Argument(plain, 0.3),
        "anneal_strategy": Argument(
            word(("cos", "linear"), "anneal_strategy must be one of 'cos' or 'linear', instead got {value}"), "cos"
        ),
        "cycle_momentum": Argument(flag, True),
        "base_momentum": Argument(per_group, 0.85),
        "max_momentum": Argument(per_group, 0.95),
        "div_factor": Argument(number, 25.0),
        "final_div_factor": Argument(number, 1e4),
        "three_phase": Argument(flag, False),
    },
    check=_one_cycle_check,
    writes=_one_cycle_writes,
    rule=_one_cycle_lr,
    keys_of=_one_cycle_keys,
    head=_one_cycle_head,
    taken=_one_cycle_taken,
)
