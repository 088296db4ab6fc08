"""Schedules made of others: SequentialLR and ChainedScheduler, with torch's quirks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from optserve.server.schedules.arguments import MOST_EPOCHS, Argument, epoch, milestones, refuse
from optserve.server.schedules.definition import Functions, Schedule, ScheduleState, Values, Walk, rates
from optserve.server.schedules.single import numbers, step_count
from optserve.wire.arguments import Entry, pairs
from optserve.wire.errors import InvalidHyperparameterError


@dataclass(frozen=True, eq=False, kw_only=True)
class Composed(Schedule):
    """What both have in common. `arguments` has `schedulers`; a state has its `parts` instead."""

    nothing: str
    """torch's message for no schedulers."""

    def check_parts(self, arguments: Mapping[str, Any], parts: Sequence[ScheduleState]) -> None:  # noqa: ARG002
        """torch's checks. InvalidHyperparameterError with its messages."""
        if not parts:
            raise InvalidHyperparameterError(self.nothing)
        for index, part in enumerate(parts):
            if part.schedule.takes_metric:
                raise InvalidHyperparameterError(
                    f"{self.name} does not support `{part.name}` scheduler as it requires additional kwargs to be specified "
                    f"when calling `step`, but got one at index {index} in the given schedulers sequence."
                )

    def advance_initially(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        """torch marks it as initial here, and the schedules in it step as ever."""
        return self.advance(replace(state, step_count=0), walk, first)

    def restart(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:  # noqa: ARG002
        raise InvalidHyperparameterError(
            f"a SequentialLR cannot turn to a {self.name} at a milestone (torch raises NotImplementedError there); "
            "it may come first, or its schedules stand in the SequentialLR themselves"
        )

    def undo(self, state: ScheduleState) -> ScheduleState:
        return replace(state, parts=tuple(part.schedule.undo(part) for part in state.parts))

    def extend(self, state: ScheduleState, group: Mapping[str, Any]) -> tuple[ScheduleState, Values]:
        parts: list[ScheduleState] = []
        keys: Values = {}
        for part in state.parts:
            extended, more = part.schedule.extend(part, {**group, **keys})
            parts.append(extended)
            keys |= more
        return replace(state, parts=tuple(parts)), keys

    def to_torch(self, state: ScheduleState) -> dict[str, Any]:
        initial = {} if state.step_count is None else {"_step_count": state.step_count, "_is_initial": False}
        parts = [part.schedule.to_torch(part) for part in state.parts]
        return {**self._own(state), "_last_lr": list(state.last_lrs), **initial, "_schedulers": parts}

    def _own(self, state: ScheduleState) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def from_torch(self, state: ScheduleState, document: Mapping[str, Any]) -> ScheduleState:
        inner = document["_schedulers"]
        if not isinstance(inner, list) or len(inner) != len(state.parts):
            raise refuse("_schedulers", "another number", f"the states of {len(state.parts)} schedules")
        if not all(isinstance(entry, dict) for entry in inner):
            raise refuse("_schedulers", inner, "dicts")
        parts = tuple(part.schedule.from_torch(part, entry) for part, entry in zip(state.parts, inner, strict=True))
        counted = step_count(document["_step_count"]) if "_step_count" in document else None
        return replace(state, parts=parts, step_count=counted, last_lrs=numbers("_last_lr", document["_last_lr"]))


def _firsts(state: ScheduleState, first: int) -> list[int]:
    """Of each part: how many schedules with functions come before it."""
    return list(accumulate((part.functions for part in state.parts[:-1]), initial=first))


def _begun(state: ScheduleState, walk: Walk, first: int) -> list[ScheduleState]:
    firsts = _firsts(state, first)
    return [part.schedule.begin(part, walk, before) for part, before in zip(state.parts, firsts, strict=True)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Sequential(Composed):
    """One schedule after the other, each from its milestone on."""

    def check_parts(self, arguments: Mapping[str, Any], parts: Sequence[ScheduleState]) -> None:
        super().check_parts(arguments, parts)
        if len(arguments["milestones"]) != len(parts) - 1:
            raise InvalidHyperparameterError(
                "Sequential Schedulers expects number of schedulers provided to be one more than the number of milestone "
                f"points, but got number of schedulers {len(parts)} and the number of milestones to be equal to "
                f"{len(arguments['milestones'])}"
            )

    def begin(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        """Makes the schedules, puts the rates back, and lets only the first one take its initial step again."""
        parts = [part.schedule.undo(part) for part in _begun(state, walk, first)]
        for group in walk.groups:
            group["lr"] = group["initial_lr"]
        turns, firsts = self._milestones(state), _firsts(state, first)
        now = bisect_right(turns, 0)
        parts[now] = parts[now].schedule.advance_initially(parts[now], walk, firsts[now])
        for part, turn in zip(parts[1:], turns, strict=True):
            if turn > 0:  # would it turn to it, when the time comes?
                copies = Walk([dict(group) for group in walk.groups], Functions((), part.functions))
                part.schedule.restart(part, copies, 0)
        return replace(state, last_epoch=state.last_epoch + 1, parts=tuple(parts), last_lrs=parts[now].last_lrs)

    def advance(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        turns, last_epoch = self._milestones(state), state.last_epoch + 1
        now = bisect_right(turns, last_epoch)
        part = state.parts[now]
        turning = now > 0 and turns[now - 1] == last_epoch
        move = part.schedule.restart if turning else part.schedule.advance
        part = move(part, walk, _firsts(state, first)[now])
        parts = (*state.parts[:now], part, *state.parts[now + 1 :])
        return replace(state, last_epoch=last_epoch, parts=parts, last_lrs=part.last_lrs)

    @staticmethod
    def _milestones(state: ScheduleState) -> tuple[int, ...]:
        found: Any = state.arguments["milestones"]
        return tuple(found)

    def _own(self, state: ScheduleState) -> dict[str, Any]:
        return {"_milestones": list(self._milestones(state)), "last_epoch": state.last_epoch}

    def from_torch(self, state: ScheduleState, document: Mapping[str, Any]) -> ScheduleState:
        turns = milestones("_milestones", document["_milestones"])
        if len(turns) != len(state.parts) - 1:
            raise refuse("_milestones", document["_milestones"], f"{len(state.parts) - 1} milestones")
        found = super().from_torch(state, document)
        return replace(found, arguments={"milestones": turns}, last_epoch=epoch(document["last_epoch"], most=2 * MOST_EPOCHS))


@dataclass(frozen=True, eq=False, kw_only=True)
class Chained(Composed):
    """All of them, one after the other, at every step. Its last_epoch is that of its first: torch's has none."""

    def begin(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        parts = _begun(state, walk, first)
        return replace(state, parts=tuple(parts), last_epoch=parts[0].last_epoch, last_lrs=rates(walk))

    def advance(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        firsts = _firsts(state, first)
        parts = [part.schedule.advance(part, walk, before) for part, before in zip(state.parts, firsts, strict=True)]
        return replace(state, parts=tuple(parts), last_epoch=parts[0].last_epoch, last_lrs=rates(walk))

    def undo(self, state: ScheduleState) -> ScheduleState:
        found = super().undo(state)
        return replace(found, last_epoch=found.parts[0].last_epoch)

    def from_torch(self, state: ScheduleState, document: Mapping[str, Any]) -> ScheduleState:
        found = super().from_torch(state, document)
        return replace(found, last_epoch=found.parts[0].last_epoch)


def _schedulers(name: str, value: object) -> tuple[Entry, ...]:
    """Each is checked by itself when it is made."""
    return tuple(pairs(name, value))


COMPOSED: Mapping[str, Composed] = {
    "chainedscheduler": Chained(
        name="ChainedScheduler",
        arguments={"schedulers": Argument(_schedulers)},
        takes_last_epoch=False,
        nothing="ChainedScheduler expects at least one scheduler to be chained, but got no scheduler.",
    ),
    "sequentiallr": Sequential(
        name="SequentialLR",
        arguments={"schedulers": Argument(_schedulers), "milestones": Argument(milestones)},
        nothing="SequentialLR expects at least one scheduler, but got no scheduler.",
    ),
}
