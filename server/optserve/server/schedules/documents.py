"""A schedule's documents: torch's state_dict, and a checkpoint's part, which holds it. Both may come from anywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from optserve.server.schedules.definition import Groups, ScheduleState
from optserve.server.schedules.state import check_size
from optserve.server.schedules.table import described, unbegun
from optserve.wire.errors import InputError, InvalidStateDictError

_FLAGS = frozenset({"_is_initial", "_get_lr_called_within_step", "verbose"})
"""What torch's state_dict has in some versions only, and what says nothing between two steps."""

_MOST_SETTING = 256


def state_dict(state: ScheduleState) -> dict[str, Any]:
    """torch's state_dict, JSON-able but for Infinity: a Counter is its (key, count) pairs in ascending order."""
    return state.schedule.to_torch(state)


def load(state: ScheduleState, document: object, groups: Groups) -> ScheduleState:
    """The schedule put where a state_dict of its class stands, with the arguments that torch keeps in it.

    What torch keeps in derived form only (OneCycleLR's phases, CyclicLR's sizes) must be what the schedule has.
    InvalidStateDictError names what does not fit.
    """
    loaded = _read(state, document)
    known = _known_groups(loaded)
    try:
        for group in groups[min(known, default=len(groups)) :]:  # torch knows nothing of groups that were added in mid-run
            loaded, _ = loaded.schedule.extend(loaded, group)
    except InputError as error:
        raise InvalidStateDictError(f"the state_dict of {state.name} does not fit: {error}") from error
    check_groups(loaded, len(groups))
    return loaded


def to_document(state: ScheduleState) -> dict[str, Any]:
    """As JSON; floats survive bit for bit."""
    arguments = _with_lists(described(state))
    return {"name": state.name, "arguments": arguments, "setting": state.setting, "state": state_dict(state)}


def _with_lists(value: Any) -> Any:
    """Arguments as JSON gives them back."""
    if isinstance(value, tuple):
        return [_with_lists(entry) for entry in value]
    return {name: _with_lists(entry) for name, entry in value.items()} if isinstance(value, dict) else value


def from_document(document: object) -> ScheduleState:
    """The inverse. InvalidStateDictError if it is none."""
    try:
        name, arguments, setting, inner = (
            document[key]  # type: ignore[index]
            for key in ("name", "arguments", "setting", "state")
        )
        if not isinstance(arguments, dict) or not isinstance(setting, str) or len(setting) > _MOST_SETTING:
            raise TypeError("a field has another type than it must have")
        return replace(_read(unbegun(name, arguments), inner), setting=setting)
    except KeyError as error:
        raise InvalidStateDictError(f"the state of the schedule cannot be used: it lacks {error}") from error
    except (InputError, TypeError, RecursionError) as error:
        raise InvalidStateDictError(f"the state of the schedule cannot be used: {error}") from error


def check_groups(state: ScheduleState, groups: int) -> None:
    """InvalidStateDictError unless a state that was read is of so many groups."""
    try:
        check_size(state, groups)
    except InputError as error:
        raise InvalidStateDictError(str(error)) from error
    other = _known_groups(state) - {groups}
    if other or _longest(state) > groups:
        known = max((_longest(state), *other))
        raise InvalidStateDictError(f"the state of {state.name} is of {known} param groups; there are {groups}")


def _known_groups(state: ScheduleState) -> set[int]:
    """How many groups the schedules know, of those that count them."""
    if state.parts:
        return {count for part in state.parts for count in _known_groups(part)}
    return set() if state.schedule.takes_metric else {len(state.base_lrs)}


def _longest(state: ScheduleState) -> int:
    """The most numbers in a list that may be one for each group of before."""
    return max(len(state.last_lrs), len(state.own.get("min_lrs", ())), *map(_longest, state.parts))


def _read(state: ScheduleState, document: object) -> ScheduleState:
    """The state that the document stands for. InvalidStateDictError unless it is exactly what that state's own document is."""
    try:
        if not isinstance(document, dict):
            raise TypeError(f"it is a {type(document).__name__}, and must be a dict")
        found = state.schedule.from_torch(state, document)
        odd = _difference(state_dict(found), document, "")
    except KeyError as error:
        raise InvalidStateDictError(f"the state_dict is not one of {state.name}: it lacks {error}") from error
    except (InputError, TypeError, ArithmeticError, RecursionError) as error:
        raise InvalidStateDictError(f"the state_dict is not one of {state.name}: {error}") from error
    if odd:
        raise InvalidStateDictError(f"the state_dict is not one of this {state.name}: {odd}")
    return found


def _difference(ours: Any, theirs: Any, where: str) -> str:
    """The first thing in which a document differs from what it must be; empty if it does not."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        absent, unknown = (one.keys() - other.keys() - _FLAGS for one, other in ((ours, theirs), (theirs, ours)))
        if absent or unknown:
            return f"{where or 'it'} lacks {sorted(absent)}" if absent else f"{where or 'it'} has {sorted(map(str, unknown))}"
        pairs = [(ours[key], theirs[key], f"{where}[{key!r}]" if where else key) for key in ours if key in theirs]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(mine, other, f"{where}[{index}]") for index, (mine, other) in enumerate(zip(ours, theirs, strict=True))]
    else:
        return "" if ours == theirs else f"{where} is {theirs!r}, and here {ours!r}"
    return next(filter(None, (_difference(*pair) for pair in pairs)), "")
