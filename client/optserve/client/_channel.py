"""Calls over gRPC: the only module of the client that imports it, and the one translator of its errors."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from optserve.client._transport import STREAM, Outgoing, Pieces
from optserve.v1 import types_pb2 as pb
from optserve.wire import errors, reasons
from optserve.wire.chunks import MAX_MESSAGE_BYTES, encode, parse
from optserve.wire.methods import METHODS, Item, serialize

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),  # gRPC's own stop silently above 256 KiB; ours are in _connection
    ("grpc.enable_http_proxy", 0),
    # A window of fixed size: the estimate grows it to many times the memory at the same speed.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 << 20),
    # A server that was stopped or unplugged is noticed only with the ping timeout too; it stands at 60 s.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted server is found again within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


def _serialize(item: Outgoing) -> bytes:
    return encode(item.array_id, item.offset, *item.pieces) if isinstance(item, Pieces) else serialize(item)


def _own(error: grpc.RpcError) -> errors.OptserveError | None:
    """What an optserve server said; None if the status is somebody else's."""
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # the details contradict the status: not written by optserve
        return None
    if status is None:
        return None
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == reasons.DOMAIN:
            try:
                reason = pb.ErrorReason.Value(f"ERROR_REASON_{info.reason}")
            except ValueError:
                return errors.InternalError(f"{status.message} (reason {info.reason} is not known to this client)")
            return reasons.from_detail(cast(pb.ErrorReason, reason), status.message, info.metadata)
    return None


def translate(error: grpc.RpcError, address: str, waited_seconds: float) -> errors.OptserveError:
    """The error of the tree that an RPC's failure stands for. The server's own carry a google.rpc.ErrorInfo."""
    own = _own(error)
    if own is not None:
        return own
    code, details = error.code(), error.details()
    where = f"the server at {address}"
    if code is grpc.StatusCode.CANCELLED:
        return errors.ServerUnavailableError(f"{where} hung up: it stops, or is started again", address=address)
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.ServerUnavailableError(
            f"{where} did not answer (waited {waited_seconds:.1f} s): {details}", address=address
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceededError(f"{where} did not answer within {waited_seconds:.1f} s", address=address)
    # The one thing that gRPC says under a code which means several, and only in words.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (details or ""):
        return errors.InvalidArgumentError(
            f"a message of the call to {where} was too large, {MAX_MESSAGE_BYTES} bytes are allowed: {details}"
        )
    name = code.name if code else "no status"
    return errors.InternalError(f"{where} answered {name}: {details}", address=address)


class GrpcTransport:
    """A server at host:port. The channel is made at the first use in each process: gRPC's do not survive a fork."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._pid = 0
        self._closed = False

    def unary(self, path: str, request: Message, timeout_seconds: float) -> Message:
        method = METHODS[path]
        call = self._open().unary_unary(path, _serialize, method.response.FromString)
        return self._translated(lambda: call(request, timeout=timeout_seconds))

    def upload(self, path: str, items: Callable[[], Iterator[Outgoing]], timeout_seconds: float) -> Message:
        method = METHODS[path]
        call = self._open().stream_unary(path, _serialize, method.response.FromString)
        failures: list[Exception] = []

        def watched() -> Iterator[Outgoing]:
            """gRPC would hide what goes wrong while the items are made."""
            try:
                yield from items()
            except Exception as error:
                failures.append(error)
                raise

        try:
            return self._translated(lambda: call(watched(), timeout=timeout_seconds))
        except errors.OptserveError:
            if failures:
                raise failures[0] from None
            raise

    def download(self, path: str, request: Message, timeout_seconds: float) -> Iterator[Item]:
        method = METHODS[path]
        call = self._open().unary_stream(path, _serialize)(request, timeout=timeout_seconds)
        began = time.monotonic()
        try:
            for raw in call:
                yield parse(method.response, raw)
        except grpc.RpcError as error:
            raise translate(error, self.address, time.monotonic() - began) from None
        finally:
            call.cancel()

    def stream(self) -> GrpcStream:
        return GrpcStream(self._open().stream_stream(STREAM, _serialize), self.address)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            channel, self._channel = self._channel, None
            if channel is not None and self._pid == os.getpid():
                channel.close()

    def _open(self) -> grpc.Channel:
        with self._lock:
            if self._closed:
                raise errors.ClosedError(f"the connection to {self.address} is closed")
            if self._channel is None or self._pid != os.getpid():
                self._channel = grpc.insecure_channel(self.address, options=OPTIONS)
                self._pid = os.getpid()
            return self._channel

    def _translated(self, call: Callable[[], Message]) -> Message:
        began = time.monotonic()
        try:
            return call()
        except grpc.RpcError as error:
            raise translate(error, self.address, time.monotonic() - began) from None
        except ValueError as error:
            if self._closed:  # gRPC's way to say that the channel was closed meanwhile
                raise errors.ClosedError(f"the connection to {self.address} is closed") from error
            raise


class GrpcStream:
    """A worker's kept stream.

    gRPC takes the requests in a thread of its own, one message at a time as the window allows, so chunks are made when they are
    sent. A blocked read has no deadline in gRPC; a watch thread ends the call when nothing has moved for too long.
    """

    def __init__(self, open_call: Callable[..., Any], address: str) -> None:
        self._address = address
        self._batches: queue.SimpleQueue[Iterable[Outgoing] | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._timed_out = False
        self._moved_at = time.monotonic()
        self._silence_seconds: float | None = None
        self._looks_at = float("inf")
        self._look = threading.Condition()
        """Guards the three above."""
        self._call = open_call(self._requests())
        threading.Thread(target=self._watch, name="optserve-stream-watch", daemon=True).start()

    def send(self, items: Iterable[Outgoing]) -> None:
        self._batches.put(items)

    def receive(self, timeout_seconds: float) -> Item:
        self._expect(timeout_seconds)
        began = time.monotonic()
        try:
            return parse(METHODS[STREAM].response, next(self._call))
        except (StopIteration, grpc.RpcError) as error:
            waited = time.monotonic() - began
            if self._failure is not None:
                raise self._failure from None
            if self._closed.is_set():
                raise errors.ClosedError("the stream was closed while its answer was waited for") from None
            if self._timed_out:
                raise errors.DeadlineExceededError(
                    f"the stream to the server at {self._address} stood still for {timeout_seconds:.0f} s",
                    address=self._address,
                ) from None
            if isinstance(error, StopIteration):
                raise errors.ServerUnavailableError(
                    f"the server at {self._address} ended the stream", address=self._address
                ) from None
            raise translate(error, self._address, waited) from None
        finally:
            self._silence_seconds = None

    def close(self) -> None:
        self._closed.set()
        self._batches.put(None)
        # An interrupt (Ctrl-C) that hit inside gRPC can leave the call's lock taken: who closes must not wait for it.
        threading.Thread(target=self._call.cancel, name="optserve-stream-cancel", daemon=True).start()
        with self._look:
            self._look.notify()

    def _requests(self) -> Iterator[Outgoing]:
        while (batch := self._batches.get()) is not None:
            try:
                for item in batch:
                    self._moved_at = time.monotonic()
                    yield item
            except Exception as error:
                self._failure = error
                self._call.cancel()
                return

    def _expect(self, timeout_seconds: float) -> None:
        """Arms the watch; it is woken only if it would look later than this deadline."""
        with self._look:
            self._moved_at = time.monotonic()
            self._silence_seconds = timeout_seconds
            if self._looks_at > self._moved_at + timeout_seconds:
                self._look.notify()

    def _watch(self) -> None:
        with self._look:
            while not self._closed.is_set():
                silence = self._silence_seconds
                now = time.monotonic()
                if silence is None:
                    self._looks_at = float("inf")
                elif self._moved_at + silence <= now:
                    self._timed_out = True
                    self._call.cancel()
                    return
                else:
                    self._looks_at = self._moved_at + silence
                self._look.wait(None if silence is None else self._looks_at - now)
