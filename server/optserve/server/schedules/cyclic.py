"""CyclicLR: between two rates of its own, and momentum the other way.

Smith, "Cyclical Learning Rates for Training Neural Networks", 2017. It starts from its own rates at every step, not from
those that the groups have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optserve.server.schedules.arguments import Argument, count, flag, number, optional, per_group, period, refuse, word
from optserve.server.schedules.definition import Groups, ScheduleState, Values
from optserve.server.schedules.momentum import MOMENTUM, begun, beta1, beta1_taken, turned
from optserve.server.schedules.single import Arguments, Call, Single, Taken, numbers, of_another_group, of_groups, one_of_groups


def _cyclic_sizes(arguments: Arguments) -> tuple[float, float]:
    """torch's total_size and step_ratio."""
    up = float(arguments["step_size_up"])
    down = up if arguments["step_size_down"] is None else float(arguments["step_size_down"])
    return up + down, up / (up + down)


def _cyclic_writes(groups: Groups, arguments: Arguments, last_epoch: int) -> list[Values]:
    found: list[Values] = [{} for _ in groups]
    if last_epoch == -1:
        found = [{"lr": rate} for rate in of_groups(arguments, "base_lr", len(groups))]
    momenta = begun(groups, arguments, last_epoch)
    return [{**edit, **more} for edit, more in zip(found, momenta, strict=True)]


def _cyclic_lr(call: Call) -> tuple[list[Values], dict[str, Any]]:
    """torch starts from its base rates, not from the rates that the groups have."""
    arguments, epoch, groups = call.arguments, call.position.last_epoch, len(call.groups)
    size, ratio = _cyclic_sizes(arguments)
    cycle = math.floor(1 + epoch / size)
    x = 1.0 + epoch / size - cycle
    height = x / ratio if x <= ratio else (x - 1) / (ratio - 1)
    scale = _cyclic_scale(arguments, cycle, epoch)
    pairs = zip(call.base_lrs, of_groups(arguments, "max_lr", groups), strict=True)
    values: list[Values] = [{"lr": base + (most - base) * height * scale} for base, most in pairs]
    if arguments["cycle_momentum"]:
        low, high = (of_groups(arguments, name, groups) for name in MOMENTUM)
        for edit, group, least, most in zip(values, call.groups, low, high, strict=True):
            edit.update(turned(group, most - (most - least) * height * scale))
    return values, beta1(call)


def _cyclic_base(state: ScheduleState, _group: Mapping[str, Any]) -> float:
    arguments = state.arguments
    for name in ("max_lr", *(MOMENTUM if arguments["cycle_momentum"] else ())):
        of_another_group(arguments, name)
    return of_another_group(arguments, "base_lr")


def _cyclic_scale(arguments: Arguments, cycle: int, epoch: int) -> float:
    if arguments["mode"] == "triangular":
        return 1.0
    return 1 / (2.0 ** (cycle - 1)) if arguments["mode"] == "triangular2" else float(arguments["gamma"] ** epoch)


def _cyclic_head(state: ScheduleState) -> dict[str, Any]:
    arguments, groups = state.arguments, len(state.base_lrs)
    size, ratio = _cyclic_sizes(arguments)
    names = MOMENTUM if arguments["cycle_momentum"] else ()
    return {
        "max_lrs": list(of_groups(arguments, "max_lr", groups)),
        "total_size": size,
        "step_ratio": ratio,
        "mode": arguments["mode"],
        "gamma": arguments["gamma"],
        "scale_mode": "iterations" if arguments["mode"] == "exp_range" else "cycle",
        "cycle_momentum": arguments["cycle_momentum"],
        **state.own,
        **{f"{name}s": list(of_groups(arguments, name, groups)) for name in names},
    }


def _cyclic_taken(state: ScheduleState, document: Mapping[str, Any]) -> Taken:
    lists = {"base_lr": "base_lrs", "max_lr": "max_lrs"}
    if document["cycle_momentum"]:
        lists |= {name: f"{name}s" for name in MOMENTUM}
    told = {name: one_of_groups(numbers(key, document[key]), state.arguments[name]) for name, key in lists.items()}
    same = {name: document[name] for name in ("mode", "gamma", "cycle_momentum")}
    return {**state.arguments, **told, **same}, beta1_taken(state, document)


def _no_function(name: str, value: object) -> None:
    if value is not None:
        raise refuse(name, value, "None: functions never travel; choose a mode, or a LambdaLR, whose numbers do")


CYCLIC_LR = Single(
    name="CyclicLR",
    arguments={
        "base_lr": Argument(per_group),
        "max_lr": Argument(per_group),
        "step_size_up": Argument(period, 2000),
        "step_size_down": Argument(optional(count), None),
        "mode": Argument(
            word(("triangular", "triangular2", "exp_range"), "mode is invalid and scale_fn is None"), "triangular"
        ),
        "gamma": Argument(number, 1.0),
        "scale_fn": Argument(_no_function, None),
        "scale_mode": Argument(
            word(("cycle", "iterations"), "scale_mode is {value!r}; it must be cycle or iterations"), "cycle"
        ),
        "cycle_momentum": Argument(flag, True),
        "base_momentum": Argument(per_group, 0.8),
        "max_momentum": Argument(per_group, 0.9),
    },
    writes=_cyclic_writes,
    rule=_cyclic_lr,
    bases=lambda arguments, groups: of_groups(arguments, "base_lr", groups),
    base_of=_cyclic_base,
    head=_cyclic_head,
    tail=lambda _: {"_scale_fn_custom": None},
    taken=_cyclic_taken,
)
