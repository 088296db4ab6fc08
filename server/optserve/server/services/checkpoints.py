"""CheckpointService."""

from __future__ import annotations

from collections.abc import Iterator

from optserve.server.durability.archive import Archive
from optserve.server.records import Restored, new_id
from optserve.server.rounds.host import JobHost
from optserve.server.rounds.registry import Registry
from optserve.server.services import decode, encode
from optserve.server.services.context import CallContext
from optserve.server.services.folders import Folders
from optserve.v1 import checkpoints_pb2, checkpoints_pb2_grpc, jobs_pb2, types_pb2
from optserve.wire.chunks import Chunk, blocks


class CheckpointService(checkpoints_pb2_grpc.CheckpointServiceServicer):
    """Saves, lists, verifies, restores, downloads and deletes checkpoints."""

    def __init__(self, registry: Registry, archive: Archive, folders: Folders) -> None:
        self._registry = registry
        self._archive = archive
        self._folders = folders

    def _host(self, job_id: str) -> JobHost:
        return self._registry.find(job_id).host

    def SaveCheckpoint(
        self, request: checkpoints_pb2.SaveCheckpointRequest, context: CallContext
    ) -> checkpoints_pb2.SaveCheckpointResponse:
        host = self._host(request.job_id)
        host.check_seen(decode.seen(request.seen))
        self._archive.check_name(request.name)
        info = self._folders.save(host, request.name, replace=request.overwrite)
        host.announce("checkpoint", f"checkpoint {request.name!r} saved, {info.size} bytes", name=request.name)
        return checkpoints_pb2.SaveCheckpointResponse(checkpoint=encode.checkpoint(info))

    def ListCheckpoints(
        self, request: checkpoints_pb2.ListCheckpointsRequest, context: CallContext
    ) -> checkpoints_pb2.ListCheckpointsResponse:
        found = self._archive.checkpoints.list(self._host(request.job_id).job.job_id)
        return checkpoints_pb2.ListCheckpointsResponse(checkpoints=[encode.checkpoint(info) for info in found])

    def VerifyCheckpoint(
        self, request: checkpoints_pb2.VerifyCheckpointRequest, context: CallContext
    ) -> checkpoints_pb2.VerifyCheckpointResponse:
        info = self._archive.checkpoints.verify(self._host(request.job_id).job.job_id, request.name)
        return checkpoints_pb2.VerifyCheckpointResponse(checkpoint=encode.checkpoint(info))

    def RestoreCheckpoint(
        self, request: checkpoints_pb2.RestoreCheckpointRequest, context: CallContext
    ) -> checkpoints_pb2.RestoreCheckpointResponse:
        running = self._registry.find(request.call.job_id)
        caller, seen = decode.caller(request.call, decode.fingerprint(request))

        def read() -> Restored:
            return self._archive.restored(running.job.job_id, request.name, caller, new_id())

        result = running.administration.restore(caller, seen, request.name, read)
        return checkpoints_pb2.RestoreCheckpointResponse(position=encode.position(result))

    def DownloadCheckpoint(
        self, request: checkpoints_pb2.DownloadCheckpointRequest, context: CallContext
    ) -> Iterator[checkpoints_pb2.DownloadCheckpointResponse | Chunk]:
        checkpoints, folder = self._archive.checkpoints, self._host(request.job_id).job.job_id
        info = checkpoints.verify(folder, request.name)
        files = checkpoints.files(folder, request.name)
        listed = [jobs_pb2.CheckpointFile(name=name, size=size) for name, size in files]
        begin = checkpoints_pb2.DownloadBegin(checkpoint=encode.checkpoint(info), files=listed)
        yield checkpoints_pb2.DownloadCheckpointResponse(begin=begin)
        for index, (name, size) in enumerate(files):
            for offset, length in blocks(size):
                yield Chunk(index, offset, memoryview(checkpoints.read_file(folder, request.name, name, offset, length)))
        yield checkpoints_pb2.DownloadCheckpointResponse(end=types_pb2.StreamEnd())

    def DeleteCheckpoint(
        self, request: checkpoints_pb2.DeleteCheckpointRequest, context: CallContext
    ) -> checkpoints_pb2.DeleteCheckpointResponse:
        running = self._registry.find(request.call.job_id)
        caller, seen = decode.caller(request.call, decode.fingerprint(request))

        def delete() -> None:
            self._archive.checkpoints.delete(running.job.job_id, request.name)

        result = running.administration.delete_checkpoint(caller, seen, request.name, delete)
        return checkpoints_pb2.DeleteCheckpointResponse(position=encode.position(result))
