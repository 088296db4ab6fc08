"""ServerService."""

from __future__ import annotations

import time
from collections.abc import Callable

from optserve.server.rounds.registry import Registry
from optserve.server.services.context import CallContext
from optserve.v1 import server_pb2, server_pb2_grpc


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """What the server is."""

    def __init__(
        self, registry: Registry, version: str, start_id: str, has_data_dir: bool, streams: Callable[[], tuple[int, int]]
    ) -> None:
        """`streams` tells how many are open and may be."""
        self._registry = registry
        self._version, self._start_id, self._has_data_dir = version, start_id, has_data_dir
        self._streams = streams
        self._started_at = time.monotonic()

    def GetServer(self, request: server_pb2.GetServerRequest, context: CallContext) -> server_pb2.GetServerResponse:
        streams, most = self._streams()
        return server_pb2.GetServerResponse(
            version=self._version,
            start_id=self._start_id,
            backend=self._registry.backend.name,
            has_data_dir=self._has_data_dir,
            jobs=len(self._registry.all()),
            uptime_seconds=time.monotonic() - self._started_at,
            streams=streams,
            max_streams=most,
        )
