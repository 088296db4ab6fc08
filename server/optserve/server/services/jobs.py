"""JobService."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from optserve.server.durability.archive import IMPORTED, Archive
from optserve.server.records import new_id
from optserve.server.rounds.events import Event
from optserve.server.rounds.registry import Registry
from optserve.server.services import decode, encode
from optserve.server.services.context import LONGEST_WAIT_SECONDS, CallContext, seconds_left
from optserve.server.services.folders import Folders
from optserve.v1 import jobs_pb2, jobs_pb2_grpc
from optserve.wire import errors
from optserve.wire.chunks import Chunk, Coverage

_LONGEST_POLL_SECONDS = 30.0

_EVENTS_BYTES = 1 << 20
"""Of one answer to ListEvents; the rest comes when asked for again."""

_EVENT_BYTES = 64 << 10
"""Of one event: one with more comes without its fields."""

InitializeItem = bytes | jobs_pb2.InitializeJobRequest | Chunk
UploadItem = bytes | jobs_pb2.CreateJobFromCheckpointRequest | Chunk


class JobService(jobs_pb2_grpc.JobServiceServicer):
    """Creates, finds, watches and deletes jobs."""

    def __init__(self, registry: Registry, archive: Archive, folders: Folders) -> None:
        self._registry = registry
        self._archive = archive
        self._folders = folders

    def CreateJob(self, request: jobs_pb2.CreateJobRequest, context: CallContext) -> jobs_pb2.CreateJobResponse:
        session_id = decode.session(request.session_id)
        job_id = decode.new_job(request.job_id)
        running, created = self._registry.create(job_id, request.spec, session_id, request.exist_ok)
        return jobs_pb2.CreateJobResponse(job=encode.job_info(running.host), created=created)

    def InitializeJob(self, requests: Iterable[InitializeItem], context: CallContext) -> jobs_pb2.InitializeJobResponse:
        found = decode.items(jobs_pb2.InitializeJobRequest, requests)
        begin = decode.first(jobs_pb2.InitializeJobRequest, found, "begin").begin
        host = self._registry.find(begin.job_id).host
        if not host.job.initialized:
            store = host.job.store
            coverage = [Coverage(f"array {array.array_id}", array.nbytes) for array in store.layout.arrays]
            for chunk in decode.chunks(found):
                if chunk.array_id >= len(coverage):
                    raise errors.InvalidChunkError(f"a chunk names array {chunk.array_id}; the job has {len(coverage)}")
                coverage[chunk.array_id].add(chunk.offset, chunk.data.nbytes)
                store.write_block(chunk.array_id, chunk.offset, chunk.data)
                host.uploading(begin.session_id)
            missing = sum(len(entry.missing) for entry in coverage)
            if missing:
                raise errors.IncompleteStreamError(f"the initial values ended with {missing} chunks missing")
            host.initialized()
        return jobs_pb2.InitializeJobResponse(position=host.job.position.to_proto())

    def CreateJobFromCheckpoint(
        self, requests: Iterable[UploadItem], context: CallContext
    ) -> jobs_pb2.CreateJobFromCheckpointResponse:
        found = decode.items(jobs_pb2.CreateJobFromCheckpointRequest, requests)
        begin = decode.first(jobs_pb2.CreateJobFromCheckpointRequest, found, "begin").begin
        job_id, session_id = decode.new_job(begin.job_id), decode.session(begin.session_id)
        known = self._registry.get(job_id)
        if known is not None:
            return jobs_pb2.CreateJobFromCheckpointResponse(job=encode.job_info(known.host))
        with self._archive.receive([(file.name, file.size) for file in begin.files]) as (folder, upload):
            for chunk in decode.chunks(found):
                upload.write(chunk.array_id, chunk.offset, chunk.data)
            upload.commit()
            job = self._archive.imported(folder, job_id, begin.name, self._registry.backend, new_id())
        host = self._registry.adopt(job, session_id).host
        try:
            self._folders.save(host, IMPORTED, replace=True)
        except errors.OptserveError:
            self._folders.delete(job_id)
            raise
        return jobs_pb2.CreateJobFromCheckpointResponse(job=encode.job_info(host))

    def GetJob(self, request: jobs_pb2.GetJobRequest, context: CallContext) -> jobs_pb2.GetJobResponse:
        host = self._registry.find(request.job).host
        if request.wait_initialized:
            context.add_callback(host.wake)
            host.wait_initialized(seconds_left(context, LONGEST_WAIT_SECONDS), context.is_active)
        return jobs_pb2.GetJobResponse(job=encode.job_info(host))

    def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: CallContext) -> jobs_pb2.ListJobsResponse:
        return jobs_pb2.ListJobsResponse(
            jobs=[encode.job_info(running.host, with_layout=False) for running in self._registry.all()]
        )

    def WaitForVersion(self, request: jobs_pb2.WaitForVersionRequest, context: CallContext) -> jobs_pb2.WaitForVersionResponse:
        host = self._registry.find(request.job_id).host
        context.add_callback(host.wake)
        timeout = seconds_left(context, min(request.timeout_seconds, LONGEST_WAIT_SECONDS))
        host.wait_version(request.version, timeout, context.is_active)
        return jobs_pb2.WaitForVersionResponse(position=host.job.position.to_proto())

    def ListEvents(self, request: jobs_pb2.ListEventsRequest, context: CallContext) -> jobs_pb2.ListEventsResponse:
        host = self._registry.find(request.job_id).host
        context.add_callback(host.wake)
        wait = seconds_left(context, min(request.wait_seconds, _LONGEST_POLL_SECONDS)) if request.wait_seconds > 0 else 0.0
        found = host.events.after(request.after, wait, lambda: context.is_active() and host.closed is None)
        return jobs_pb2.ListEventsResponse(events=_page(found))

    def DeleteJob(self, request: jobs_pb2.DeleteJobRequest, context: CallContext) -> jobs_pb2.DeleteJobResponse:
        self._folders.delete(request.job_id)
        return jobs_pb2.DeleteJobResponse()


def _page(found: Iterable[Event]) -> Iterator[jobs_pb2.Event]:
    """The first of them, as many as one answer holds."""
    size = 0
    for event in found:
        entry = jobs_pb2.Event(
            index=event.index,
            time_seconds=event.time_seconds,
            kind=event.kind,
            position=event.position.to_proto(),
            message=event.message,
            fields=event.fields,
            metrics=event.metrics,
        )
        if entry.ByteSize() > _EVENT_BYTES:
            entry.ClearField("fields")
        if entry.ByteSize() > _EVENT_BYTES:
            entry.ClearField("metrics")
        size += entry.ByteSize() + 8
        if size > _EVENTS_BYTES:
            return
        yield entry
