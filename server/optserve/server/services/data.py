"""DataService: gradients in, weights out."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from optserve.server.jobs.sessions import Member
from optserve.server.rounds.pushes import Done, Push, Resend, Ticket, Waiting
from optserve.server.rounds.registry import Registry, Running
from optserve.server.services import decode, encode
from optserve.server.services.context import CallContext
from optserve.server.store import Hold
from optserve.v1 import data_pb2, data_pb2_grpc, types_pb2
from optserve.wire import errors
from optserve.wire.chunks import INLINE_BYTES, Chunk, array_chunks, from_inline, to_inline
from optserve.wire.reasons import to_detail

StreamItem = bytes | data_pb2.StreamRequest | Chunk
PushItem = bytes | data_pb2.PushRequest | Chunk
Answer = data_pb2.StreamResponse | Chunk

_ENDING = (errors.FencedError, errors.ServerStoppingError, errors.NotJoinedError, errors.JobNotFoundError)
"""After these a stream has no further use: they are said with a goodbye."""


class OpenStreams:
    """The worker streams that are open, at most `limit`. Owns its lock, which guards all of it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._idle: dict[CallContext, bool] = {}
        self._stopping = False

    def __len__(self) -> int:
        return len(self._idle)

    @contextmanager
    def one(self, context: CallContext) -> Iterator[None]:
        """TooManyStreamsError beyond the limit."""
        with self._lock:
            if len(self._idle) >= self.limit:
                raise errors.TooManyStreamsError(
                    f"{len(self._idle)} worker streams are open; --max-streams allows {self.limit}"
                )
            self._idle[context] = False
        try:
            yield
        finally:
            with self._lock:
                del self._idle[context]

    def mark(self, context: CallContext, idle: bool) -> None:
        """Says whether a stream waits for its worker's next request. ServerStoppingError once the server stops."""
        with self._lock:
            self._idle[context] = idle
            if self._stopping:
                raise errors.ServerStoppingError("the server is stopping")

    def hang_up(self) -> None:
        """Ends idle streams now, and every other one after its answer."""
        with self._lock:
            self._stopping = True
            idle = [context for context, waits in self._idle.items() if waits]
        for context in idle:
            context.cancel()


class DataService(data_pb2_grpc.DataServiceServicer):
    """A worker's stream, and Push and Pull for one-off clients."""

    def __init__(self, registry: Registry, max_streams: int) -> None:
        self._registry = registry
        self.streams = OpenStreams(max_streams)

    def Stream(self, requests: Iterable[StreamItem], context: CallContext) -> Iterator[Answer]:
        found = decode.items(data_pb2.StreamRequest, requests)
        with self.streams.one(context):
            opening = decode.first(data_pb2.StreamRequest, found, "open").open
            stream = _WorkerStream(self._registry.find(opening.job_id), opening, context, self.streams)
            try:
                yield from stream.answers(found)
            finally:
                stream.close()

    def Push(self, requests: Iterable[PushItem], context: CallContext) -> data_pb2.PushResponse:
        found = decode.items(data_pb2.PushRequest, requests)
        begin = decode.first(data_pb2.PushRequest, found, "begin").begin
        running = self._registry.find(begin.call.job_id)
        context.add_callback(running.host.wake)
        ticket = _gathered(running, decode.push(begin), _chunks(begin, found), context)
        while isinstance(outcome := running.pushes.finish(ticket, context.is_active), Waiting):
            pass
        if isinstance(outcome, Resend):
            raise errors.RoundFailedError(f"round {outcome.round}: a member was lost half-way and the sum is void; push again")
        return data_pb2.PushResponse(result=encode.push_result(running.host, begin, outcome))

    def Pull(self, request: data_pb2.PullRequest, context: CallContext) -> Iterator[data_pb2.PullResponse | Chunk]:
        host = self._registry.find(request.job_id).host
        with host.changed:
            host.check_seen(decode.seen(request.seen))
            arrays, layout, position = host.job.store.snapshot(), host.job.store.layout, host.job.position
        chosen = [layout.place(name).index for name in request.parameters] or range(len(layout.places))
        begin = data_pb2.WeightsBegin(position=position.to_proto(), layout_version=layout.version)
        if request.include_layout:
            begin.layout.CopyFrom(layout.to_proto())
        yield data_pb2.PullResponse(begin=begin)
        for array_id, wanted in layout.blocks_of(chosen).items():
            yield from array_chunks(array_id, _bytes(arrays[array_id]), wanted)
        yield data_pb2.PullResponse(end=types_pb2.StreamEnd())


class _WorkerStream:
    """One worker's stream: half duplex, a request and then its answer."""

    def __init__(self, running: Running, opening: data_pb2.StreamOpen, context: CallContext, streams: OpenStreams) -> None:
        self._running = running
        self._streams = streams
        self._context = context
        self._opening = opening
        self._hold: Hold | None = None
        context.add_callback(self._cut)
        running.host.stream_opened(opening.session_id, self)

    def _cut(self) -> None:
        """In gRPC's thread, when the stream ends: a reader that is gone must not keep the next update waiting."""
        if self._hold is not None:
            self._hold.release()
        self._running.host.wake()

    def close(self) -> None:
        self._cut()
        self._running.host.stream_ended(self._opening.session_id, self)

    def _member(self) -> Member:
        return self._running.job.sessions.check_member(self._opening.session_id, self._opening.epoch)

    def answers(self, found: Iterator[data_pb2.StreamRequest | Chunk]) -> Iterator[Answer]:
        host = self._running.host
        with host.changed:
            host.check_initialized()
            self._member()
            host.job.check_seen(*decode.seen(self._opening.seen))
            position, last_seq = host.job.position, host.job.sessions.last_seq(self._opening.session_id)
        opened = data_pb2.StreamOpened(position=position.to_proto(), last_seq=last_seq)
        yield data_pb2.StreamResponse(opened=opened)
        for item in self._requests(found):
            content = "chunk" if isinstance(item, Chunk) else item.WhichOneof("content")
            try:
                self._streams.mark(self._context, idle=False)
                if not isinstance(item, Chunk) and content == "push":
                    yield from self._push(item.push, found)
                elif not isinstance(item, Chunk) and content == "pull":
                    yield from self._weights(item.pull)
                else:
                    raise errors.ProtocolViolationError(f"a stream may not go on with {content!r}; push or pull is next")
            except _ENDING as error:
                yield data_pb2.StreamResponse(goodbye=data_pb2.Goodbye(error=to_detail(error)))
                return
            except errors.StreamError:
                raise
            except errors.OptserveError as error:
                yield data_pb2.StreamResponse(error=to_detail(error))

    def _requests(self, found: Iterator[data_pb2.StreamRequest | Chunk]) -> Iterator[data_pb2.StreamRequest | Chunk]:
        while True:
            self._streams.mark(self._context, idle=True)
            item = next(found, None)
            if item is None:
                return
            yield item

    def _push(self, begin: data_pb2.PushBegin, found: Iterator[data_pb2.StreamRequest | Chunk]) -> Iterator[Answer]:
        chunks = _chunks(begin, found)
        try:
            push = decode.push(begin)
            ticket = _gathered(self._running, push, chunks, self._context)
        except errors.OptserveError:
            for _ in chunks:  # the rest of a refused push: what comes after it is the next request
                pass
            raise
        while isinstance(outcome := self._running.pushes.finish(ticket, self._context.is_active), Waiting):
            yield data_pb2.StreamResponse(waiting=encode.waiting(outcome))
        if isinstance(outcome, Resend):
            yield data_pb2.StreamResponse(resend=data_pb2.RoundResend(round=outcome.round))
            return
        yield from self._applied(begin, outcome)

    def _applied(self, begin: data_pb2.PushBegin, outcome: Done) -> Iterator[Answer]:
        result = encode.push_result(self._running.host, begin, outcome)
        pull = data_pb2.PullWeights(inline_weights_bytes=begin.inline_weights_bytes, seen=result.position)
        failure: errors.OptserveError | None = None
        try:
            small = self._small_weights(pull) if begin.want_weights else None
            if small is not None:
                result.weights.CopyFrom(small)
        except errors.OptserveError as error:
            failure = error
        yield data_pb2.StreamResponse(pushed=result)  # whatever becomes of the weights, the push was applied
        if failure is not None:
            raise failure
        if begin.want_weights and not result.HasField("weights"):
            yield from self._weights(pull)

    def _weights_begin(self, pull: data_pb2.PullWeights) -> data_pb2.WeightsBegin:
        """Of the weights as they are. With the job's lock held. Typed errors if this worker may not have them."""
        host = self._running.host
        host.check_seen(decode.seen(pull.seen))
        self._member()
        return data_pb2.WeightsBegin(
            position=host.job.position.to_proto(),
            layout_version=host.job.store.layout.version,
            changed_groups=encode.changed_groups(host, pull),
        )

    def _small_weights(self, pull: data_pb2.PullWeights) -> data_pb2.WeightsBegin | None:
        """The weights in one message, if they have at most so many bytes."""
        host = self._running.host
        with host.changed:
            begin = self._weights_begin(pull)
            if host.job.store.layout.nbytes > min(pull.inline_weights_bytes, INLINE_BYTES):
                return None
            arrays = host.job.store.snapshot()
        chunks = (chunk for array_id, array in arrays.items() for chunk in array_chunks(array_id, _bytes(array)))
        begin.inline.CopyFrom(to_inline(chunks))
        return begin

    def _weights(self, pull: data_pb2.PullWeights) -> Iterator[Answer]:
        """One whole version: in `sync` read in place, since no step can come before this worker pushes; else from a copy."""
        small = self._small_weights(pull)
        if small is not None:
            yield data_pb2.StreamResponse(weights=small)
            return
        host = self._running.host
        with host.changed:
            begin = self._weights_begin(pull)
            self._hold = host.hold(self._opening.session_id) if host.sync else None
            arrays = self._hold.arrays if self._hold else host.job.store.snapshot()
        try:
            yield data_pb2.StreamResponse(weights=begin)
            for array_id, array in arrays.items():
                yield from array_chunks(array_id, _bytes(array))
            if self._hold is not None and self._hold.released:
                raise errors.RoundTimeoutError("this worker was silent for so long that the round went on; pull again")
        finally:
            if self._hold is not None:
                self._hold.release()  # first, and without the job's lock: an edit may wait for it with that in hand
                host.release(self._opening.session_id, self._hold)
        yield data_pb2.StreamResponse(end=types_pb2.StreamEnd())


def _gathered(running: Running, push: Push, chunks: Iterator[Chunk], context: CallContext) -> Ticket:
    """Begins a push and takes its chunks in. What ends it early is raised, and the round forgets it."""
    ticket = running.pushes.begin(push, context.is_active)
    try:
        for chunk in chunks:
            running.pushes.offer(ticket, chunk, context.is_active)
    except BaseException:
        running.pushes.abandon(ticket)
        raise
    return ticket


def _chunks(begin: data_pb2.PushBegin, found: Iterator[decode.AnyMessage | Chunk]) -> Iterator[Chunk]:
    """A push's chunks: those in its head, or else those that follow."""
    return from_inline(begin.inline) if begin.HasField("inline") else decode.chunks(found)


def _bytes(array: npt.NDArray[np.generic]) -> memoryview:
    """A flat array's bytes, whatever its dtype."""
    return array.view(np.uint8).data
