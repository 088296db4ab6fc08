"""What the client asks of whatever carries its calls. gRPC and the embedded server's direct calls both do it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from google.protobuf.message import Message

from optserve.v1 import data_pb2
from optserve.wire.chunks import Chunk
from optserve.wire.errors import OptserveError
from optserve.wire.methods import Item
from optserve.wire.reasons import from_detail

STREAM = "/optserve.v1.DataService/Stream"
"""The one path that is kept open."""


class Pieces(NamedTuple):
    """A chunk whose bytes lie in several places: each piece is one-dimensional bytes, borrowed from the caller's arrays."""

    array_id: int
    offset: int
    pieces: tuple[memoryview, ...]

    def assembled(self) -> Chunk:
        """As one chunk; a single piece is not copied."""
        data = self.pieces[0] if len(self.pieces) == 1 else memoryview(b"".join(self.pieces))
        return Chunk(self.array_id, self.offset, data)


Outgoing = Item | Pieces
"""What the client puts on a stream."""


def refusal(item: Item) -> OptserveError | None:
    """The error that an answer on a stream stands for: an error, or a goodbye. None if it is another one."""
    content = item.WhichOneof("content") if isinstance(item, data_pb2.StreamResponse) else None
    if not isinstance(item, data_pb2.StreamResponse) or content not in ("error", "goodbye"):
        return None
    detail = item.error if content == "error" else item.goodbye.error
    return from_detail(detail.reason, detail.message, detail.metadata)


class Stream(Protocol):
    """A worker's kept stream (DataService/Stream). One thread at a time uses it; close() may come from any."""

    def send(self, items: Iterable[Outgoing]) -> None:
        """Queues a request; its items are produced while they are sent, so what they borrow must stay until the answer."""

    def receive(self, timeout_seconds: float) -> Item:
        """The next message.

        ServerUnavailableError if the stream has ended, DeadlineExceededError if nothing moved on it for that long.
        """

    def close(self) -> None:
        """Ends the stream at once. Idempotent."""


class Transport(Protocol):
    """Carries calls by their path ("/optserve.v1.JobService/GetJob"). Thread safe; its errors are optserve.wire.errors'."""

    address: str
    """For messages: "localhost:50051", "this process"."""

    def unary(self, path: str, request: Message, timeout_seconds: float) -> Message:
        """A call with one message each way."""

    def upload(self, path: str, items: Callable[[], Iterator[Outgoing]], timeout_seconds: float) -> Message:
        """A call that sends a stream."""

    def download(self, path: str, request: Message, timeout_seconds: float) -> Iterator[Item]:
        """A call that is answered with a stream. An iterator left before its end is to be closed."""

    def stream(self) -> Stream:
        """Opens a worker's stream."""

    def close(self) -> None:
        """Ends every call. Idempotent."""
