"""Learning-rate schedules: pure functions of torch's recursive form."""

from optserve.server.schedules.definition import GROUP_KEYS, ScheduleState, Values
from optserve.server.schedules.documents import check_groups, from_document, load, state_dict, to_document
from optserve.server.schedules.state import awaited, create, extend, step
from optserve.server.schedules.table import SCHEDULES, described

__all__ = [
    "GROUP_KEYS",
    "SCHEDULES",
    "ScheduleState",
    "Values",
    "awaited",
    "check_groups",
    "create",
    "described",
    "extend",
    "from_document",
    "load",
    "state_dict",
    "step",
    "to_document",
]
