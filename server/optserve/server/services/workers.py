"""WorkerService."""

from __future__ import annotations

from optserve.server.rounds.registry import Registry
from optserve.server.services import decode, encode
from optserve.server.services.context import LONGEST_WAIT_SECONDS, CallContext, seconds_left
from optserve.server.services.folders import Folders
from optserve.v1 import workers_pb2, workers_pb2_grpc


class WorkerService(workers_pb2_grpc.WorkerServiceServicer):
    """Who takes part in a job's rounds."""

    def __init__(self, registry: Registry, folders: Folders) -> None:
        self._registry = registry
        self._folders = folders

    def Join(self, request: workers_pb2.JoinRequest, context: CallContext) -> workers_pb2.JoinResponse:
        session_id = decode.session(request.session_id)
        host = self._registry.find(request.job_id).host
        context.add_callback(host.wake)
        host.wait_initialized(seconds_left(context, LONGEST_WAIT_SECONDS), context.is_active)
        rank = request.rank if request.HasField("rank") else None
        member = host.join(request.name, rank, session_id, decode.seen(request.seen))
        with host.changed:
            return workers_pb2.JoinResponse(
                name=member.name,
                rank=member.rank,
                epoch=member.epoch,
                workers=host.job.plan.spec.workers,
                position=host.job.position.to_proto(),
                layout=host.job.store.layout.to_proto(),
                lease_seconds=host.job.plan.spec.lease_seconds,
                schedule_steps=host.job.schedule_steps,
                last_seq=host.job.sessions.last_seq(session_id),
                learning_rates=host.job.learning_rates,
                groups=encode.groups(host, with_names=False),
            )

    def Heartbeat(self, request: workers_pb2.HeartbeatRequest, context: CallContext) -> workers_pb2.HeartbeatResponse:
        host = self._registry.find(request.job_id).host
        host.heartbeat(decode.session(request.session_id), request.epoch)
        return workers_pb2.HeartbeatResponse(position=host.job.position.to_proto())

    def Leave(self, request: workers_pb2.LeaveRequest, context: CallContext) -> workers_pb2.LeaveResponse:
        host = self._registry.find(request.job_id).host
        position = host.job.position.to_proto()
        if host.owner_session and request.session_id == host.owner_session:
            self._folders.delete(request.job_id)
        else:
            host.leave(decode.session(request.session_id), request.epoch)
        return workers_pb2.LeaveResponse(position=position)
