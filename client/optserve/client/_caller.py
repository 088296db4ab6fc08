"""A job's administrative calls: their identity, and what a missing job means."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

from optserve.client._connection import CALL_SECONDS, Answer, Connection
from optserve.client._session import Session
from optserve.v1 import types_pb2 as pb
from optserve.wire.errors import (
    JobLostError,
    JobNotFoundError,
    OptserveError,
    RolledBackError,
    SequenceConflictError,
    SequenceGapError,
    ServerError,
)
from optserve.wire.methods import Item

Result = TypeVar("Result")


def lost(connection: Connection, error: JobNotFoundError, job: str) -> JobLostError | JobNotFoundError:
    """What it means that a job which this client had is not there: lost with its server's memory, or deleted."""
    try:
        if not connection.restarted():
            return error
    except OptserveError:
        return error
    return JobLostError(
        f"job {job} is lost: the server was started again, and the job's state was in memory only, with no checkpoint of it "
        "to go on from",
        job=job,
    )


class Caller:
    """One session that edits and reads one job. Thread safe: mutating calls go one at a time."""

    def __init__(self, connection: Connection, job_id: str, name: str) -> None:
        self.connection = connection
        self.session = Session(job_id)
        self.shown = repr(name) if name else job_id
        self._lock = threading.Lock()
        """Guards the session's seq."""

    def read(self, request: Message, kind: type[Answer], timeout_seconds: float = CALL_SECONDS) -> Answer:
        """A call that changes nothing, or is safe to repeat without an identity."""
        return self.told(lambda: self.connection.call(request, kind, timeout_seconds))

    def download(self, request: Message, read: Callable[[Iterator[Item]], Result]) -> Result:
        return self.told(lambda: self.connection.download(request, read))

    def told(self, action: Callable[[], Result]) -> Result:
        """The action, its errors in terms of this job."""
        try:
            return action()
        except RolledBackError as error:
            self.session.rolled_back(error)
            raise
        except JobNotFoundError as error:
            raise lost(self.connection, error, self.shown) from error

    def mutate(self, send: Callable[[pb.CallIdentity], Result]) -> Result:
        """A call with an identity. `send` repeats it with the same one while the server is away."""
        with self._lock:
            try:
                answer = self.told(lambda: send(self.session.identity()))
            # Not applied: the server was started again and does not know the session, or it applied a call that this client
            # thinks has failed.
            except (SequenceGapError, SequenceConflictError):
                self.session.renew()
                answer = self.told(lambda: send(self.session.identity()))
            except OptserveError as error:
                if isinstance(error, ServerError):  # it is not known whether it was applied
                    self.session.renew()
                raise
            except BaseException:
                self.session.renew()
                raise
            self.session.seq += 1
            return answer
