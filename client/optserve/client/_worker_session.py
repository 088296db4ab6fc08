"""A worker's membership and its kept stream: joined, opened, lost, opened again, joined again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TypeVar

from optserve.client._caller import Caller, lost
from optserve.client._connection import CALL_SECONDS, logger
from optserve.client._groups import KnownGroups
from optserve.client._heartbeat import Heartbeat
from optserve.client._session import Session
from optserve.client._transport import Stream, refusal
from optserve.v1 import data_pb2, jobs_pb2, optimizer_pb2, workers_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire.chunks import Chunk
from optserve.wire.errors import (
    ClosedError,
    FencedError,
    JobNotFoundError,
    NotJoinedError,
    OptserveError,
    ProtocolViolationError,
    RolledBackError,
    ServerError,
    ServerStoppingError,
    ServerUnavailableError,
    UnknownParameterError,
)
from optserve.wire.layout import Layout

SILENCE_SECONDS = 300.0
"""A stream on which nothing moves for so long is broken: a waiting push is told so every 30 s."""

_LEAVE_SECONDS = 10.0

Result = TypeVar("Result")


class WorkerSession:
    """Calls of one worker, one at a time: its owner's lock is held around every one of them but leave()."""

    def __init__(self, caller: Caller, name: str, rank: int | None, restored: set[str]) -> None:
        self.connection = caller.connection
        self.session = Session(caller.session.job_id)
        self.job = caller.shown
        self._job_session = caller.session
        self.name = name
        self.rank = rank
        self.layout = Layout()
        self.groups = KnownGroups()
        self.schedule_steps = 0
        self._restored = restored
        """Lineages that this client itself began: going back to them is no surprise."""
        self._stream: Stream | None = None
        self._must_join = False
        self._settled = True
        self._closed_because = ""
        self.heartbeat: Heartbeat | None = None

    @property
    def who(self) -> str:
        return f"worker {self.name!r} of job {self.job}"

    def join(self, timeout_seconds: float) -> None:
        """Becomes a member and opens the stream."""
        answer = self.connection.call(self._join_request(), workers_pb2.JoinResponse, timeout_seconds)
        self.schedule_steps = answer.schedule_steps
        self._joined(answer)
        self.heartbeat = Heartbeat(self.connection, self.session, answer.lease_seconds, self.who)
        self.connection.attach(self)
        try:
            self.call(lambda *_: self.settle())
        except BaseException:
            self.leave()
            raise

    def restores(self) -> frozenset[str]:
        """The lineages that this client itself has begun so far."""
        return frozenset(self._restored)

    def call(
        self,
        action: Callable[[Stream, pb.CallIdentity], Result],
        known_restores: Collection[str] | None = None,
        retry_seconds: float = math.inf,
    ) -> Result:
        """The action on the open stream, repeated with the same identity while the server is away.

        It calls settle() once the whole answer is read, otherwise the stream is given up; and applied() if it changes the job.
        known_restores: restores() as it was when a call that changes the job was begun. One begun before a restore is not
        repeated after it: what it brings is of the state that is gone. None: the call changes nothing. retry_seconds: at most
        so long, if that is less than the connection's own patience.
        """
        known: Collection[str] = self._restored if known_restores is None else known_restores
        backoff = self.connection.backoff(retry_seconds)
        repeat = joined_again = False
        while True:
            self.check_open()
            try:
                stream = self._opened(repeat)
                repeat, self._settled = True, False
                return action(stream, self.session.identity())
            except (ServerUnavailableError, ServerStoppingError) as error:
                self.drop()
                self.check_open()
                backoff.wait(error)
            except NotJoinedError:
                self.drop()
                if joined_again:
                    raise
                joined_again = self._must_join = True
            except RolledBackError as error:
                self.drop()
                self.session.rolled_back(error)
                self._job_session.rolled_back(error)  # said once to a client, not once more by its job
                self._rewind(int(error.metadata.get("schedule_steps", self.schedule_steps)))
                self.refresh_layout()  # groups that were added since are gone
                if error.metadata.get("lineage_id") not in known:
                    raise
            except FencedError as error:
                self._end(str(error))
                raise
            except JobNotFoundError as error:
                self._end(str(error))
                raise lost(self.connection, error, self.job) from error
            finally:
                if not self._settled:
                    self.drop()

    def applied(self, seq: int, position: pb.Position) -> None:
        """The server has applied this call, whatever becomes of the rest of its answer: the next one has the next number."""
        self.session.seq = seq
        self.session.saw(position)

    def settle(self) -> None:
        """The answer is read whole: the stream can take the next request."""
        self._settled = True

    def answer(self, stream: Stream, silence_seconds: float = SILENCE_SECONDS) -> data_pb2.StreamResponse:
        """The next message that is no chunk; an error or goodbye is raised."""
        item = stream.receive(silence_seconds)
        if isinstance(item, Chunk) or not isinstance(item, data_pb2.StreamResponse):
            raise ProtocolViolationError("a chunk came where an answer was expected")
        refused = refusal(item)
        if refused is not None:
            # After a failure of the server itself it is not known what was applied; the next opening asks.
            if item.HasField("error") and not isinstance(refused, ServerError):
                self.settle()
            raise refused
        return item

    def refresh_layout(self) -> None:
        """Asks for the job's layout and groups of now."""
        answer = self.connection.call(jobs_pb2.GetJobRequest(job=self.session.job_id), jobs_pb2.GetJobResponse)
        self.layout = Layout.from_proto(answer.job.layout)
        self.groups.told_all(answer.job.position, answer.job.groups, self.layout)

    def schedule(self) -> optimizer_pb2.Schedule:
        """Asks for the job's schedule of now."""
        request = optimizer_pb2.GetScheduleRequest(job_id=self.session.job_id)
        return self.connection.call(request, optimizer_pb2.GetScheduleResponse).schedule

    def check_group(self, index: int) -> None:
        """UnknownParameterError if the job has no such group, nor got it lately."""
        try:
            self.groups.check(index)
        except UnknownParameterError:
            self.refresh_layout()  # somebody may have added it
            self.groups.check(index)

    def check_open(self) -> None:
        if self._closed_because:
            raise ClosedError(f"{self.who} is closed: {self._closed_because}")
        self.connection.check_open()

    def drop(self) -> None:
        """Gives the stream up; the next call opens another."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def leave(self) -> None:
        """Ends the membership and every call under way. Idempotent; a server that is away is not waited for."""
        if self._closed_because:
            return
        self._end("it has left")
        session = self.session
        request = workers_pb2.LeaveRequest(job_id=session.job_id, session_id=session.session_id, epoch=session.epoch)
        try:
            self.connection.once(request, workers_pb2.LeaveResponse, _LEAVE_SECONDS)
        except OptserveError as error:
            logger.info("%s could not say that it leaves: %s", self.who, error)
        self.drop()

    def abandon(self) -> None:
        """For a worker that was forgotten without leaving: its stream and its heartbeats end, so its lease will."""
        self._end("it was abandoned")
        self.drop()

    def _end(self, why: str) -> None:
        self._closed_because = self._closed_because or why
        if self.heartbeat is not None:
            self.heartbeat.stop()

    def _opened(self, repeat: bool) -> Stream:
        if self._must_join:
            answer = self.connection.once(self._join_request(), workers_pb2.JoinResponse, CALL_SECONDS)
            self._joined(answer, repeat)
            self._rewind(answer.schedule_steps)
            logger.info("%s joined again at version %d", self.who, answer.position.version)
            self._must_join = False
        if self._stream is None:
            stream = self.connection.stream()
            try:
                opened = self._open(stream)
            except BaseException:
                stream.close()
                raise
            self._stream = stream
            self.session.saw(opened.position)
            self._count_from(opened.last_seq, repeat)
        return self._stream

    def _open(self, stream: Stream) -> data_pb2.StreamOpened:
        session = self.session
        request = data_pb2.StreamOpen(
            job_id=session.job_id, session_id=session.session_id, epoch=session.epoch, seen=session.seen
        )
        stream.send([data_pb2.StreamRequest(open=request)])
        answer = self.answer(stream)
        if answer.WhichOneof("content") != "opened":
            raise ProtocolViolationError(f"a stream was opened with {answer.WhichOneof('content')}")
        return answer.opened

    def _join_request(self) -> workers_pb2.JoinRequest:
        session = self.session
        return workers_pb2.JoinRequest(
            job_id=session.job_id, session_id=session.session_id, name=self.name, rank=self.rank, seen=session.seen
        )

    def _joined(self, answer: workers_pb2.JoinResponse, repeat: bool = False) -> None:
        self.name, self.rank = answer.name, answer.rank
        self.session.epoch = answer.epoch
        self._count_from(answer.last_seq, repeat)
        self.session.saw(answer.position)
        self.layout = Layout.from_proto(answer.layout)
        self.groups.told_all(answer.position, answer.groups, self.layout)

    def _count_from(self, last_seq: int, repeat: bool) -> None:
        """A repeated call may have been applied before the stream broke; any other count is the server's to say."""
        if not (repeat and last_seq == self.session.seq + 1):
            self.session.seq = last_seq

    def _rewind(self, schedule_steps: int) -> None:
        """Counted calls that the job has lost are made again; those that other ranks made first are still to come here."""
        self.schedule_steps = min(self.schedule_steps, schedule_steps)
