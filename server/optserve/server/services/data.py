"""DataService: gradients in, weights out."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

from optserve.server.formulas import Searching
from optserve.server.jobs.sessions import Member
from optserve.server.rounds.contributions import Push, Trial
from optserve.server.rounds.registry import Registry, Running
from optserve.server.rounds.tickets import Done, Resend, Ticket, Waiting
from optserve.server.services import decode, encode, pushing, weights
from optserve.server.services.context import CallContext
from optserve.server.services.weights import Selection
from optserve.server.store import Hold
from optserve.v1 import data_pb2, data_pb2_grpc, types_pb2
from optserve.wire import errors
from optserve.wire.chunks import Chunk, from_inline, to_inline
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
        if begin.closure or isinstance(running.job.plan.optimizer, Searching):
            raise errors.InvalidArgumentError("a step with a closure needs a worker's stream; Push takes one gradient alone")
        context.add_callback(running.host.wake)
        ticket = _gathered(running, pushing.push(begin), _chunks(begin, found), context)
        while isinstance(outcome := running.pushes.finish(ticket, context.is_active), Waiting):
            pass
        if isinstance(outcome, Resend):
            raise errors.RoundFailedError(f"round {outcome.round}: a member was lost half-way and the sum is void; push again")
        if isinstance(outcome, Trial):
            raise errors.InternalError("a push without a closure was asked for another evaluation")
        return data_pb2.PushResponse(result=encode.push_result(running.host, begin, outcome))

    def Pull(self, request: data_pb2.PullRequest, context: CallContext) -> Iterator[data_pb2.PullResponse | Chunk]:
        host = self._registry.find(request.job_id).host
        with host.changed:
            host.check_seen(decode.seen(request.seen))
            layout = host.job.store.layout
            selection = Selection.of(layout, request.rows, request.layout_version, request.parameters)
            begin = weights.begin(host, selection)
            chunks = weights.copied(host.job.store, selection)
        if request.include_layout:
            begin.layout.CopyFrom(layout.to_proto())
        yield data_pb2.PullResponse(begin=begin)
        yield from chunks
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
                    yield from self._weights(item.pull, self._selection(item.pull.rows, item.pull.layout_version))
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
            push, selection = pushing.push(begin), self._asked_with(begin)
            ticket = _gathered(self._running, push, chunks, self._context)
        except errors.OptserveError:
            for _ in chunks:  # the rest of a refused push: what comes after it is the next request
                pass
            raise
        while isinstance(outcome := self._running.pushes.finish(ticket, self._context.is_active), Waiting):
            yield data_pb2.StreamResponse(waiting=encode.waiting(outcome))
        if isinstance(outcome, Resend):
            yield data_pb2.StreamResponse(resend=data_pb2.RoundResend(round=outcome.round, restart=outcome.restart))
        elif isinstance(outcome, Trial):
            yield from weights.evaluate(self._running.host, outcome, begin.inline_weights_bytes)
        else:
            yield from self._applied(begin, outcome, selection)

    def _asked_with(self, begin: data_pb2.PushBegin) -> Selection | None:
        """What a push asks for with its result; None if it is of an old layout: it may have been applied before, and if it was
        not, it is refused for that."""
        try:
            return self._selection(begin.want_rows, begin.layout_version)
        except errors.StaleLayoutError:
            return None

    def _selection(self, rows: Sequence[types_pb2.Rows], layout_version: int) -> Selection:
        if not rows:
            return Selection({}, layout_version)
        with self._running.host.changed:
            return Selection.of(self._running.job.store.layout, rows, layout_version)

    def _applied(self, begin: data_pb2.PushBegin, outcome: Done, selection: Selection | None) -> Iterator[Answer]:
        result = encode.push_result(self._running.host, begin, outcome)
        pull = data_pb2.PullWeights(inline_weights_bytes=begin.inline_weights_bytes, seen=result.position)
        failure: errors.OptserveError | None = None
        try:
            if begin.want_weights:
                selection = selection or self._selection(begin.want_rows, begin.layout_version)
                small = self._small_weights(pull, selection)
                if small is not None:
                    result.weights.CopyFrom(small)
        except errors.OptserveError as error:
            failure = error
        yield data_pb2.StreamResponse(pushed=result)  # whatever becomes of the weights, the push was applied
        if failure is not None:
            raise failure
        if begin.want_weights and selection is not None and not result.HasField("weights"):
            yield from self._weights(pull, selection)

    def _weights_begin(self, pull: data_pb2.PullWeights, selection: Selection) -> data_pb2.WeightsBegin:
        """Of the weights as they are. With the job's lock held. Typed errors if this worker may not have them."""
        host = self._running.host
        host.check_seen(decode.seen(pull.seen))
        self._member()
        begin = weights.begin(host, selection)
        changed = encode.changed_groups(host, pull)
        if changed is not None:
            begin.changed_groups.CopyFrom(changed)
        return begin

    def _small_weights(self, pull: data_pb2.PullWeights, selection: Selection) -> data_pb2.WeightsBegin | None:
        """The weights in one message, if they have at most so many bytes."""
        host = self._running.host
        with host.changed:
            begin = self._weights_begin(pull, selection)
            if not selection.fits(host.job.store.layout, pull.inline_weights_bytes):
                return None
            chunks = weights.copied(host.job.store, selection)
        begin.inline.CopyFrom(to_inline(chunks))
        return begin

    def _weights(self, pull: data_pb2.PullWeights, selection: Selection) -> Iterator[Answer]:
        """One whole version: in `sync` flat arrays are read in place, since no step can come before this worker pushes; rows,
        and in `async` all, from copies."""
        small = self._small_weights(pull, selection)
        if small is not None:
            yield data_pb2.StreamResponse(weights=small)
            return
        host = self._running.host
        with host.changed:
            begin, store = self._weights_begin(pull, selection), host.job.store
            if host.sync:
                rows = weights.bundle(store, selection)
                self._hold = host.hold(self._opening.session_id)
                chunks: Iterator[Chunk] = chain(weights.in_place(self._hold.arrays, selection.blocks(store.layout)), rows)
            else:
                chunks = weights.copied(store, selection)
        try:
            yield data_pb2.StreamResponse(weights=begin)
            yield from chunks
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
