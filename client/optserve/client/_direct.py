"""Calls to a server in this process: its handlers, called in the calling thread, with nothing encoded.

The kept stream is driven as a coroutine. That is safe because it is half duplex: the handler asks for the next request only
after it has answered the last one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

from optserve.client._transport import STREAM, Outgoing, Pieces
from optserve.wire.chunks import Chunk
from optserve.wire.errors import ClosedError, ProtocolViolationError, ServerUnavailableError
from optserve.wire.methods import Item

Handler = Callable[[Any, Any], Any]
"""(request or iterator of items, context) -> response or iterator of items."""


class Context:
    """What the handlers use of grpc.ServicerContext. Thread safe."""

    def __init__(self, timeout_seconds: float | None = None) -> None:
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] | None = []

    def is_active(self) -> bool:
        return self._callbacks is not None

    def time_remaining(self) -> float | None:
        """Seconds; None without a deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Called when the RPC ends; False, and not called, if it has ended already."""
        with self._lock:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def cancel(self) -> None:
        """Ends the RPC: runs the callbacks, once."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback()


def _item(item: Outgoing) -> Item:
    return item.assembled() if isinstance(item, Pieces) else item


class DirectTransport:
    """The handlers of an embedded server. `on_close` is called once, when the transport is closed."""

    def __init__(self, handlers: Mapping[str, Handler], on_close: Callable[[], None] = lambda: None) -> None:
        self.address = "this process"
        self._handlers = handlers
        self._on_close = on_close
        self._closed = False

    def unary(self, path: str, request: Message, timeout_seconds: float) -> Message:
        return self._answered(path, request, timeout_seconds)

    def upload(self, path: str, items: Callable[[], Iterator[Outgoing]], timeout_seconds: float) -> Message:
        return self._answered(path, (_item(item) for item in items()), timeout_seconds)

    def download(self, path: str, request: Message, timeout_seconds: float) -> Iterator[Item]:
        handler, context = self._handler(path), Context(timeout_seconds)
        try:
            yield from handler(request, context)
        finally:
            context.cancel()

    def stream(self) -> DirectStream:
        return DirectStream(self._handler(STREAM))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._on_close()

    def _handler(self, path: str) -> Handler:
        if self._closed:
            raise ClosedError("the connection to the server in this process is closed")
        return self._handlers[path]

    def _answered(self, path: str, request: object, timeout_seconds: float) -> Message:
        handler, context = self._handler(path), Context(timeout_seconds)
        try:
            answer: Message = handler(request, context)
            return answer
        finally:
            context.cancel()


class DirectStream:
    """A kept stream as two generators that feed each other. The timeout of receive() is the handler's own business here."""

    def __init__(self, handler: Handler) -> None:
        self._context = Context()
        self._batches: deque[Iterable[Outgoing]] = deque()
        self._answers: Iterator[Item] = iter(handler(self._requests(), self._context))
        self._running = threading.Lock()
        """Held while the handler's generator runs: it cannot be closed then."""

    def send(self, items: Iterable[Outgoing]) -> None:
        self._batches.append(items)

    def receive(self, timeout_seconds: float) -> Item:  # noqa: ARG002
        with self._running:
            if not self._context.is_active():
                raise ClosedError("the stream was closed")
            answer = next(self._answers, None)
        if not self._context.is_active():
            self.close()
            raise ClosedError("the stream was closed while its answer was waited for")
        if answer is None:
            raise ServerUnavailableError("the server in this process ended the stream")
        return answer

    def close(self) -> None:
        self._context.cancel()  # wakes a handler that waits
        if self._running.acquire(blocking=False):
            try:
                close = getattr(self._answers, "close", None)
                if close is not None:
                    close()
            finally:
                self._running.release()

    def _requests(self) -> Iterator[Message | Chunk]:
        while self._batches:
            for item in self._batches.popleft():
                yield _item(item)
        raise ProtocolViolationError("the handler asked for a request before one was sent")
