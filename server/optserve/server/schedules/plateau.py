"""ReduceLROnPlateau: torch's schedule of a metric that travels with every step.

A metric of NaN is no improvement, ±inf is compared as any other, as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from optserve.server.schedules.arguments import Argument, checked, epoch, number, per_group, plain, refuse, word
from optserve.server.schedules.definition import Schedule, ScheduleState, Values, Walk, rates
from optserve.server.schedules.single import numbers
from optserve.wire.errors import InvalidArgumentError, InvalidHyperparameterError


def _factor(name: str, value: object) -> float:
    found = number(name, value)
    if found >= 1.0:
        raise InvalidHyperparameterError("Factor should be < 1.0.", argument=name)
    return found


def _is_better(metric: float, best: float, arguments: Mapping[str, Any]) -> bool:
    threshold, lower = arguments["threshold"], arguments["mode"] == "min"
    if arguments["threshold_mode"] == "rel":
        return bool(metric < best * (1.0 - threshold) if lower else metric > best * (threshold + 1.0))
    return bool(metric < best - threshold if lower else metric > best + threshold)


def _worst(arguments: Mapping[str, Any]) -> float:
    return math.inf if arguments["mode"] == "min" else -math.inf


@dataclass(frozen=True, eq=False, kw_only=True)
class Plateau(Schedule):
    """`own` holds best, cooldown_counter, num_bad_epochs and min_lrs."""

    def begin(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:  # noqa: ARG002
        least = state.arguments["min_lr"]
        if isinstance(least, tuple) and len(least) != len(walk.groups):
            raise InvalidHyperparameterError(f"expected {len(walk.groups)} min_lrs, got {len(least)}")
        min_lrs = list(least) if isinstance(least, tuple) else [least] * len(walk.groups)
        own = {"best": _worst(state.arguments), "cooldown_counter": 0, "num_bad_epochs": 0, "min_lrs": min_lrs}
        return replace(state, last_epoch=0, own=own, last_lrs=rates(walk))

    def advance(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:  # noqa: ARG002
        if walk.metric is None:
            raise InvalidArgumentError(
                f"{state.name} steps on a metric, and none came: step_schedule(metric=loss), the same on every rank"
            )
        arguments, own = state.arguments, dict(state.own)
        better = _is_better(walk.metric, own["best"], arguments)
        if better:
            own["best"] = walk.metric
        own["num_bad_epochs"] = 0 if better else own["num_bad_epochs"] + 1
        if own["cooldown_counter"] > 0:
            own["cooldown_counter"] -= 1
            own["num_bad_epochs"] = 0
        if own["num_bad_epochs"] > arguments["patience"]:
            own["min_lrs"] = self._reduce(state, walk)
            own["cooldown_counter"] = arguments["cooldown"]
            own["num_bad_epochs"] = 0
        return replace(state, last_epoch=state.last_epoch + 1, own=own, last_lrs=rates(walk))

    @staticmethod
    def _reduce(state: ScheduleState, walk: Walk) -> list[float]:
        arguments = state.arguments
        least: list[float] = state.own["min_lrs"]
        if len(least) != len(walk.groups):
            if isinstance(arguments["min_lr"], tuple):
                raise InvalidArgumentError(
                    f"the job has {len(walk.groups)} param groups, and min_lr has {len(least)} values: a group was added since "
                    "the schedule was set; set it anew, or load its state_dict with as many min_lrs"
                )
            least = [arguments["min_lr"]] * len(walk.groups)
        for group, lowest in zip(walk.groups, least, strict=True):
            before = float(group["lr"])
            after = max(before * arguments["factor"], lowest)
            if before - after > arguments["eps"]:
                group["lr"] = after
        return least

    def extend(self, state: ScheduleState, group: Mapping[str, Any]) -> tuple[ScheduleState, Values]:  # noqa: ARG002
        """Nothing: torch counts the groups when it reduces."""
        return state, {}

    def to_torch(self, state: ScheduleState) -> dict[str, Any]:
        given, own = state.arguments, state.own
        return {
            "factor": given["factor"],
            "default_min_lr": None if isinstance(given["min_lr"], tuple) else given["min_lr"],
            "min_lrs": list(own["min_lrs"]),
            **{name: given[name] for name in ("patience", "cooldown", "eps")},
            "last_epoch": state.last_epoch,
            "_last_lr": list(state.last_lrs),
            "mode_worse": _worst(given),
            **{name: given[name] for name in ("mode", "threshold", "threshold_mode")},
            **{name: own[name] for name in ("best", "cooldown_counter", "num_bad_epochs")},
        }

    def from_torch(self, state: ScheduleState, document: Mapping[str, Any]) -> ScheduleState:
        default, least = document["default_min_lr"], numbers("min_lrs", document["min_lrs"])
        best = document["best"]
        if not isinstance(best, int | float) or isinstance(best, bool) or math.isnan(best):
            raise refuse("best", best, "a number")
        told = {name: document[name] for name in self.arguments if name != "min_lr"}
        return replace(
            state,
            arguments=checked(self.name, self.arguments, {**told, "min_lr": least if default is None else default}),
            last_epoch=epoch(document["last_epoch"]),
            last_lrs=numbers("_last_lr", document["_last_lr"]),
            own={
                "best": best,
                "cooldown_counter": plain("cooldown_counter", document["cooldown_counter"]),
                "num_bad_epochs": plain("num_bad_epochs", document["num_bad_epochs"]),
                "min_lrs": list(least),
            },
        )


REDUCE_LR_ON_PLATEAU = Plateau(
    name="ReduceLROnPlateau",
    arguments={
        "mode": Argument(word(("min", "max"), "mode {value} is unknown!"), "min"),
        "factor": Argument(_factor, 0.1),
        "patience": Argument(plain, 10),
        "threshold": Argument(number, 1e-4),
        "threshold_mode": Argument(word(("rel", "abs"), "threshold mode {value} is unknown!"), "rel"),
        "cooldown": Argument(plain, 0),
        "min_lr": Argument(per_group, 0),
        "eps": Argument(number, 1e-8),
    },
    takes_last_epoch=False,
    takes_metric=True,
)
