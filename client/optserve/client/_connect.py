"""connect(): the client's way in."""

from __future__ import annotations

import time

from optserve.client import _environment
from optserve.client._connection import Connection
from optserve.client._server import Server
from optserve.client._transport import Transport
from optserve.v1 import server_pb2
from optserve.wire.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    OptserveError,
    ServerStoppingError,
    ServerUnavailableError,
)
from optserve.wire.names import nearest

_ATTEMPT_SECONDS = 5.0
_PAUSE_SECONDS = 0.1
_TRANSPORTS = ["auto", "tcp", "shm"]


def connect(
    address: str | None = None,
    *,
    transport: str = "auto",
    timeout_seconds: float = 30.0,
    retry_timeout_seconds: float = 300.0,
) -> Server:
    """Connects to the server at host:port and waits until it answers.

    address: None means OPTSERVE_SERVER, and without that a server embedded in this process, shared by all its connections, in
    memory only. transport: "auto", or "tcp" for gRPC. timeout_seconds: how long to wait for the server now;
    retry_timeout_seconds: how long every later call waits for it, should it go away and come back.

    ServerUnavailableError names the address and the time waited. InvalidArgumentError; MissingExtraError if nothing can be
    embedded here.
    """
    if transport not in _TRANSPORTS:
        raise InvalidArgumentError(f"transport is {transport!r}{nearest(transport, _TRANSPORTS)}")
    if transport == "shm":
        raise InvalidArgumentError('transport "shm" (shared memory) is not in this version; use "tcp" or "auto"')
    if address is None:
        address = _environment.server_address()
    if address is None and transport == "tcp":
        raise InvalidArgumentError('transport "tcp" needs an address, or OPTSERVE_SERVER in the environment')
    if address is None:
        from optserve import embedded

        carrier: Transport = embedded.transport()
    else:
        from optserve.client._channel import GrpcTransport

        carrier = GrpcTransport(_checked(address))
    connection = Connection(carrier, retry_timeout_seconds)
    try:
        connection.start_id = _found(connection, timeout_seconds).start_id
    except BaseException:
        connection.close()
        raise
    return Server(connection)


def _checked(address: str) -> str:
    host, _, port = address.rpartition(":")
    named = host.startswith("[") or ":" not in host
    if host and named and "/" not in host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16:
        return address
    raise InvalidArgumentError(f"address is {address!r}; it must be host:port, as in localhost:50051")


def _found(connection: Connection, timeout_seconds: float) -> server_pb2.GetServerResponse:
    began = time.monotonic()
    last: OptserveError | None = None
    while True:
        left = began + timeout_seconds - time.monotonic()
        if last is not None and left <= 0:
            raise ServerUnavailableError(
                f"no server answered at {connection.address} within {timeout_seconds:g} s; is `optserve serve` running there?",
                address=connection.address,
                waited_seconds=timeout_seconds,
            ) from last
        try:
            attempt = max(0.01, min(left, _ATTEMPT_SECONDS))
            return connection.once(server_pb2.GetServerRequest(), server_pb2.GetServerResponse, attempt)
        except (ServerUnavailableError, DeadlineExceededError, ServerStoppingError) as error:
            last = error
            time.sleep(max(0.0, min(_PAUSE_SECONDS, left)))
