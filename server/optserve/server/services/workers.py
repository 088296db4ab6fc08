"""WorkerService."""

from __future__ import annotations

from optserve.server.rounds.registry import Registry
from optserve.server.services import decode
from optserve.server.services.context import CallContext, seconds_left
from optserve.v1 import workers_pb2, workers_pb2_grpc

_LONGEST_WAIT_SECONDS = 3600.0


class WorkerService(workers_pb2_grpc.WorkerServiceServicer):
    """Who takes part in a job's rounds."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def Join(self, request: workers_pb2.JoinRequest, context: CallContext) -> workers_pb2.JoinResponse:
        session_id = decode.session(request.session_id)
        host = self._registry.find(request.job_id).host
        context.add_callback(host.wake)
        host.wait_initialized(seconds_left(context, _LONGEST_WAIT_SECONDS), context.is_active)
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
            )

    def Heartbeat(self, request: workers_pb2.HeartbeatRequest, context: CallContext) -> workers_pb2.HeartbeatResponse:
        host = self._registry.find(request.job_id).host
        host.heartbeat(decode.session(request.session_id), request.epoch)
        return workers_pb2.HeartbeatResponse(position=host.job.position.to_proto())

    def Leave(self, request: workers_pb2.LeaveRequest, context: CallContext) -> workers_pb2.LeaveResponse:
        host = self._registry.find(request.job_id).host
        position = host.job.position.to_proto()
        if host.owner_session and request.session_id == host.owner_session:
            self._registry.delete(request.job_id)
        else:
            host.leave(decode.session(request.session_id), request.epoch)
        return workers_pb2.LeaveResponse(position=position)
