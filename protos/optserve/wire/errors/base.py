"""The root of the tree."""

from __future__ import annotations

from typing import ClassVar

from optserve.v1 import types_pb2 as pb


class OptserveError(Exception):
    """Base of the tree. `reason` is what programs match on; `metadata` holds the message's facts as text."""

    reason: ClassVar[pb.ErrorReason] = pb.ERROR_REASON_UNSPECIFIED
    status: ClassVar[str] = "UNKNOWN"
    """Name of the gRPC status code that carries it."""

    def __init__(self, message: str, /, **metadata: object) -> None:
        super().__init__(message)
        self.metadata: dict[str, str] = {key: str(value) for key, value in metadata.items()}
