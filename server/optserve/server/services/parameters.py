"""ParameterService."""

from __future__ import annotations

from collections.abc import Iterable

from optserve.server.records import ParameterRemoved, ParameterRenamed, ParameterReplaced
from optserve.server.rounds.registry import Registry
from optserve.server.services import decode, encode
from optserve.server.services.context import CallContext
from optserve.v1 import parameters_pb2, parameters_pb2_grpc
from optserve.wire import dtypes, errors
from optserve.wire.chunks import Chunk

ReplaceItem = bytes | parameters_pb2.ReplaceParameterRequest | Chunk

_PADDING = 64
"""Bytes of a bundle beyond its one tensor."""


class ParameterService(parameters_pb2_grpc.ParameterServiceServicer):
    """Parameters of a running job: renamed, replaced, removed."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def RenameParameter(
        self, request: parameters_pb2.RenameParameterRequest, context: CallContext
    ) -> parameters_pb2.RenameParameterResponse:
        running = self._registry.find(request.call.job_id)
        caller, seen = decode.caller(request.call, decode.fingerprint(request))
        result = running.parameter_edits.edit(caller, seen, ParameterRenamed(caller, request.parameter, request.new_name))
        layout = running.job.store.layout.to_proto()
        return parameters_pb2.RenameParameterResponse(position=encode.position(result), layout=layout)

    def ReplaceParameter(
        self, requests: Iterable[ReplaceItem], context: CallContext
    ) -> parameters_pb2.ReplaceParameterResponse:
        found = decode.items(parameters_pb2.ReplaceParameterRequest, requests)
        begin = decode.first(parameters_pb2.ReplaceParameterRequest, found, "begin").begin
        running = self._registry.find(begin.call.job_id)
        name, entry = begin.entry.parameter, begin.entry
        if entry.slot:
            raise errors.InvalidArgumentError(
                f"slot {entry.slot!r} came for the value of parameter {name!r}; a value has no slot"
            )
        limit = dtypes.checked_bytes(f"parameter {name!r}", entry.shape, dtypes.from_wire(entry.dtype, name)) + _PADDING
        ((_, _, value),) = decode.received([entry], begin.bundle_bytes, limit, decode.chunks(found))
        caller, seen = decode.caller(begin.call, decode.fingerprint(begin, value.tobytes()))
        result = running.parameter_edits.edit(caller, seen, ParameterReplaced(caller, name, value, begin.keep_state))
        layout = running.job.store.layout.to_proto()
        return parameters_pb2.ReplaceParameterResponse(position=encode.position(result), layout=layout)

    def RemoveParameter(
        self, request: parameters_pb2.RemoveParameterRequest, context: CallContext
    ) -> parameters_pb2.RemoveParameterResponse:
        running = self._registry.find(request.call.job_id)
        caller, seen = decode.caller(request.call, decode.fingerprint(request))
        result = running.parameter_edits.edit(caller, seen, ParameterRemoved(caller, request.parameter))
        layout = running.job.store.layout.to_proto()
        return parameters_pb2.RemoveParameterResponse(position=encode.position(result), layout=layout)
