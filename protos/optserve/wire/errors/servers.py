"""Errors of streams, of the server, and of objects that are done with."""

from __future__ import annotations

from optserve.v1 import types_pb2 as pb
from optserve.wire.errors.base import OptserveError


class StreamError(OptserveError, RuntimeError):
    """Chunks that do not fit together; nothing was changed."""

    status = "INVALID_ARGUMENT"


class InvalidChunkError(StreamError):
    """A chunk lies outside its array, repeats or overlaps another, or is too large."""

    reason = pb.ERROR_REASON_INVALID_CHUNK


class IncompleteStreamError(StreamError):
    """A stream ended before everything that was announced had come."""

    reason = pb.ERROR_REASON_INCOMPLETE_STREAM


class ProtocolViolationError(StreamError):
    """Messages came in an order that the protocol does not allow, or could not be parsed."""

    reason = pb.ERROR_REASON_PROTOCOL_VIOLATION


class ServerError(OptserveError, RuntimeError):
    """The server cannot do it now."""

    status = "UNAVAILABLE"


class StorageError(ServerError, OSError):
    """The storage under the data directory failed or is full."""

    reason = pb.ERROR_REASON_STORAGE_FAILED
    status = "INTERNAL"


class TooManyStreamsError(ServerError):
    """More streams are open than `--max-streams` allows."""

    reason = pb.ERROR_REASON_TOO_MANY_STREAMS
    status = "RESOURCE_EXHAUSTED"


class OutOfMemoryError(ServerError, MemoryError):
    """The server has not the memory for it."""

    reason = pb.ERROR_REASON_OUT_OF_MEMORY
    status = "RESOURCE_EXHAUSTED"


class ServerStoppingError(ServerError):
    """The server is stopping; a client that retries finds its successor."""

    reason = pb.ERROR_REASON_SERVER_STOPPING


class ServerUnavailableError(ServerError, ConnectionError):
    """The server did not answer within the deadline."""

    reason = pb.ERROR_REASON_SERVER_UNAVAILABLE


class DeadlineExceededError(ServerError, TimeoutError):
    """A deadline passed before the call was done."""

    reason = pb.ERROR_REASON_DEADLINE_EXCEEDED
    status = "DEADLINE_EXCEEDED"


class AddressInUseError(ServerError, OSError):
    """The address is taken by another process."""

    reason = pb.ERROR_REASON_ADDRESS_IN_USE


class InternalError(ServerError):
    """A defect of optserve itself; the server's log has the traceback."""

    reason = pb.ERROR_REASON_INTERNAL
    status = "INTERNAL"


class ClosedError(OptserveError, ValueError):
    """The object is closed."""

    reason = pb.ERROR_REASON_CLOSED
    status = "FAILED_PRECONDITION"


class ReadOnlyError(OptserveError, TypeError):
    """The mapping is edited by a call, not by assignment; the message names the call."""

    reason = pb.ERROR_REASON_READ_ONLY


class MissingExtraError(OptserveError, ImportError):
    """An optional dependency is not installed; the message names the extra."""

    reason = pb.ERROR_REASON_MISSING_EXTRA
