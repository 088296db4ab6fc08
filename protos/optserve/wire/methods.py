"""The contract's RPCs, read off the descriptors: one table for the server's handlers, the client's channel and the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf import message_factory
from google.protobuf.message import Message

from optserve.v1 import (
    checkpoints_pb2,
    data_pb2,
    jobs_pb2,
    optimizer_pb2,
    parameters_pb2,
    server_pb2,
    state_pb2,
    workers_pb2,
)
from optserve.wire.chunks import Chunk, encode

Item = Message | Chunk
"""What passes on a stream."""

FILES = (jobs_pb2, workers_pb2, data_pb2, optimizer_pb2, parameters_pb2, state_pb2, checkpoints_pb2, server_pb2)
"""The generated modules that define services."""


@dataclass(frozen=True)
class Method:
    """One RPC. `path` is what gRPC calls it: "/optserve.v1.JobService/GetJob"."""

    service: str
    name: str
    request: type[Message]
    response: type[Message]
    request_streams: bool
    response_streams: bool

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


def _methods() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for module in FILES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for rpc in service.methods:
                method = Method(
                    service.full_name,
                    rpc.name,
                    message_factory.GetMessageClass(rpc.input_type),
                    message_factory.GetMessageClass(rpc.output_type),
                    rpc.client_streaming,
                    rpc.server_streaming,
                )
                found[method.path] = method
    return found


METHODS: Mapping[str, Method] = _methods()
"""Every RPC by its path."""


def serialize(item: Item) -> bytes:
    """A stream's item as gRPC sends it."""
    return encode(item.array_id, item.offset, item.data) if isinstance(item, Chunk) else item.SerializeToString()
