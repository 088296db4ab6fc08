"""Whether an address can be listened on, asked before gRPC is: its own answer names no cause and writes to stderr."""

from __future__ import annotations

import errno
import socket

from optserve.wire import errors


def check_free(address: str) -> None:
    """AddressInUseError if another process listens there, InvalidArgumentError if it is no address of this machine."""
    host, _, port = address.rpartition(":")
    if port == "0":
        return
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise errors.InvalidArgumentError(f"cannot listen on {address}: {error.strerror}") from error
    refusals: list[OSError] = []
    for family, kind, protocol, _, where in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(where)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise errors.AddressInUseError(f"cannot listen on {address}: another process does") from error
                refusals.append(error)
    if len(refusals) == len(found):  # a name may also have an address of a kind that this machine has not
        raise errors.InvalidArgumentError(f"cannot listen on {address}: {refusals[0].strerror}") from refusals[0]
