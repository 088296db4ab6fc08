"""How a job is called: its connection, the identity of its calls, and what it has seen."""

from __future__ import annotations

from optserve.client._caller import Caller
from optserve.client._connection import Answer, Connection
from optserve.client._functions import Functions
from optserve.client._info import Position
from optserve.v1 import jobs_pb2, optimizer_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire.layout import Layout


class JobCalls:
    """What every group of a job's calls is built on. Thread safe."""

    def __init__(self, connection: Connection, info: jobs_pb2.JobInfo, caller: Caller | None = None) -> None:
        self._connection = connection
        self._caller = caller or Caller(connection, info.job_id, info.spec.name)
        self._spec = info.spec
        self._restored: set[str] = set()
        self._functions = Functions()
        self._told(info.layout, info.position)

    @property
    def name(self) -> str:
        """Empty for an unnamed job."""
        return self._spec.name

    @property
    def job_id(self) -> str:
        return self._caller.session.job_id

    @property
    def optimizer(self) -> str:
        """As it was named at creation."""
        return self._spec.optimizer

    def _identified(
        self,
        request: optimizer_pb2.SetScheduleRequest | optimizer_pb2.StepScheduleRequest | optimizer_pb2.LoadScheduleStateRequest,
        identity: pb.CallIdentity,
        kind: type[Answer],
    ) -> Answer:
        request.call.CopyFrom(identity)
        return self._connection.call(request, kind)

    def _get(self) -> jobs_pb2.JobInfo:
        job = self._caller.read(jobs_pb2.GetJobRequest(job=self.job_id), jobs_pb2.GetJobResponse).job
        self._told(job.layout, job.position)
        return job

    def _told(self, layout: pb.Layout, position: pb.Position) -> Position:
        self._layout, self._layout_lineage_id = Layout.from_proto(layout), position.lineage_id
        return self._saw(position)

    def _known_layout(self) -> Layout:
        """The layout that was told last; of a lineage that has ended it is asked for again, since edits may be gone with it."""
        seen = self._caller.session.seen
        if seen is not None and seen.lineage_id != self._layout_lineage_id:
            self._get()
        return self._layout

    def _saw(self, position: pb.Position) -> Position:
        self._caller.session.saw(position)
        return Position.from_proto(position)
