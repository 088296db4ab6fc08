"""A schedule of its own: torch's LRScheduler, of which each class is a rule and what surrounds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optserve.server.schedules.arguments import MOST_EPOCHS, checked, epoch, number, plain
from optserve.server.schedules.definition import Groups, Schedule, ScheduleState, Values, Walk, edit, rates
from optserve.wire.arguments import ScheduleValue
from optserve.wire.errors import InputError, InvalidArgumentError, InvalidHyperparameterError

_LEAST_EPOCH = -64
"""Of a `last_epoch` on the way: each SequentialLR around a schedule takes one from it when it is made."""

Arguments = Mapping[str, Any]
"""A schedule's, as checked."""


@dataclass(frozen=True)
class Position:
    """`last_epoch` as torch counts it, already advanced by this step; `initial` marks the step that a constructor takes."""

    last_epoch: int
    initial: bool = False
    step_count: int = 0
    """torch's _step_count, already advanced by this step."""


@dataclass(frozen=True)
class Call:
    """What a rule reads: one step of one schedule. `groups` hold at least what the schedule changes ("lr")."""

    position: Position
    groups: Groups
    base_lrs: Sequence[float]
    own: Mapping[str, Any]
    arguments: Arguments
    ask: Callable[[], tuple[float, ...]]
    """Calls the functions at this epoch: one factor a group."""


Rule = Callable[[Call], tuple[list[Values], dict[str, Any]]]

Taken = tuple[dict[str, Any], dict[str, Any]]
"""Arguments and `own`, not checked yet."""


def _writes_nothing(_groups: Groups, _arguments: Arguments, _last_epoch: int) -> list[Values]:
    return []


def _nothing(_arguments: Arguments, _last_epoch: int) -> dict[str, Any]:
    return {}


def _successor(last_epoch: int) -> int:
    return last_epoch + 1


def _as_arguments(state: ScheduleState) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in state.arguments.items()}


def _no_tail(_state: ScheduleState) -> dict[str, Any]:
    return {}


def _arguments_in(state: ScheduleState, document: Mapping[str, Any]) -> Taken:
    return {name: document[name] for name in state.arguments}, {}


def _no_keys(_state: ScheduleState, _group: Mapping[str, Any]) -> Values:
    return {}


def initial_lr(group: Mapping[str, Any]) -> float:
    """The base rate of a group that a schedule has not seen."""
    return number("initial_lr", group.get("initial_lr", group["lr"]))


def _initial_lr_of(_state: ScheduleState, group: Mapping[str, Any]) -> float:
    return initial_lr(group)


@dataclass(frozen=True, eq=False, kw_only=True)
class Single(Schedule):
    """What torch's class does, in pure functions. Most are their `rule` only."""

    rule: Rule
    """torch's get_lr: new values from the position and what is now."""
    closed: Rule | None = None
    """torch's closed form at epoch 0, where it has one: what SequentialLR turns to it with."""
    writes: Callable[[Groups, Arguments, int], list[Values]] = _writes_nothing
    """(groups, arguments, last_epoch): what torch's constructor writes into each group before its first step."""
    keeps: Callable[[Arguments, int], dict[str, Any]] = _nothing
    """(arguments, last_epoch): `own` before the first step."""
    bases: Callable[[Arguments, int], tuple[float, ...]] | None = None
    """(arguments, groups): base rates that torch's constructor sets after its first step, in place of `initial_lr`."""
    counts_steps: bool = True
    """Whether torch's step() advances _step_count."""
    next_epoch: Callable[[int], int] = _successor
    """The last_epoch after a step."""
    head: Callable[[ScheduleState], dict[str, Any]] = _as_arguments
    """The keys of torch's state_dict before those that all have."""
    tail: Callable[[ScheduleState], dict[str, Any]] = _no_tail
    """Those after them."""
    taken: Callable[[ScheduleState, Mapping[str, Any]], Taken] = _arguments_in
    """Arguments and `own` from a state_dict, as far as they can be told from it."""
    base_of: Callable[[ScheduleState, Mapping[str, Any]], float] = _initial_lr_of
    """The base rate of a group that is added in mid-run."""
    keys_of: Callable[[ScheduleState, Mapping[str, Any]], Values] = _no_keys
    """What such a group needs beside its rate."""

    def begin(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        arguments, last_epoch = state.arguments, state.last_epoch
        edit(walk, self.writes(walk.groups, arguments, last_epoch) or [{} for _ in walk.groups], self.name, last_epoch)
        for index, group in enumerate(walk.groups):
            if last_epoch == -1:
                group.setdefault("initial_lr", group["lr"])
            elif "initial_lr" not in group:
                raise InvalidHyperparameterError(
                    f"param 'initial_lr' is not specified in param_groups[{index}] when resuming scheduler with "
                    "last_epoch >= 0."
                )
        bases = tuple(initial_lr(group) for group in walk.groups)
        state = replace(state, base_lrs=bases, own=self.keeps(arguments, last_epoch))
        state = self.advance_initially(state, walk, first)
        return state if self.bases is None else replace(state, base_lrs=self.bases(arguments, len(walk.groups)))

    def advance_initially(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        return self._step(replace(state, step_count=0), walk, first, initial=True)

    def advance(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        return self._step(state, walk, first, initial=False)

    def _step(self, state: ScheduleState, walk: Walk, first: int, *, initial: bool) -> ScheduleState:
        counted = (state.step_count or 0) + self.counts_steps
        at = Position(self.next_epoch(state.last_epoch), initial, counted)
        return self._update(self.rule, state, at, walk, first)

    def restart(self, state: ScheduleState, walk: Walk, first: int) -> ScheduleState:
        return self._update(self.closed or self.rule, state, Position(0, False, state.step_count or 0), walk, first)

    def _update(self, rule: Rule, state: ScheduleState, at: Position, walk: Walk, first: int) -> ScheduleState:
        if len(walk.groups) != len(state.base_lrs):
            raise InvalidArgumentError(f"{state.name} knows {len(state.base_lrs)} param groups; there are {len(walk.groups)}")

        def ask() -> tuple[float, ...]:
            return walk.functions.ask(first, at.last_epoch, len(walk.groups))

        try:
            values, own = rule(Call(at, walk.groups, state.base_lrs, state.own, state.arguments, ask))
        except InputError:
            raise
        except (ArithmeticError, ValueError) as error:  # a cosine of infinity is a ValueError
            raise InvalidHyperparameterError(
                f"{state.name} cannot be stepped to last_epoch {at.last_epoch}: {error}"
            ) from error
        except KeyError as error:
            raise InvalidArgumentError(
                f"{state.name} reads {error} of every param group, and one has none; set the schedule anew"
            ) from error
        edit(walk, values, self.name, at.last_epoch)
        return replace(state, last_epoch=at.last_epoch, step_count=at.step_count, own=own, last_lrs=rates(walk))

    def undo(self, state: ScheduleState) -> ScheduleState:
        return replace(state, last_epoch=state.last_epoch - 1)

    def extend(self, state: ScheduleState, group: Mapping[str, Any]) -> tuple[ScheduleState, Values]:
        keys = self.keys_of(state, group)
        return replace(state, base_lrs=(*state.base_lrs, self.base_of(state, group))), keys

    def to_torch(self, state: ScheduleState) -> dict[str, Any]:
        return {
            **self.head(state),
            "base_lrs": list(state.base_lrs),
            "last_epoch": state.last_epoch,
            "_step_count": state.step_count,
            "_is_initial": False,
            "_get_lr_called_within_step": False,
            "_last_lr": list(state.last_lrs),
            **self.tail(state),
        }

    def from_torch(self, state: ScheduleState, document: Mapping[str, Any]) -> ScheduleState:
        arguments, own = self.taken(state, document)
        return replace(
            state,
            arguments=checked(self.name, self.arguments, arguments),
            own=own,
            last_epoch=epoch(document["last_epoch"], _LEAST_EPOCH, 2 * MOST_EPOCHS),
            step_count=step_count(document["_step_count"]),
            base_lrs=numbers("base_lrs", document["base_lrs"]),
            last_lrs=numbers("_last_lr", document["_last_lr"]),
        )


def numbers(name: str, values: object) -> tuple[float, ...]:
    """A list of finite numbers, one a group."""
    if not isinstance(values, list) or not values:
        raise InvalidHyperparameterError(f"{name} is {values!r}; it must be a list of numbers, one a param group")
    return tuple(plain(name, entry) for entry in values)


def step_count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise InvalidHyperparameterError(f"_step_count is {value!r}; it must be a whole number of at least 0")
    return value


def each(rate: Callable[..., float]) -> Rule:
    """A function (position, rate, base rate, **arguments) of one group as a rule."""

    def rule(call: Call) -> tuple[list[Values], dict[str, Any]]:
        pairs = zip(call.groups, call.base_lrs, strict=True)
        return [{"lr": rate(call.position, group["lr"], base, **call.arguments)} for group, base in pairs], dict(call.own)

    return rule


def from_base(rate: Callable[..., float]) -> Rule:
    """A closed form (base rate, **arguments) of one group as a rule."""

    def rule(call: Call) -> tuple[list[Values], dict[str, Any]]:
        return [{"lr": rate(base, **call.arguments)} for base in call.base_lrs], dict(call.own)

    return rule


def of_groups(arguments: Arguments, name: str, groups: int) -> tuple[float, ...]:
    """The argument as one number a group. InvalidHyperparameterError with torch's message if a list has not as many."""
    value = arguments[name]
    if not isinstance(value, tuple):
        return (value,) * groups
    if len(value) != groups:
        raise InvalidHyperparameterError(
            f"{name} must have the same length as optimizer.param_groups. "
            f"{name} has {len(value)} values, param_groups has {groups}."
        )
    found: tuple[float, ...] = value
    return found


def of_another_group(arguments: Arguments, name: str) -> float:
    """The argument for a group that is added in mid-run. InvalidArgumentError if each group has its own."""
    value = arguments[name]
    if isinstance(value, tuple):
        raise InvalidArgumentError(
            f"{name} has one value for each of {len(value)} param groups, and none for another; set the schedule anew"
        )
    found: float = value
    return found


def one_of_groups(found: tuple[float, ...], before: ScheduleValue) -> Any:
    """The argument that `of_groups` makes `found` of: one number if it was one and still can be."""
    return found[0] if found and not isinstance(before, tuple) and len(set(map(repr, found))) == 1 else found
