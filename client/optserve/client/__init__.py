"""optserve's client: a server's jobs, and workers that push gradients and pull weights as NumPy arrays.

Needs no server dependency; thread safe; errors are those of `errors`, a tree under OptserveError.
"""

from optserve.client._connect import connect
from optserve.client._info import Checkpoint, Event, JobInfo, Member, Position, Schedule, ServerInfo, StepInfo
from optserve.client._job import Job
from optserve.client._job_state import Loaded
from optserve.client._server import Server
from optserve.client._sparse import SparseGradient
from optserve.client._worker import Worker
from optserve.wire import errors
from optserve.wire.errors import OptserveError

__all__ = [
    "Checkpoint",
    "Event",
    "Job",
    "JobInfo",
    "Loaded",
    "Member",
    "OptserveError",
    "Position",
    "Schedule",
    "Server",
    "ServerInfo",
    "SparseGradient",
    "StepInfo",
    "Worker",
    "connect",
    "errors",
]
