"""OptimizerService."""

from __future__ import annotations

from collections.abc import Iterable

from optserve.server.jobs import spec as specs
from optserve.server.records import GroupAdded, Rules, ScheduleLoaded, ScheduleSet, ScheduleStepped
from optserve.server.rounds.registry import Registry
from optserve.server.services import decode, encode
from optserve.server.services.context import CallContext
from optserve.v1 import optimizer_pb2, optimizer_pb2_grpc
from optserve.wire import errors
from optserve.wire.arguments import from_arguments
from optserve.wire.chunks import Chunk
from optserve.wire.values import from_hyperparameters

AddGroupItem = bytes | optimizer_pb2.AddGroupRequest | Chunk


class OptimizerService(optimizer_pb2_grpc.OptimizerServiceServicer):
    """Parameter groups and the schedule of a running job."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def ListGroups(self, request: optimizer_pb2.ListGroupsRequest, context: CallContext) -> optimizer_pb2.ListGroupsResponse:
        host = self._registry.find(request.job_id).host
        with host.changed:
            return optimizer_pb2.ListGroupsResponse(groups=encode.groups(host), position=host.job.position.to_proto())

    def AddGroup(self, requests: Iterable[AddGroupItem], context: CallContext) -> optimizer_pb2.AddGroupResponse:
        found = decode.items(optimizer_pb2.AddGroupRequest, requests)
        begin = decode.first(optimizer_pb2.AddGroupRequest, found, "begin").begin
        running = self._registry.find(begin.call.job_id)
        declared = specs.declared(running.job.plan.optimizer, begin.group.parameters)
        tensors = decode.received(begin.entries, begin.bundle_bytes, _bundle_limit(declared), decode.chunks(found))
        values = {name: array for name, slot, array in tensors if not slot}
        parameters = []
        for name, shape, dtype in declared:
            if name not in values:
                raise errors.UnknownParameterError(f"the bundle has no values for parameter {name!r}")
            if values[name].shape != shape:
                raise errors.ShapeMismatchError(f"the values of {name!r} have shape {values[name].shape}; {shape} was declared")
            if values[name].dtype != dtype:
                raise errors.DtypeMismatchError(f"the values of {name!r} have dtype {values[name].dtype}; {dtype} was declared")
            parameters.append((name, values[name]))
        caller, seen = decode.caller(begin.call, decode.fingerprint(begin, *(value.tobytes() for _, value in parameters)))
        plan = running.job.plan
        group = specs.hyperparameters(
            plan.optimizer, from_hyperparameters(plan.spec.defaults), from_hyperparameters(begin.group.hyperparameters)
        )
        result = running.administration.add_group(caller, seen, GroupAdded(caller, group, parameters))
        return optimizer_pb2.AddGroupResponse(position=encode.position(result), layout=running.job.store.layout.to_proto())

    def UpdateGroup(self, request: optimizer_pb2.UpdateGroupRequest, context: CallContext) -> optimizer_pb2.UpdateGroupResponse:
        administration = self._registry.find(request.call.job_id).administration
        caller, seen = decode.caller(request.call, decode.fingerprint(request))
        result = administration.update_group(caller, seen, request.group, from_hyperparameters(request.hyperparameters))
        return optimizer_pb2.UpdateGroupResponse(position=encode.position(result))

    def UpdateRules(self, request: optimizer_pb2.UpdateRulesRequest, context: CallContext) -> optimizer_pb2.UpdateRulesResponse:
        administration = self._registry.find(request.call.job_id).administration
        caller, seen = decode.caller(request.call, decode.fingerprint(request))
        result = administration.update_rules(caller, seen, from_hyperparameters(request.rules))
        return optimizer_pb2.UpdateRulesResponse(position=encode.position(result), rules=Rules(**result.value).to_proto())

    def SetSchedule(self, request: optimizer_pb2.SetScheduleRequest, context: CallContext) -> optimizer_pb2.SetScheduleResponse:
        administration = self._registry.find(request.call.job_id).administration
        caller, seen = decode.caller(request.call, decode.fingerprint(request))
        arguments = from_arguments(request.arguments)
        record = ScheduleSet(caller, request.name, arguments, decode.factors(request.factors))
        result = administration.set_schedule(caller, seen, record)
        return optimizer_pb2.SetScheduleResponse(position=encode.position(result), schedule=encode.schedule(result.value))

    def StepSchedule(
        self, request: optimizer_pb2.StepScheduleRequest, context: CallContext
    ) -> optimizer_pb2.StepScheduleResponse:
        running = self._registry.find(request.call.job_id)
        caller, seen = decode.caller(request.call, decode.fingerprint(request))
        metric = request.metric if request.HasField("metric") else None
        factors, changes = decode.factors(request.factors), decode.group_changes(request.changes)
        record = ScheduleStepped(caller, request.count, metric, factors, request.setting, changes)
        result = running.administration.step_schedule(caller, seen, record)
        return optimizer_pb2.StepScheduleResponse(
            position=encode.position(result),
            schedule=encode.schedule(result.value),
            changed_groups=encode.changed_groups(running.host, request),
        )

    def LoadScheduleState(
        self, request: optimizer_pb2.LoadScheduleStateRequest, context: CallContext
    ) -> optimizer_pb2.LoadScheduleStateResponse:
        administration = self._registry.find(request.call.job_id).administration
        caller, seen = decode.caller(request.call, decode.fingerprint(request))
        record = ScheduleLoaded(caller, decode.schedule_state(request.state))
        result = administration.load_schedule_state(caller, seen, record)
        schedule = encode.schedule(result.value)
        return optimizer_pb2.LoadScheduleStateResponse(position=encode.position(result), schedule=schedule)

    def GetSchedule(self, request: optimizer_pb2.GetScheduleRequest, context: CallContext) -> optimizer_pb2.GetScheduleResponse:
        host = self._registry.find(request.job_id).host
        with host.changed:
            schedule = encode.schedule(host.job.schedule_document())
            return optimizer_pb2.GetScheduleResponse(schedule=schedule, position=host.job.position.to_proto())


def _bundle_limit(declared: specs.Declared) -> int:
    """The bytes that the declared parameters' values can take, paddings included."""
    total = 0
    for _, shape, dtype in declared:
        size = dtype.itemsize
        for extent in shape:
            size *= max(extent, 0)
        total += size + 64
    return total
