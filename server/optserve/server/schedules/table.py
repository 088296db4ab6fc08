"""One table of torch 2.13's learning-rate schedules, as pure functions.

A schedule is (position, each group's values, base values, own state, metric) → (each group's new values, own state). Its
kind decides where its rule stands: a function of one rate in `rates.py`, rates of its own in `cyclic.py`, `one_cycle.py` and
`swa.py`, a metric in `plateau.py`, other schedules in `composed.py`.

Deviations from torch, all of them errors where torch goes on or breaks later: NaN and Inf are no arguments; `step_size`,
`T_max` and the sizes of a cycle are positive, `total_iters` is not negative, milestones are whole, a list of momenta has one
for each group even if they are not turned; a step whose result is not finite, at its end or on the way, changes nothing; a
SequentialLR that could not turn to one of its schedules is not made; functions stay with the client, and a CyclicLR takes
none. A group added in mid-run gets a base rate and the keys that its schedule reads (`extend`), where torch gives it none and
fails at the next step or at its turn; it is refused if the schedule has one value for each group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optserve.server.schedules.arguments import checked, epoch
from optserve.server.schedules.composed import COMPOSED, Composed
from optserve.server.schedules.cyclic import CYCLIC_LR
from optserve.server.schedules.definition import Schedule, ScheduleState
from optserve.server.schedules.one_cycle import ONE_CYCLE_LR
from optserve.server.schedules.plateau import REDUCE_LR_ON_PLATEAU
from optserve.server.schedules.rates import RATES
from optserve.server.schedules.swa import SWA_LR
from optserve.wire.arguments import SCHEDULERS, Bounds, ScheduleValue
from optserve.wire.errors import UnknownScheduleError
from optserve.wire.names import nearest

SCHEDULES: Mapping[str, Schedule] = {
    **RATES,
    **COMPOSED,
    "cycliclr": CYCLIC_LR,
    "onecyclelr": ONE_CYCLE_LR,
    "reducelronplateau": REDUCE_LR_ON_PLATEAU,
    "swalr": SWA_LR,
}


def find(name: object) -> Schedule:
    schedule = SCHEDULES.get(name.lower()) if isinstance(name, str) else None
    if schedule is None:
        known = sorted(entry.name for entry in SCHEDULES.values())
        raise UnknownScheduleError(f"schedule {name!r} is not known{nearest(str(name), known)}", schedule=name)
    return schedule


def unbegun(name: object, given: Mapping[str, Any]) -> ScheduleState:
    """A schedule with its arguments checked, before torch's constructor has done anything.

    UnknownScheduleError for a name or argument that does not exist, InvalidHyperparameterError for a value.
    """
    return _unbegun(name, given, 1, Bounds())


def _unbegun(name: object, given: Mapping[str, Any], depth: int, bounds: Bounds) -> ScheduleState:
    bounds.enter(depth)
    schedule, given = find(name), dict(given)
    last_epoch = epoch(given.pop("last_epoch", -1)) if schedule.takes_last_epoch else -1
    arguments = checked(schedule.name, schedule.arguments, given)
    schedule.check(arguments)
    parts: tuple[ScheduleState, ...] = ()
    if isinstance(schedule, Composed):
        inner: Any = arguments.pop(SCHEDULERS)
        parts = tuple(_unbegun(entry, values, depth + 1, bounds) for entry, values in inner)
        schedule.check_parts(arguments, parts)
    return ScheduleState(schedule, arguments, last_epoch, parts=parts)


def described(state: ScheduleState) -> dict[str, ScheduleValue]:
    """The arguments as a user gives them: those of a composed schedule with its `schedulers` first."""
    if not state.parts:
        return state.arguments
    return {SCHEDULERS: tuple((part.name, described(part)) for part in state.parts), **state.arguments}
