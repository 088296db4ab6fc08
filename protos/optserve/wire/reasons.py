"""Errors between Python and the wire: the one table of reasons, by which both sides translate."""

from __future__ import annotations

from collections.abc import Mapping

from optserve.v1 import types_pb2 as pb
from optserve.wire.errors import InternalError, OptserveError

DOMAIN = "optserve"
"""The `domain` of the google.rpc.ErrorInfo in an RPC's status details."""


def _with_reason(base: type[OptserveError]) -> list[type[OptserveError]]:
    found: list[type[OptserveError]] = []
    for child in base.__subclasses__():
        found += [child, *_with_reason(child)] if "reason" in vars(child) else _with_reason(child)
    return found


ERRORS: Mapping[pb.ErrorReason, type[OptserveError]] = {error.reason: error for error in _with_reason(OptserveError)}
"""Reason to class."""


def to_detail(error: OptserveError) -> pb.ErrorDetail:
    """The error as it travels inside a stream."""
    return pb.ErrorDetail(reason=error.reason, message=str(error), metadata=error.metadata)


def from_detail(reason: pb.ErrorReason, message: str, metadata: Mapping[str, str]) -> OptserveError:
    """The error that a detail stands for; a reason of a newer server becomes InternalError with its number."""
    error_class = ERRORS.get(reason)
    if error_class is None:
        return InternalError(f"{message} (reason {reason} is not known to this client)", **metadata)
    return error_class(message, **metadata)
