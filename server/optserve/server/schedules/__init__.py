"""Learning-rate schedules: pure functions of torch's recursive form."""

from optserve.server.schedules.state import ScheduleState, create, extend, step
from optserve.server.schedules.table import SCHEDULES

__all__ = ["SCHEDULES", "ScheduleState", "create", "extend", "step"]
