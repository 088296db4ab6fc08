"""Schedules that are a function of one group's rate, in torch's recursive form; and the table of them.

Each starts from the rate that the group has now, so a rate edited by hand and a group added in mid-run go on as under torch
2.13, bit for bit. The closed forms are torch's at epoch 0, which only a SequentialLR asks for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optserve.server.schedules.arguments import (
    MOST_MILESTONES,
    Argument,
    Number,
    constant_factor,
    count,
    end_factor,
    milestones,
    number,
    period,
    plain,
    refuse,
    start_factor,
    whole,
)
from optserve.server.schedules.definition import ScheduleState, Values
from optserve.server.schedules.single import Call, Position, Single, Taken, each, from_base


def _step_lr(at: Position, lr: float, _base: float, step_size: Number, gamma: float) -> float:
    return lr if at.last_epoch == 0 or at.last_epoch % step_size != 0 else lr * gamma


def _step_lr_again(base: float, step_size: Number, gamma: float) -> float:
    return base * gamma ** (0 // step_size)


def _multi_step_lr(at: Position, lr: float, _base: float, milestones: tuple[int, ...], gamma: float) -> float:
    count = milestones.count(at.last_epoch)
    return lr * gamma**count if count else lr


def _multi_step_lr_again(base: float, milestones: tuple[int, ...], gamma: float) -> float:
    return base * gamma ** sum(entry <= 0 for entry in milestones)


def _constant_lr(at: Position, lr: float, _base: float, factor: float, total_iters: Number) -> float:
    if at.last_epoch == 0:
        return lr * factor
    return lr if at.last_epoch != total_iters else lr * (1.0 / factor)


def _constant_lr_again(base: float, factor: float, total_iters: Number) -> float:
    return base * (factor + (total_iters <= 0) * (1 - factor))


def _exponential_lr(at: Position, lr: float, _base: float, gamma: float) -> float:
    return lr if at.initial else lr * gamma


def _exponential_lr_again(base: float, gamma: float) -> float:
    return base * gamma**0


def _linear_lr(at: Position, lr: float, _base: float, start_factor: float, end_factor: float, total_iters: Number) -> float:
    if at.last_epoch == 0:
        return lr * start_factor
    if at.initial or at.last_epoch > total_iters:
        return lr
    rise = end_factor - start_factor
    return lr * (1.0 + rise / (total_iters * start_factor + (at.last_epoch - 1) * rise))


def _linear_lr_again(base: float, start_factor: float, end_factor: float, total_iters: Number) -> float:
    return base * (start_factor + (end_factor - start_factor) * 0 / total_iters)


def _polynomial_lr(at: Position, lr: float, _base: float, total_iters: Number, power: float) -> float:
    if at.initial or at.last_epoch > total_iters:
        return lr
    left, before = 1.0 - at.last_epoch / total_iters, 1.0 - (at.last_epoch - 1) / total_iters
    return float(lr * (left / before) ** power)


def _polynomial_lr_again(base: float, total_iters: Number, power: float) -> float:
    return float(base * (1.0 - 0 / total_iters) ** power)


def _cosine_annealing_lr(at: Position, lr: float, base: float, T_max: Number, eta_min: float) -> float:  # noqa: N803
    if at.initial:
        return lr
    if at.step_count == 1 and at.last_epoch > 0:  # after a state_dict whose _step_count was edited
        return eta_min + (base - eta_min) * (1 + math.cos(at.last_epoch * math.pi / T_max)) / 2
    if (at.last_epoch - 1 - T_max) % (2 * T_max) == 0:  # out of the trough, where the ratio below would divide by zero
        return lr + (base - eta_min) * (1 - math.cos(math.pi / T_max)) / 2
    now = 1 + math.cos(math.pi * at.last_epoch / T_max)
    before = 1 + math.cos(math.pi * (at.last_epoch - 1) / T_max)
    return now / before * (lr - eta_min) + eta_min


def _cosine_annealing_lr_again(base: float, T_max: Number, eta_min: float) -> float:  # noqa: N803
    return eta_min + (base - eta_min) * (1 + math.cos(math.pi * 0 / T_max)) / 2


def _warm_restarts_rates(call: Call) -> tuple[list[Values], dict[str, Any]]:
    """Also what SequentialLR turns to it with: torch sets last_epoch to 0 there and leaves T_cur."""
    low: float = call.arguments["eta_min"]
    around = 1 + math.cos(math.pi * call.own["T_cur"] / call.own["T_i"])
    return [{"lr": low + (base - low) * around / 2} for base in call.base_lrs], dict(call.own)


def _warm_restarts(call: Call) -> tuple[list[Values], dict[str, Any]]:
    length, now = call.own["T_i"], call.own["T_cur"] + 1
    if call.position.last_epoch == 0:
        length, now = call.arguments["T_0"], 0
    elif now >= length:
        now, length = now % length, length * call.arguments["T_mult"]
    return _warm_restarts_rates(replace(call, own={"T_i": length, "T_cur": now}))


def _warm_restarts_head(state: ScheduleState) -> dict[str, Any]:
    given, own = state.arguments, state.own
    return {
        "T_0": given["T_0"],
        "T_i": own["T_i"],
        "T_mult": given["T_mult"],
        "eta_min": given["eta_min"],
        "T_cur": own["T_cur"],
    }


def _cycle(name: str, value: object) -> Number:
    """Of more than 64 bits, too: a restart multiplies it."""
    return value if type(value) is int and value > 0 else period(name, value)


def _warm_restarts_taken(state: ScheduleState, document: Mapping[str, Any]) -> Taken:
    return {name: document[name] for name in state.arguments}, {
        "T_i": _cycle("T_i", document["T_i"]),
        "T_cur": plain("T_cur", document["T_cur"]),
    }


def _multi_step_head(state: ScheduleState) -> dict[str, Any]:
    """The Counter of the milestones as (epoch, count) pairs in ascending order."""
    counted = Counter(state.arguments["milestones"])
    return {"milestones": [list(pair) for pair in sorted(counted.items())], "gamma": state.arguments["gamma"]}


def _multi_step_taken(state: ScheduleState, document: Mapping[str, Any]) -> Taken:
    pairs = document["milestones"]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise refuse("milestones", pairs, "a Counter of whole numbers")
    counts = {count("milestones", epoch): _times(times) for epoch, times in pairs}
    if sum(counts.values()) > MOST_MILESTONES:
        raise refuse("milestones", "a Counter", f"of at most {MOST_MILESTONES} milestones")
    found = tuple(sorted(epoch for epoch, times in counts.items() for _ in range(times)))
    given: tuple[int, ...] = state.arguments["milestones"]
    return {"milestones": given if tuple(sorted(given)) == found else found, "gamma": document["gamma"]}, {}


def _times(value: object) -> int:
    if type(value) is not int or not 0 < value <= MOST_MILESTONES:
        raise refuse("milestones", value, f"counts, from 1 to {MOST_MILESTONES}")
    return value


def _lambda_lr(call: Call) -> tuple[list[Values], dict[str, Any]]:
    return [{"lr": base * factor} for base, factor in zip(call.base_lrs, call.ask(), strict=True)], {}


def _multiplicative_lr(call: Call) -> tuple[list[Values], dict[str, Any]]:
    if call.position.initial:
        return [{} for _ in call.groups], {}
    return [{"lr": group["lr"] * factor} for group, factor in zip(call.groups, call.ask(), strict=True)], {}


def _functions_tail(state: ScheduleState) -> dict[str, Any]:
    """The functions stay with the client; torch too leaves them out."""
    return {"lr_lambdas": [None] * len(state.base_lrs)}


_GAMMA = Argument(number, 0.1)

RATES: Mapping[str, Single] = {
    "constantlr": Single(
        name="ConstantLR",
        arguments={"factor": Argument(constant_factor, 1.0 / 3), "total_iters": Argument(count, 5)},
        rule=each(_constant_lr),
        closed=from_base(_constant_lr_again),
    ),
    "cosineannealinglr": Single(
        name="CosineAnnealingLR",
        arguments={"T_max": Argument(period), "eta_min": Argument(number, 0.0)},
        rule=each(_cosine_annealing_lr),
        closed=from_base(_cosine_annealing_lr_again),
    ),
    "cosineannealingwarmrestarts": Single(
        name="CosineAnnealingWarmRestarts",
        arguments={
            "T_0": Argument(whole(1, "Expected positive integer T_0, but got {value}")),
            "T_mult": Argument(whole(1, "Expected integer T_mult >= 1, but got {value}"), 1),
            "eta_min": Argument(number, 0.0),
        },
        rule=_warm_restarts,
        closed=_warm_restarts_rates,
        keeps=lambda arguments, last_epoch: {"T_i": arguments["T_0"], "T_cur": last_epoch},
        counts_steps=False,
        next_epoch=lambda last_epoch: max(last_epoch + 1, 0),
        head=_warm_restarts_head,
        taken=_warm_restarts_taken,
    ),
    "exponentiallr": Single(
        name="ExponentialLR",
        arguments={"gamma": Argument(number)},
        rule=each(_exponential_lr),
        closed=from_base(_exponential_lr_again),
    ),
    "lambdalr": Single(name="LambdaLR", arguments={}, calls_functions=True, rule=_lambda_lr, tail=_functions_tail),
    "linearlr": Single(
        name="LinearLR",
        arguments={
            "start_factor": Argument(start_factor, 1.0 / 3),
            "end_factor": Argument(end_factor, 1.0),
            "total_iters": Argument(count, 5),
        },
        rule=each(_linear_lr),
        closed=from_base(_linear_lr_again),
    ),
    "multiplicativelr": Single(
        name="MultiplicativeLR", arguments={}, calls_functions=True, rule=_multiplicative_lr, tail=_functions_tail
    ),
    "multisteplr": Single(
        name="MultiStepLR",
        arguments={"milestones": Argument(milestones), "gamma": _GAMMA},
        rule=each(_multi_step_lr),
        closed=from_base(_multi_step_lr_again),
        head=_multi_step_head,
        taken=_multi_step_taken,
    ),
    "polynomiallr": Single(
        name="PolynomialLR",
        arguments={"total_iters": Argument(count, 5), "power": Argument(number, 1.0)},
        rule=each(_polynomial_lr),
        closed=from_base(_polynomial_lr_again),
    ),
    "steplr": Single(
        name="StepLR",
        arguments={"step_size": Argument(period), "gamma": _GAMMA},
        rule=each(_step_lr),
        closed=from_base(_step_lr_again),
    ),
}
