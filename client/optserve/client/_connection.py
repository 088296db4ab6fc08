"""One client's connection: calls that are tried again while the server is away, and what that means for jobs."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from optserve.client._transport import Outgoing, Stream, Transport
from optserve.v1 import server_pb2
from optserve.wire.errors import (
    ClosedError,
    OptserveError,
    ProtocolViolationError,
    ServerStoppingError,
    ServerUnavailableError,
)
from optserve.wire.methods import METHODS, Item

logger = logging.getLogger("optserve.client")

CALL_SECONDS = 60.0
"""Deadline of a small call. A dead server is noticed sooner, by keepalive."""

BULK_SECONDS = 3600.0
"""Deadline of a call that moves a whole model or waits for storage."""

_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.05, 2.0

Answer = TypeVar("Answer", bound=Message)
Result = TypeVar("Result")

_PATHS = {method.request: path for path, method in METHODS.items()}


class Backoff:
    """The waits between attempts of one call: exponential, with jitter, up to a total."""

    def __init__(self, address: str, retry_timeout_seconds: float, closed: threading.Event) -> None:
        self._address = address
        self._timeout_seconds = retry_timeout_seconds
        self._closed = closed
        self._lost_at = self._resumed_at = time.monotonic()
        self._delay = _FIRST_DELAY_SECONDS
        self._attempts = 0

    def wait(self, error: OptserveError) -> None:
        """Waits before the next attempt. ServerUnavailableError when the time is over, ClosedError if the client was closed."""
        now = time.monotonic()
        # An attempt that held for long, as a push that waits in a round, is no part of the outage that ended it.
        if self._attempts == 0 or now - self._resumed_at > self._timeout_seconds:
            self._lost_at, self._delay = now, _FIRST_DELAY_SECONDS
            logger.warning("%s; trying again for up to %.0f s", error, self._timeout_seconds)
        self._attempts += 1
        waited = now - self._lost_at
        if waited + self._delay > self._timeout_seconds:
            raise ServerUnavailableError(
                f"the server at {self._address} was not there for {waited:.1f} s (attempt {self._attempts}): {error}",
                address=self._address,
                waited_seconds=waited,
            ) from error
        if self._closed.wait(self._delay * random.uniform(0.5, 1.0)):
            raise ClosedError("the client was closed while it waited for the server") from error
        self._delay = min(2 * self._delay, _LONGEST_DELAY_SECONDS)
        self._resumed_at = time.monotonic()


class Member(Protocol):
    """A worker, or the creator of an unnamed job."""

    def leave(self) -> None:
        """Says so to the server, if it is there. Idempotent; raises nothing of optserve's."""


class Connection:
    """A transport with its retry policy. Thread safe."""

    def __init__(self, transport: Transport, retry_timeout_seconds: float) -> None:
        self.transport = transport
        self.retry_timeout_seconds = retry_timeout_seconds
        self.start_id = ""
        """Of the server as it was at connect()."""
        self.closed = threading.Event()
        self._members: weakref.WeakSet[Member] = weakref.WeakSet()

    @property
    def address(self) -> str:
        return self.transport.address

    def check_open(self) -> None:
        if self.closed.is_set():
            raise ClosedError(f"the connection to {self.address} is closed")

    def backoff(self, most_seconds: float = math.inf) -> Backoff:
        """`most_seconds`: for a call that has less patience than the connection."""
        return Backoff(self.address, min(self.retry_timeout_seconds, most_seconds), self.closed)

    def retried(self, action: Callable[[], Result]) -> Result:
        """The action, repeated while the server is away; it must be safe to repeat."""
        self.check_open()
        backoff = self.backoff()
        while True:
            try:
                return action()
            except (ServerUnavailableError, ServerStoppingError) as error:
                backoff.wait(error)

    def once(self, request: Message, kind: type[Answer], timeout_seconds: float = CALL_SECONDS) -> Answer:
        """A call with one message each way, not repeated."""
        self.check_open()
        return _checked(self.transport.unary(_PATHS[type(request)], request, timeout_seconds), kind)

    def call(self, request: Message, kind: type[Answer], timeout_seconds: float = CALL_SECONDS) -> Answer:
        """A call with one message each way that is safe to repeat."""
        return self.retried(lambda: self.once(request, kind, timeout_seconds))

    def upload(self, request: type[Message], items: Callable[[], Iterator[Outgoing]], kind: type[Answer]) -> Answer:
        """A call that sends a stream of `request` and is safe to repeat from its start."""
        path = _PATHS[request]
        return self.retried(lambda: _checked(self.transport.upload(path, items, BULK_SECONDS), kind))

    def download(self, request: Message, read: Callable[[Iterator[Item]], Result]) -> Result:
        """A call that is answered with a stream, read by `read` again from the start if it breaks."""

        def attempt() -> Result:
            items = self.transport.download(_PATHS[type(request)], request, BULK_SECONDS)
            try:
                return read(items)
            finally:
                close = getattr(items, "close", None)
                if close is not None:
                    close()

        return self.retried(attempt)

    def stream(self) -> Stream:
        self.check_open()
        return self.transport.stream()

    def restarted(self) -> bool:
        """Whether the server is another start of it than the one that connect() found."""
        found = self.call(server_pb2.GetServerRequest(), server_pb2.GetServerResponse)
        return found.start_id != self.start_id

    def attach(self, member: Member) -> None:
        """Something to leave when the connection is closed; not kept alive by this."""
        self._members.add(member)

    def close(self) -> None:
        """Leaves with every member first. Idempotent."""
        if not self.closed.is_set():
            for member in list(self._members):
                member.leave()
            self.closed.set()
            self.transport.close()


def _checked(answer: Message, kind: type[Answer]) -> Answer:
    if not isinstance(answer, kind):
        raise ProtocolViolationError(f"the server answered with a {type(answer).__name__} instead of a {kind.__name__}")
    return answer
